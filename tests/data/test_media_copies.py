"""Single copies of media in an object store, with bytes in memory in its place: which stay, and what a failure leaves."""

from __future__ import annotations

import errno
import os
from collections import deque
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data import media_copies, remote_tars
from pipeline.data.media_copies import single_copy
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process has its copies: none so far. Every object consists of zeros."""
    monkeypatch.setattr(media_copies, "_folder", lambda: SimpleNamespace(name=str(tmp_path)))
    monkeypatch.setattr(media_copies, "_single_copies", deque())
    monkeypatch.setattr(media_copies, "_failed_at", {})
    monkeypatch.setattr(remote_tars, "read_unchanged", lambda place, start, num_bytes, stamp: memoryview(bytes(num_bytes)))
    return tmp_path


def copy(num_bytes: int, bucket: str = "s3://bucket") -> Path:
    manifest: Any = SimpleNamespace(media_root=Address(bucket, ""), media_stamp=lambda tar: "stamp", prepare_command="prepare")
    return single_copy(manifest, PurePosixPath(f"a.tar/0+{num_bytes}.png"))


@pytest.mark.parametrize(
    ("num_cores", "num_bytes", "num_kept"),
    [(1, 10, 4), (64, 10, 4), (64, 40, 4), (2, 40, 3), (1, 200, 2)],  # at most 4, and 100 bytes, but one more than cores
)
def test_the_last_copies_stay(
    num_cores: int, num_bytes: int, num_kept: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setattr(media_copies, "MAX_SINGLE_COPIES", 4)
    monkeypatch.setattr(media_copies, "MAX_SINGLE_BYTES", 100)
    copies = [copy(num_bytes) for _ in range(8)]
    assert [path for path in copies if path.exists()] == copies[-num_kept:]
    assert {path.parent for path in copies[-num_kept:]} == set(folder.iterdir())
    assert copies[-1].read_bytes() == bytes(num_bytes)


@pytest.mark.parametrize(
    ("error", "takes_long", "asked_again"),
    [
        (TimeoutError(errno.ETIMEDOUT, "does not answer", "s3://bucket/a.tar"), True, False),
        (OSError(errno.EIO, "needs credentials", "s3://bucket/a.tar"), True, False),
        (OSError(errno.EIO, "refuses access to this one", "s3://bucket/a.tar"), False, True),
        (OSError(errno.EIO, "a bad block", "/tmp/a.png"), True, True),
        (OSError(errno.ESTALE, "it was changed", "s3://bucket/a.tar"), True, True),
    ],
)
def test_a_store_that_fails_is_asked_once(
    error: OSError, takes_long: bool, asked_again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or each picture of a report would wait for it; another bucket, and a later time, are no matter of that."""
    asked: list[str] = []
    monkeypatch.setattr(media_copies, "LONG_SECONDS", 0.0 if takes_long else 60.0)

    def fail(place: Address, *_: object) -> memoryview:
        asked.append(place.bucket)
        raise error

    monkeypatch.setattr(remote_tars, "read_unchanged", fail)
    for message in (None, None if asked_again else "s3://bucket could not be read a moment ago"):
        with pytest.raises(UserError, match=message):
            copy(1)
    assert len(asked) == 1 + asked_again
    with pytest.raises(UserError):
        copy(1, "s3://other")
    assert asked[-1] == "s3://other"
    monkeypatch.setattr(media_copies, "RETRY_SECONDS", 0.0)
    with pytest.raises(UserError):
        copy(1)
    assert asked[-1] == "s3://bucket"
    assert list(folder.iterdir()) == []
