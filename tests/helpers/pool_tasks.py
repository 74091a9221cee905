"""Jobs for worker processes; this module imports nothing heavy, so that a new process starts at once."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

from pipeline.runtime.errors import UserError


def square(number: int) -> tuple[int, int, str]:
    """Return the square, the process id, and the number of threads."""
    if number < 0:
        raise UserError(f"{number} has no square here")
    return number**2, os.getpid(), os.environ["OMP_NUM_THREADS"]


def kill_first_attempt(marker: Path) -> int:
    """Return the process id; the first process that tries is killed."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def logging_level(name: str) -> tuple[int, str]:
    """Return the level of a logger, and the environment variable that cuBLAS reads."""
    return logging.getLogger(name).level, os.environ["CUBLAS_WORKSPACE_CONFIG"]
