"""The most probable classes of items as rows, and files of such rows, which grow as they come: CSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.readers import guard_cell
from pipeline.evaluation.classify import ClassifiedRows
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.files import written_aside

Row = Mapping[str, Any]
SUFFIXES = (".csv", ".jsonl", ".parquet")


def prediction_columns(name: str, num_classes: int, top: int) -> dict[str, type]:
    """Return the columns of predictions with their types.

    Args:
        name: of the first column: "file" or "sample_id".
        num_classes: C.
        top: how many classes of each item; at most C are there.
    """
    places = range(1, min(top, num_classes) + 1)
    pairs = [pair for k in places for pair in ((f"class_{k}", str), (f"probability_{k}", float))]
    return {name: str, **dict(pairs), "error": str}


def prediction_rows(classified: ClassifiedRows, class_names: Sequence[str], columns: Mapping[str, type]) -> list[Row]:
    """Return one row per item, with a value for each column; an item that failed has an error, and no classes (None)."""
    name, *cells, _ = columns
    order = np.argsort(-classified.probabilities, axis=1, kind="stable")[:, : len(cells) // 2].tolist()
    rows = []
    for item, best, own, error in zip(classified.names, order, classified.probabilities, classified.errors, strict=True):
        values = [None] * len(cells) if error else [value for k in best for value in (class_names[k], float(own[k]))]
        rows.append({name: item, **dict(zip(cells, values, strict=True)), "error": error})
    return rows


def check_suffix(path: Path) -> None:
    """Refuse a file whose ending names no format.

    Raises:
        UserError: with the endings that do.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise unknown_choice(path.suffix, f"{path}: the ending says the format", SUFFIXES)


@contextmanager
def open_prediction_file(path: Path, columns: Mapping[str, type]) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yield a function that appends rows to a file, which gets its name when the block ends without an error.

    Args:
        path: its ending says the format, see `check_suffix`. Cells of a CSV file that a spreadsheet would run as formulas get
            an apostrophe.
        columns: see `prediction_columns`.
    """
    writers = {".csv": _csv_writer, ".jsonl": _json_writer, ".parquet": _parquet_writer}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside, ExitStack() as files:
        write = writers[path.suffix.lower()](aside, columns, files)
        yield lambda rows: write([{key: _valid(value) for key, value in row.items()} for row in rows])
        files.close()


def _valid(value: Any) -> Any:
    """Return a text that UTF-8 can spell: a file name of other bytes is written with escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _csv_writer(path: Path, columns: Mapping[str, type], files: ExitStack) -> Callable[[Sequence[Row]], None]:
    file = files.enter_context(path.open("w", encoding="utf-8", newline=""))
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()

    def write(rows: Sequence[Row]) -> None:
        writer.writerows(
            {key: guard_cell(cell) if isinstance(cell, str) else cell for key, cell in row.items()} for row in rows
        )
        file.flush()

    return write


def _json_writer(path: Path, columns: Mapping[str, type], files: ExitStack) -> Callable[[Sequence[Row]], None]:
    file = files.enter_context(path.open("w", encoding="utf-8"))

    def write(rows: Sequence[Row]) -> None:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        file.flush()

    return write


def _parquet_writer(path: Path, columns: Mapping[str, type], files: ExitStack) -> Callable[[Sequence[Row]], None]:
    kinds = {str: pa.string(), float: pa.float64()}
    schema = pa.schema([(name, kinds[kind]) for name, kind in columns.items()])
    writer = files.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
    return lambda rows: writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))
