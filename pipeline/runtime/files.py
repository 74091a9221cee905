"""Files and folders: canonical JSON, SHA-256, files that are written as a whole, locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def canonical_json(value: Any) -> str:
    """A JSON value in its only spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON, as 64 hexadecimal digits."""
    return sha256(canonical_json(value))


def sha256(data: bytes | memoryview | str) -> str:
    """SHA-256 of bytes, or of a text's UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file as a whole: whenever the process is killed, a reader sees the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def written_aside(path: Path, alone: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`; what is written there becomes `path` when the block ends without an error.

    Both the file and its new name are on disk then (fsync). After an error nothing is left.

    Args:
        path: the file to write.
        alone: no other process writes it, since the caller holds a lock: the temporary file then has the same name each
            time, and what a killed process has left there is overwritten.
    """
    mark = "" if alone else f".{secrets.token_hex(4)}"  # no process id: those repeat on machines that share a disk
    aside = path.with_name(f".{path.name}{mark}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make new names inside a folder survive a power cut (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes to a folder. The folder is made if needed; a killed process frees its lock.

    Args:
        folder: the folder to hold.
        wait: wait for another process that holds it, instead of raising.

    Raises:
        ValueError: another process holds the folder, and `wait` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / ".lock", f"another process is writing to {folder}; wait until it has ended", wait=wait):
        for stale in folder.glob(".*.tmp"):  # of writers that were killed
            stale.unlink()
        yield


@contextmanager
def lock_shared(folder: Path) -> Iterator[None]:
    """Write to a folder that exists beside other processes that also use `lock_shared`.

    Raises:
        ValueError: a process holds the folder with `lock`.
    """
    with lock_file(folder / ".lock", f"another process is writing to {folder}; wait until it has ended", shared=True):
        yield


@contextmanager
def lock_file(path: Path, busy: str, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold a lock that lies in a file; the system frees it when the process ends, however it ends.

    Args:
        path: the file, made if needed; nothing is written to it.
        busy: message of the `ValueError` when another process holds the lock.
        wait: wait for the other process instead of raising.
        shared: others may hold it at the same time if they ask for it in the same way.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("a") as file:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise ValueError(busy) from error
            logger.info("waiting for the process that writes to %s", path.parent)
            fcntl.flock(file, mode)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: a forked process may have the same file open


@contextmanager
def label_os_errors(path: Path) -> Iterator[None]:
    """Give an `OSError` raised inside the block this path, unless it names one already: a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
