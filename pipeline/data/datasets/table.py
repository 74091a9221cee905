"""Your own data: a CSV, JSON-lines or Parquet table of media and labels, a Hugging Face imagefolder, or one folder per class.

What `root` holds decides the layout, the first that fits:
1. `file` is given, or a column is and there is one table: that table; media are named relative to `image_root`, which is
   `root` unless it is given.
2. metadata.csv, .jsonl or .parquet in `root` or in its split folders (imagefolder): media are named relative to that folder.
3. Folders below `image_root`: <class>/… or <split>/<class>/…; the folder is the label.
A table needs a media column; the label is a column, else the folder of the media file. Labels are names, or 0-based ids when
every one of them is a number and not all are class names; several are a JSON list, or parted by `label_separator`. Texts are
one text, or a JSON list of them. The id is a column, else the media path without its ending. The columns are those of a
manifest unless others are named, so the CSV twin of a manifest is such a table.
The split is a column, else the split folder (train, val, valid, validation, dev, test), else the SHA-256 of the group (of the
id where there is none) at the percents of `splits`; the manifest's meta says which. `val_percent` takes a share of the training
samples that a column or folder gives, by the same hash, for validation. Names and CSV cells that a spreadsheet would run, paths
that leave the root and fields of more than 2^20 characters are refused with file and line (Parquet: row).
A row takes about 1.4 KB of memory (0.8 million rows took 1.05 GiB): 8 million rows need about 11 GB.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import readers as lists
from pipeline.data import splits
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.spec import describe_spec, enforced_counts, held_out_percent
from pipeline.types import Sample

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
IMAGE = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg")
VIDEO = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".csv", ".jsonl", ".ndjson", ".parquet")
MAX_CLASSES = 100_000  # of numbered labels without class names: a wrong column holds larger numbers
_BATCH = 64  # rows of a Parquet file in memory at once
_NUMBER = re.compile(r"0|[1-9]\d*")


class Row(NamedTuple):
    """One sample as the table writes it."""

    file: Path  # the table, or the root of a folder tree
    line: int
    media: str  # relative to the root
    labels: tuple[str, ...]  # names, or ids as digits
    texts: tuple[str, ...]
    split: str  # "" when neither a column nor a folder says it
    id: str
    group: str


def build(spec: Mapping[str, Any], root: Path | None) -> Manifest:
    """The manifest of the data in `root`; `spec` is table.yaml with the user's options in it.

    `ValueError` with file and line for whatever cannot be used.
    """
    if root is None or not root.is_dir():
        raise ValueError(f"{root} is no folder; --root takes the folder of your media")
    spec = {**spec, "file": _named_table(spec, root)}
    media_root = lists.locate(root, spec["layout"]["image_root"], "the folder of media")
    tables = _tables(spec, root)
    rows = [row for table in tables for row in _table_rows(spec, root, table)] if tables else list(_tree_rows(media_root))
    if not rows:
        raise ValueError(f"{tables[0] if tables else media_root} has no rows; see the layouts in `diffalign datasets table`")
    names_file = [lists.locate(root, [spec["class_names"]], "the list of class names")] if spec["class_names"] else []
    label_kind = _choice(spec, "labels", "multi" if any(len(set(row.labels)) > 1 for row in rows) else "single")
    classes, labels = _labels(rows, label_kind, [name for path in names_file for name in lists.read_names(path)])
    samples = tuple(
        Sample(row.id, split, Path(row.media), row.texts, ids, row.group)
        for row, split, ids in zip(rows, _splits(rows, spec), labels, strict=True)
    )
    media_type = _choice(spec, "media", _media_type(rows) if spec["media"] == "auto" else "")
    entries, positions = _listed(rows, root) if tables else ([], ())
    task = "singlelabel" if label_kind == "single" else "multilabel"
    meta = describe_spec(
        {**spec, "media_type": media_type, "metrics": {"task": task, "topk": [1, 5]}},
        sources=lists.sources([*tables, *names_file], root),
        lists=entries,
        split_rule="as given" if rows[0].split else "by the SHA-256 of group or id",
    )
    manifest = Manifest(spec["name"], label_kind, classes, samples, meta, media_root, positions)
    check_manifest(manifest, enforced_counts(spec))
    return manifest


def _splits(rows: list[Row], spec: Mapping[str, Any]) -> Iterator[str]:
    """The split of every row: given for all of them, or for none."""
    percent = held_out_percent(spec)
    for row in rows:
        name = row.group or row.id
        if bool(row.split) != bool(rows[0].split):
            where = f"is in {'a' if row.split else 'no'} split folder, unlike the first row"
            raise lists.fault(row.file, row.line, f"{row.media[:80]!r} {where}; say the splits of all rows, or of none")
        if row.split == "train" and percent and splits.is_held_out(name, percent):
            yield "val"
        else:
            yield row.split or splits.by_hash(name, spec["splits"])


def _listed(rows: list[Row], root: Path) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The tables, and the line of every row in all of them, one table after another: a faulty row is named by it."""
    entries: list[dict[str, Any]] = []
    positions: list[int] = []
    before = 0
    for file, group in itertools.groupby(rows, key=lambda row: row.file):
        lines = [row.line for row in group]
        entries.append(lists.listing(file, root, lines[-1], unit="row" if file.suffix.lower() == ".parquet" else "line"))
        positions += [before + line - 1 for line in lines]
        before += lines[-1]
    return entries, tuple(positions)


