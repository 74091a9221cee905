"""Files and folders: canonical JSON, SHA-256, atomic writes, locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline.runtime.errors import UserError

logger = logging.getLogger(__name__)


def canonical_json(value: Any) -> str:
    """Return the canonical JSON text of a value: sorted keys, no spaces, no NaN. Equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a value, as 64 hexadecimal digits."""
    return sha256(canonical_json(value))


def sha256(data: bytes | memoryview | str) -> str:
    """Return the SHA-256 of bytes, or of a text in UTF-8, as 64 hexadecimal digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the content of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes | memoryview | str | Iterator[bytes | memoryview]) -> None:
    """Write a whole file at once: a reader sees the old content or the new content, even if this process is killed.

    Data that come in pieces are never together in memory.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, aside.open("wb") as file:
        if isinstance(data, str):
            file.write(data.encode())
        else:
            file.writelines([data] if isinstance(data, bytes | memoryview) else data)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append lines to a text file, which need not exist, and wait until they are on disk; none: nothing is written."""
    if not lines:
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; none if there is no such file."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


@contextmanager
def written_aside(path: Path, alone: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there becomes `path` when the block ends without an error.

    The file and its new name are then safely on disk (fsync). After an error, the temporary file is deleted.

    Args:
        path: the file to write.
        alone: the caller holds a lock, so no other process writes this file. The temporary file then has the same name
            each time, and overwrites one that a killed process has left.
    """
    # random, not the process id: two machines that share a disk may use the same id
    mark = "" if alone else f".{secrets.token_hex(4)}"
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
    """Make new file names in a folder survive a power cut (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Inside the block, be the only process that writes to a folder. The system frees the lock of a killed process.

    Args:
        folder: the folder to lock; it is created if needed.
        wait: wait for another process that holds the lock, instead of raising.

    Raises:
        UserError: another process holds the lock, and `wait` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with lock_file(folder / ".lock", f"another process is writing to {folder}; wait until it has ended", wait=wait):
        for stale in folder.glob(".*.tmp"):  # left by processes that were killed
            stale.unlink()
        yield


@contextmanager
def lock_shared(folder: Path) -> Iterator[None]:
    """Inside the block, write to an existing folder; other processes that use `lock_shared` may do so at the same time.

    Raises:
        UserError: another process holds the folder with `lock`.
    """
    with lock_file(folder / ".lock", f"another process is writing to {folder}; wait until it has ended", shared=True):
        yield


@contextmanager
def lock_file(path: Path, busy: str, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Inside the block, hold the lock of a file. The system frees it when the process ends for any reason.

    Args:
        path: the file; it is created if needed, and nothing is written to it.
        busy: message of the `UserError` when another process holds the lock.
        wait: wait for the other process instead of raising.
        shared: other processes may hold the lock at the same time, if they also ask for a shared lock.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with _open_locked(path, mode, busy, wait) as file:
        logger.debug("locked %s%s", path, " together with others" if shared else "")
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing the file is not enough: a forked process may still have it open


def _open_locked(path: Path, mode: int, busy: str, wait: bool) -> IO[str]:
    """Open a file and lock it; if its folder was removed in the meantime, so that nobody else would see the lock, again."""
    while True:
        file = path.open("a+")  # NFS wants a readable file for a shared lock, a writable one for an exclusive lock
        try:
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not wait:
                    raise UserError(busy) from error
                logger.info("waiting for the process that writes to %s", path.parent)
                fcntl.flock(file, mode)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def label_os_errors(path: object) -> Iterator[None]:
    """Add this path to an `OSError` that is raised inside the block without a file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(path)
        raise
