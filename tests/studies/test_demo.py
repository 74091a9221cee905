"""Tests of the demo's settings, and of the commands in the README."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from pipeline.commands import app as cli
from pipeline.runtime import plugins
from pipeline.runtime.settings import flatten, name_settings
from pipeline.studies.demo import DEMO_METHODS, EXTRA_OVERRIDES, demo_settings, extra_overrides
from pipeline.studies.demo_joint import JOINT_DEMO_DATASET, JOINT_DEMO_METHODS
from pipeline.training.config import TrainConfig
from pipeline.training.heads import resolve_head_settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]


@pytest.mark.parametrize("method", DEMO_METHODS)
def test_every_method_of_the_demo_has_settings(method: str) -> None:
    settings, training = demo_settings(method)
    assert training.epochs > 0
    for overrides in EXTRA_OVERRIDES.get(method, ()):
        named = name_settings(type(settings), overrides)
        assert set(named) <= set(plugins.get("methods", method).prediction)
        is_new = all(flatten(asdict(settings))[name] != value for name, value in named.items())
        assert (overrides in extra_overrides(method)) == is_new
    assert training == TrainConfig(lr=1e-3)


@pytest.mark.parametrize("method", JOINT_DEMO_METHODS)
def test_every_method_of_the_joint_demo_has_tuned_settings(method: str) -> None:
    _, training = resolve_head_settings(JOINT_DEMO_DATASET, method, "tuned", {}, {})
    assert training.epochs > 0


def test_the_readme_is_finished() -> None:
    assert not re.findall(r"@[A-Z_]+@", README)
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(
    "target", ["setup", "demo", "test", "check", "extract", "train-head", "grid", "finetune", "demo-joint", "report", "bench"]
)
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_make_commands_of_the_readme_exist(command: str) -> None:
    subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, check=True)


def write_photos(folder: Path) -> None:
    """Write forty plain images of two classes, and a table with their paths, classes and captions."""
    folder.mkdir()
    lines = ["path,kind,caption"]
    for number in range(40):
        kind = ("light", "dark")[number % 2]
        Image.new("RGB", (32, 32), (200 - 150 * (number % 2), number, 90)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{kind},a {kind} picture number {number}")
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every `diffalign` line in order, in one folder; a glob stands for the first file that it matches.

    Heads are trained for one epoch, and grids in this process: others would take longer to start than to train.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFALIGN_HOME", raising=False)
    write_photos(tmp_path / "my_photos")
    commands = [shlex.split(command) for command in COMMANDS if command.startswith("diffalign ")]
    assert {words[1] for words in commands} >= {
        "prepare",
        "extract",
        "train-head",
        "grid",
        "finetune",
        "evaluate",
        "report",
        "methods",
        "cache",
        "doctor",
    }
    for words in commands:
        arguments = [str(next(tmp_path.glob(word))) if "*" in word else word for word in words[1:]]
        if words[1] in ("train-head", "grid", "finetune", "ablate"):
            arguments += ["--train", "epochs=1"]
        if words[1] in ("grid", "tune"):
            arguments += ["--workers", "0"]
        monkeypatch.setattr(sys, "argv", ["diffalign", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert exit_info.value.code == 0, words
