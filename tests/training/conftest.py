"""Fixtures of the training tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """A copy of the tiny home that a test may write to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))
