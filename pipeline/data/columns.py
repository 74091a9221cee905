"""Tables of many rows as columns of Arrow: few bytes a row in memory, whatever the length of the texts.

Columns that are larger than `MAX_BYTES_IN_MEMORY` lie in a temporary file without a name, which is mapped into memory: its
pages belong to the system, which takes them back when it needs them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

compute: Any = pyarrow.compute  # its functions are made when it is loaded, so that no type checker knows them
BATCH_ROWS = 2**14  # rows of a batch
MAX_BATCH_BYTES = 2**28  # of a batch of several rows; Arrow counts the bytes of its texts, and of their JSON, in 31 bits
MAX_BYTES_IN_MEMORY = 2**26
RELEASE_EVERY = 64  # batches, after which the pages of a mapped file that were read are given back
TEXT_COLUMN = pa.schema([("value", pa.string())])


class Columns:
    """A table that is only read. `ColumnWriter` makes it."""

    def __init__(self, schema: pa.Schema, batches: Sequence[pa.RecordBatch], mapped: mmap.mmap | None = None) -> None:
        """Take batches that are in memory, or in a mapped file."""
        self.schema = schema
        self._batches = [batch for batch in batches if batch.num_rows]
        self._mapped = mapped
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)], dtype=np.int64)
        self._start_list: list[int] = self._starts.tolist()

    def __reduce__(self) -> Any:
        return Columns, (self.schema, self._batches)

    def __len__(self) -> int:
        return self._start_list[-1]

    def row(self, position: int) -> list[Any]:
        """Return the values of one row, in the order of the schema."""
        batch = bisect_right(self._start_list, position) - 1
        return [column[position - self._start_list[batch]].as_py() for column in self._batches[batch].columns]

    def value(self, position: int, name: str) -> Any:
        """Return one value."""
        batch = bisect_right(self._start_list, position) - 1
        return self._batches[batch].column(name)[position - self._start_list[batch]].as_py()

    def blocks(
        self, positions: NDArray[np.int64] | None = None, names: Sequence[str] = (), num_rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Yield rows in batches.

        Args:
            positions: the rows, in the order of the result; None: all.
            names: the columns; (): all.
            num_rows: rows of a batch; the last one may have fewer, and so have batches of more than `MAX_BATCH_BYTES`.
        """
        wanted = np.arange(len(self)) if positions is None else positions
        for number, start in enumerate(range(0, len(wanted), num_rows)):
            yield from self.fitting(wanted[start : start + num_rows], names)
            if number % RELEASE_EVERY == RELEASE_EVERY - 1:
                self.release()
        self.release()

    def fitting(self, positions: NDArray[np.int64], names: Sequence[str] = ()) -> Iterator[pa.RecordBatch]:
        """Yield some rows in the order of their positions: as one batch, or as several where one would be too large."""
        try:
            batch = self._take(positions, names)
        except pa.ArrowCapacityError:
            half = len(positions) // 2
            yield from self.fitting(positions[:half], names)
            yield from self.fitting(positions[half:], names)
        else:
            yield batch

    def _take(self, positions: NDArray[np.int64], names: Sequence[str]) -> pa.RecordBatch:
        is_ordered = bool((positions[1:] >= positions[:-1]).all())
        order = np.arange(0) if is_ordered else np.argsort(positions, kind="stable")
        wanted = positions if is_ordered else positions[order]
        schema = pa.schema([self.schema.field(name) for name in names]) if names else self.schema
        if not len(wanted):
            return pa.RecordBatch.from_pylist([], schema=schema)
        first, last = (bisect_right(self._start_list, int(end)) for end in (wanted[0], wanted[-1]))
        cuts = np.searchsorted(wanted, self._starts[first - 1 : last + 1]).tolist()
        batches = zip(self._batches[first - 1 : last], self._start_list[first - 1 : last], pairwise(cuts), strict=True)
        parts = [
            _rows_of(batch.select(schema.names), wanted[low:high] - start)
            for batch, start, (low, high) in batches
            if low < high
        ]
        if len(wanted) > 1 and sum(part.nbytes for part in parts) > MAX_BATCH_BYTES:
            raise pa.ArrowCapacityError(f"more than {MAX_BATCH_BYTES} bytes")
        found = parts[0] if len(parts) == 1 else pa.Table.from_batches(parts).combine_chunks().to_batches()[0]
        return found if is_ordered else found.take(index_array(np.argsort(order)))

    def copy_of(self, positions: NDArray[np.int64] | None) -> Columns:
        """Return a table of these rows alone, which shares nothing with this one; None: this table, with all of its rows."""
        if positions is None:
            return self
        copies = [block.take(index_array(np.arange(len(block)))) for block in self.blocks(positions)]
        return Columns(self.schema, copies)

    def release(self) -> None:
        """Give the pages of a mapped file that were read back to the system."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _rows_of(batch: pa.RecordBatch, positions: NDArray[np.int64]) -> pa.RecordBatch:
    is_run = positions[-1] - positions[0] == len(positions) - 1 and bool((np.diff(positions) == 1).all())
    return batch.slice(int(positions[0]), len(positions)) if is_run else batch.take(index_array(positions))


def index_array(positions: NDArray[np.int64]) -> pa.Array:
    """Return positions as an Arrow array; `pa.array` would import pandas, which takes a second."""
    return pa.Array.from_buffers(pa.int64(), len(positions), [None, pa.py_buffer(np.ascontiguousarray(positions, np.int64))])


def numpy_array(array: pa.Array) -> NDArray[Any]:
    """Return numbers or booleans as a NumPy array that is only read; `to_numpy` would import pandas, too."""
    return np.from_dlpack(array.cast(pa.int8()) if pa.types.is_boolean(array.type) else array)


def text_bytes(texts: pa.Array) -> NDArray[np.uint8]:
    """Return the bytes of all texts, one after the other, as an array that is only read."""
    _, offsets, data = texts.buffers()
    if data is None or not len(texts):
        return np.zeros(0, np.uint8)
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]


def holds_controls(texts: pa.Array) -> bool:
    """Return whether there is a control character of ASCII in any of the texts."""
    data = text_bytes(texts)
    return bool(len(data)) and bool(data.min() < 32 or (data == 127).any())


class ColumnWriter:
    """Collects the rows of a table: in memory while they are few, else in a file."""

    def __init__(self, schema: pa.Schema) -> None:
        """Start a table without rows."""
        self._schema = schema
        self._batches: list[pa.RecordBatch] = []
        self._num_bytes = 0
        self._file: Any = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Add rows; a batch should not have many more than `BATCH_ROWS`."""
        self._num_bytes += batch.nbytes
        if self._num_bytes > MAX_BYTES_IN_MEMORY and self._writer is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as its mapping
            self._writer = pa.ipc.new_file(self._file, self._schema)
            for each in self._batches:
                self._writer.write_batch(each)
            self._batches = []
        if self._writer is None:
            self._batches.append(batch)
        else:
            self._writer.write_batch(batch)

    def add_lists(self, *columns: Sequence[Any]) -> None:
        """Add rows whose values are given by column."""
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        for batch in pa.Table.from_arrays(arrays, schema=self._schema).to_batches():  # several of texts of more than 2 GiB
            self.add(batch)

    def finish(self) -> Columns:
        """Return the table."""
        if self._writer is None:
            return Columns(self._schema, self._batches)
        self._writer.close()
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), os.fstat(self._file.fileno()).st_size, prot=mmap.PROT_READ)
        self._file.close()
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        return Columns(self._schema, [reader.get_batch(i) for i in range(reader.num_record_batches)], mapped)


