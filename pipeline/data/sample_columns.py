"""The samples of a manifest as columns, and what is computed of whole columns: the canonical JSON of rows, and checks.

A row of ten million takes a byte for its split and nothing for its texts (`columns`), but a sample that is asked for is an
ordinary `Sample`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.columns import BATCH_ROWS, Columns, ColumnWriter, Strings, compute, holds_controls, numpy_array, text_bytes
from pipeline.types import SPLITS, Sample

SAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("media", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("labels", pa.list_(pa.int32())),
        ("group", pa.string()),
    ]
)
_SPLIT_NAMES = pa.StringArray.from_buffers(  # as pa.array(SPLITS), which would import pandas
    len(SPLITS), pa.py_buffer(np.cumsum([0, *map(len, SPLITS)], dtype=np.int32)), pa.py_buffer("".join(SPLITS).encode())
)
_NO_SPLIT = pa.Int32Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(np.full(1, -1, np.int32))])[0]
NO_GROUP = pa.StringArray.from_buffers(1, pa.py_buffer(bytes(8)), pa.py_buffer(b""))[0]  # ""


class SampleColumns(Sequence[Sample]):
    """Samples that are made when they are asked for; a slice shares the columns."""

    def __init__(self, columns: Columns, positions: NDArray[np.int64] | None = None) -> None:
        """Show the rows of a table of `SAMPLE_SCHEMA` at these positions; None: all of them."""
        self._columns, self._positions = columns, positions
        self.passed: tuple[Any, ...] = ()  # what `check_manifest` has found them right for

    def __reduce__(self) -> Any:
        return SampleColumns, (self._columns.copy_of(self._positions),)  # a slice takes no other rows along

    @staticmethod
    def of(samples: Iterable[Sample]) -> SampleColumns:
        """Return the columns of samples, which may be columns already."""
        if isinstance(samples, SampleColumns):
            return samples
        writer, remaining = ColumnWriter(SAMPLE_SCHEMA), iter(samples)
        while part := list(islice(remaining, BATCH_ROWS)):
            rows = [(each.id, each.split, each.media.as_posix(), each.texts, each.labels, each.group) for each in part]
            writer.add_lists(*zip(*rows, strict=True))
        return SampleColumns(writer.finish())

    def __len__(self) -> int:
        return len(self._columns) if self._positions is None else len(self._positions)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> SampleColumns: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Sample | SampleColumns:
        if isinstance(index, slice):
            return SampleColumns(self._columns, self._all_positions()[index])
        position = range(len(self))[index] if self._positions is None else int(self._positions[index])
        return _sample(*self._columns.row(position))

    def __iter__(self) -> Iterator[Sample]:
        for block in self.blocks():
            yield from map(_sample, *(column.to_pylist() for column in block.columns))

    def __add__(self, other: Sequence[Sample]) -> SampleColumns:
        return SampleColumns.of(chain(self, other))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SampleColumns({list(self[:2])}{' …' if len(self) > 2 else ''}, {len(self)} in all)"

    @property
    def ids(self) -> Strings:
        """The ids, in order."""
        return self.strings("id")

    @cached_property
    def split_codes(self) -> NDArray[np.int8]:
        """The number of each sample's split in `SPLITS`; -1: it has another one."""
        parts = [
            compute.coalesce(compute.index_in(block.column(0), _SPLIT_NAMES), _NO_SPLIT) for block in self.blocks(["split"])
        ]
        return np.concatenate([np.zeros(0, np.int8), *(numpy_array(part).astype(np.int8) for part in parts)])

    def strings(self, name: str) -> Strings:
        """Return the column "id", "split", "media" or "group"."""
        return Strings(self._columns, name, self._positions)

    def labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (position of its sample, label) of every label, in order."""
        columns = [block.column(0) for block in self.blocks(["labels"])]
        sizes = np.concatenate([np.zeros(0, np.int64), *map(list_sizes, columns)])
        labels = [np.zeros(0, np.int64), *(numpy_array(column.flatten()) for column in columns)]
        return np.repeat(np.arange(len(sizes)), sizes), np.concatenate(labels).astype(np.int64)

    def blocks(self, names: Sequence[str] = (), num_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the samples in batches; see `Columns.blocks`."""
        return self._columns.blocks(self._positions, names, num_rows)

    def select(self, positions: NDArray[Any] | Sequence[int]) -> SampleColumns:
        """Return the samples at these positions, in their order."""
        wanted = np.asarray(positions, np.int64)
        return SampleColumns(self._columns, wanted if self._positions is None else self._positions[wanted])

    def _all_positions(self) -> NDArray[np.int64]:
        return np.arange(len(self._columns)) if self._positions is None else self._positions


