"""Digests of the contents of media files. They are remembered in the home, so that a file that has not changed is read once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from pipeline.data.remote_tars import read_pieces, stamps_of
from pipeline.data.tar_members import find_member, read_member
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import is_address
from pipeline.runtime.stores import file_stamp

STORE_NAME = "media.sqlite"  # in the home: path -> stamp and digest of every media file that was read
NO_DIGEST = bytes(8)  # of a file that cannot be read
SETTLING_NS = 2 * 10**9  # a file that has just changed may change again within one tick of its disk's clock
MAX_JUST_READ = 2**17  # digests of media in object stores that a process keeps until a shard is written
STORE_TIMEOUT = 60.0  # seconds to wait for other processes that write to the store


class _Entry(NamedTuple):
    path: bytes
    stamp: str  # see `Store.stamp`; of a member, that of its tar
    digest: bytes


_just_read: dict[bytes, _Entry] = {}  # of media in object stores, the oldest first
_JUST_READ = threading.Lock()


def note_digest(file: str, stamp: str, digest: bytes) -> None:
    """Remember the digest of a member of a tar in an object store in this process, for the next call of `media_digests`."""
    with _JUST_READ:
        _just_read[file.encode()] = _Entry(file.encode(), stamp, digest)
        if len(_just_read) > MAX_JUST_READ:
            del _just_read[next(iter(_just_read))]


def media_digests(files: Sequence[str], home: Path) -> list[bytes]:
    """Return the XXH3 digest (64 bits) of the contents of every file.

    A digest is taken from <home>/media.sqlite while the file has the same size and times; all others are computed by several
    threads, and remembered there. Any number of processes may do so at the same time. Without a store that can be read and
    written, every file is read.

    Args:
        files: absolute paths, or addresses of members of tar files in an object store; one may occur several times.
        home: folder of all artifacts.

    Returns:
        8 bytes per file; zeros for "", and for what is no regular file or cannot be read.

    Raises:
        OSError: an object store does not answer.
    """
    paths = [os.fsencode(file) for file in files]
    wanted = [path for path in dict.fromkeys(paths) if path]
    store = home / STORE_NAME
    remembered = _recall(store, wanted)
    now = time.time_ns()
    on_disk = [path for path in wanted if not is_address(os.fsdecode(path))]
    num_threads = min(os.cpu_count() or 1, max(1, len(on_disk)))
    with ThreadPoolExecutor(num_threads) as pool:
        parts = pool.map(lambda first: [_digest(path, remembered) for path in on_disk[first::num_threads]], range(num_threads))
        entries = {entry.path: entry for part in parts for entry in part if entry}
    if len(on_disk) < len(wanted):
        entries |= _remote_digests([path for path in wanted if is_address(os.fsdecode(path))], remembered)
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
        stamp = file_stamp(status)
        known = remembered.get(path)
        if known and known.stamp == stamp:
            return known
        if member:
            return _Entry(path, stamp, xxhash.xxh3_64_digest(read_member(member)))
        with open(path, "rb", buffering=0) as file:
            return _Entry(path, stamp, hashlib.file_digest(file, xxhash.xxh3_64).digest())
    except (OSError, UserError):
        return None


def _remote_digests(paths: Sequence[bytes], remembered: Mapping[bytes, _Entry]) -> dict[bytes, _Entry]:
    """Return the entries of members of tar files in object stores; only those whose tar has another stamp are read."""
    members = {path: member for path in paths if (member := find_member(os.fsdecode(path)))}
    stamps = stamps_of(dict.fromkeys(member.tar for member in members.values()))
    with _JUST_READ:
        known = {**remembered, **{path: _just_read.pop(path) for path in paths if path in _just_read}}
    entries = {
        path: known[path] for path, member in members.items() if path in known and known[path].stamp == stamps[member.tar]
    }
    missing = [path for path, member in members.items() if path not in entries and stamps[member.tar]]
    hasher = xxhash.xxh3_64()
    for number, piece, is_last in read_pieces([members[path] for path in missing], stamps.__getitem__, "run the command again"):
        hasher.update(piece)
        if is_last:
            path = missing[number]
            entries[path] = _Entry(path, stamps[members[path].tar], hasher.digest())
            hasher.reset()
    return entries


def _is_settled(entry: _Entry, now: int) -> bool:
    """Whether the stamp of an entry tells every change: an ETag does, times only after a while."""
    _, *rest = entry.stamp.split(" ", 1)
    if is_address(os.fsdecode(entry.path)):
        return bool(rest)
    return max(map(int, rest[0].split())) < now - SETTLING_NS


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
