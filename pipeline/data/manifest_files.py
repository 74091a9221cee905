"""Read and write the files of a manifest: a Parquet table, the same table as CSV, and two JSON files beside them."""

from __future__ import annotations

import csv
import json
import sys
from array import array
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import spec as specs
from pipeline.data.manifest import DATASET_NAME, SCHEMA_VERSION, Manifest, check_manifest, prepare_command, split_counts
from pipeline.data.readers import guard_cell
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic, written_aside
from pipeline.types import SPLITS, Sample

BUILDER_VERSION = 1  # raised whenever the same official files give other rows
ROWS_PER_BATCH = 2**16  # rows that are read or written at a time
MANIFEST_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("sample_id", pa.string()),
        ("split", pa.string()),
        ("media_type", pa.string()),
        ("media_path", pa.string()),
        ("label_ids", pa.list_(pa.int32())),
        ("texts", pa.list_(pa.string())),
        ("source_row", pa.int32()),
        ("group_id", pa.string()),
        ("media_ok", pa.bool_()),
        ("extra", pa.string()),
    ]
)
_COLUMNS_READ = ("source_row", "sample_id", "split", "media_path", "texts", "label_ids", "group_id", "extra", "media_ok")


def write_manifest(manifest: Manifest, home: Path) -> Path:
    """Check a manifest and write it to `<home>/manifests/<dataset>.parquet`, .csv, .meta.json and .location.json.

    The CSV file holds the same table without loss. The same samples give the same bytes in all files except .location.json;
    the Parquet file needs the same version of pyarrow for that.

    Returns:
        The path of the Parquet file.

    Raises:
        UserError: names the first faulty row, see `check_manifest`.
    """
    check_manifest(manifest)
    sidecar = _sidecar(manifest)
    path = manifest_path(home, manifest.dataset, "parquet")
    location = {"media_root": str(manifest.media_root.resolve())}
    write_atomic(manifest_path(home, manifest.dataset, "location.json"), _indented_json(location))
    _write_tables(manifest, path, manifest_path(home, manifest.dataset, "csv"))
    write_atomic(manifest_path(home, manifest.dataset, "meta.json"), _indented_json(sidecar))
    return path


def _sidecar(manifest: Manifest) -> dict[str, Any]:
    """The content of .meta.json."""
    return {
        "schema_version": SCHEMA_VERSION,
        "builder_version": BUILDER_VERSION,
        "dataset": manifest.dataset,
        "label_kind": manifest.label_kind,
        "class_names": manifest.class_names,
        "num_classes": len(manifest.class_names),
        "counts": split_counts(manifest),
        "class_counts": _class_counts(manifest),
        "fingerprint": manifest.fingerprint(),
        "meta": manifest.meta,
    }


def _write_tables(manifest: Manifest, parquet_path: Path, csv_path: Path) -> None:
    """Write the rows to both files, a batch at a time."""
    with ExitStack() as files:
        csv_aside, parquet_aside = (files.enter_context(written_aside(path)) for path in (csv_path, parquet_path))
        text = csv.DictWriter(
            files.enter_context(csv_aside.open("w", encoding="utf-8", newline="")), MANIFEST_SCHEMA.names, lineterminator="\n"
        )
        table = files.enter_context(pq.ParquetWriter(parquet_aside, MANIFEST_SCHEMA, compression="zstd"))
        text.writeheader()
        remaining = (_row(manifest, source_row, sample) for source_row, sample in manifest.in_file_order())
        for rows in iter(lambda: list(islice(remaining, ROWS_PER_BATCH)), []):
            text.writerows(map(_csv_cells, rows))
            table.write_table(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))


def read_manifest(home: Path, dataset: str) -> Manifest:
    """Read the manifest that `write_manifest` wrote, and check it again.

    Raises:
        UserError: a file is missing or does not fit the others (with the remedy), or a row is faulty (with the row).
    """
    remedy = f"run: {prepare_command(dataset, read_plugin(home, dataset))}"
    paths = [manifest_path(home, dataset, suffix) for suffix in ("parquet", "meta.json", "location.json")]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing{_what_else_is_prepared(home, dataset)}; {remedy}")
    try:
        sidecar, location = (json.loads(path.read_text(encoding="utf-8")) for path in paths[1:])
        manifest = Manifest(
            dataset=dataset,
            label_kind=sidecar["label_kind"],
            class_names=tuple(sidecar["class_names"]),
            meta=sidecar["meta"],
            media_root=Path(location["media_root"]),
            **_read_rows(paths[0]),
        )
        is_intact = manifest.fingerprint() == sidecar["fingerprint"]
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{paths[0]} or its sidecar cannot be read ({error}); {remedy}") from error
    if not is_intact:
        raise UserError(f"{paths[0]} does not fit {paths[1].name}: one of them was changed or half written; {remedy}")
    check_manifest(manifest)
    return manifest


