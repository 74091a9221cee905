"""Tests of what a command does before it works: its names are checked in a second of CPU, and old forms are understood."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import joint_home
from helpers.command_line import run
from helpers.tiny_grids import tiny_grid
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings

from pipeline.commands.finetune import finetune
from pipeline.data.manifest import Manifest
from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.studies.search import run_grid

ROOT = Path(__file__).parents[2]
NAMES_ONLY_SECONDS = 2.0  # it takes 0.2 to 0.5; importing torch alone takes 2 to 3
METHODS = [name for name in plugins.names("methods") if not plugins.is_external("methods", name)]
ONE_METHOD_SECONDS = 6.0  # it takes 3; with torch._dynamo it takes 6 to 9


def cpu_seconds(arguments: list[str], tmp_path: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run `python -m pipeline` with these arguments; return its CPU seconds, in user and system mode, and the process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DIFFALIGN_HOME": str(tmp_path)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--version"], 0, "diffalign "),
        (["--help"], 0, "train-head"),
        (["finetune", "-h"], 0, "--unfreeze"),
        (["methods"], 0, "seda"),
        (["datasets"], 0, "openmoji"),
        (["encoders"], 0, "timm"),
        (["train-head", "--method", "sedaa"], 2, f"choose one of: {', '.join(METHODS)} ("),
        (["train-head", "openmojj", "--method", "seda"], 2, "did you mean 'openmoji'?"),
        (["train-head", "--method", "seda", "--preset", "tunned"], 2, "did you mean 'tuned'?"),
        (["train-head", "--method", "seda", "--seeds", "0;1"], 2, "--seeds takes numbers"),
        (["train-head", "--method", "seda", "--train", "epoch=3"], 2, "did you mean 'epochs'?"),
        (["train-head", "--method", "seda", "--train", "epochs=0"], 2, "training setting 'epochs' must be positive"),
        (["grid", "--method", "sedaa"], 2, "did you mean 'seda'?"),
        (["grid", "--grid-file", "nowhere.yaml"], 2, "--grid-file: nowhere.yaml is no file"),
        (["tune", "-h"], 0, "--points"),
        (["tune", "openmoji", "--methods", "ema,sedaa"], 2, "did you mean 'seda'?"),
        (["tune", "openmoji", "--space", "nowhere.yaml"], 2, "--space: nowhere.yaml is no file"),
        (["extract", "openmoji", "--encoder", "tim"], 2, "did you mean 'timm'?"),
        (["prepare", "openmojj"], 2, "did you mean 'openmoji'?"),
        (["report", "openmojj"], 2, "did you mean 'openmoji'?"),
        (["evaluate", "nowhere"], 2, "nowhere is not a run"),
        (["finetune", "--init", "nowhere"], 2, "nowhere is not a run"),
        (["reproduce", "--list"], 0, "seda-table3: SeDA, Table 3"),
        (["reproduce", "seda-tabel2"], 2, "did you mean 'seda-table2'?"),
        (["reproduce", "seda-table2", "openmojj"], 2, "did you mean 'openmoji'?"),
        (["ablate", "strategy", "--method", "sedaa"], 2, "did you mean 'seda'?"),
        (["ablate", "text", "--method", "sedaa"], 2, "did you mean 'seda'?"),
        (["ablate", "data", "--fractions", "half"], 2, "--fractions takes numbers such as 0.25,0.5,1, not 'half'"),
    ],
)  # fmt: skip
def test_names_are_checked_before_torch_is_imported(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    seconds, done = cpu_seconds(arguments, tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert seconds < NAMES_ONLY_SECONDS


def test_the_settings_of_a_method_come_without_the_compiler(tmp_path: Path) -> None:
    seconds, done = cpu_seconds(["methods", "seda"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert seconds < ONE_METHOD_SECONDS
    program = "import sys, pipeline.methods.seda; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_a_close_name_is_suggested_behind_the_choices() -> None:
    assert str(unknown_choice("SEDA", "unknown method 'SEDA'", ["ema", "seda"])) == (
        "unknown method 'SEDA'; choose one of: ema, seda; did you mean 'seda'?"
    )
    assert str(unknown_choice("xyz", "no", ["ema"], ["T (= num_steps)"], "or a file")) == (
        "no; choose one of: ema, T (= num_steps) (or a file)"
    )


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def test_a_dataset_is_an_argument_or_an_option(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = caches_by_key(home)
    common = [
        "--method",
        "baseline",
        "--home",
        str(home),
        "--image",
        caches["image"],
        "--text",
        caches["text"],
        "--json",
        "--train=epochs=1",
    ]
    rows = []
    for dataset in (["tiny"], ["--dataset", "tiny"], ["tiny", "--dataset", "tiny"]):
        assert run(["train-head", *dataset, *common], monkeypatch) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert rows[0] == rows[1] == rows[2]
    for command in (["report"], ["doctor"], ["grid"], ["extract"], ["prepare"], ["fetch"], ["ablate", "strategy"]):
        assert run([*command, "tiny", "--dataset", "openmoji"], monkeypatch) == 2
        assert "the dataset is given twice: tiny as argument, and openmoji by --dataset" in capsys.readouterr().err
    assert run(["report", "--home", str(home)], monkeypatch) == 2
    assert "which dataset?" in capsys.readouterr().err
    assert run(["report", "--dataset", "tiny", "--home", str(home / "none")], monkeypatch) == 2
    assert "unknown dataset 'tiny'" in capsys.readouterr().err


def test_a_cell_of_a_grid_and_train_head_are_one_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With equal settings and no word about precision, both commands share a folder, and the second one trains nothing."""
    caches = caches_by_key(home)
    small = [f"--set={key}={value}" for key, value in small_settings("ema").items()]
    common = [*small, *(f"--train={key}={value}" for key, value in FAST_TRAINING.items()), "--method", "ema"]
    common += ["--home", str(home), "--image", caches["image"], "--text", caches["text"], "--seeds", "0", "--json"]
    assert run(["grid", "tiny", "--grid", "lr=1e-3,1e-2", "--workers", "0", *common], monkeypatch) == 0
    capsys.readouterr()
    runs = {path: path.stat().st_mtime_ns for path in home.glob("runs/tiny/*/seed0/checkpoint.safetensors")}
    assert len(runs) == 2
    for lr in ("1e-3", "1e-2"):
        assert run(["train-head", "tiny", "--train", f"lr={lr}", *common], monkeypatch) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert Path(row["run"]) / "checkpoint.safetensors" in runs
    assert {path: path.stat().st_mtime_ns for path in home.glob("runs/tiny/*/seed0/checkpoint.safetensors")} == runs


