"""A manifest says which samples a dataset has: media, texts, labels, splits; built once from official files, then only read."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.readers import LINE_LIMIT, UNPRINTABLE, formula_like
from pipeline.data.spec import parse_spec
from pipeline.runtime.files import canonical_json, write_atomic, written_aside
from pipeline.types import SPLITS, Sample

SCHEMA_VERSION = 1
BUILDER_VERSION = 1  # raised whenever the same official files give other rows
DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
BATCH = 2**16  # rows written at a time
HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
READ_ORDER = ("source_row", "sample_id", "split", "media_path", "texts", "label_ids", "group_id", "extra", "media_ok")
NO_COUNTS: Mapping[str, int] = MappingProxyType({})
PACKAGE = Path(str(resources.files("pipeline")))
# inside the installed package, or beside it in a checkout
SPEC_FOLDER = next(f for f in (PACKAGE / "data_manifests", PACKAGE.parent / "data_manifests") if f.is_dir())
COLUMNS = pa.schema(
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


@dataclass(frozen=True)
class Manifest:
    """The samples of a dataset in the order of its official files, and what their labels mean."""

    dataset: str
    label_kind: Literal["single", "multi"]
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    meta: Mapping[str, Any]  # media_type, text, licence, attribution, sources (versions, sha256); JSON values, no machine facts
    media_root: Path  # where the media of this machine are; no part of the identity
    rows: tuple[int, ...] = ()  # of each sample in meta["lists"], one after another; () when the samples are all of them
    extra: Mapping[str, str] = field(default_factory=dict)  # sample id -> JSON object of facts that no stage needs
    media_ok: Mapping[str, bool] = field(default_factory=dict)  # sample id -> whether its file could be decoded, once tried

    def fingerprint(self) -> str:
        """SHA-256 of the meaning: label kind, class names and every row; neither paths of the machine nor provenance."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """The fingerprint of [version, kind, names, rows], fed row by row: the text of millions of rows need not be held."""
        digest = hashlib.sha256(canonical_json([SCHEMA_VERSION, self.label_kind, self.class_names])[:-1].encode() + b",[")
        comma = b""
        for _, sample in _file_order(self):
            row = [sample.id, sample.split, sample.media.as_posix(), sample.labels, sample.texts, sample.group]
            digest.update(comma + canonical_json(row).encode())
            comma = b","
        digest.update(b"]]")
        return digest.hexdigest()

    def split(self, name: str) -> list[Sample]:
        """The samples of a split; `ValueError` with the choices when there is no such split."""
        if name not in SPLITS:
            raise ValueError(f"unknown split {name!r}; choose one of: {', '.join(SPLITS)}")
        return [sample for sample in self.samples if sample.split == name]

    def media_path(self, sample: Sample) -> Path:
        """The sample's file; `ValueError` when the path or a symbolic link leads out of the media root."""
        path = (self.media_root / sample.media).resolve()
        if not path.is_relative_to(self.media_root.resolve()):
            raise ValueError(f"{sample.media.as_posix()} of sample {sample.id!r} leads out of the media folder")
        return path

    def where(self, position: int) -> str:
        """The official list and line of a sample, or its row where the dataset has no lists."""
        row = self.rows[position] if self.rows else position
        for entry in self.meta.get("lists", ()):
            if row < entry["rows"]:
                return f"{entry['file']}, {entry['unit']} {entry['first'] + row}"
            row -= entry["rows"]
        return f"row {row}"


def _file_order(manifest: Manifest) -> Iterator[tuple[int, Sample]]:
    """(source row, sample), sorted by split, then by source row."""
    source = np.array(manifest.rows) if manifest.rows else np.arange(len(manifest.samples))
    splits = np.fromiter((SPLITS.index(sample.split) for sample in manifest.samples), np.int8, len(manifest.samples))
    for position in np.lexsort((source, splits)).tolist():
        yield int(source[position]), manifest.samples[position]


def load_spec(dataset: str) -> dict[str, Any]:
    """What `data_manifests/<dataset>.yaml` says about a dataset; `ValueError` with the choices when there is none."""
    choices = sorted(path.stem for path in SPEC_FOLDER.glob("*.yaml"))
    if dataset not in choices:
        raise ValueError(f"unknown dataset {dataset!r}; choose one of: {', '.join(choices)}")
    return parse_spec(SPEC_FOLDER / f"{dataset}.yaml")


def check_manifest(manifest: Manifest, counts: Mapping[str, int] = NO_COUNTS) -> None:
    """`ValueError` that names the first faulty row, by list and line: schema, then `counts`, then leaks between splits."""
    _check_schema(manifest)
    check_counts(manifest, counts)
    _check_leaks(manifest, lambda sample: sample.group, "group")
    _check_leaks(manifest, lambda sample: sample.media.as_posix(), "media file")
    if not manifest.meta.get("texts_recur", False):
        _check_texts(manifest)