def _sample(id: str, split: str, media: str, texts: list[str], labels: list[int], group: str) -> Sample:
    return Sample(id, split, Path(media), tuple(texts), tuple(labels), group)


def json_strings(texts: pa.Array) -> pa.Array:
    """Return each text as JSON writes it, with its quotes."""
    data = text_bytes(texts)
    for character in ("\\", '"', *(map(chr, range(32)) if data.min(initial=32) < 32 else "")):
        if (data == ord(character)).any():
            texts = compute.replace_substring(texts, character, json.dumps(character)[1:-1])
    return compute.binary_join_element_wise('"', texts, '"', "")


def json_lists(lists: pa.Array, separator: str = ",") -> pa.Array:
    """Return each list of texts or of whole numbers as JSON writes it."""
    flat = lists.flatten()
    items = json_strings(flat) if pa.types.is_string(flat.type) else flat.cast(pa.string())
    joined = compute.binary_join(pa.ListArray.from_arrays(_offsets(lists), items), separator)
    return compute.binary_join_element_wise("[", joined, "]", "")


def list_sizes(lists: pa.Array) -> NDArray[np.int64]:
    """Return the number of items of each list."""
    return np.diff(numpy_array(_offsets(lists))).astype(np.int64)


def _offsets(lists: pa.Array) -> pa.Array:
    """Return where each list starts and ends in `lists.flatten()`, which leaves out what a slice does not show."""
    return compute.subtract(lists.offsets, lists.offsets[0])


def json_rows(block: pa.RecordBatch) -> bytes:
    """Return the canonical JSON of the rows of a batch of samples, with a comma before each."""
    id, split, media, group = (json_strings(block.column(name)) for name in ("id", "split", "media", "group"))
    labels, texts = (json_lists(block.column(name)) for name in ("labels", "texts"))
    first, last = compute.binary_join_element_wise(",[", id, ""), compute.binary_join_element_wise(group, "]", "")
    rows = compute.binary_join_element_wise(first, split, media, labels, texts, last, ",")
    return rows.buffers()[2].to_pybytes()[: compute.sum(compute.binary_length(rows)).as_py()]


def unusual_rows(block: pa.RecordBatch, label_kind: str, num_classes: int, most_characters: int) -> NDArray[np.int64]:
    """Return the rows of a batch that may break the schema of a manifest; all others keep it.

    Args:
        block: samples.
        label_kind: "single" or "multi".
        num_classes: labels are 0 .. num_classes-1.
        most_characters: of an id, a media path, a group, and of all texts together.
    """
    id, media, group, split = (block.column(name) for name in ("id", "media", "group", "split"))
    odd = compute.equal(compute.binary_length(id), 0)
    odd = compute.or_(odd, compute.invert(compute.is_in(split, _SPLIT_NAMES)))
    for column in (id, media, group):
        if holds_controls(column):
            odd = compute.or_(odd, compute.match_substring_regex(column, r"[\x00-\x1f\x7f]"))
        odd = compute.or_(odd, compute.greater(compute.binary_length(column), most_characters))
    odd = compute.or_(odd, compute.match_substring_regex(media, r"^/|\\|^\.?$|(^|/)\.\.(/|$)"))
    sizes, starts = list_sizes(block.column("texts")), numpy_array(_offsets(block.column("texts")))
    total = np.append(0, np.cumsum(numpy_array(compute.binary_length(block.column("texts").flatten())), dtype=np.int64))
    is_long = np.diff(total[starts]) + 4 * (sizes + 1) > most_characters // 2
    return np.flatnonzero(
        numpy_array(odd).astype(np.bool_) | is_long | _odd_labels(block.column("labels"), label_kind, num_classes)
    )


def _odd_labels(labels: pa.Array, label_kind: str, num_classes: int) -> NDArray[np.bool_]:
    sizes, flat = list_sizes(labels), numpy_array(labels.flatten())
    row_of = np.repeat(np.arange(len(sizes)), sizes)
    odd = sizes != 1 if label_kind == "single" else np.zeros(len(sizes), np.bool_)
    odd[row_of[(flat < 0) | (flat >= num_classes)]] = True
    odd[row_of[1:][(flat[1:] <= flat[:-1]) & (row_of[1:] == row_of[:-1])]] = True
    return odd
