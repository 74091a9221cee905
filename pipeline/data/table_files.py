"""Read the rows of a user's table, .csv, .jsonl or .parquet, in batches by column, and find the columns."""

from __future__ import annotations

import codecs
import functools
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.cells import nfc
from pipeline.data.columns import BATCH_ROWS, compute
from pipeline.data.manifest_files import MANIFEST_SCHEMA
from pipeline.data.readers import LINE_LIMIT, LineReader, line_error, rows_of_lines, text_lines, unguard_cell
from pipeline.runtime.errors import UserError

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder
INDEX_COLUMNS = ("", "Unnamed: 0", "__index_level_0__")  # the numbers of rows that pandas writes
SEPARATORS = (",", ";", "\t")  # the first one of those that are as frequent
TABLE_BLOCK_BYTES = 2**24  # of a table that are read at once
Cells = pa.Array | list[Any]  # a list where the values of a JSON column are not all texts
_SIMPLE = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
RowT = TypeVar("RowT")


def tables_in(folder: Path) -> list[Path]:
    """Return the tables that lie in a folder itself, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file())


class TableBatch(NamedTuple):
    """Some rows of a table, by column."""

    lines: NDArray[np.int64]  # or numbers of rows in a Parquet file, from 1
    names: Sequence[Collection[str]]  # of the columns that each row has, in the form NFC; one object where they are the same
    cells: Callable[[str], Cells]  # the values of a column, None for a row without it


def read_batches(table: Path) -> Iterator[TableBatch]:
    """Yield the rows of a table; all rows before a faulty one come before its error.

    Raises:
        UserError: the file is of another kind, or damaged; with its line.
    """
    if table.suffix.lower() == ".csv":
        yield from _csv_batches(table)
    elif table.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _json_batches(table)
    elif table.suffix.lower() == ".parquet":
        yield from _parquet_batches(table)
    else:
        raise UserError(f"{table} is none of: .csv, .jsonl, .parquet; one with tabs between the cells is read as .csv")


def _collect(rows: Iterator[RowT], lines: LineReader) -> Iterator[list[RowT]]:
    """Yield lists of at most `BATCH_ROWS` rows, and about `TABLE_BLOCK_BYTES`, read from lines; all come before an error."""
    error: UserError | None = None
    batch: list[RowT] = []
    while error is None:
        start = lines.file.tell()
        try:
            for row in itertools.islice(rows, BATCH_ROWS):
                batch.append(row)
                if lines.file.tell() - start > TABLE_BLOCK_BYTES:
                    break
        except UserError as found:
            error = found
        if not batch:
            break
        yield batch
        batch = []
    if error:
        raise error


def _csv_batches(table: Path) -> Iterator[TableBatch]:
    """Yield the rows of a CSV file: quickly where each line is a row without peculiarities, else one by one."""
    separator = _separator(table)
    with table.open("rb") as file:
        lines = LineReader(file, table)
        rows = rows_of_lines(lines, separator)
        header = [nfc(name) for name in next(rows, (0, []))[1]]
        if again := _repeated(header):
            raise line_error(table, lines.number, f"two columns have the same name, {again}")
        while block := file.read(TABLE_BLOCK_BYTES):
            block += file.readline(LINE_LIMIT + 1)
            num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
            plain = _read_plain(block, num_lines, header, separator)
            if plain is None:
                file.seek(-len(block), os.SEEK_CUR)
                own = _rows_up_to(rows, lines, lines.number + num_lines, header)
                for batch in _collect(own, lines):
                    numbers, cells = zip(*batch, strict=True)
                    yield _csv_batch(
                        header, np.array(numbers), [pa.array(each, pa.string()) for each in zip(*cells, strict=True)]
                    )
                continue
            for batch in plain.to_batches():
                yield _csv_batch(header, np.arange(lines.number + 1, lines.number + 1 + len(batch)), batch.columns)
                lines.number += len(batch)


def _csv_batch(header: list[str], lines: NDArray[np.int64], columns: Sequence[pa.Array]) -> TableBatch:
    is_guarded = header == MANIFEST_SCHEMA.names  # against spreadsheets
    by_name = dict(zip(header, map(_unguard, columns) if is_guarded else columns, strict=True))
    return TableBatch(lines, [header] * len(lines), by_name.__getitem__)


def _unguard(cells: pa.Array) -> pa.Array:
    may_be = compute.starts_with(cells, "'")
    return compute.replace_with_mask(cells, may_be, pa.array(map(unguard_cell, cells.filter(may_be).to_pylist()), pa.string()))


def _rows_up_to(
    rows: Iterator[tuple[int, list[str]]], lines: LineReader, last: int, header: Sequence[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that begin up to a line."""
    while lines.number < last:
        row = next(rows, None)
        if row is None:
            return
        if len(row[1]) != len(header):
            what = f"{len(row[1])} cells where the header has {len(header)}{_separator_hint(header)}"
            raise line_error(lines.path, row[0], what)
        yield row


