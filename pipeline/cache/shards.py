"""The shards of features: chunks of numbers as they are, each with its crc32c, and an index behind them.

This is the layout of Zarr's sharding codec, and any Zarr client reads it. Zarr itself copies each chunk several times, which
takes five to ten times as long as reading the file; here pieces of a chunk are checked and converted while they are in the
processor's cache, by several threads.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import google_crc32c
import numpy as np
import zarr
from dask.system import CPU_COUNT

from pipeline.cache import layout
from pipeline.cache.shard_bytes import FileBytes, ObjectBytes, ShardBytes, local_copies
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place
from pipeline.runtime.stores import REQUESTS_IN_FLIGHT, zarr_source

PIECE_BYTES = 2**20  # of rows that are read, checked and converted at a time
WRITE_PIECES = 8  # that are in memory while a shard is written
FILE_PART_BYTES = 2**24  # of a file, that a thread reads at a time: the chunks that fit, at least one
REQUEST_CHUNKS = 4  # of an object, that one request asks for; more, if they have fewer than REQUEST_BYTES
REQUEST_BYTES = 2**22
READ_THREADS = min(4, CPU_COUNT)
CRC_BYTES = 4
NO_CHUNK = 2**64 - 1  # offset and length, in the index, of a chunk behind the last row


@dataclass(frozen=True)
class StoredFeatures:
    """The features of a cache as they are stored: [M, *row_shape], bfloat16 as its bits in uint16."""

    path: Place  # of the cache
    remedy: str  # the end of the message about a damaged shard
    shape: tuple[int, ...]
    dtype: np.dtype
    store_dtype: str
    fill_value: float
    shard_rows: int
    chunk_rows: int
    digests: tuple[str, ...] = ()  # of the shards; (): not known

    @staticmethod
    def open(path: Place, command: str = "", digests: Sequence[str] = ()) -> StoredFeatures:
        """Return the features of the cache at this place; only their metadata are read.

        Args:
            path: the place.
            command: what makes the cache again, for messages.
            digests: the SHA-256 of every shard: what is read of an object store may then be kept in a folder of this machine.
        """
        array = zarr.open_array(zarr_source(path / "features"), mode="r")
        assert array.shards is not None
        return StoredFeatures(
            path=path,
            remedy=f"; to redo it, run: {command}" if command else "",
            shape=array.shape,
            dtype=np.dtype(array.dtype).newbyteorder("<"),
            store_dtype=str(array.attrs["store_dtype"]),
            fill_value=array.fill_value,
            shard_rows=array.shards[0],
            chunk_rows=array.chunks[0],
            digests=tuple(digests),
        )

    @property
    def chunk_bytes(self) -> int:
        """The bytes of a chunk, without its crc32c."""
        return self.chunk_rows * self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def chunks_per_shard(self) -> int:
        """The chunks of a shard, and entries of its index."""
        return self.shard_rows // self.chunk_rows

    def shard_bytes(self, num_rows: int) -> int:
        """Return the bytes of a shard of this many rows."""
        return -(-num_rows // self.chunk_rows) * (self.chunk_bytes + CRC_BYTES) + 16 * self.chunks_per_shard + CRC_BYTES

    def encode_shard(self, num_rows: int, fill_rows: Callable[[slice, np.ndarray], None]) -> Iterator[memoryview | bytes]:
        """Yield the bytes of a shard, the same that Zarr writes, in pieces. `WRITE_PIECES` pieces later a piece is overwritten.

        Args:
            num_rows: rows of the shard; the last one has fewer than the others.
            fill_rows: called with some rows and an array for them, as stored; once for each row, in order.
        """
        index = np.full((self.chunks_per_shard, 2), NO_CHUNK, "<u8")
        buffers = itertools.cycle([self._piece_buffer() for _ in range(WRITE_PIECES)])
        for chunk in range(-(-num_rows // self.chunk_rows)):
            index[chunk] = chunk * (self.chunk_bytes + CRC_BYTES), self.chunk_bytes + CRC_BYTES
            crc = 0
            for piece in self._pieces:
                start, stop = (min(chunk * self.chunk_rows + row, num_rows) for row in (piece.start, piece.stop))
                block = next(buffers)[: piece.stop - piece.start]
                if start < stop:
                    fill_rows(slice(start, stop), block[: stop - start])
                block[stop - start :] = self.fill_value
                crc = google_crc32c.extend(crc, _as_bytes(block))
                yield _as_bytes(block).data
            yield crc.to_bytes(CRC_BYTES, "little")
        yield index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(CRC_BYTES, "little")

    def _piece_buffer(self) -> np.ndarray:
        """Return an array for the rows of a piece, as stored. To use it again is cheaper than to get memory from the system."""
        return np.empty((self._pieces[0].stop, *self.shape[1:]), self.dtype)

    @cached_property
    def _pieces(self) -> list[slice]:
        """Return the rows of each piece of a chunk, counted from the first row of the chunk."""
        piece_rows = max(1, PIECE_BYTES * self.chunk_rows // self.chunk_bytes)
        ends = [*range(piece_rows, self.chunk_rows, piece_rows), self.chunk_rows]
        return [slice(start, stop) for start, stop in itertools.pairwise([0, *ends])]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return rows as stored. Their chunks are read once, whole, and checked.

        Args:
            rows: row numbers, int64 [K], in any order and with repeats.

        Raises:
            UserError: a chunk is damaged or missing.
        """
        return self._read(rows, self.dtype)

    def read_float32(self, rows: np.ndarray) -> np.ndarray:
        """Return rows as `read` does, but as float32."""
        return self._read(rows, np.dtype(np.float32))

    def _read(self, rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
        result = np.empty((len(rows), *self.shape[1:]), dtype)
        order = None if (np.diff(rows) > 0).all() else np.argsort(rows, kind="stable")
        ascending = rows if order is None else rows[order]
        chunks = ascending // self.chunk_rows
        starts = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist()] if len(rows) else []
        spans = zip(chunks[starts].tolist(), starts, [*starts, len(rows)][1:], strict=True)

        def read_part(part: list[tuple[int, int, int]]) -> None:
            shard = part[0][0] // self.chunks_per_shard
            buffer = self._piece_buffer()
            with self._open_shard(shard) as (file, index):
                file.load(*self._range_of_part(index, [chunk for chunk, _, _ in part]))
                for chunk, start, stop in part:
                    wanted = ascending[start:stop] - chunk * self.chunk_rows
                    places = slice(start, stop) if order is None else _as_slice(order[start:stop], wanted)
                    self._read_chunk(file, index[chunk % self.chunks_per_shard], wanted, result, places, buffer)

        parts = [list(part) for _, part in itertools.groupby(spans, key=lambda span: self._part_of(span[0]))]
        if len(parts) < 2:
            list(map(read_part, parts))
        else:
            with ThreadPoolExecutor(READ_THREADS if isinstance(self.path, Path) else REQUESTS_IN_FLIGHT) as executor:
                list(executor.map(read_part, parts))
        return result

    def _part_of(self, chunk: int) -> tuple[int, int]:
        """Return the shard of a chunk, and its part of the shard."""
        shard, number = divmod(chunk, self.chunks_per_shard)
        return shard, number // self._part_chunks

    @cached_property
    def _part_chunks(self) -> int:
        """The chunks of a part."""
        if isinstance(self.path, Path):
            return max(1, FILE_PART_BYTES // self.chunk_bytes)
        return max(REQUEST_CHUNKS, REQUEST_BYTES // self.chunk_bytes)

    def _range_of_part(self, index: np.ndarray, chunks: Sequence[int]) -> tuple[int, int]:
        """Return the bytes of a shard in which chunks of a part lie. Where copies are kept it is that of the whole part."""
        numbers = [chunk % self.chunks_per_shard for chunk in chunks]
        first, last = numbers[0], numbers[-1]
        if isinstance(self.path, Address) and self.digests and local_copies():
            first = first // self._part_chunks * self._part_chunks
            last = min(first + self._part_chunks, np.count_nonzero(index[:, 0] != NO_CHUNK)) - 1
        return int(index[first, 0]), int(index[last].sum())

    @contextmanager
    def _open_shard(self, shard: int) -> Iterator[tuple[ShardBytes, np.ndarray]]:
        """Open a shard for reading, and yield its bytes and its index [chunks, 2]: offset and bytes of each chunk.

        Raises:
            UserError: the shard is missing or cut off, or what the block reads from it is damaged.
            OSError: the object store does not answer.
        """
        path = layout.shard_path(self.path, shard, len(self.shape))
        try:
            if isinstance(path, Path):
                with path.open("rb", buffering=0) as file:
                    shard_bytes = FileBytes(file)
                    yield shard_bytes, self._read_index(shard_bytes, os.fstat(file.fileno()).st_size)
                return
            shard_bytes = ObjectBytes(path, self.digests[shard] if self.digests else "")
            if shard not in self._indices:
                self._indices[shard] = self._read_index(shard_bytes, self._expected_bytes(shard))
            yield shard_bytes, self._indices[shard]
        except UserError:  # of a setting
            raise
        except (OSError, ValueError) as error:
            if isinstance(path, Address) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # the store does not answer, for example: nothing is damaged
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{path} is damaged or missing ({reason}){self.remedy}") from error

    def _read_index(self, file: ShardBytes, num_bytes: int) -> np.ndarray:
        """Return the index of a shard that has this many bytes."""
        index = np.empty((self.chunks_per_shard, 2), "<u8")
        start = max(0, num_bytes - index.nbytes - CRC_BYTES)
        file.load(start, num_bytes)
        _check_crc(_fill(index, file, start), file, start + index.nbytes)
        return index

    @cached_property
    def _indices(self) -> dict[int, np.ndarray]:
        """The indices of shards in an object store that have been read: each of them would be a request."""
        return {}

    def _expected_bytes(self, shard: int) -> int:
        """Return the bytes of a shard as it was written."""
        return self.shard_bytes(min(self.shard_rows, self.shape[0] - shard * self.shard_rows))

    def _read_chunk(
        self,
        file: ShardBytes,
        entry: np.ndarray,
        wanted: np.ndarray,
        result: np.ndarray,
        places: slice | np.ndarray,
        buffer: np.ndarray,
    ) -> None:
        """Copy rows of a chunk into the result.

        Args:
            file: the shard.
            entry: of the index.
            wanted: the rows, counted from the first row of the chunk, ascending.
            result: gets the rows.
            places: where they go in the result; a slice only if no row is wanted twice.
            buffer: for a piece.

        Raises:
            ValueError: the chunk is damaged or not there.
        """
        offset, num_bytes = entry.tolist()
        if num_bytes != self.chunk_bytes + CRC_BYTES:
            raise ValueError("a chunk is not there")
        is_run = isinstance(places, slice) and int(wanted[-1] - wanted[0]) == len(wanted) - 1
        is_as_stored = is_run and len(wanted) == self.chunk_rows and result.dtype == self.dtype
        chunk_rows = result[places] if is_as_stored else None
        crc = done = 0
        for piece in self._pieces:
            block = buffer[: piece.stop - piece.start] if chunk_rows is None else chunk_rows[piece]
            crc = _fill(block, file, offset, crc)
            offset += block.nbytes
            if chunk_rows is not None:
                continue
            stop = int(np.searchsorted(wanted, piece.stop))
            picked = wanted[done:stop] - piece.start
            rows = block[picked[0] : picked[-1] + 1] if is_run and len(picked) else block[picked]
            if isinstance(places, slice):
                layout.copy_values(rows, result[places][done:stop])
            elif result.dtype == self.dtype:
                result[places[done:stop]] = rows
            else:
                result[places[done:stop]] = layout.from_stored(rows, self.store_dtype)
            done = stop
        _check_crc(crc, file, offset)


def _as_slice(places: np.ndarray, rows: np.ndarray) -> slice | np.ndarray:
    """Return the places of rows in a result as a slice if they follow each other and no row comes twice."""
    is_run = int(places[-1] - places[0]) == len(places) - 1 and (np.diff(places) == 1).all() and (np.diff(rows) > 0).all()
    return slice(int(places[0]), int(places[-1]) + 1) if is_run else places


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def _fill(array: np.ndarray, file: ShardBytes, offset: int, crc: int = 0) -> int:
    """Fill an array with the bytes of a file from an offset on, and return their crc32c, which continues `crc`.

    Raises:
        ValueError: the file ends before.
    """
    data = _as_bytes(array)
    done = 0
    while done < len(data):  # the system may give fewer bytes than asked for
        num_read = file.read_into(data[done:], offset + done)
        if not num_read:
            raise ValueError("it is cut off")
        done += num_read
    return google_crc32c.extend(crc, data)


def _check_crc(crc: int, file: ShardBytes, offset: int) -> None:
    """Compare a crc32c with the one that follows in the file.

    Raises:
        ValueError: they differ.
    """
    stored = np.zeros(CRC_BYTES, np.uint8)
    if file.read_into(stored, offset) != CRC_BYTES or crc.to_bytes(CRC_BYTES, "little") != stored.tobytes():
        raise ValueError("a checksum does not fit")
