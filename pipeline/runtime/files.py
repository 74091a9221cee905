"""Files and folders: canonical JSON, fingerprints, whole-file writes and locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def write_atomic(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file so that a reader sees the old bytes or the new ones, whatever is killed: aside, fsync, rename, fsync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # machines that share a disk share process ids
    try:
        with aside.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for writing; while another process does, `wait`, or `ValueError`. The kernel frees it if we are killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if not wait:
                raise ValueError(f"another process is writing to {folder}; wait until it has ended") from error
            print(f"waiting for the process that writes to {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            for stale in folder.glob(".*.tmp"):  # of writers that were killed
                stale.unlink()
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # now: a forked process may have the same file open, and live on


@contextmanager
def together(folder: Path) -> Iterator[None]:
    """Hold a folder for writing, like others that do at the same time; `ValueError` while a process has it `runs.lock`ed."""
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {folder}; wait until it has ended") from error
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of what is done inside, such as a full disk, names a file, or else this folder."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:  # the system does not say which file it could not write
            error.filename = str(path)
        raise