class Strings(Sequence[str]):
    """A column of texts that are no Python objects until they are asked for."""

    def __init__(self, columns: Columns, name: str = "value", positions: NDArray[np.int64] | None = None) -> None:
        """Show the column `name` of a table at these positions; None: all rows."""
        self._columns, self._name, self._positions = columns, name, positions

    def __reduce__(self) -> Any:
        return Strings, (self._columns.copy_of(self._positions), self._name)

    @staticmethod
    def collect(parts: Iterable[Sequence[str]]) -> Strings:
        """Return the texts of several lists, one after the other."""
        writer = ColumnWriter(TEXT_COLUMN)
        for part in parts:
            writer.add_lists(part)
        return Strings(writer.finish())

    def __len__(self) -> int:
        return len(self._columns) if self._positions is None else len(self._positions)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Strings: ...
    def __getitem__(self, index: SupportsIndex | slice) -> str | Strings:
        if isinstance(index, slice):
            return Strings(self._columns, self._name, self._all_positions()[index])
        position = range(len(self))[index] if self._positions is None else int(self._positions[index])
        return self._columns.value(position, self._name)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.parts())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Strings({list(self[:3])}{' …' if len(self) > 3 else ''}, {len(self)} in all)"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(list(self), dtype)

    def blocks(self, num_rows: int = BATCH_ROWS) -> Iterator[pa.Array]:
        """Yield all texts as arrays, none of which is empty."""
        for block in self._columns.blocks(self._positions, [self._name], num_rows):
            yield block.column(0)

    def parts(self, num_rows: int = BATCH_ROWS) -> Iterator[list[str]]:
        """Yield all texts as lists."""
        yield from (block.to_pylist() for block in self.blocks(num_rows))

    def at(self, positions: NDArray[np.int64]) -> Strings:
        """Return the texts at these positions, without copying them."""
        return Strings(self._columns, self._name, self._rows_at(positions))

    def take(self, positions: NDArray[np.int64] | Sequence[int]) -> list[str]:
        """Return the texts at these positions."""
        blocks = self._columns.fitting(self._rows_at(np.asarray(positions, np.int64)), [self._name])
        return [text for block in blocks for text in block.column(0).to_pylist()]

    def _rows_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return positions if self._positions is None else self._positions[positions]

    def _all_positions(self) -> NDArray[np.int64]:
        return np.arange(len(self._columns)) if self._positions is None else self._positions
