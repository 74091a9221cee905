"""The templates of examples/slurm/ run with stand-ins for Slurm's commands: two "machines" that are processes of this one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import joint_home
from helpers.fault_cases import SHARD_ROWS, TEXT_SETTINGS, extract_texts, write_texts
from helpers.feature_caches import assert_same_cache

from pipeline.cache import find_caches
from pipeline.data.manifest import Manifest

TEMPLATES = Path(__file__).parents[2] / "examples" / "slurm"
NUM_TASKS = 2
STAND_INS = {
    # Runs the command once for each task, as one process of each, and fails if one fails.
    "srun": """#!/bin/bash
pids=()
trap 'kill "${pids[@]}" 2>/dev/null; exit 143' TERM
for task in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$task "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
""",
    "scontrol": "#!/bin/bash\nprintf '127.0.0.1\\n127.0.0.1\\n'\n",
    "hostname": "#!/bin/bash\necho 127.0.0.1\n",
    "diffalign": f'#!/bin/bash\nexec "{sys.executable}" -m pipeline "$@"\n',
    "python": f'#!/bin/bash\nexec "{sys.executable}" "$@"\n',
    "torchrun": f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
    "dask": f'#!/bin/bash\nexec "{sys.executable}" -m dask "$@"\n',
}


def submit(template: str, arguments: list[str], home: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a template as `sbatch` does on a cluster of two machines with one processor each."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_NTASKS": str(NUM_TASKS)}
    slurm |= {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    environment = {**os.environ, **slurm, "DIFFALIGN_HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(TEMPLATES / template), *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip


@pytest.mark.slow
def test_the_template_of_extraction_makes_the_cache_of_one_process(tmp_path: Path) -> None:
    """Three shards, shared by two workers; the cache is that of an extraction without dask, byte for byte."""
    write_texts(tmp_path / "home", 60)
    settings = [f"--set={key}={value}" for key, value in TEXT_SETTINGS.items()]
    arguments = ["texts", "--encoder=random_projection", *settings, f"--shard-rows={SHARD_ROWS}"]
    done = submit("extract.sbatch", arguments, tmp_path / "home", tmp_path)
    assert done.returncode == 0, done.stderr
    (made,) = find_caches(tmp_path / "home", "texts")
    assert len(list((made / "commits").glob("0*.json"))) == 3
    assert_same_cache(made, extract_texts(write_texts(tmp_path / "alone", 60), tmp_path / "alone"))


@pytest.mark.exhaustive
def test_the_template_of_joint_training_trains_with_two_processes(tiny_manifest: Manifest, tmp_path: Path) -> None:
    home = joint_home.make_home(tiny_manifest, tmp_path / "home")
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    arguments = ["--init", str(init.path), "--train=epochs=1", "--train=batch_size=8", "--workers=0", "--json"]
    done = submit("finetune.sbatch", arguments, home, tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)  # one process prints
    assert "validation" in outcome["verdict"]
    assert len(pd.read_csv(Path(outcome["run"]) / "history.csv")) >= 1


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.glob("*.sbatch")))
def test_a_template_asks_for_its_home(template: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DIFFALIGN_HOME"}
    command = ["bash", str(TEMPLATES / template)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DIFFALIGN_HOME: set it to a folder that all machines see" in done.stderr
