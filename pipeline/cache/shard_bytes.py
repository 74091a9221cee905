"""The bytes of a shard: of a file, or of an object that is read in ranges. A folder of this machine may keep copies of them."""

from __future__ import annotations

import logging
import os
import random
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address
from pipeline.runtime.stores import store_of

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "DIFFALIGN_LOCAL_COPIES"  # the folder that keeps copies; without it, nothing is kept
LIMIT_VARIABLE = "DIFFALIGN_LOCAL_COPIES_GIB"  # the most that it may hold
DEFAULT_LIMIT = "20"
COPIES = "diffalign-copies"  # the folder in it with the copies and nothing else
KEPT_SHARE = 0.9  # of the limit, that is left when copies are removed
UNCOUNTED_SHARE = 0.02  # of the limit, that a process writes before it counts again what others have written
_MARK_BYTES = 8  # the XXH3 behind the bytes of a copy
_COPY_NAME = re.compile(r"[0-9a-f]{64}-\d+-\d+|\.[0-9a-f]{64}-\d+-\d+\.[0-9a-f]{8}")  # or one that is not complete


class ShardBytes(Protocol):
    """The bytes of a shard by offset."""

    def load(self, start: int, stop: int) -> None:
        """Say that only bytes of this range will be asked for next; they may be fetched at once."""
        ...

    def read_into(self, data: np.ndarray, offset: int) -> int:
        """Fill an array of bytes from an offset on, and return how many there were: at least one, unless the shard ends."""
        ...


@dataclass(frozen=True)
class FileBytes:
    """The `ShardBytes` of an open file."""

    file: FileIO

    def load(self, start: int, stop: int) -> None:
        pass

    def read_into(self, data: np.ndarray, offset: int) -> int:
        return os.preadv(self.file.fileno(), [data.data], offset)


class ObjectBytes:
    """The `ShardBytes` of an object. One range of it is in memory at a time."""

    def __init__(self, place: Address, digest: str = "") -> None:
        """Read nothing yet.

        Args:
            place: the object.
            digest: its SHA-256, under which copies are kept; "": none are.
        """
        self.place, self.digest = place, digest
        self._start, self._loaded = 0, np.empty(0, np.uint8)

    def load(self, start: int, stop: int) -> None:
        copies = local_copies() if self.digest else None
        data = copies.fetch(f"{self.digest}-{start}-{stop}", lambda: self._fetch(start, stop)) if copies else None
        self._start, self._loaded = start, np.frombuffer(self._fetch(start, stop) if data is None else data, np.uint8)

    def read_into(self, data: np.ndarray, offset: int) -> int:
        available = self._loaded[offset - self._start :][: len(data)]
        data[: len(available)] = available
        return len(available)

    def _fetch(self, start: int, stop: int) -> memoryview:
        return store_of(self.place).get_range(self.place, start, stop - start)


class LocalCopies:
    """Ranges of objects in a folder of this machine, which any number of processes share.

    When it is full, it gives up copies at random: training reads a split again and again, and if that is larger than the
    folder, those used longest ago are the ones that are needed next. Files that are no copies are neither counted nor removed.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Make the folder `COPIES` in a folder, if it is not there.

        Args:
            folder: a folder, which may have other files.
            max_bytes: the most that the copies may hold.
        """
        self.folder, self.max_bytes = folder / COPIES, max_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._num_bytes, self._num_written = sum(size for _, size in self._files()), 0

    def fetch(self, name: str, read: Callable[[], memoryview]) -> memoryview:
        """Return the bytes named <SHA-256>-<start>-<stop>: an undamaged copy, or else what is read now and kept."""
        file = self.folder / name
        with suppress(OSError):
            content = memoryview(file.read_bytes())
            if xxhash.xxh3_64_digest(content[:-_MARK_BYTES]) == content[-_MARK_BYTES:]:
                return content[:-_MARK_BYTES]
        data = read()
        try:
            self._keep(file, data)
        except OSError as error:  # the disk is full, for example
            logger.debug("%s is not kept: %s", file, error)
        return data

    def _keep(self, file: Path, data: memoryview) -> None:
        aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
        try:
            with aside.open("wb") as opened:
                opened.writelines([data, xxhash.xxh3_64_digest(data)])
            os.replace(aside, file)
        finally:
            aside.unlink(missing_ok=True)
        with self._lock:
            self._num_bytes += len(data) + _MARK_BYTES
            self._num_written += len(data) + _MARK_BYTES
            if self._num_bytes > self.max_bytes or self._num_written > UNCOUNTED_SHARE * self.max_bytes:
                self._shrink()

    def _shrink(self) -> None:
        """Count the copies again, and remove some at random if they are too many, until there is room."""
        files = self._files()
        self._num_bytes, self._num_written = sum(size for _, size in files), 0  # other processes have written, too
        if self._num_bytes <= self.max_bytes:
            return
        random.shuffle(files)
        while files and self._num_bytes > KEPT_SHARE * self.max_bytes:
            file, size = files.pop()
            file.unlink(missing_ok=True)
            self._num_bytes -= size

    def _files(self) -> list[tuple[Path, int]]:
        found = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if _COPY_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    found.append((Path(entry.path), entry.stat().st_size))
        return found


def local_copies() -> LocalCopies | None:
    """Return the copies that the environment asks for; None: nothing is kept."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    return _open_copies(folder, os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT) if folder else None


@cache
def _open_copies(folder: str, limit: str) -> LocalCopies:
    try:
        max_bytes = int(float(limit) * 2**30)
    except (ValueError, OverflowError):
        raise UserError(f"{LIMIT_VARIABLE} must be a number of GiB, not {limit!r}") from None
    try:
        return LocalCopies(Path(folder), max_bytes)
    except OSError as error:
        raise UserError(f"{FOLDER_VARIABLE} is {folder!r}, where no copies can be kept: {error.strerror}") from error
