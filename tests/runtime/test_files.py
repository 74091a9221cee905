"""Files are written as a whole or not at all; locks keep others out and are free as soon as their block ends."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.runtime.files import file_sha256, lock, lock_file, lock_shared, sha256, write_atomic, written_aside


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


@pytest.mark.parametrize("alone", [False, True])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(alone: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def fail() -> None:
        with written_aside(path, alone=alone) as aside:
            aside.write_text("half of the n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
    with written_aside(path, alone=alone) as aside:
        assert (aside.name == ".x.json.tmp") == alone
        aside.write_text("new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


def test_a_lock_waits_and_removes_what_killed_writers_have_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def wait() -> None:
        with lock(tmp_path, wait=True):
            order.append("second")

    with lock(tmp_path):
        (tmp_path / ".x.json.12ab.tmp").touch()
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert f"waiting for the process that writes to {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_s_file_can_be_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks for both: a shared lock needs a file that can be read, an exclusive one a file that can be written."""
    modes: list[str] = []
    opened = Path.open

    def remember(self: Path, mode: str = "r", *arguments: object) -> object:
        modes.append(mode)
        return opened(self, mode, *arguments)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(Path, "open", remember)
    for shared in (False, True):
        with lock_file(tmp_path / "lock", "busy", shared=shared):
            pass
    assert modes == ["a+", "a+"]


def test_digests_are_those_of_hashlib(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("grün".encode())
    expected = hashlib.sha256("grün".encode()).hexdigest()
    assert expected == sha256("grün") == sha256("grün".encode()) == file_sha256(tmp_path / "x")
