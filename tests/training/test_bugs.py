"""A bug in a method is no bad input: its traceback is kept, and the command exits with 1."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.command_line import run
from helpers.tiny_heads import caches_by_key, extract_tokens

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError, describe_error, is_bug, is_out_of_memory, note_traceback_file, traceback_file
from pipeline.training.features import open_features

PLUGIN = '''
"""A linear head with bugs of our own kind, and other failures."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn
from pipeline.nn.method import Method
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import Settings
from pipeline.nn.losses import classification_loss


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    fault: Annotated[
        Literal["none", "zip", "unpack", "shape", "build", "user", "gpu", "cpu", "host"], "what goes wrong"
    ] = "none"


class Faulty(Method):
    """A linear head with a fault."""

    Config = Config
    needs = ("image", "label")

    def __init__(self, config, shapes):
        super().__init__(config, shapes)
        self.fault = config.fault
        if self.fault == "build":
            raise ValueError("a mistake in the building")
        (width,), (classes,) = shapes["image"], shapes["classes"]
        self.classifier = nn.Linear(width, classes)

    def loss(self, batch, phase):
        logits = self.classifier(batch["image"])
        if self.fault == "zip":
            list(zip(batch["image"], batch["label"][:-1], strict=True))
        elif self.fault == "unpack":
            first, second = logits.shape[:1]
        elif self.fault == "shape":
            logits = logits @ logits
        elif self.fault == "user":
            raise UserError("a setting of the user is wrong; set another")
        elif self.fault == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        elif self.fault == "cpu":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        elif self.fault == "host":
            raise MemoryError
        return {"loss": classification_loss(logits, batch["label"], "softmax_kl")}

    def predict(self, image, rng):
        return self.classifier(image)

    def feature(self, image, rng):
        return image
