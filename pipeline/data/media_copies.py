"""Media that lie in an object store, as files of this machine: those of some batches at a time, or single ones.

Whoever decodes them needs no object store: its library cannot be used in a process that was forked from one that uses it.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePath
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from pipeline.data.media_digests import note_digest
from pipeline.data.remote_tars import read_pieces, stamps_of
from pipeline.data.tar_members import Member, find_member
from pipeline.runtime.connections import RETRY_SECONDS
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import is_address

if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest

MAX_SINGLE_COPIES = 256  # that a process keeps
MAX_SINGLE_BYTES = 2**30  # of them, unless the last ones have more
LONG_SECONDS = 2.0  # a store that refuses one object says so sooner
_LOCK = Lock()
_single_copies: deque[tuple[Path, int]] = deque()  # with their bytes, each in a folder of its own
_numbers = itertools.count()
_failed_at: dict[str, float] = {}  # bucket -> when its store was last asked for long in vain


class MediaCopies:
    """Copies of the media of batches. They are read ahead, each batch is asked for in its turn, and its copies are dropped."""

    def __init__(self, manifest: Manifest, folder: Path, sizes: Sequence[int], media_of: Callable[[int], Iterable[PurePath]]):
        """Read nothing yet: processes can still be forked.

        Args:
            manifest: the samples.
            folder: gets the copies: that of <media> is <folder>/<media>.
            sizes: the number of media of each batch.
            media_of: returns the media of a batch of this number.
        """
        self._manifest, self._folder, self._media_of, self._num_batches = manifest, folder, media_of, len(sizes)
        self._ends = list(itertools.accumulate(sizes, initial=0))  # number of the media before each batch
        self._files: dict[int, Path] = {}  # number of the medium -> its copy
        self._users: Counter[Path] = Counter()  # of a copy: batches may come again
        self._num_ready = 0
        self._sizes: dict[Path, int] = {}  # of the copies that are there
        self._file: BinaryIO | None = None  # the copy that is being written
        self._hasher = xxhash.xxh3_64()
        remedy = f"run: {manifest.prepare_command}"
        self._pieces = read_pieces(self._members(), manifest.media_stamp, remedy)

    def wait(self, batch: int) -> None:
        """Return when the copies of a batch, and of all before it, are there.

        Raises:
            UserError: a tar is gone, or was changed since it was prepared, or the disk for the copies is full.
            OSError: the store does not answer.
        """
        while self._num_ready < self._ends[batch + 1]:
            piece = next(self._pieces)
            with _explain_full_disk():
                self._write(*piece)

    def has_room(self) -> bool:
        """Whether the disk has room for more copies: at least as much as they have. So several processes share it, too."""
        return not self._sizes or shutil.disk_usage(self._folder).free > sum(self._sizes.values())

    def drop(self, batch: int) -> None:
        """Remove the copies of a batch."""
        for number in range(self._ends[batch], self._ends[batch + 1]):
            path = self._files.pop(number)
            self._users[path] -= 1
            if not self._users[path]:
                del self._users[path], self._sizes[path]
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Read no further."""
        self._pieces.close()
        if self._file:
            self._file.close()

    def _members(self) -> Iterator[Member]:
        number = 0
        for batch in range(self._num_batches):
            for media in self._media_of(batch):
                self._files[number] = self._folder / media
                self._users[self._files[number]] += 1
                yield _member_of(self._manifest, media)
                number += 1

    def _write(self, number: int, piece: memoryview, is_last: bool) -> None:
        path = self._files[number]
        if self._file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _beside(path).open("wb", buffering=0)
            self._hasher.reset()
        self._file.write(piece)
        self._hasher.update(piece)
        if is_last:
            self._sizes[path] = self._file.tell()
            self._file.close()
            self._file = None
            _beside(path).replace(path)  # at once: a worker may read a copy that an earlier batch has asked for
            media = path.relative_to(self._folder)
            stamp = self._manifest.media_stamp(_member_of(self._manifest, media).tar)
            note_digest(str(self._manifest.media_root / media.as_posix()), stamp, self._hasher.digest())
            self._num_ready += 1


