"""Messages and progress: lines on a file, in place on a terminal, nothing when it is quiet."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.runtime import logs
from pipeline.runtime.logs import ProgressBar, set_up_logging


class Terminal(io.StringIO):
    """A standard error that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def level_as_before() -> Iterator[None]:
    yield
    set_up_logging()


def lines_of(bar_options: dict[str, Any], steps: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a bar prints that makes these steps and shows a number with each."""
    with ProgressBar(total=steps, label="reading", **bar_options) as bar:
        for step in range(steps):
            bar.set_postfix_str(f"step {step}")
            bar.update()
    return capsys.readouterr().err.splitlines()


def test_a_short_bar_in_a_file_is_one_labelled_line(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines_of({}, 5, capsys)
    assert line.startswith("reading: 100%|")
    assert "5/5" in line


def test_a_long_bar_in_a_file_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SPARSE_SECONDS", 0.0)  # each of the two calls of a step prints one
    lines = lines_of({}, 5, capsys)
    assert len(lines) > 5
    assert "5/5" in lines[-1]
    assert all(line.startswith("reading: ") for line in lines)


@pytest.mark.parametrize("options", [{"leave": False}, {"show": False}, {"delay": 60.0}])
def test_bars_that_disappear_leave_no_line_in_a_file(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(options, 5, capsys) == []


def test_a_terminal_gets_the_bar_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar(range(3), label="reading") as bar:
        for _ in bar:
            logging.getLogger("pipeline.test").info("a message")
    assert terminal.getvalue().count("\r") > 3
    assert terminal.getvalue().count("a message\n") == 3


def test_quiet_shows_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(logging.WARNING)
    logger = logging.getLogger("pipeline.test")
    logger.info("not shown")
    logger.warning("look at %s", "this")
    assert lines_of({}, 3, capsys) == ["warning: look at this"]
    set_up_logging(logging.DEBUG)
    logger.debug("shown")
    assert capsys.readouterr().err == "shown\n"


def test_bars_in_one_another_leave_no_terminal_codes_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "SPARSE_SECONDS", 0.0)
    with ProgressBar(range(2), label="runs") as runs:
        for _ in runs:
            with ProgressBar(range(3), label="epochs", leave=False) as epochs:
                for _ in epochs:
                    pass
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("epochs: ") for line in lines)
    assert all(line.startswith(("runs: ", "epochs: ")) for line in lines)
    assert not any(character in line for line in lines for character in "\x1b\r")
