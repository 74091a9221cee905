"""Your own data: a CSV, JSON-lines or Parquet table of media and labels, a Hugging Face imagefolder, or one folder per class.

The contents of `root` decide the layout; the first that fits is used:
1. A table: `file` is given, or a column is given and `root` holds exactly one table. Media paths are relative to `image_root`,
   which is `root` unless it is given.
2. An imagefolder: metadata.csv, .jsonl or .parquet in `root` or in its split folders. Media paths are relative to that folder.
3. Folders below `image_root`: <class>/… or <split>/<class>/…; the name of the folder is the label.
A table needs a media column. The label is a column; a table whose columns are all known may do without, and then the folder of
the media file is the label (`folder_labels` says so for other tables), but never a split folder, nor the only folder. Labels
are names, or ids from 0 if all of them are numbers and not all are class names; `numbers` decides where the numbers have large
gaps. Several labels are a list, or are separated by `label_separator`. Texts are one text, or a list of texts. Lists are
written as JSON, as Python or as NumPy does. The id is a column, else the media path without its ending, which stays where two
files would have the same id. Rows of one id are refused, or are one sample with `merge_rows`. The default column names are
those of a manifest, so the CSV copy of a manifest is such a table. Names of classes and files are compared in the form NFC.
The split is a column, else the split folder (train, training, val, valid, validation, dev, test, testing), else it follows
from the SHA-256 of the group (or of the id, if there is no group) and the percentages `splits`; the manifest's meta says which.
`val_percent` moves a share of the training samples to validation, by a hash, too. Symbolic links are followed. Refused, with
file and line (Parquet: row): paths that lead out of the root, and fields of more than 2^20 characters. A row takes about 1.4 KB
of memory (0.8 million rows took 1.05 GiB): 8 million rows need about 11 GB.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data import readers, splits
from pipeline.data.cells import SPLIT_ALIASES, looks_like_splits, nfc, parse_labels, parse_name, parse_split, parse_texts
from pipeline.data.class_folders import VIDEO_SUFFIXES, read_class_folders
from pipeline.data.columns import BATCH_ROWS, ColumnWriter
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import HALF_CHARACTER, Manifest, check_manifest, is_half
from pipeline.data.sample_columns import SAMPLE_SCHEMA, SampleColumns
from pipeline.data.spec import held_out_percent, manifest_meta, required_counts
from pipeline.data.table_files import (
    INDEX_COLUMNS,
    METADATA_FILES,
    column_candidates,
    find_columns,
    no_label_column,
    read_records,
    tables_in,
)
from pipeline.data.table_rows import TableRow, label_ids, merge_rows, sample_ids, warn_about_classes, whole_labels
from pipeline.runtime.errors import UserError

_CHOICES = {
    "labels": ("auto", "single", "multi"),
    "media": ("auto", "image", "video"),
    "numbers": ("auto", "ids", "names"),
}


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
        _check_choices(spec)
        spec = {**spec, "file": _named_table(spec, root)}
        media_root = readers.locate(root, spec["layout"]["image_root"], "the folder of media")
        tables = _find_tables(spec, root)
        found, warnings = _read_tables(spec, root, tables) if tables else read_class_folders(spec, media_root, root)
        if not found:
            why = "".join(f" ({warning})" for warning in warnings)
            raise UserError(
                f"{tables[0] if tables else media_root} has no rows{why}; see the layouts in `diffalign datasets table`"
            )
        entries, positions = _list_entries(found, root) if tables else ([], range(len(found)))
        names_file = [readers.locate(root, [spec["class_names"]], "the list of class names")] if spec["class_names"] else []
        names = [nfc(name) for path in names_file for name in readers.read_names(path)]
        found = whole_labels(found, names) if tables else found
        ids = sample_ids(found)
        rows, kept = merge_rows(found, ids, spec)
        label_kind, classes, labels = label_ids(rows, spec["labels"], names, spec["numbers"])
        samples = _make_samples(rows, [ids[position] for position in kept], labels, spec)
        meta = manifest_meta(
            {
                **spec,
                "media_type": _media_type(rows) if spec["media"] == "auto" else spec["media"],
                "metrics": {"task": f"{label_kind}label", "topk": [1, 5]},
            },
            sources=readers.source_hashes([*tables, *names_file], root),
            lists=entries,
            split_rule="as given" if rows[0].split else "by the SHA-256 of group or id",
            warnings=[*warnings, *warn_about_classes(classes, samples)],
        )
        source_rows = tuple(positions[position] for position in kept) if tables else ()
        manifest = Manifest(spec["name"], label_kind, classes, samples, meta, media_root, source_rows)
        check_manifest(manifest, required_counts(spec))
        return manifest


def _make_samples(
    rows: Sequence[TableRow], ids: Sequence[str], labels: Sequence[tuple[int, ...]], spec: Mapping[str, Any]
) -> SampleColumns:
    writer = ColumnWriter(SAMPLE_SCHEMA)
    for start in range(0, len(rows), BATCH_ROWS):
        batch = slice(start, start + BATCH_ROWS)
        own = rows[batch]
        for row, id in zip(own, ids[batch], strict=True):
            if is_half(row.texts):
                raise UserError(f"{row.file}, line {row.line}, sample {id[:80]!r}: {HALF_CHARACTER}")
        chosen = [_choose_split(row, id, rows[0], spec) for row, id in zip(own, ids[batch], strict=True)]
        media = [Path(row.media).as_posix() for row in own]
        writer.add_lists(ids[batch], chosen, media, [row.texts for row in own], labels[batch], [row.group for row in own])
    return SampleColumns(writer.finish())


def _check_choices(spec: Mapping[str, Any]) -> None:
    for key, choices in _CHOICES.items():
        if spec[key] not in choices:
            raise UserError(f"{key} is {spec[key]!r}; choose one of: {', '.join(choices)}")


def _choose_split(row: TableRow, id: str, first: TableRow, spec: Mapping[str, Any]) -> str:
    """Return the split of a row; either all rows give a split, as the first one does, or none."""
    name = row.group or id
    if bool(row.split) != bool(first.split):
        where = f"is in {'a' if row.split else 'no'} split folder, unlike the first row"
        raise readers.line_error(row.file, row.line, f"{row.media[:80]!r} {where}; say the splits of all rows, or of none")
    split = row.split or splits.by_hash(name, spec["splits"])
    percent = held_out_percent(spec)
    # the hash that dealt the splits cannot deal again: its training samples are those with the smallest hashes
    if split == "train" and percent and splits.is_held_out(name if row.split else f"held out: {name}", percent):
        return "val"
    return split


def _list_entries(rows: Sequence[TableRow], root: Path) -> tuple[list[dict[str, Any]], Sequence[int]]:
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
    return entries, positions


def _media_type(rows: Sequence[TableRow]) -> str:
    """Return the type of media according to the suffixes, which must agree."""
    is_video = [row.media.lower().endswith(VIDEO_SUFFIXES) for row in rows]
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
    found = [path.name for path in tables_in(root)]
    if len(found) != 1:
        choices = ", ".join(found) or "no .csv, .jsonl or .parquet"
        raise UserError(f"{root} holds {len(found)} tables ({choices}); say where it is, --set file=NAME")
    return found[0]


def _find_tables(spec: Mapping[str, Any], root: Path) -> list[Path]:
    """Return the tables to read: the given one, or the metadata files of an imagefolder, or none."""
    if spec["file"]:
        return [readers.locate(root, [spec["file"]], "the table")]
    names = ["", *sorted(f"{path.name}/" for path in root.iterdir() if path.name.lower() in SPLIT_ALIASES and path.is_dir())]
    found = (f"{folder}{name}" for folder in names for name in METADATA_FILES)
    return [readers.locate(root, [name], "the table") for name in found if (root / name).is_file()]


def _read_tables(spec: Mapping[str, Any], root: Path, tables: Sequence[Path]) -> tuple[list[TableRow], list[str]]:
    """Return the rows of all tables, and warnings about their columns."""
    rows: list[TableRow] = []
    warnings: list[str] = []
    folders: set[str] = set()  # that are labels
    example: tuple[Mapping[str, Any], Path, int] | None = None  # a row of a table without label column
    for table in tables:
        prefix = "" if spec["file"] or table.parent == root else f"{table.parent.relative_to(root).as_posix()}/"
        columns: dict[str, str] = {}
        for line, record in read_records(table):
            if not columns:
                columns = find_columns(spec, record, table)
                warnings += _check_other_columns(spec, record, columns, table, line)
            rows.append(_read_row(spec, record, columns, prefix, table, line))
            if "label" not in columns:
                folders.update(rows[-1].labels)
                example = record, table, line
    if example and not spec["folder_labels"]:
        shown = ", ".join(sorted(folders)[:5])
        if len(folders) == 1 or looks_like_splits(folders):
            raise no_label_column(spec, *example, f"the folders of the media are {shown}, no classes")
        warnings.append(f"the table has no label column: the labels are the {len(folders)} folders of the media: {shown}")
    return rows, warnings


def _check_other_columns(
    spec: Mapping[str, Any], record: Mapping[str, Any], columns: Mapping[str, str], table: Path, line: int
) -> list[str]:
    """Refuse a table without label column that has columns which may be it; return a warning if one may hold the texts."""
    others = [name for name in record if name not in columns.values() and name not in INDEX_COLUMNS]
    if others and "label" not in columns and not spec["folder_labels"]:
        raise no_label_column(spec, record, table, line)
    if others and "text" not in columns:
        looked_for = ", ".join(column_candidates(spec, "text"))
        return [f"{table.name} has no column of texts ({looked_for}); if one of {', '.join(others)} is it, say --text-column"]
    return []


def _read_row(
    spec: Mapping[str, Any], record: Mapping[str, Any], columns: Mapping[str, str], prefix: str, table: Path, line: int
) -> TableRow:
    """Return one row of a table whose columns by role are known."""
    absent = [name for role in spec["defaults"] if role not in columns for name in column_candidates(spec, role)]
    late = next((name for name in absent if name in record), "")
    if late:
        raise readers.line_error(table, line, f"the column {late!r} is not in the first row; write it in every row, or in none")
    cells = {role: record.get(column) for role, column in columns.items()}
    media = prefix + readers.parse_media_path(parse_name(cells["media"], table, line), table, line)
    parts = media.split("/")
    if "label" in columns:
        labels = parse_labels(cells["label"], spec["label_separator"], table, line)
    elif len(parts) < 2:
        raise no_label_column(spec, record, table, line, "there is neither a label column nor a class folder")
    elif parts[-2].lower() in SPLIT_ALIASES:
        raise no_label_column(spec, record, table, line, f"{parts[-2]!r} is a split folder and no class")
    else:
        labels = (nfc(parts[-2]),)
    folder = "" if spec["file"] else SPLIT_ALIASES.get(parts[0].lower(), "")
    split = parse_split(cells["split"], table, line) if "split" in columns else folder
    id = parse_name(cells["id"], table, line) if "id" in columns else ""
    group = nfc(parse_name(cells["group"], table, line)) if cells.get("group") not in (None, "") else ""
    return TableRow(table, line, media, labels, parse_texts(cells.get("text"), table, line), split, id, group)
