"""Read the rows of a user's table, .csv, .jsonl or .parquet, as mappings of columns to values, and find the columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.cells import nfc
from pipeline.data.manifest_files import MANIFEST_SCHEMA
from pipeline.data.readers import csv_rows, line_error, text_lines, unguard_cell
from pipeline.runtime.errors import UserError

TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of an imagefolder
INDEX_COLUMNS = ("", "Unnamed: 0", "__index_level_0__")  # the numbers of rows that pandas writes
SEPARATORS = (",", ";", "\t")  # the first one of those that are as frequent
_BATCH_ROWS = 64  # rows of a Parquet file that are in memory at once


def tables_in(folder: Path) -> list[Path]:
    """Return the tables that lie in a folder itself, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLE_SUFFIXES and path.is_file())


def read_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (line or row number, column -> value) for every row of a table; names of columns are in the form NFC.

    Raises:
        UserError: the file is of another kind, or damaged; with its line.
    """
    if table.suffix.lower() == ".csv":
        yield from _csv_records(table)
    elif table.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _json_records(table)
    elif table.suffix.lower() == ".parquet":
        yield from _parquet_records(table)
    else:
        raise UserError(f"{table} is none of: .csv, .jsonl, .parquet")


def _csv_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    header: list[str] = []
    is_manifest = False
    for line, cells in csv_rows(table, _separator(table)):
        if not header:
            header = [nfc(cell) for cell in cells]
            is_manifest = header == MANIFEST_SCHEMA.names  # which is guarded against spreadsheets
            if len(set(header)) != len(header):
                raise line_error(table, line, "two columns have the same name")
        elif len(cells) != len(header):
            raise line_error(table, line, f"{len(cells)} cells where the header has {len(header)}")
        else:
            yield line, dict(zip(header, map(unguard_cell, cells) if is_manifest else cells, strict=True))


def _separator(table: Path) -> str:
    """Return what separates the cells: a comma, or a tab or semicolon (as Excel writes in Europe) if the header has none."""
    header = next(text_lines(table), "")
    return "," if "," in header else max(SEPARATORS, key=header.count)


def _json_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(text_lines(table), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise line_error(table, line, f"broken JSON: {error}") from error
        if not isinstance(record, dict):
            raise line_error(table, line, "it is no JSON object")
        yield line, {nfc(name): value for name, value in record.items()}


def _parquet_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    row = 0
    try:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for record in batch.to_pylist():
                    row += 1
                    yield row, {nfc(name): value for name, value in record.items()}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{table} is damaged or no Parquet file: {error}") from error


def column_candidates(spec: Mapping[str, Any], role: str) -> list[str]:
    """Return the names that the column of a role may have: the given one, else the default ones."""
    return [nfc(spec[f"{role}_column"])] if spec[f"{role}_column"] else spec["defaults"][role]


def find_columns(spec: Mapping[str, Any], record: Mapping[str, Any], table: Path) -> dict[str, str]:
    """Return the column of every role; `UserError` lists the columns if a given or needed one does not exist."""
    columns: dict[str, str] = {}
    for role in spec["defaults"]:
        names = column_candidates(spec, role)
        found = next((name for name in names if name in record), "")
        if not found and (spec[f"{role}_column"] or role == "media"):
            shown = ", ".join(name if name == name.strip() else repr(name) for name in record)
            option = "" if spec[f"{role}_column"] else f", with --{role}-column NAME"
            raise UserError(f"{table} has no column {' or '.join(names)}; choose one of: {shown}{option}")
        if found:
            columns[role] = found
    return columns


def no_label_column(spec: Mapping[str, Any], record: Mapping[str, Any], table: Path, line: int, why: str = "") -> UserError:
    """Return the error for a table without labels: why the folders are no classes ("": they may be), columns, options."""
    folders = "" if why else ", or say that the folders of the media are the classes, --set folder_labels=true"
    return line_error(
        table,
        line,
        f"{why + ', and ' if why else ''}the table has no label column ({' or '.join(column_candidates(spec, 'label'))}); its "
        f"columns are: {', '.join(record)}; name the one of the labels with --label-column{folders}",
    )
