"""Tar files in an object store: read from start to end, or a run of neighbouring members at a time, in large ranges.

Several requests are in flight, and no more than about `BYTES_AHEAD` of a tar are in memory. Every answer is checked against the
stamp of the object, so that no picture comes from a tar that was replaced meanwhile.
"""

from __future__ import annotations

import errno
import io
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.data.tar_members import Member
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, parse_place
from pipeline.runtime.stores import map_objects, read_unchanged, store_of

BLOCK_BYTES = 2**20  # that are read at a time of a tar whose headers are wanted
MAX_SKIPPED_BYTES = 2**22  # that are read rather than left out: to ask anew takes as long
RANGE_BYTES = 2**23  # most of one request for members
MAX_GAP_BYTES = 2**18  # between two members of one request
BYTES_AHEAD = 2**26


@contextmanager
def explain_changes(place: Address, remedy: str) -> Iterator[None]:
    """Turn the errors of reading a tar that is gone, or has other bytes than expected, into a `UserError` with the remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{place} is gone; bring it back, or {remedy}") from error
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise UserError(f"{place} was changed since it was prepared; {remedy}") from error
        raise


def stamps_of(tars: Iterable[str]) -> dict[str, str]:
    """Return the stamp that each of these tar files in object stores has now; "" if it is gone.

    Raises:
        OSError: a store does not answer.
    """

    def stamp(tar: str) -> str:
        place = parse_place(tar)
        try:
            return store_of(place).stamp(place)
        except FileNotFoundError:
            return ""

    names = list(tars)
    return dict(zip(names, map_objects(parse_place(names[0]), stamp, names), strict=True)) if names else {}


class ObjectFile(io.RawIOBase):
    """An object as a file to read: what follows the last reads is fetched ahead, unless they leave out long parts."""

    def __init__(self, place: Address, num_bytes: int, stamp: str, threads: ThreadPoolExecutor) -> None:
        """Read nothing yet.

        Args:
            place: the object.
            num_bytes: its size.
            stamp: its stamp.
            threads: read its blocks.
        """
        self._place, self._num_bytes, self._stamp, self._threads = place, num_bytes, stamp, threads
        self._position = self._ahead = 0
        self._block = -1  # number of the last block that was read
        self._blocks: dict[int, Future[memoryview]] = {}

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._num_bytes if size < 0 else min(self._num_bytes, self._position + size)
        pieces = []
        while self._position < stop:
            number, start = divmod(self._position, BLOCK_BYTES)
            pieces.append(self._load(number)[start : start + stop - self._position])
            self._position += len(pieces[-1])
        return b"".join(pieces)

    def close(self) -> None:
        for block in self._blocks.values():
            block.cancel()
        self._blocks.clear()
        super().close()

    def _load(self, number: int) -> memoryview:
        """Return a block, and ask for twice as many behind it as the last time; for none, where a long part was left out."""
        if number not in (self._block, self._block - 1):
            is_run = 0 < number - self._block <= MAX_SKIPPED_BYTES // BLOCK_BYTES
            self._ahead = min(2 * self._ahead + 1, BYTES_AHEAD // BLOCK_BYTES) if is_run else 0
            self._block = number
            wanted = range(number - 1, number + 1 + self._ahead)  # tarfile looks at the byte before a header
            for other in self._blocks.keys() - set(wanted):
                self._blocks.pop(other).cancel()
            for block in wanted[1:]:
                if block not in self._blocks and block * BLOCK_BYTES < self._num_bytes:
                    self._blocks[block] = self._threads.submit(self._fetch, block)
        if number not in self._blocks:
            self._blocks[number] = self._threads.submit(self._fetch, number)
        return self._blocks[number].result()

    def _fetch(self, number: int) -> memoryview:
        start = number * BLOCK_BYTES
        block = read_unchanged(self._place, start, min(BLOCK_BYTES, self._num_bytes - start), self._stamp)
        assert len(block) == min(BLOCK_BYTES, self._num_bytes - start), self._place
        return block


class _Piece(NamedTuple):
    """A part of a range that belongs to a member."""

    member: int  # its number
    start: int  # in the object
    stop: int
    is_last: bool  # of the member


class _Range(NamedTuple):
    """What one request reads."""

    tar: str
    pieces: list[_Piece]

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        return self.pieces[-1].stop


def read_pieces(
    members: Iterable[Member], stamp_of: Callable[[str], str], remedy: str
) -> Generator[tuple[int, memoryview, bool], None, None]:
    """Yield the bytes of members of tar files in object stores, in order: neighbours come with one request.

    Args:
        members: where they are.
        stamp_of: returns the stamp that a tar must have.
        remedy: what to do if a tar was changed, for the message.

    Yields:
        (number of the member, some of its bytes, whether they are its last).

    Raises:
        UserError: a tar is gone, or was changed.
        OSError: the store does not answer.
    """

    def fetch(wanted: _Range) -> memoryview:
        if wanted.start == wanted.stop:
            return memoryview(b"")
        tar: Any = parse_place(wanted.tar)
        with explain_changes(tar, remedy):
            return read_unchanged(tar, wanted.start, wanted.stop - wanted.start, stamp_of(wanted.tar))

    most = BYTES_AHEAD // RANGE_BYTES
    with ThreadPoolExecutor(most) as threads:
        pending: deque[tuple[_Range, Future[memoryview]]] = deque()
        ranges = _plan(members)
        try:
            while True:
                pending.extend((each, threads.submit(fetch, each)) for each in itertools.islice(ranges, most - len(pending)))
                if not pending:
                    return
                wanted, answer = pending.popleft()
                data = answer.result()
                for piece in wanted.pieces:
                    yield piece.member, data[piece.start - wanted.start : piece.stop - wanted.start], piece.is_last
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _plan(members: Iterable[Member]) -> Iterator[_Range]:
    """Yield the ranges that hold the members: a long member has several, short ones share one with their neighbours."""
    planned = _Range("", [])
    for number, member in enumerate(members):
        stop = member.offset + member.size
        for start in range(member.offset, stop, RANGE_BYTES) or [stop]:  # a member may be empty
            end = min(start + RANGE_BYTES, stop)
            if planned.pieces and not _fits(planned, member.tar, start, end):
                yield planned
                planned = _Range("", [])
            planned = planned if planned.pieces else _Range(member.tar, [])
            planned.pieces.append(_Piece(number, start, end, end == stop))
    if planned.pieces:
        yield planned


def _fits(planned: _Range, tar: str, start: int, stop: int) -> bool:
    """Whether a range of a tar is near enough behind a planned one to come with it."""
    gap = start - planned.stop
    return planned.tar == tar and 0 <= gap <= MAX_GAP_BYTES and stop - planned.start <= RANGE_BYTES