def _check_schema(manifest: Manifest) -> None:
    if not DATASET_NAME.fullmatch(manifest.dataset):
        raise ValueError(f"dataset name {manifest.dataset!r} may hold only letters, digits, '_', '-' and '.'")
    if not manifest.samples:
        raise ValueError(f"dataset {manifest.dataset!r} has no samples")
    for name, count in Counter(manifest.class_names).items():
        if count > 1 or not name or UNPRINTABLE.search(name):
            what = "more than once" if count > 1 else "which is empty or unprintable"
            raise ValueError(f"dataset {manifest.dataset!r} names the class {name[:80]!r} {what}")
    for position, sample in enumerate(manifest.samples):
        if fault_found := _fault(sample, manifest):
            raise _row_error(manifest, position, fault_found)
    for _, first, second in _repeats(manifest.samples, lambda sample: sample.id):
        raise _row_error(manifest, second, f"repeats the id of {manifest.where(first)}")


def _row_error(manifest: Manifest, position: int, what: str) -> ValueError:
    shown = manifest.samples[position].id[:80]
    return ValueError(f"dataset {manifest.dataset!r}, {manifest.where(position)}, sample {shown!r}: {what}")


def _fault(sample: Sample, manifest: Manifest) -> str:
    """What breaks the schema in one row, or ""."""
    media = sample.media.as_posix()
    if not sample.id:
        return "the id is empty"
    cells = (sample.id, media, sample.group)
    if any(map(UNPRINTABLE.search, cells)) or any(map(formula_like, cells)):
        return "id, media path or group hold control characters, or would be run as a formula by a spreadsheet"
    written = (*sample.texts, manifest.extra.get(sample.id, ""))
    if max(*map(len, cells), sum(map(len, written)) + 4 * len(written)) > LINE_LIMIT:  # texts are one cell of CSV
        return f"a field has more than {LINE_LIMIT} characters"
    if any(map(HALF_CHARACTER.search, written)):
        return "a text holds a lone surrogate, half of a character that UTF-8 cannot spell"
    if sample.split not in SPLITS:
        return f"unknown split {sample.split!r}; choose one of: {', '.join(SPLITS)}"
    if media.startswith("/") or ".." in media.split("/") or media in ("", ".") or "\\" in media:
        return f"media path {media[:80]!r} must be relative, with '/' and without '..'"
    if manifest.label_kind == "single" and len(sample.labels) != 1:
        return f"a single-label dataset needs exactly one label, found {len(sample.labels)}"
    if list(sample.labels) != sorted(set(sample.labels)):
        return f"labels {list(sample.labels)} must be sorted and unique"
    outside = [label for label in sample.labels if not 0 <= label < len(manifest.class_names)]
    if outside:
        return f"label {outside[0]} is outside 0..{len(manifest.class_names) - 1}"
    return ""


def _check_leaks(manifest: Manifest, key_of: Callable[[Sample], str], what: str) -> None:
    """Samples with the same key, "" for none, belong to one split."""
    for key, first, second in _repeats(manifest.samples, key_of):
        sample, other = manifest.samples[second], manifest.samples[first]
        if other.split != sample.split:
            there = f"sample {other.id[:80]!r} of it is in {other.split} ({manifest.where(first)})"
            raise _row_error(manifest, second, f"{what} {key[:80]!r} is in {sample.split}, but {there}")


def _check_texts(manifest: Manifest) -> None:
    """No test sample has the texts of a training sample: a head would have been trained on what it must not know of it."""
    for test in recurring_texts(manifest)[:1].tolist():
        key = _text_key(manifest.samples[test])
        train = next(i for i, sample in enumerate(manifest.samples) if sample.split == "train" and _text_key(sample) == key)
        leak = f"has the texts of {manifest.where(train)}: test texts leak into training"
        raise _row_error(manifest, test, f"{leak}; where they recur by nature, prepare with --set texts_recur=true")


def recurring_texts(manifest: Manifest) -> NDArray[np.int64]:
    """Ascending positions of the test samples whose texts, as a whole and in any order, are those of a training sample.

    Case, blanks and Unicode's compatibility forms do not tell texts apart; a sample without text shares none. Texts are
    compared by 64-bit hashes, so that millions of them need not be held.
    """
    hashes = np.fromiter((hash(_text_key(sample)) for sample in manifest.samples), np.int64, len(manifest.samples))
    split = np.array([SPLITS.index(sample.split) for sample in manifest.samples], np.int8)
    train, test = (np.flatnonzero((split == SPLITS.index(name)) & (hashes != hash(""))) for name in ("train", "test"))
    return test[np.isin(hashes[test], hashes[train])]


