"""Tests of the ways to run the program: from a source tree without installed metadata, and from a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from pipeline.runtime import version

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# What a Python without the metadata of the package does: nobody has installed diffalign.
HIDE_METADATA = """
import importlib.metadata
find = importlib.metadata.Distribution.from_name
def from_name(name):
    if name == "diffalign":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.Distribution.from_name = from_name
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of the source tree as an archive of the repository holds it."""
    for name in ("pipeline", "data_manifests"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


@pytest.fixture
def environment(source: Path, tmp_path: Path) -> dict[str, str]:
    """Return an environment in which Python imports the source tree and finds no metadata of it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE_METADATA)
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{source}"}


@pytest.mark.slow
def test_a_source_tree_runs_without_metadata(source: Path, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "pipeline"]
    for start in ([sys.executable, "-m", "pipeline"], [sys.executable, str(source / "cli.py")], torchrun):
        done = subprocess.run(
            [*start, "--version"], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path / "empty"
        )
        assert done.stdout.strip() == f"diffalign {VERSION}"
    doctor = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path / "empty",
    )  # fmt: skip
    assert f"ok   diffalign {VERSION}" in doctor.stdout
    assert "ok   torch " in doctor.stdout
    assert "Traceback" not in doctor.stderr
    (source / "pyproject.toml").unlink()
    program = "from pipeline.runtime.version import *; print(program_version(), program_requirements())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path / "empty"
    )
    assert done.stdout.split() == ["source", "[]"]


def test_requirements_of_the_source_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    def simple(requirements: list[str]) -> set[tuple[str, str]]:
        """Return names and markers; without the packages of developers, which an older environment may not know yet."""
        found = {(canonicalize_name(each.name), str(each.marker)) for each in map(Requirement, requirements)}
        return {(name, marker) for name, marker in found if "dev" not in marker}

    installed = simple(version.program_requirements())

    def hidden(name: str) -> list[str]:
        raise version.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(version.importlib.metadata, "requires", hidden)
    assert simple(version.program_requirements()) == installed


@pytest.mark.slow
def test_a_wheel_in_a_fresh_environment_trains_a_head(source: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheels = tmp_path / "wheels"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)], check=True)
    (wheel,) = wheels.glob("diffalign-*.whl")
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"pipeline", f"diffalign-{VERSION}.dist-info"}
    fresh, work = tmp_path / "fresh", tmp_path / "work"
    work.mkdir()
    venv.create(fresh, with_pip=False, symlinks=True)
    python = fresh / "bin" / "python"
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DIFFALIGN_HOME")}
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True, env=clean)
    libraries = sysconfig.get_paths(vars={"base": str(fresh), "platbase": str(fresh)})["purelib"]
    Path(libraries, "libraries.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # its .pth files are not followed

    def diffalign(*arguments: str) -> str:
        command = [str(fresh / "bin" / "diffalign"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean, cwd=work)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import pipeline; print(pipeline.__file__)"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True, env=clean, cwd=work)
    assert found.stdout.startswith(str(fresh))
    assert diffalign("--version") == f"diffalign {VERSION}\n"
    assert "openmoji" in diffalign("datasets")
    diffalign("prepare", "openmoji")
    diffalign("extract", "openmoji", "--encoder", "random_projection", "--set", "modality=image", "--quiet")
    trained = diffalign(
        "train-head", "openmoji", "--method", "baseline", "--image", "random_projection", "--train", "epochs=2", "--json"
    )
    assert '"acc1"' in trained
    assert len(list(work.glob("artifacts/runs/openmoji/baseline-*/seed0/done"))) == 1
