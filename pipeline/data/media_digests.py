"""Digests of the contents of media files. They are remembered in the home, so that a file that has not changed is read once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from pipeline.data.tar_members import find_member, read_member
from pipeline.runtime.errors import UserError

STORE_NAME = "media.sqlite"  # in the home: path -> stamp and digest of every media file that was read
NO_DIGEST = bytes(8)  # of a file that cannot be read
SETTLING_NS = 2 * 10**9  # a file that has just changed may change again within one tick of its disk's clock
STORE_TIMEOUT = 60.0  # seconds to wait for other processes that write to the store


class _Entry(NamedTuple):
    path: bytes
    stamp: str  # size, time of the content and time of the inode in ns; a program can set back the former time, not the latter
    digest: bytes


def media_digests(files: Sequence[str], home: Path) -> list[bytes]:
    """Return the XXH3 digest (64 bits) of the contents of every file.

    A digest is taken from <home>/media.sqlite while the file has the same size and times; all others are computed by several
    threads, and remembered there. Any number of processes may do so at the same time. Without a store that can be read and
    written, every file is read.

    Args:
        files: absolute paths; a path may occur several times.
        home: folder of all artifacts.

    Returns:
        8 bytes per file; zeros for "", and for what is no regular file or cannot be read.
    """
    paths = [os.fsencode(file) for file in files]
    wanted = [path for path in dict.fromkeys(paths) if path]
    store = home / STORE_NAME
    remembered = _recall(store, wanted)
    num_threads = min(os.cpu_count() or 1, max(1, len(wanted)))
    now = time.time_ns()
    with ThreadPoolExecutor(num_threads) as pool:
        parts = pool.map(lambda first: [_digest(path, remembered) for path in wanted[first::num_threads]], range(num_threads))
        entries = {entry.path: entry for part in parts for entry in part if entry}
    _remember(store, [entry for entry in entries.values() if entry != remembered.get(entry.path)], now)
    return [entries[path].digest if path in entries else NO_DIGEST for path in paths]


def read_digest(path: Path) -> bytes:
    """Return the digest of one file that belongs to no home; see `media_digests`."""
    entry = _digest(os.fsencode(path), {})
    return entry.digest if entry else NO_DIGEST


def _digest(path: bytes, remembered: Mapping[bytes, _Entry]) -> _Entry | None:
    """Return the entry of a regular file that can be read; it is read only when the remembered one has another stamp."""
    try:
        member = find_member(os.fsdecode(path))
        status = os.stat(member.tar if member else path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            return None
        stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
        known = remembered.get(path)
        if known and known.stamp == stamp:
            return known
        if member:
            return _Entry(path, stamp, xxhash.xxh3_64_digest(read_member(member)))
        with open(path, "rb", buffering=0) as file:
            return _Entry(path, stamp, hashlib.file_digest(file, xxhash.xxh3_64).digest())
    except (OSError, UserError):
        return None


def _is_settled(entry: _Entry, now: int) -> bool:
    return max(map(int, entry.stamp.split()[1:])) < now - SETTLING_NS


@contextmanager
def _open_store(store: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(store, timeout=STORE_TIMEOUT)) as connection, connection:
        columns = "path BLOB PRIMARY KEY, stamp TEXT NOT NULL, digest BLOB NOT NULL"
        connection.execute(f"CREATE TABLE IF NOT EXISTS digests ({columns}) WITHOUT ROWID")
        yield connection


def _recall(store: Path, paths: Sequence[bytes]) -> dict[bytes, _Entry]:
    """Return the remembered entries of these files; none if the store is missing or damaged."""
    query = "SELECT path, stamp, digest FROM digests WHERE path = ?"
    with suppress(sqlite3.Error):
        if store.is_file():
            with _open_store(store) as connection:
                rows = (connection.execute(query, (path,)).fetchone() for path in paths)
                return {row[0]: _Entry(*row) for row in rows if row}
    return {}


def _remember(store: Path, entries: Sequence[_Entry], now: int) -> None:
    """Add entries to the store. A damaged store is removed; one that cannot be written is left as it is.

    Args:
        store: the file of the store.
        entries: the new entries.
        now: the time before their files were read, in ns; what had changed just before is not remembered.
    """
    settled = [entry for entry in entries if _is_settled(entry, now)]
    if not settled:
        return
    try:
        with _open_store(store) as connection:
            connection.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", settled)
    except sqlite3.OperationalError:  # read-only, full, or locked for too long: the files are read again next time
        return
    except sqlite3.DatabaseError:
        store.unlink(missing_ok=True)
