"""Small tables and folders of media, for the tests of users' own data."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.datasets.table import MediaTable
from pipeline.data.manifest import Manifest
from pipeline.data.spec import load_spec


def build(root: Path, **options: Any) -> Manifest:
    """Build the manifest of a folder; the short texts of these tables may occur in several splits."""
    return MediaTable().build({**load_spec("table"), "texts_recur": True, **options}, root)


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n", encoding="utf-8")


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)


WRITERS = {"data.csv": write_csv, "data.jsonl": write_jsonl, "data.parquet": write_parquet}
Writer = Callable[[Path, list[dict[str, Any]]], None]


def make_empty_files(root: Path, *names: str) -> None:
    """Create empty files with these names below `root`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