def read_plugin(home: Path, dataset: str) -> str:
    """Return the plug-in that builds a dataset: that of its manifest in `home`, else the one of the same name."""
    return str(_read_meta(home, dataset).get("plugin", dataset))


def _read_meta(home: Path, dataset: str) -> dict[str, Any]:
    """Return the meta of a manifest from its small sidecar alone; empty if it cannot be read."""
    path = manifest_path(home, dataset, "meta.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["meta"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # `read_manifest` says what is wrong with it
        return {}


def _what_else_is_prepared(home: Path, dataset: str) -> str:
    """Return in brackets which other datasets a home has, for users who have named another one, or another home."""
    if not home.is_dir():
        return f" (there is no folder {home}: --home says where yours is)"
    names = sorted(path.stem for path in (home / "manifests").glob("*.parquet") if path.stem != dataset)
    return f" (prepared: {', '.join(names)})" if names else ""


def load_dataset_spec(home: Path, dataset: str) -> dict[str, Any]:
    """Return the spec of a dataset of this home, which is that of the plug-in that built it; see `spec.load_spec`.

    Where the plug-in takes pictures and videos, `encoders` are those for the media of this dataset.
    """
    spec = specs.load_spec(read_plugin(home, dataset))
    is_video = _read_meta(home, dataset).get("media_type") == "video"
    return {**spec, "encoders": spec["video_encoders"]} if is_video and "video_encoders" in spec else spec


def _read_rows(path: Path) -> dict[str, Any]:
    """Read, in batches, the fields of `Manifest` that are in the Parquet file; samples are sorted by source row."""
    samples: list[Sample] = []
    source_rows = array("q")
    extra: dict[str, str] = {}
    media_ok: dict[str, bool] = {}
    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(MANIFEST_SCHEMA):
            raise UserError("it has other columns than a manifest")
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=list(_COLUMNS_READ)):
            for row in zip(*(batch[name].to_pylist() for name in _COLUMNS_READ), strict=True):
                source_row, sample_id, split, media, texts, labels, group, facts, is_ok = row
                interned = tuple(map(sys.intern, texts))  # the same tag occurs in many samples: keep one object for all
                samples.append(Sample(sample_id, sys.intern(split), Path(media), interned, tuple(labels), group or ""))
                source_rows.append(source_row)
                extra |= {sample_id: facts} if facts != "{}" else {}
                media_ok |= {sample_id: is_ok} if is_ok is not None else {}
    order = np.argsort(np.frombuffer(source_rows, np.int64), kind="stable").tolist()
    rows = tuple(source_rows[position] for position in order)
    return {
        "samples": tuple(samples[position] for position in order),
        "rows": () if rows == tuple(range(len(rows))) else rows,
        "extra": extra,
        "media_ok": media_ok,
    }


def manifest_path(home: Path, dataset: str, suffix: str) -> Path:
    if not DATASET_NAME.fullmatch(dataset):
        raise UserError(f"dataset name {dataset!r} may hold only letters, digits, '_', '-' and '.'")
    return home / "manifests" / f"{dataset}.{suffix}"


def _row(manifest: Manifest, source_row: int, sample: Sample) -> dict[str, Any]:
    return {
        "dataset": manifest.dataset,
        "sample_id": sample.id,
        "split": sample.split,
        "media_type": manifest.meta["media_type"],
        "media_path": sample.media.as_posix(),
        "label_ids": list(sample.labels),
        "texts": list(sample.texts),
        "source_row": source_row,
        "group_id": sample.group or None,
        "media_ok": manifest.media_ok.get(sample.id),
        "extra": manifest.extra.get(sample.id, "{}"),
    }


def _class_counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    counts = Counter((sample.split, label) for sample in manifest.samples for label in sample.labels)
    return {split: {name: counts[split, label] for label, name in enumerate(manifest.class_names)} for split in SPLITS}


def _csv_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as CSV cells that a spreadsheet may open: lists and booleans become JSON, null becomes an empty cell."""
    lists = {name: json.dumps(row[name], ensure_ascii=False) for name in ("label_ids", "texts")}
    media_ok = "" if row["media_ok"] is None else json.dumps(row["media_ok"])
    names = {name: guard_cell(row[name] or "") for name in ("sample_id", "media_path", "group_id")}
    return {**row, **lists, **names, "media_ok": media_ok}


def _indented_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