def _read_plain(block: bytes, num_lines: int, header: Sequence[str], separator: str) -> pa.Table | None:
    """Return the rows of some lines of a CSV file if each line is one row about which all readers of CSV agree, else None."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
    bounds = np.concatenate([[0], ends, [len(block)]])[: num_lines + 1].astype(np.int32)
    if np.diff(bounds).max() > LINE_LIMIT or b"\0" in block or block.startswith(codecs.BOM_UTF8):
        return None
    if block.count(b"\r") != block.count(b"\r\n"):
        return None
    if b'"' in block:
        cell = rf'(?:[^"\r\n{separator}]*|"(?:[^"\r\n]|"")*")'
        lines = pa.StringArray.from_buffers(num_lines, pa.py_buffer(bounds), pa.py_buffer(block))
        is_plain = compute.match_substring_regex(lines, rf"^{cell}(?:{separator}{cell})*\r?\n?$")
        if not compute.all(is_plain).as_py():
            return None
    try:
        found = pyarrow.csv.read_csv(
            pa.BufferReader(block),
            pyarrow.csv.ReadOptions(column_names=header),
            pyarrow.csv.ParseOptions(delimiter=separator),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
        )
    except pa.ArrowInvalid:  # the text is not UTF-8, or a row has more or fewer cells; the slow way says which
        return None
    return found if found.num_rows == num_lines else None  # there are blank lines


def _separator(table: Path) -> str:
    """Return what separates the cells: a comma, or a tab or semicolon (as Excel writes in Europe) if the header has none."""
    header = next(text_lines(table), "")
    return "," if "," in header else max(SEPARATORS, key=header.count)


def _separator_hint(header: Iterable[str]) -> str:
    """Return a hint if the names of columns look as if the cells were separated by something else; "": they do not."""
    other = next((sign for sign in (*SEPARATORS, "|") if any(sign in name for name in header)), "")
    rule = "cells are separated by commas or, if the header has no comma, by semicolons or tabs"
    return f"; is {other!r} between the cells? {rule}" if other else ""


def _json_batches(table: Path) -> Iterator[TableBatch]:
    with table.open("rb") as file:
        lines = LineReader(file, table)
        for batch in _collect(_json_records(lines), lines):
            numbers, records = zip(*batch, strict=True)
            yield TableBatch(np.array(numbers), records, functools.partial(_json_cells, records))


def _json_records(lines: LineReader) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for text in lines:
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise line_error(lines.path, lines.number, f"broken JSON: {error}") from error
        if not isinstance(record, dict):
            raise line_error(lines.path, lines.number, "it is no JSON object")
        yield lines.number, record if "".join(record).isascii() else {nfc(name): value for name, value in record.items()}


def _json_cells(records: Sequence[Mapping[str, Any]], name: str) -> Cells:
    values = [record.get(name) for record in records]
    try:
        return pa.array(values, pa.string())
    except (pa.ArrowException, TypeError, ValueError):  # not all are texts, or one has half of a character
        return values


def _parquet_batches(table: Path) -> Iterator[TableBatch]:
    row = 1
    try:
        with pq.ParquetFile(table) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            row_bytes = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
            for batch in file.iter_batches(max(1, min(BATCH_ROWS, TABLE_BLOCK_BYTES // max(1, row_bytes)))):
                batch.validate(full=True)  # texts that are not UTF-8
                names = [nfc(name) for name in batch.schema.names]
                if again := _repeated(names):
                    raise UserError(f"{table}: two columns have the same name, {again}")
                by_name = dict(zip(names, map(_decoded, batch.columns), strict=True))
                yield TableBatch(np.arange(row, row + len(batch)), [list(by_name)] * len(batch), by_name.__getitem__)
                row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{table} is damaged or no Parquet file: {error}") from error


def _decoded(cells: pa.Array) -> Cells:
    """Return texts as ordinary strings, however they are stored, and as a list what functions for columns do not take."""
    cells = cells.dictionary_decode() if isinstance(cells, pa.DictionaryArray) else cells
    kind = cells.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return cells.cast(pa.string())
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    item = kind.value_type if is_list else kind
    takes = (pa.types.is_string, pa.types.is_large_string, *(() if is_list else _SIMPLE))
    return cells if any(is_kind(item) for is_kind in takes) else cells.to_pylist()


def _repeated(names: Sequence[str]) -> str:
    """Return the first name that comes twice, as it is shown; "": none does."""
    return next((repr(name) for name in names if names.count(name) > 1), "")


def shown_names(names: Iterable[str]) -> str:
    """Return the names of columns in one line; one that is empty, or has blanks at an end, is in quotes."""
    return ", ".join(name if name and name == name.strip() else repr(name) for name in names)


def column_candidates(spec: Mapping[str, Any], role: str) -> list[str]:
    """Return the names that the column of a role may have: the given one, else the default ones."""
    return [nfc(spec[f"{role}_column"])] if spec[f"{role}_column"] else spec["defaults"][role]


def find_columns(spec: Mapping[str, Any], present: Collection[str], table: Path) -> dict[str, str]:
    """Return the column of every role; `UserError` lists the columns if a given or needed one does not exist."""
    columns: dict[str, str] = {}
    for role in spec["defaults"]:
        names = column_candidates(spec, role)
        found = next((name for name in names if name in present), "")
        if not found and (spec[f"{role}_column"] or role == "media"):
            option = "" if spec[f"{role}_column"] else f", with --{role}-column NAME"
            choices = f"{shown_names(present)}{option}{_separator_hint(present) if table.suffix.lower() == '.csv' else ''}"
            raise UserError(f"{table} has no column {' or '.join(names)}; choose one of: {choices}")
        if found:
            columns[role] = found
    return columns


def no_label_column(spec: Mapping[str, Any], present: Collection[str], table: Path, line: int, why: str = "") -> UserError:
    """Return the error for a table without labels: why the folders are no classes ("": they may be), columns, options."""
    folders = "" if why else ", or say that the folders of the media are the classes, --set folder_labels=true"
    return line_error(
        table,
        line,
        f"{why + ', and ' if why else ''}the table has no label column ({' or '.join(column_candidates(spec, 'label'))}); its "
        f"columns are: {shown_names(present)}; name the one of the labels with --label-column{folders}",
    )
