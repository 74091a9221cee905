"""Read and write the files of a manifest: a Parquet table, the same table as CSV, and two JSON files beside them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data import spec as specs
from pipeline.data.columns import BATCH_ROWS, ColumnWriter, compute, numpy_array, text_bytes
from pipeline.data.manifest import DATASET_NAME, SCHEMA_VERSION, Manifest, check_manifest, prepare_command, split_counts
from pipeline.data.readers import guard_cell
from pipeline.data.sample_columns import NO_GROUP, SAMPLE_SCHEMA, SampleColumns, json_lists, list_sizes
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic, written_aside
from pipeline.runtime.places import absolute_text, parse_place
from pipeline.types import SPLITS

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
SHOWN_LEFT_OUT = 3
_COLUMNS_READ = (  # the first ones are those of `SAMPLE_SCHEMA`, in its order
    *("sample_id", "split", "media_path", "texts", "label_ids", "group_id"),
    *("source_row", "extra", "media_ok"),
)


def write_manifest(manifest: Manifest, home: Path) -> Path:
    """Check a manifest and write it to `<home>/manifests/<dataset>.parquet`, .csv, .meta.json and .location.json.

    Samples that the builder left out, with the reasons, go to the `left_out_path`. The CSV file holds the same table as
    the first without loss. The same samples give the same bytes in all files except .location.json; the Parquet file
    needs the same version of pyarrow for that.

    Returns:
        The path of the Parquet file.

    Raises:
        UserError: names the first faulty row, see `check_manifest`.
    """
    check_manifest(manifest)
    path = manifest_path(home, manifest.dataset, "parquet")
    location: dict[str, Any] = {"media_root": absolute_text(manifest.media_root)}
    if manifest.media_stamps:
        location["media_stamps"] = dict(manifest.media_stamps)
    with ThreadPoolExecutor(1) as pool:
        sidecar = pool.submit(_sidecar, manifest)  # the fingerprint of millions of rows takes half as long as writing them
        write_atomic(manifest_path(home, manifest.dataset, "location.json"), _indented_json(location))
        _write_tables(manifest, path, manifest_path(home, manifest.dataset, "csv"))
        _write_left_out(manifest, left_out_path(home, manifest.dataset))
        write_atomic(manifest_path(home, manifest.dataset, "meta.json"), _indented_json(sidecar.result()))
    return path


def _write_left_out(manifest: Manifest, path: Path) -> None:
    if not manifest.left_out:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    with written_aside(path) as aside, pq.ParquetWriter(aside, manifest.left_out.schema, compression="zstd") as table:
        for block in manifest.left_out.blocks(num_rows=ROWS_PER_BATCH):
            table.write_batch(block)


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
        text = files.enter_context(csv_aside.open("wb"))
        table = files.enter_context(pq.ParquetWriter(parquet_aside, MANIFEST_SCHEMA, compression="zstd"))
        text.write(",".join(MANIFEST_SCHEMA.names).encode() + b"\n")
        for batch in _table_batches(manifest):
            text.write(_csv_rows(batch).data)
            table.write_batch(batch)


def _table_batches(manifest: Manifest) -> Iterator[pa.RecordBatch]:
    """Yield the rows of the Parquet file."""
    order = manifest.file_order()
    source = np.asarray(manifest.rows, np.int64)[order] if manifest.rows else order
    start = 0
    for block in manifest.columns.select(order).blocks(num_rows=ROWS_PER_BATCH):
        num_rows = len(block)
        facts, is_ok = (
            [of.get(id) for id in block.column("id").to_pylist()] if of else None for of in (manifest.extra, manifest.media_ok)
        )
        groups = block.column("group")
        columns = {
            "dataset": pa.repeat(manifest.dataset, num_rows),
            "sample_id": block.column("id"),
            "split": block.column("split"),
            "media_type": pa.repeat(manifest.meta["media_type"], num_rows),
            "media_path": block.column("media"),
            "label_ids": block.column("labels"),
            "texts": block.column("texts"),
            "source_row": pa.array(source[start : start + num_rows], pa.int32()),
            "group_id": compute.if_else(compute.equal(groups, ""), None, groups),
            "media_ok": pa.array(is_ok, pa.bool_()) if is_ok else pa.nulls(num_rows, pa.bool_()),
            "extra": compute.fill_null(pa.array(facts, pa.string()), "{}") if facts else pa.repeat("{}", num_rows),
        }
        yield pa.RecordBatch.from_arrays([columns[name] for name in MANIFEST_SCHEMA.names], schema=MANIFEST_SCHEMA)
        start += num_rows


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
            media_root=parse_place(location["media_root"]),
            media_stamps=location.get("media_stamps", {}),
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


def left_out_facts(home: Path, dataset: str) -> dict[str, str]:
    """Return how many samples were left out for each reason, the first ones, and which file lists all; {}: none were."""
    meta, path = _read_meta(home, dataset), left_out_path(home, dataset)
    if not path.is_file():
        return {}
    reasons = sorted(dict(meta.get("left_out_counts", {})).items(), key=lambda reason: -int(reason[1]))
    counts = "; ".join(f"{count}: {reason}" for reason, count in reasons)
    first = "; ".join(map(str, list(meta.get("left_out", []))[:SHOWN_LEFT_OUT]))
    return {"left out": counts, "the first of them": first, "all of them": str(path)}


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
    writer = ColumnWriter(SAMPLE_SCHEMA)
    source_rows = [np.zeros(0, np.int64)]
    extra: dict[str, str] = {}
    media_ok: dict[str, bool] = {}
    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(MANIFEST_SCHEMA):
            raise UserError("it has other columns than a manifest")
        for batch in file.iter_batches(BATCH_ROWS, columns=list(_COLUMNS_READ)):
            batch.validate(full=True)  # names that are not UTF-8
            by_name = dict(zip(_COLUMNS_READ, map(batch.column, _COLUMNS_READ), strict=True))
            columns = [by_name[name] for name in _COLUMNS_READ[: len(SAMPLE_SCHEMA)]]
            columns[-1] = compute.coalesce(columns[-1], NO_GROUP)
            if any(column.null_count or (pa.types.is_list(column.type) and column.flatten().null_count) for column in columns):
                raise ValueError("a value is missing")
            writer.add(pa.RecordBatch.from_arrays(columns, schema=SAMPLE_SCHEMA))
            source_rows.append(numpy_array(by_name["source_row"]))
            extra |= _facts_by_id(by_name["sample_id"], by_name["extra"], compute.not_equal(by_name["extra"], "{}"))
            media_ok |= _facts_by_id(by_name["sample_id"], by_name["media_ok"], compute.is_valid(by_name["media_ok"]))
    source = np.concatenate(source_rows)
    order = np.argsort(source, kind="stable")
    is_whole = np.array_equal(source[order], np.arange(len(order)))
    samples = SampleColumns(writer.finish(), None if np.array_equal(order, np.arange(len(order))) else order)
    return {"samples": samples, "rows": () if is_whole else array("q", source[order]), "extra": extra, "media_ok": media_ok}


def _facts_by_id(ids: pa.Array, facts: pa.Array, is_given: pa.Array) -> dict[str, Any]:
    """Return the facts of the samples that have one, by id."""
    return dict(zip(ids.filter(is_given).to_pylist(), facts.filter(is_given).to_pylist(), strict=True))


def manifest_path(home: Path, dataset: str, suffix: str) -> Path:
    if not DATASET_NAME.fullmatch(dataset):
        raise UserError(f"dataset name {dataset!r} may hold only letters, digits, '_', '-' and '.'")
    return home / "manifests" / f"{dataset}.{suffix}"


def left_out_path(home: Path, dataset: str) -> Path:
    """Return the table of the samples that the builder of a dataset could not use; no dataset has such a path."""
    return home / "manifests" / "left_out" / f"{dataset}.parquet"


def _class_counts(manifest: Manifest) -> dict[str, dict[str, int]]:
    counts = np.zeros((len(SPLITS), len(manifest.class_names)), np.int64)
    start = 0
    for block in manifest.columns.blocks(["labels"]):
        labels = block.column(0)
        codes = np.repeat(manifest.columns.split_codes[start : start + len(block)], list_sizes(labels))
        np.add.at(counts, (codes, numpy_array(labels.flatten())), 1)
        start += len(block)
    return {split: dict(zip(manifest.class_names, counts[code].tolist(), strict=True)) for code, split in enumerate(SPLITS)}


def _csv_rows(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    """Return the rows of a batch as lines of CSV that a spreadsheet may open.

    Lists and booleans become JSON, null becomes an empty cell.
    """
    cells = [_csv_cells(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    cells[-1] = compute.binary_join_element_wise(cells[-1], "\n", "")
    return text_bytes(compute.binary_join_element_wise(*cells, ","))


def _csv_cells(name: str, column: pa.Array) -> pa.Array:
    cells = json_lists(column, ", ") if pa.types.is_list(column.type) else column.cast(pa.string())
    cells = compute.coalesce(cells, "")
    if name in ("sample_id", "media_path", "group_id"):
        may_be_odd = compute.match_substring_regex(cells, r"^'*[=+\-@\t\r]")
        guarded = pa.array(map(guard_cell, cells.filter(may_be_odd).to_pylist()), pa.string())
        cells = compute.replace_with_mask(cells, may_be_odd, guarded)
    data = text_bytes(cells)
    if not any((data == ord(character)).any() for character in '",\n'):
        return cells
    is_quoted = compute.match_substring_regex(cells, '[",\n]')
    quoted = compute.binary_join_element_wise('"', compute.replace_substring(cells.filter(is_quoted), '"', '""'), '"', "")
    return compute.replace_with_mask(cells, is_quoted, quoted)


def _indented_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