def _choice(spec: Mapping[str, Any], key: str, found: str) -> Any:
    """The user's choice, or what was found in the data."""
    choices = {"labels": ("single", "multi"), "media": ("image", "video")}[key]
    if spec[key] not in ("auto", *choices):
        raise ValueError(f"{key} is {spec[key]!r}; choose one of: auto, {', '.join(choices)}")
    return found if spec[key] == "auto" else spec[key]


def _media_type(rows: list[Row]) -> str:
    """What the endings say, which must agree."""
    is_video = [row.media.lower().endswith(VIDEO) for row in rows]
    if len(set(is_video)) > 1:
        odd = rows[is_video.index(not is_video[0])]
        raise lists.fault(
            odd.file, odd.line, f"{odd.media[:80]!r} makes images and videos in one table; --set media says which"
        )
    return "video" if is_video[0] else "image"


def _named_table(spec: Mapping[str, Any], root: Path) -> str:
    """The table that is given, or the only one in the root when columns are given, or ""."""
    if spec["file"] or not any(spec[f"{role}_column"] for role in spec["defaults"]) or _tables(spec, root):
        return spec["file"]
    found = sorted(path.name for path in root.iterdir() if path.suffix.lower() in TABLES and path.is_file())
    if len(found) != 1:
        choices = ", ".join(found) or "no .csv, .jsonl or .parquet"
        raise ValueError(f"{root} holds {len(found)} tables ({choices}); say where it is, --set file=NAME")
    return found[0]


def _tables(spec: Mapping[str, Any], root: Path) -> list[Path]:
    """The tables to read: the one that is named, or the metadata files of an imagefolder, or none."""
    if spec["file"]:
        return [lists.locate(root, [spec["file"]], "the table")]
    names = ["", *sorted(f"{path.name}/" for path in root.iterdir() if path.name.lower() in SPLIT_NAMES and path.is_dir())]
    found = (f"{folder}{name}" for folder in names for name in METADATA)
    return [lists.locate(root, [name], "the table") for name in found if (root / name).is_file()]


