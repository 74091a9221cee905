"""Your own data: a CSV, JSON-lines or Parquet table of media and labels, a Hugging Face imagefolder, or one folder per class.

The contents of `root` decide the layout; the first that fits is used:
1. A table: `file` is given, or a column is given and `root` holds exactly one table. Media paths are relative to `image_root`,
   which is `root` unless it is given.
2. An imagefolder: metadata.csv, .jsonl or .parquet in `root` or in its split folders. Media paths are relative to that folder.
3. Folders below `image_root`: <class>/… or <split>/<class>/…; the name of the folder is the label.
A table needs a media column. The label is a column, else the folder of the media file. Labels are names, or ids from 0 if all
of them are numbers and not all are class names. Several labels are a JSON list, or are separated by `label_separator`. Texts
are one text, or a JSON list of texts. The id is a column, else the media path without its suffix. The default column names are
those of a manifest, so the CSV copy of a manifest is such a table.
The split is a column, else the split folder (train, val, valid, validation, dev, test), else it follows from the SHA-256 of the
group (or of the id, if there is no group) and the percentages `splits`; the manifest's meta says which. If a column or folder
gives the split, `val_percent` moves a share of the training samples to validation, by the same hash. Refused, with file and
line (Parquet: row): names and CSV cells that a spreadsheet would run as a formula, paths that lead out of the root, and fields
of more than 2^20 characters. A row takes about 1.4 KB of memory (0.8 million rows took 1.05 GiB): 8 million rows need about
11 GB.
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

from pipeline.data import readers, splits
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.spec import held_out_percent, manifest_meta, required_counts
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

_SPLIT_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg")
_VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
_METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TABLE_SUFFIXES = (".csv", ".jsonl", ".ndjson", ".parquet")
MAX_CLASSES = 100_000  # of numbered labels without class names; larger numbers are probably those of a wrong column
_BATCH_ROWS = 64  # rows of a Parquet file that are in memory at once
_NUMBER = re.compile(r"0|[1-9]\d*")


class TableRow(NamedTuple):
    """One sample, as the table or the folder tree gives it."""

    file: Path  # the table, or the root of a folder tree
    line: int
    media: str  # relative to the root
    labels: tuple[str, ...]  # names, or ids as digits
    texts: tuple[str, ...]
    split: str  # "": neither a column nor a folder gives it
    id: str
    group: str


class MediaTable(Dataset):
    """A table, an imagefolder, or a tree with one folder per class."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from what is in `root`; `UserError` names file and line if the data cannot be used."""
        if root is None:
            raise UserError(
                "where are your media? Give their folder, --root DIR; the layouts are in `diffalign datasets table`"
            )
        if not root.is_dir():
            raise UserError(f"{root} is no folder; --root takes the folder of your media")
        spec = {**spec, "file": _named_table(spec, root)}
        media_root = readers.locate(root, spec["layout"]["image_root"], "the folder of media")
        tables = _find_tables(spec, root)
        rows = [row for table in tables for row in _read_table(spec, root, table)] if tables else list(_read_tree(media_root))
        if not rows:
            raise UserError(f"{tables[0] if tables else media_root} has no rows; see the layouts in `diffalign datasets table`")
        names_file = [readers.locate(root, [spec["class_names"]], "the list of class names")] if spec["class_names"] else []
        label_kind = _chosen_or_found(spec, "labels", "multi" if any(len(set(row.labels)) > 1 for row in rows) else "single")
        classes, labels = _label_ids(rows, label_kind, [name for path in names_file for name in readers.read_names(path)])
        samples = tuple(
            Sample(row.id, split, Path(row.media), row.texts, ids, row.group)
            for row, split, ids in zip(rows, _splits_of_rows(rows, spec), labels, strict=True)
        )
        media_type = _chosen_or_found(spec, "media", _media_type(rows) if spec["media"] == "auto" else "")
        entries, positions = _list_entries(rows, root) if tables else ([], ())
        task = "singlelabel" if label_kind == "single" else "multilabel"
        meta = manifest_meta(
            {**spec, "media_type": media_type, "metrics": {"task": task, "topk": [1, 5]}},
            sources=readers.source_hashes([*tables, *names_file], root),
            lists=entries,
            split_rule="as given" if rows[0].split else "by the SHA-256 of group or id",
        )
        manifest = Manifest(spec["name"], label_kind, classes, samples, meta, media_root, positions)
        check_manifest(manifest, required_counts(spec))
        return manifest