def _text_key(sample: Sample) -> str:
    units = {" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in sample.texts}
    return "\n".join(sorted(units - {""}))


def _repeats(samples: Sequence[Sample], key_of: Callable[[Sample], str]) -> Iterator[tuple[str, int, int]]:
    """Every key that comes again, with its first and this position; "" is no key. Keys that come once are not kept."""
    hashes = np.fromiter((hash(key_of(sample)) for sample in samples), np.int64, len(samples))
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    first: dict[str, int] = {}
    for position in np.unique(np.concatenate([order[1:][same], order[:-1][same]])).tolist():
        key = key_of(samples[position])
        if key and first.setdefault(key, position) != position:
            yield key, first[key], position


def check_counts(manifest: Manifest, expected: Mapping[str, int]) -> None:
    """`ValueError` when the number of samples ("all", "train", "val", "test") or "classes" is not the expected one."""
    found = found_counts(manifest)
    wrong = [f"{name} {found[name]} (expected {count})" for name, count in expected.items() if found[name] != count]
    if wrong:
        files = ", ".join(entry["file"] for entry in manifest.meta.get("lists", ())) or "the files"
        raise ValueError(f"dataset {manifest.dataset!r} has unexpected counts: {', '.join(wrong)}; are {files} complete?")


def found_counts(manifest: Manifest) -> dict[str, int]:
    """What there is to count: "all", the splits, "classes", and what the builder has counted in the official files."""
    whole = {"all": len(manifest.samples), **split_counts(manifest), "classes": len(manifest.class_names)}
    return {**whole, **manifest.meta.get("counts", {})}


def split_counts(manifest: Manifest) -> dict[str, int]:
    """Number of samples per split."""
    counts = Counter(sample.split for sample in manifest.samples)
    return {split: counts[split] for split in SPLITS}


def write_manifest(manifest: Manifest, home: Path) -> Path:
    """Check and write `<home>/manifests/<dataset>.parquet`, its lossless .csv twin, .meta.json and .location.json.

    The same samples give the same bytes, but for the location; those of the Parquet file with the same version of pyarrow.
    """
    check_manifest(manifest)
    sidecar = {
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
    path = _path(home, manifest.dataset, "parquet")
    write_atomic(_path(home, manifest.dataset, "location.json"), _json({"media_root": str(manifest.media_root.resolve())}))
    with ExitStack() as files:
        text_file, table_file = (
            files.enter_context(written_aside(_path(home, manifest.dataset, kind))) for kind in ("csv", "parquet")
        )
        text = csv.DictWriter(
            files.enter_context(text_file.open("w", encoding="utf-8", newline="")), COLUMNS.names, lineterminator="\n"
        )
        table = files.enter_context(pq.ParquetWriter(table_file, COLUMNS, compression="zstd"))
        text.writeheader()
        remaining = (_row(manifest, source_row, sample) for source_row, sample in _file_order(manifest))
        for rows in iter(lambda: list(islice(remaining, BATCH)), []):
            text.writerows(map(_cells, rows))
            table.write_table(pa.Table.from_pylist(rows, schema=COLUMNS))
    write_atomic(_path(home, manifest.dataset, "meta.json"), _json(sidecar))
    return path


def read_manifest(home: Path, dataset: str) -> Manifest:
    """The manifest written by `write_manifest`, checked again.

    `ValueError` with the remedy when a file is missing or does not fit the others, or with the faulty row.
    """
    remedy = f"run: diffalign prepare {dataset}"
    paths = [_path(home, dataset, suffix) for suffix in ("parquet", "meta.json", "location.json")]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing; {remedy}")
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
        intact = manifest.fingerprint() == sidecar["fingerprint"]
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{paths[0]} or its sidecar cannot be read ({error}); {remedy}") from error
    if not intact:
        raise ValueError(f"{paths[0]} does not fit {paths[1].name}: one of them was changed or half written; {remedy}")
    check_manifest(manifest)
    return manifest


def _read_rows(path: Path) -> dict[str, Any]:
    """The fields of a manifest that stand in its Parquet file, read in batches; samples in the order of their source rows."""
    samples: list[Sample] = []
    source_rows = array("q")
    extra: dict[str, str] = {}
    media_ok: dict[str, bool] = {}
    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(COLUMNS):
            raise ValueError("it has other columns than a manifest")
        for batch in file.iter_batches(BATCH, columns=list(READ_ORDER)):
            for row in zip(*(batch[name].to_pylist() for name in READ_ORDER), strict=True):
                source_row, sample_id, split, media, texts, labels, group, facts, is_ok = row
                words = tuple(map(sys.intern, texts))  # tags recur: one object for all of them
                samples.append(Sample(sample_id, sys.intern(split), Path(media), words, tuple(labels), group or ""))
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


def _path(home: Path, dataset: str, suffix: str) -> Path:
    if not DATASET_NAME.fullmatch(dataset):
        raise ValueError(f"dataset name {dataset!r} may hold only letters, digits, '_', '-' and '.'")
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


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as CSV cells: lists and truth values are JSON, an empty cell is null."""
    spelled = {name: json.dumps(row[name], ensure_ascii=False) for name in ("label_ids", "texts")}
    media_ok = "" if row["media_ok"] is None else json.dumps(row["media_ok"])
    return {**row, **spelled, "group_id": row["group_id"] or "", "media_ok": media_ok}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