def _tree_rows(root: Path) -> Iterator[Row]:
    """One row for every media file below a class folder, in the order of the paths; hidden files and folders are no data."""
    line, depth = 0, _split_depth(root)
    for base, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        linked = next((name for name in inside if os.path.islink(os.path.join(base, name))), "")
        if linked:
            raise ValueError(f"{Path(base, linked)} is a symbolic link to a folder; put the folder itself there")
        for name in sorted(name for name in names if name.lower().endswith((*IMAGE, *VIDEO)) and name[0] != "."):
            line += 1
            media = lists.media_path(Path(base, name).relative_to(root).as_posix(), root, line)
            parts = media.split("/")
            if len(parts) < depth + 2:
                raise ValueError(f"{root / media} is in no class folder; name a table, or make folders <class>/…")
            split = SPLIT_NAMES[parts[0].lower()] if depth else ""
            yield Row(root, line, media, (parts[depth],), (), split, _stem(media), "")


def _split_depth(root: Path) -> int:
    """1 when the folders below the root are splits, 0 when they are classes; `ValueError` when they are a mixture."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = [name for name in folders if name.lower() in SPLIT_NAMES]
    if len(named) < 2 or len(named) == len(folders):  # one alone may be the class of trains
        return int(bool(folders) and len(named) == len(folders))
    other = next(name for name in folders if name not in named)
    raise ValueError(
        f"{root} holds split folders ({', '.join(named)}) and others ({other}); move the others away, or name a table"
    )


def _table_rows(spec: Mapping[str, Any], root: Path, table: Path) -> Iterator[Row]:
    """The rows of one table."""
    prefix = "" if spec["file"] or table.parent == root else f"{table.parent.relative_to(root).as_posix()}/"
    columns: dict[str, str] = {}
    for line, record in _records(table):
        columns = columns or _columns(spec, record, table)
        late = next(
            (name for role in spec["defaults"] for name in _names(spec, role) if role not in columns and name in record), ""
        )
        if late:
            raise lists.fault(table, line, f"the column {late!r} is not in the first row; write it in every row, or in none")
        cells = {role: record.get(column) for role, column in columns.items()}
        media = prefix + lists.media_path(_plain(cells["media"], table, line), table, line)
        parts = media.split("/")
        if "label" not in columns and len(parts) < 2:
            raise lists.fault(table, line, "there is neither a label column nor a class folder; name the column")
        labels = _items(cells["label"], spec["label_separator"], table, line) if "label" in columns else (parts[-2],)
        split = _split(cells["split"], table, line) if "split" in columns else _folder_split(spec, parts)
        id = _plain(cells["id"], table, line) if "id" in columns else _stem(media)
        group = _plain(cells["group"], table, line) if cells.get("group") not in (None, "") else ""
        yield Row(table, line, media, labels, _texts(cells.get("text"), table, line), split, id, group)


def _names(spec: Mapping[str, Any], role: str) -> list[str]:
    """The names that the column of a role may have: the one that is given, else the usual ones."""
    return [spec[f"{role}_column"]] if spec[f"{role}_column"] else spec["defaults"][role]


def _columns(spec: Mapping[str, Any], record: Mapping[str, Any], table: Path) -> dict[str, str]:
    """Role -> column; `ValueError` lists the columns when a named or needed one is not there."""
    columns: dict[str, str] = {}
    for role in spec["defaults"]:
        names = _names(spec, role)
        found = next((name for name in names if name in record), "")
        if not found and (spec[f"{role}_column"] or role == "media"):
            raise ValueError(f"{table} has no column {' or '.join(names)}; choose one of: {', '.join(record)}")
        if found:
            columns[role] = found
    return columns


def _records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line or row number, column -> value) of a table."""
    if table.suffix.lower() == ".csv":
        yield from _csv_records(table)
    elif table.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _json_records(table)
    elif table.suffix.lower() == ".parquet":
        yield from _parquet_records(table)
    else:
        raise ValueError(f"{table} is none of: .csv, .jsonl, .parquet")


def _csv_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    header: list[str] = []
    for line, cells in lists.csv_rows(table):
        if not header:
            header = cells
            if len(set(header)) != len(header):
                raise lists.fault(table, line, "two columns have the same name")
        elif len(cells) != len(header):
            raise lists.fault(table, line, f"{len(cells)} cells where the header has {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _json_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(lists.text_lines(table), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise lists.fault(table, line, f"broken JSON: {error}") from error
        if not isinstance(record, dict):
            raise lists.fault(table, line, "it is no JSON object")
        yield line, record


def _parquet_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    row = 0
    try:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table} is damaged or no Parquet file: {error}") from error