'''
MESSAGES = {  # patterns of the error of each bug
    "zip": r"ValueError: zip\(\) argument 2 is shorter than argument 1",
    "unpack": r"ValueError: not enough values to unpack \(expected 2, got 1\)",
    "shape": r"RuntimeError: (mm: )?mat1 and mat2 shapes cannot be multiplied",
    "build": r"ValueError: a mistake in the building",
}


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[Path]:
    """The file of the plug-in `faulty`, loaded."""
    file = tmp_path / "faulty.py"
    file.write_text(PLUGIN)
    plugins.load_file(file)
    yield file
    plugins.forget_file(file)


def arguments(command: str, home: Path, *others: str) -> list[str]:
    """Return a command that trains `faulty` on the tiny dataset."""
    caches = caches_by_key(home)
    common = ["--dataset", "tiny", "--home", str(home), "--image", caches["image"], "--text", caches["text"]]
    return [command, "--method", "faulty", *common, "--train", "epochs=2", "--train", "batch_size=8", *others]


def error_files(home: Path) -> list[Path]:
    return sorted(home.glob("runs/tiny/*/*/error.txt"))


@pytest.mark.parametrize("fault", MESSAGES)
def test_a_bug_while_a_head_is_trained_keeps_its_traceback(
    fault: str, home: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("train-head", home, "--set", f"fault={fault}"), monkeypatch) == 1
    (file,) = error_files(home)
    printed = capsys.readouterr().err
    line = next(line for line in printed.splitlines() if line.startswith("diffalign: "))
    assert "this is a bug in diffalign" in line
    assert line.endswith(f"in {file}")
    assert printed.index(line) < printed.index("Traceback (most recent call last)")
    for text in (printed, file.read_text()):
        assert re.search(MESSAGES[fault], text)
        assert 'faulty.py", line' in text  # the place of the bug


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("user", "a setting of the user is wrong"),
        ("gpu", "memory ran out"),
        ("cpu", "memory ran out"),
        ("host", "memory ran out (MemoryError)"),
    ],
)
def test_a_mistake_of_the_user_or_too_little_memory_is_one_line(
    fault: str, shown: str, home: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("train-head", home, "--set", f"fault={fault}"), monkeypatch) == 2
    printed = capsys.readouterr().err
    assert [line for line in printed.splitlines() if line.startswith("diffalign: ")] == [printed.splitlines()[-1]]
    assert shown in printed
    assert "Traceback" not in printed
    assert not error_files(home)


@pytest.mark.parametrize(
    "options",
    [
        ("--workers", "0"),
        pytest.param(("--workers", "2"), marks=pytest.mark.slow),
        ("--workers", "0", "--strategy", "stacked"),
    ],
)
def test_a_grid_lists_the_cells_with_bugs_and_finishes_the_others(
    options: tuple[str, ...], home: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ["none", *MESSAGES, "user", "cpu"]
    given = ["--grid", f"fault={','.join(faults)}", "--grid", "lr=1e-3,1e-2", "--seeds", "0", *options, "--json", "--no-test"]
    assert run(arguments("grid", home, *given), monkeypatch) == 1
    printed = capsys.readouterr()
    assert "diffalign: 12 of 14 runs failed" in printed.err
    assert "please report the bugs (8 of these runs)" in printed.err
    shown = json.loads(printed.out)
    rows = pd.read_csv(Path(shown["grid"]) / "cells.csv").set_index("fault")
    assert {fault: set(rows["state"][fault]) for fault in faults} == {
        fault: {"done" if fault == "none" else "failed"} for fault in faults
    }
    files = []
    for fault, message in MESSAGES.items():
        for reason, folder in rows.loc[fault, ["reason", "run"]].to_numpy():
            file = home / folder / "error.txt"
            assert re.match(message, reason)
            assert reason.endswith(f"a bug, its traceback is in {file}")
            assert 'faulty.py", line' in file.read_text()
            assert re.search(message, file.read_text())
            files.append(file)
    assert error_files(home) == sorted(files)
    assert all("memory ran out" in reason for reason in rows["reason"]["cpu"])
    assert shown["winner"]["cell"]["fault"] == "none"


def test_a_grid_whose_cells_fail_by_mistakes_of_users_exits_with_2(
    home: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("grid", home, "--grid", "fault=none,user,cpu", "--seeds", "0", "--workers", "0"), monkeypatch) == 2
    printed = capsys.readouterr().err
    assert "diffalign: 2 of 3 runs failed" in printed
    assert "bug" not in printed
    assert not error_files(home)


def test_a_grid_lists_a_bug_in_the_evaluation_of_its_winner(
    home: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments("grid", home, "--grid", "fault=none", "--seeds", "0", "--workers", "0")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.studies.search_worker.evaluate", lambda *_: [][0])
        assert run(given, patch) == 1
    assert "not evaluated on the test split: IndexError: list index out of range; a bug" in capsys.readouterr().err
    assert len(error_files(home)) == 1
    assert run(given, monkeypatch) == 0
    assert not error_files(home)


def test_the_traceback_is_removed_when_a_later_attempt_finishes(
    home: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = sys.modules["diffalign_plugin_faulty"]
    with monkeypatch.context() as patch:
        patch.setattr(module.Faulty, "loss", lambda self, batch, phase: {}["loss"])
        assert run(arguments("train-head", home), patch) == 1
    (file,) = error_files(home)
    assert "KeyError: 'loss'" in file.read_text()
    assert not (file.parent / "done").exists()
    assert run(arguments("train-head", home), monkeypatch) == 0
    assert (file.parent / "done").is_file()
    assert not error_files(home)


def test_an_interruption_leaves_no_traceback(home: Path, faulty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["diffalign_plugin_faulty"].Faulty, "loss", interrupt)
    assert run(arguments("train-head", home), monkeypatch) == 130
    assert not error_files(home)


def test_which_errors_are_bugs() -> None:
    bugs = [ValueError("x"), RuntimeError("mat1 and mat2 shapes"), KeyError("x"), AssertionError()]
    no_bugs = [UserError("x"), OSError(28, "full"), KeyboardInterrupt()]
    lacks = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] not enough memory: you")]
    assert all(is_bug(error) and not is_out_of_memory(error) for error in bugs)
    assert not any(is_bug(error) or is_out_of_memory(error) for error in no_bugs)
    assert all(is_out_of_memory(error) and not is_bug(error) for error in lacks)
    assert describe_error(ValueError("one\ntwo")) == "ValueError: one"
    assert describe_error(ValueError()) == "ValueError"
    error = ValueError()
    assert traceback_file(error) == ""
    note_traceback_file(error, Path("error.txt"))
    assert traceback_file(error) == "error.txt"


def test_a_cache_of_tokens_is_refused_with_the_remedy(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = caches_by_key(home)["text"]
    path = extract_tokens(home)
    caches = {"image": path.name, "text": text}
    with pytest.raises(UserError, match="holds tokens, 8×4 of each item, and seda wants one vector of each: extract without"):
        open_features(home, "tiny", "seda", caches)
    given = ["--dataset", "tiny", "--home", str(home), "--image", caches["image"], "--text", caches["text"]]
    for command in (["train-head", "--method", "baseline"], ["grid", "--method", "baseline", "--grid", "lr=1e-3"]):
        assert run([*command, *given], monkeypatch) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert str(path) in printed
        assert "--set tokens=true" in printed
    monkeypatch.setattr(plugins.get("methods", "baseline"), "reads_tokens", True)
    assert open_features(home, "tiny", "baseline", caches).shapes["image"] == (8, 4)