def _splits_of_rows(rows: list[TableRow], spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield the split of every row; either all rows give a split, or none."""
    percent = held_out_percent(spec)
    for row in rows:
        name = row.group or row.id
        if bool(row.split) != bool(rows[0].split):
            where = f"is in {'a' if row.split else 'no'} split folder, unlike the first row"
            raise readers.line_error(row.file, row.line, f"{row.media[:80]!r} {where}; say the splits of all rows, or of none")
        if row.split == "train" and percent and splits.is_held_out(name, percent):
            yield "val"
        else:
            yield row.split or splits.by_hash(name, spec["splits"])


def _list_entries(rows: list[TableRow], root: Path) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Return the entries of the tables in the manifest's meta, and the position of every row in them.

    A position is the line of the row, counted from 0 through all tables; error messages name a row by it.
    """
    entries: list[dict[str, Any]] = []
    positions: list[int] = []
    before = 0
    for file, group in itertools.groupby(rows, key=lambda row: row.file):
        lines = [row.line for row in group]
        entries.append(readers.list_entry(file, root, lines[-1], unit="row" if file.suffix.lower() == ".parquet" else "line"))
        positions += [before + line - 1 for line in lines]
        before += lines[-1]
    return entries, tuple(positions)


def _chosen_or_found(spec: Mapping[str, Any], key: str, found: str) -> Any:
    """Return the user's choice, or, if it is "auto", what was found in the data."""
    choices = {"labels": ("single", "multi"), "media": ("image", "video")}[key]
    if spec[key] not in ("auto", *choices):
        raise UserError(f"{key} is {spec[key]!r}; choose one of: auto, {', '.join(choices)}")
    return found if spec[key] == "auto" else spec[key]


def _media_type(rows: list[TableRow]) -> str:
    """Return the type of media according to the suffixes, which must agree."""
    is_video = [row.media.lower().endswith(_VIDEO_SUFFIXES) for row in rows]
    if len(set(is_video)) > 1:
        other = rows[is_video.index(not is_video[0])]
        raise readers.line_error(
            other.file, other.line, f"{other.media[:80]!r} makes images and videos in one table; --set media says which"
        )
    return "video" if is_video[0] else "image"


def _named_table(spec: Mapping[str, Any], root: Path) -> str:
    """Return the table that is given, or, if a column is given, the only table in `root`; "" if there is none."""
    if spec["file"] or not any(spec[f"{role}_column"] for role in spec["defaults"]) or _find_tables(spec, root):
        return spec["file"]
    found = sorted(path.name for path in root.iterdir() if path.suffix.lower() in _TABLE_SUFFIXES and path.is_file())
    if len(found) != 1:
        choices = ", ".join(found) or "no .csv, .jsonl or .parquet"
        raise UserError(f"{root} holds {len(found)} tables ({choices}); say where it is, --set file=NAME")
    return found[0]


def _find_tables(spec: Mapping[str, Any], root: Path) -> list[Path]:
    """Return the tables to read: the given one, or the metadata files of an imagefolder, or none."""
    if spec["file"]:
        return [readers.locate(root, [spec["file"]], "the table")]
    names = ["", *sorted(f"{path.name}/" for path in root.iterdir() if path.name.lower() in _SPLIT_ALIASES and path.is_dir())]
    found = (f"{folder}{name}" for folder in names for name in _METADATA_FILES)
    return [readers.locate(root, [name], "the table") for name in found if (root / name).is_file()]


def _read_tree(root: Path) -> Iterator[TableRow]:
    """Yield one row for every media file below a class folder, in the order of the paths.

    Hidden files and folders are skipped.
    """
    line, depth = 0, _split_depth(root)
    for base, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        linked = next((name for name in inside if os.path.islink(os.path.join(base, name))), "")
        if linked:
            raise UserError(f"{Path(base, linked)} is a symbolic link to a folder; put the folder itself there")
        for name in sorted(
            name for name in names if name.lower().endswith((*_IMAGE_SUFFIXES, *_VIDEO_SUFFIXES)) and name[0] != "."
        ):
            line += 1
            media = readers.parse_media_path(Path(base, name).relative_to(root).as_posix(), root, line)
            parts = media.split("/")
            if len(parts) < depth + 2:
                raise UserError(f"{root / media} is in no class folder; name a table, or make folders <class>/…")
            split = _SPLIT_ALIASES[parts[0].lower()] if depth else ""
            yield TableRow(root, line, media, (parts[depth],), (), split, _stem(media), "")


def _split_depth(root: Path) -> int:
    """Return 1 if the folders below the root are splits, 0 if they are classes; `UserError` if they are a mixture."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = [name for name in folders if name.lower() in _SPLIT_ALIASES]
    if len(named) < 2 or len(named) == len(folders):  # a single "train" folder may be the class of trains
        return int(bool(folders) and len(named) == len(folders))
    other = next(name for name in folders if name not in named)
    raise UserError(
        f"{root} holds split folders ({', '.join(named)}) and others ({other}); move the others away, or name a table"
    )


def _read_table(spec: Mapping[str, Any], root: Path, table: Path) -> Iterator[TableRow]:
    """Yield the rows of one table."""
    prefix = "" if spec["file"] or table.parent == root else f"{table.parent.relative_to(root).as_posix()}/"
    columns: dict[str, str] = {}
    for line, record in _read_records(table):
        columns = columns or _find_columns(spec, record, table)
        absent = [name for role in spec["defaults"] if role not in columns for name in _column_candidates(spec, role)]
        late = next((name for name in absent if name in record), "")
        if late:
            raise readers.line_error(
                table, line, f"the column {late!r} is not in the first row; write it in every row, or in none"
            )
        cells = {role: record.get(column) for role, column in columns.items()}
        media = prefix + readers.parse_media_path(_parse_name(cells["media"], table, line), table, line)
        parts = media.split("/")
        if "label" not in columns and len(parts) < 2:
            raise readers.line_error(table, line, "there is neither a label column nor a class folder; name the column")
        labels = _parse_labels(cells["label"], spec["label_separator"], table, line) if "label" in columns else (parts[-2],)
        split = _parse_split(cells["split"], table, line) if "split" in columns else _folder_split(spec, parts)
        id = _parse_name(cells["id"], table, line) if "id" in columns else _stem(media)
        group = _parse_name(cells["group"], table, line) if cells.get("group") not in (None, "") else ""
        yield TableRow(table, line, media, labels, _parse_texts(cells.get("text"), table, line), split, id, group)


def _column_candidates(spec: Mapping[str, Any], role: str) -> list[str]:
    """Return the names that the column of a role may have: the given one, else the default ones."""
    return [spec[f"{role}_column"]] if spec[f"{role}_column"] else spec["defaults"][role]


def _find_columns(spec: Mapping[str, Any], record: Mapping[str, Any], table: Path) -> dict[str, str]:
    """Return the column of every role; `UserError` lists the columns if a given or needed one does not exist."""
    columns: dict[str, str] = {}
    for role in spec["defaults"]:
        names = _column_candidates(spec, role)
        found = next((name for name in names if name in record), "")
        if not found and (spec[f"{role}_column"] or role == "media"):
            raise UserError(f"{table} has no column {' or '.join(names)}; choose one of: {', '.join(record)}")
        if found:
            columns[role] = found
    return columns


def _read_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (line or row number, column -> value) for every row of a table."""
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
    for line, cells in readers.csv_rows(table):
        if not header:
            header = cells
            if len(set(header)) != len(header):
                raise readers.line_error(table, line, "two columns have the same name")
        elif len(cells) != len(header):
            raise readers.line_error(table, line, f"{len(cells)} cells where the header has {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _json_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(readers.text_lines(table), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise readers.line_error(table, line, f"broken JSON: {error}") from error
        if not isinstance(record, dict):
            raise readers.line_error(table, line, "it is no JSON object")
        yield line, record


def _parquet_records(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    row = 0
    try:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for record in batch.to_pylist():
                    row += 1
                    yield row, record
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{table} is damaged or no Parquet file: {error}") from error


def _parse_name(value: Any, table: Path, line: int) -> str:
    """Return a path, id, group or class name: a short text without control characters that no spreadsheet would run."""
    if type(value) is int:
        value = str(value)
    faults = (
        (not isinstance(value, str), "is no text"),
        (value == "", "is empty"),
        (len(str(value)) > 1024, "is longer than 1024 characters"),
        (bool(readers.UNPRINTABLE.search(str(value)[:1024])), "holds control characters, or half of one"),
        (readers.looks_like_formula(str(value)), "would be run as a formula by a spreadsheet"),
        (str(value).startswith("-"), "is negative, or begins like a formula"),
    )
    fault = next((reason for is_fault, reason in faults if is_fault), "")
    if fault:
        raise readers.line_error(table, line, f"{value!r:.60} {fault}")
    return value


def _parse_labels(value: Any, separator: str, table: Path, line: int) -> tuple[str, ...]:
    """Return the labels in a cell: names or ids."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise readers.line_error(table, line, f"the label {value[:40]!r} is no JSON list") from error
    if isinstance(value, str):
        value = [part.strip() for part in (value.split(separator) if separator else [value])]
    labels = [item for item in (value if isinstance(value, list) else [value]) if item not in ("", None)]
    return tuple(_parse_name(item, table, line) for item in labels)


def _parse_texts(value: Any, table: Path, line: int) -> tuple[str, ...]:
    """Return the texts in a cell: one text, or a JSON list of texts."""
    if isinstance(value, str) and value.startswith("["):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value  # an ordinary text that begins with a bracket
        value = parsed if isinstance(parsed, list) else value
    texts = value if isinstance(value, list) else [value]
    for text in texts:
        if text is not None and (not isinstance(text, str) or len(text) > readers.LINE_LIMIT):
            raise readers.line_error(
                table, line, f"a text is no text, or longer than {readers.LINE_LIMIT} characters: {str(text)[:40]!r}"
            )
    return tuple(text for text in texts if text)


def _parse_split(value: Any, table: Path, line: int) -> str:
    split = _SPLIT_ALIASES.get(str(value).strip().lower(), "")
    if not split:
        raise readers.line_error(
            table, line, f"unknown split {str(value or '')[:40]!r}; choose one of: {', '.join(_SPLIT_ALIASES)}"
        )
    return split


def _folder_split(spec: Mapping[str, Any], parts: list[str]) -> str:
    """Return the split folder of a file in an imagefolder, or ""."""
    return "" if spec["file"] else _SPLIT_ALIASES.get(parts[0].lower(), "")


def _stem(media: str) -> str:
    return os.path.splitext(media)[0]


def _label_ids(rows: list[TableRow], kind: str, names: list[str]) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Return the class names, and the sorted label ids of every row.

    Args:
        rows: all rows.
        kind: "single" or "multi"; "single" demands exactly one label in every row.
        names: the given class names; if there are none, the classes follow from the labels.
    """
    written = {label for row in rows for label in row.labels}
    numbered = not written <= set(names) and all(_NUMBER.fullmatch(label) for label in written)
    classes = names or (_numbered_classes(written, rows) if numbered else sorted(written))
    ids = {str(i) if numbered else name: i for i, name in enumerate(classes)}
    result: list[tuple[int, ...]] = []
    for row in rows:
        unknown = next((label for label in row.labels if label not in ids), None)
        if unknown is not None:
            raise readers.line_error(row.file, row.line, f"the label {unknown!r} is none of the {len(classes)} class names")
        if kind == "single" and len(set(row.labels)) != 1:
            raise readers.line_error(
                row.file, row.line, f"{len(row.labels)} labels where one is due; for none or several: --set labels=multi"
            )
        result.append(tuple(sorted({ids[label] for label in row.labels})))
    return tuple(classes), result


def _numbered_classes(written: Iterable[str], rows: list[TableRow]) -> list[str]:
    """Return the class names "0", "1", … up to the largest number."""
    largest = max((int(label) for label in written), default=0)
    if largest >= MAX_CLASSES:
        raise UserError(f"{rows[0].file}: the label {largest} is above {MAX_CLASSES - 1}; give a list of class names")
    return [str(i) for i in range(largest + 1)]