def _plain(value: Any, table: Path, line: int) -> str:
    """A path, id, group or name: a short text without control characters that no spreadsheet would run."""
    if type(value) is int:
        value = str(value)
    faults = (
        (not isinstance(value, str), "is no text"),
        (value == "", "is empty"),
        (len(str(value)) > 1024, "is longer than 1024 characters"),
        (bool(lists.UNPRINTABLE.search(str(value)[:1024])), "holds control characters, or half of one"),
        (lists.formula_like(str(value)), "would be run as a formula by a spreadsheet"),
        (str(value).startswith("-"), "is negative, or begins like a formula"),
    )
    fault = next((reason for is_fault, reason in faults if is_fault), "")
    if fault:
        raise lists.fault(table, line, f"{value!r:.60} {fault}")
    return value


def _items(value: Any, separator: str, table: Path, line: int) -> tuple[str, ...]:
    """The labels in a cell: names and ids."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise lists.fault(table, line, f"the label {value[:40]!r} is no JSON list") from error
    if isinstance(value, str):
        value = [part.strip() for part in (value.split(separator) if separator else [value])]
    items = [item for item in (value if isinstance(value, list) else [value]) if item not in ("", None)]
    return tuple(_plain(item, table, line) for item in items)


def _texts(value: Any, table: Path, line: int) -> tuple[str, ...]:
    """The texts in a cell: one, or a JSON list of them."""
    if isinstance(value, str) and value.startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value  # a text that begins with a bracket
        value = parsed if isinstance(parsed, list) else value
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if text is not None and (not isinstance(text, str) or len(text) > lists.LINE_LIMIT):
            raise lists.fault(
                table, line, f"a text is no text, or longer than {lists.LINE_LIMIT} characters: {str(text)[:40]!r}"
            )
    return tuple(text for text in texts if text)


def _split(value: Any, table: Path, line: int) -> str:
    split = SPLIT_NAMES.get(str(value).strip().lower(), "")
    if not split:
        raise lists.fault(table, line, f"unknown split {str(value or '')[:40]!r}; choose one of: {', '.join(SPLIT_NAMES)}")
    return split


def _folder_split(spec: Mapping[str, Any], parts: list[str]) -> str:
    """The split folder of an imagefolder's file, or ""."""
    return "" if spec["file"] else SPLIT_NAMES.get(parts[0].lower(), "")


def _stem(media: str) -> str:
    return os.path.splitext(media)[0]


def _labels(rows: list[Row], kind: str, names: list[str]) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """The class names, and every row's sorted label ids."""
    written = {label for row in rows for label in row.labels}
    numbered = not written <= set(names) and all(_NUMBER.fullmatch(label) for label in written)
    classes = names or (_numbers(written, rows) if numbered else sorted(written))
    ids = {str(i) if numbered else name: i for i, name in enumerate(classes)}
    result: list[tuple[int, ...]] = []
    for row in rows:
        unknown = next((label for label in row.labels if label not in ids), None)
        if unknown is not None:
            raise lists.fault(row.file, row.line, f"the label {unknown!r} is none of the {len(classes)} class names")
        if kind == "single" and len(set(row.labels)) != 1:
            raise lists.fault(
                row.file, row.line, f"{len(row.labels)} labels where one is due; for none or several: --set labels=multi"
            )
        result.append(tuple(sorted({ids[label] for label in row.labels})))
    return tuple(classes), result


def _numbers(written: Iterable[str], rows: list[Row]) -> list[str]:
    """The names "0" to the largest number."""
    largest = max((int(label) for label in written), default=0)
    if largest >= MAX_CLASSES:
        raise ValueError(f"{rows[0].file}: the label {largest} is above {MAX_CLASSES - 1}; give a list of class names")
    return [str(i) for i in range(largest + 1)]