def test_precision_of_a_grid_is_that_of_train_head_unless_it_is_given(home: Path) -> None:
    grid = tiny_grid(home, pairs=("lr=1e-3",), training={"precision": "mixed"})
    assert grid.cells[0].training.precision == "mixed"
    assert not run_grid(tiny_grid(home, "baseline", ("lr=1e-3",)), workers=0, read_test=False).failed
    with pytest.raises(UserError, match="'precision' is given twice"):
        tiny_grid(home, pairs=("lr=1e-3",), training={"precision": "mixed"}, precision="float32")


@pytest.fixture(scope="module")
def joint(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a home in which a head for joint training can be trained."""
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("startup") / "home")


def test_the_old_form_of_unfreeze_works_and_says_what_to_write(
    joint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init = joint_home.train_small_head(joint, "baseline", epochs=1)
    common = ["finetune", "--init", str(init.path), "--home", str(joint), "--workers", "0", "--json"]
    common += ["--train", "epochs=1", "--train", "batch_size=8"]
    assert run([*common, "--train", "image"], monkeypatch) == 0
    old = capsys.readouterr()
    assert "warning: --train image is the old form" in old.err
    assert "write --unfreeze image" in old.err
    assert run([*common, "--unfreeze", "image"], monkeypatch) == 0
    new = capsys.readouterr()
    assert new.out == old.out
    assert "old form" not in new.err
    assert run([*common, "--train", "text", "--unfreeze", "image"], monkeypatch) == 2
    assert "--unfreeze takes one of image, text, both and last:K, not image and text" in capsys.readouterr().err
    with pytest.raises(UserError, match="--unfreeze takes image, text, both or last:K, not 'everything'"):
        finetune(init=str(init.path), home=joint, unfreeze="everything")


def test_the_shell_completes_commands() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_DIFFALIGN_COMPLETE": "complete_bash"}
    program = "import sys; sys.argv = ['diffalign']; from pipeline.commands.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, check=False, env={**environment, "COMP_WORDS": "diffalign train-", "COMP_CWORD": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["train-head"], done.stderr