@contextmanager
def _explain_full_disk() -> Iterator[None]:
    """Say which disk the copies have filled: it is not that of the home."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space is left in {tempfile.gettempdir()}, which gets copies of media while they are decoded; free some, take "
            "fewer --workers, or let TMPDIR name a folder on another disk; the same command goes on from here"
        ) from error


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextmanager
def copied_media(
    manifest: Manifest, sizes: Sequence[int], media_of: Callable[[int], Iterable[PurePath]]
) -> Iterator[tuple[Manifest, MediaCopies]]:
    """Yield a manifest whose media are files of this machine, and what copies them here; media on a disk are not copied.

    Args:
        manifest: the samples.
        sizes: the number of media of each batch.
        media_of: returns the media of a batch of this number.
    """
    if isinstance(manifest.media_root, Path):
        yield manifest, MediaCopies(manifest, manifest.media_root, [0] * len(sizes), lambda _: ())
        return
    with (
        tempfile.TemporaryDirectory(prefix="diffalign-") as folder,
        closing(MediaCopies(manifest, Path(folder), sizes, media_of)) as copies,
    ):
        yield replace(manifest, media_root=Path(folder)), copies


def single_copy(manifest: Manifest, media: PurePath) -> Path:
    """Return a copy of one medium in an object store.

    The last ones stay until the process ends: as many as `MAX_SINGLE_COPIES` and `MAX_SINGLE_BYTES` allow, but always one for
    each thread of a pool that has as many as there are cores.

    Raises:
        UserError: its tar is gone or was changed, the store does not answer, may not be used, or did so a moment ago, or the
            disk for copies is full.
    """
    root: Any = manifest.media_root
    bucket = root.bucket
    if time.monotonic() - _failed_at.get(bucket, -RETRY_SECONDS) < RETRY_SECONDS:
        raise UserError(f"{bucket} could not be read a moment ago")
    with _LOCK:  # or two threads would make two folders, of which one is removed
        path = Path(_folder().name) / f"{next(_numbers)}" / media.name
    path.parent.mkdir()
    began = time.monotonic()
    try:
        with _explain_full_disk(), path.open("wb") as file:
            for _, piece, _ in read_pieces(
                [_member_of(manifest, media)], manifest.media_stamp, f"run: {manifest.prepare_command}"
            ):
                file.write(piece)
    except BaseException as error:
        shutil.rmtree(path.parent)
        if isinstance(error, OSError):
            if is_address(error.filename) and time.monotonic() - began >= LONG_SECONDS:  # so would each of the next media take
                _failed_at[bucket] = time.monotonic()
            raise UserError(f"{error.filename}: {error.strerror}") from error
        raise
    _keep(path)
    return path


def _keep(path: Path) -> None:
    """Note a single copy, and remove the oldest of too many."""
    num_last = min(MAX_SINGLE_COPIES, (os.cpu_count() or 1) + 1)  # threads may be about to open them
    with _LOCK:
        _single_copies.append((path, path.stat().st_size))
        while len(_single_copies) > num_last and (
            len(_single_copies) > MAX_SINGLE_COPIES or sum(size for _, size in _single_copies) > MAX_SINGLE_BYTES
        ):
            shutil.rmtree(_single_copies.popleft()[0].parent)


def changed_tars(manifest: Manifest) -> list[str]:
    """Return the tar files in an object store that are gone, or have another stamp than when they were prepared.

    Raises:
        OSError: the store does not answer.
    """
    stamps = stamps_of(str(manifest.media_root / name) for name in manifest.media_stamps)
    return [tar for tar, stamp in stamps.items() if stamp != manifest.media_stamp(tar)]


def _member_of(manifest: Manifest, media: PurePath) -> Member:
    """Return where a medium is.

    Raises:
        UserError: it is in no tar.
    """
    address = str(manifest.media_root / media.as_posix())
    if member := find_member(address):
        return member
    raise UserError(f"{address} is in no tar file; run: {manifest.prepare_command}")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """The folder of this process for single copies."""
    return tempfile.TemporaryDirectory(prefix="diffalign-")
