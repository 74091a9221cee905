"""Runs the command line in the process of the tests."""

from __future__ import annotations

import sys

import pytest

from pipeline.commands import app as cli


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `diffalign` with these arguments in this process, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["diffalign", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code
