"""Parse the cells of a user's table column by column.

Cells that no rule changes or refuses are taken as they are, a column of a batch at once; every other distinct cell goes through
the functions of `cells`, so that both ways mean the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.cells import parse_texts
from pipeline.data.columns import compute, holds_controls, index_array, numpy_array
from pipeline.data.manifest import is_half
from pipeline.data.readers import LINE_LIMIT
from pipeline.data.table_files import Cells
from pipeline.runtime.errors import UserError

Parse = Callable[[Any, Path, int], Any]  # cell, table and line -> value; `UserError` if the cell is faulty
MOST_NAME_BYTES = 1024  # of a name that is taken as it is
ODD_PATH = r"\\|^/|^[A-Za-z]:|//|/$|(?:^|/)\.\.?(?:/|$)"
_MAY_BE_LIST = r"^[\pZ\pC]*(?:[\[({]|array\()"
_TEXT_LISTS = pa.list_(pa.string())


class BatchParser:
    """Parses the columns of some rows, one after the other.

    `error` is what reading row by row would raise: that of the first faulty row, and there of the column that was parsed first.
    """

    def __init__(self, table: Path, lines: NDArray[np.int64]) -> None:
        """Parse rows of a table, which stand in these lines."""
        self._table, self._lines = table, lines
        self._end = len(lines)  # the first faulty row; cells from there on may be left out, as None
        self.error: UserError | None = None

    def stop(self, row: int, error: UserError) -> None:
        """Note that a row is faulty."""
        if row < self._end:
            self._end, self.error = row, error

    def each(self, cells: Cells, parse: Parse, rows: NDArray[np.int64] | None = None) -> tuple[list[Any], NDArray[np.int64]]:
        """Parse every distinct cell once.

        Args:
            cells: the cells of some rows.
            parse: reads a cell.
            rows: the ascending rows of the cells in the batch; None: all rows.

        Returns:
            The distinct values, and for each cell the position of its value in them.
        """
        values, codes = _distinct(cells)
        rows = np.arange(len(codes)) if rows is None else rows
        first = np.empty(len(values), np.int64)
        first[codes[::-1]] = rows[::-1]
        parsed: list[Any] = []
        for value, row in zip(values, first.tolist(), strict=True):
            if row >= self._end:
                break
            try:
                parsed.append(parse(value, self._table, int(self._lines[row])))
            except UserError as error:
                self.stop(row, error)
        return parsed + [None] * (len(values) - len(parsed)), codes

    def strings(self, cells: Cells, parse: Parse) -> pa.Array:
        """Return texts that are read from cells of which few are distinct."""
        values, codes = self.each(cells, parse)
        return pa.array(values, pa.string()).take(index_array(codes))

    def names(self, cells: Cells, parse: Parse, odd: str = "") -> pa.Array:
        """Return paths or ids. Short ones without control characters, in which `odd` finds nothing, are taken as they are."""
        if isinstance(cells, list):
            return self.strings(cells, parse)
        names: pa.Array = cells.cast(pa.string()) if pa.types.is_integer(cells.type) else cells
        if not pa.types.is_string(names.type):
            return self.strings(names, parse)
        sizes = numpy_array(compute.binary_length(names).fill_null(0))
        is_odd = (sizes == 0) | (sizes > MOST_NAME_BYTES)
        pattern = "|".join(filter(None, (odd, r"[\x00-\x1f\x7f]" if holds_controls(names) else "")))
        if pattern:
            is_odd |= _fits(names, pattern)
        rows = np.flatnonzero(is_odd)
        if not len(rows):
            return names
        values, codes = self.each(names.take(index_array(rows)), parse, rows)
        return compute.replace_with_mask(names, pa.array(is_odd), pa.array(values, pa.string()).take(index_array(codes)))

    def texts(self, cells: Cells) -> tuple[pa.Array, NDArray[np.int64]]:
        """Return the lists of texts in the cells, and the rows whose texts hold half of a character; their lists are empty."""
        plain, is_odd = _plain_texts(cells)
        rows = np.flatnonzero(is_odd)
        if not len(rows):
            return plain, rows
        odd = cells if isinstance(cells, list) else cells.take(index_array(rows))
        values, codes = self.each(odd, parse_texts, rows)
        half = np.array([is_half(texts or ()) for texts in values])
        lists = pa.array([() if is_bad else texts for texts, is_bad in zip(values, half, strict=True)], _TEXT_LISTS)
        order = np.arange(len(plain))
        order[rows] = len(plain) + codes
        return pa.concat_arrays([plain, lists]).take(index_array(order)), rows[half[codes]]


def _plain_texts(cells: Cells) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Return the lists of texts in the cells that are taken as they are, and which cells are to be parsed."""
    if not isinstance(cells, list) and pa.types.is_string(cells.type):
        lengths = numpy_array(compute.binary_length(cells).fill_null(0))
        is_odd = (lengths > LINE_LIMIT) | _fits(cells, _MAY_BE_LIST)
        has_text = (lengths > 0) & ~is_odd
        return _lists(has_text, cells.filter(pa.array(has_text))), is_odd
    if not isinstance(cells, list) and _is_list_of_texts(cells.type):
        lists = cells.cast(_TEXT_LISTS)
        sizes, texts = numpy_array(compute.list_value_length(lists).fill_null(0)), lists.flatten()
        lengths = numpy_array(compute.binary_length(texts).fill_null(0))
        is_odd = np.zeros(len(sizes), np.bool_)
        is_odd[np.repeat(np.arange(len(sizes)), sizes)[(lengths == 0) | (lengths > LINE_LIMIT)]] = True
        return _lists(sizes, texts), is_odd
    return _lists(np.zeros(len(cells), np.int32), pa.array([], pa.string())), np.ones(len(cells), np.bool_)


def _distinct(cells: Cells) -> tuple[list[Any], NDArray[np.int64]]:
    """Return the distinct values in the order in which they come first, and the number of each cell's value in them."""
    if isinstance(cells, list) or pa.types.is_nested(cells.type):
        return cells if isinstance(cells, list) else cells.to_pylist(), np.arange(len(cells))
    encoded = cells.dictionary_encode(null_encoding="encode")
    return encoded.dictionary.to_pylist(), numpy_array(encoded.indices).astype(np.int64)


def _fits(texts: pa.Array, pattern: str) -> NDArray[np.bool_]:
    return numpy_array(compute.match_substring_regex(texts, pattern).fill_null(False)).astype(np.bool_)


def _lists(sizes: NDArray[Any], texts: pa.Array) -> pa.Array:
    """Return lists of so many texts each."""
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(bounds), texts)


def _is_list_of_texts(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type))
