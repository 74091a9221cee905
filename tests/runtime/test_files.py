"""The lock of a folder is free as soon as its block ends, even if a forked process has the same file open."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from pipeline.runtime.files import lock, lock_shared


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    for held in (lock, lock_shared):
        with lock(tmp_path):
            pass
        with held(tmp_path):
            child = os.fork()
            if not child:
                signal.pause()
        try:
            with lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
