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
file and line (Parquet: row): paths that lead out of the root, and fields of more than 2^20 characters. A CSV or Parquet table
is read by column: ten million rows take 0.9 GB of memory, of which only some tens of bytes a row grow with the table.
"""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data import readers, splits
from pipeline.data.cells import SPLIT_ALIASES, looks_like_splits, nfc, parse_labels, parse_name, parse_split
from pipeline.data.class_folders import VIDEO_SUFFIXES, read_class_folders
from pipeline.data.columns import ColumnWriter, Strings, compute, index_array, numpy_array
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import HALF_CHARACTER, Manifest, check_manifest
from pipeline.data.sample_columns import SAMPLE_SCHEMA, SampleColumns
from pipeline.data.spec import manifest_meta, required_counts
from pipeline.data.table_columns import ODD_PATH, BatchParser, Parse
from pipeline.data.table_files import (
    INDEX_COLUMNS,
    METADATA_FILES,
    TableBatch,
    column_candidates,
    find_columns,
    no_label_column,
    read_batches,
    shown_names,
    tables_in,
)
from pipeline.data.table_rows import (
    RowWriter,
    TableRows,
    class_lists,
    label_ids,
    merge_rows,
    sample_ids,
    warn_about_classes,
    whole_labels,
)
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
        rows, warnings = _read_tables(spec, root, tables) if tables else read_class_folders(spec, media_root, root)
        if not len(rows):
            why = "".join(f" ({warning})" for warning in warnings)
            raise UserError(
                f"{tables[0] if tables else media_root} has no rows{why}; see the layouts in `diffalign datasets table`"
            )
        entries, source = _list_entries(rows, root) if tables else ([], np.arange(len(rows)))
        names_file = [readers.locate(root, [spec["class_names"]], "the list of class names")] if spec["class_names"] else []
        names = [nfc(name) for path in names_file for name in readers.read_names(path)]
        rows = whole_labels(rows, names) if tables else rows
        ids, first = sample_ids(rows)
        rows, kept = merge_rows(rows, ids, first, spec)
        label_kind, classes, class_ids = label_ids(rows, spec["labels"], names, spec["numbers"])
        samples = _make_samples(rows, ids, kept, class_ids, spec)
        meta = manifest_meta(
            {
                **spec,
                "media_type": _media_type(rows) if spec["media"] == "auto" else spec["media"],
                "metrics": {"task": f"{label_kind}label", "topk": [1, 5]},
            },
            sources=readers.source_hashes([*tables, *names_file], root),
            lists=entries,
            split_rule="as given" if rows.samples[0].split else "by the SHA-256 of group or id",
            warnings=[*warnings, *warn_about_classes(classes, samples)],
        )
        source_rows = array("q", source[kept]) if tables else ()
        del rows, ids, first, kept, source
        manifest = Manifest(spec["name"], label_kind, classes, samples, meta, media_root, source_rows)
        check_manifest(manifest, required_counts(spec))
        return manifest


def _make_samples(
    rows: TableRows, ids: Strings, kept: NDArray[np.int64], class_ids: NDArray[np.int32], spec: Mapping[str, Any]
) -> SampleColumns:
    """Return the samples.

    Args:
        rows: one row for each sample.
        ids: the ids of all rows of the table.
        kept: the position of each sample in `ids`.
        class_ids: the class of each of `rows.labels`.
        spec: the spec of the dataset.
    """
    writer, start = ColumnWriter(SAMPLE_SCHEMA), 0
    has_splits = bool(rows.samples[0].split)
    for block in rows.samples.blocks():
        own, group = pa.array(ids.take(kept[start : start + len(block)]), pa.string()), block.column("group")
        for position in rows.half[(rows.half >= start) & (rows.half < start + len(block))].tolist():
            row, shown = rows.row(position), own[position - start].as_py()[:80]
            where = f"{row.file}, {readers.line_unit(row.file)} {row.line}"
            raise UserError(f"{where}, sample {shown!r}: {HALF_CHARACTER}")
        names = compute.if_else(compute.equal(group, ""), own, group)
        chosen = _choose_splits(names, block.column("split") if has_splits else None, spec)
        _check_all_split(rows, start, block.column("split"), has_splits)
        labels = class_lists(block.column("labels"), class_ids)
        columns = [own, chosen, block.column("media"), block.column("texts"), labels, group]
        writer.add(pa.RecordBatch.from_arrays(columns, schema=SAMPLE_SCHEMA))
        start += len(block)
    return SampleColumns(writer.finish())


def _check_choices(spec: Mapping[str, Any]) -> None:
    for key, choices in _CHOICES.items():
        if spec[key] not in choices:
            raise UserError(f"{key} is {spec[key]!r}; choose one of: {', '.join(choices)}")


def _choose_splits(names: pa.Array, given: pa.Array | None, spec: Mapping[str, Any]) -> pa.Array:
    """Return the split of each row; see `splits.choose_splits`."""
    if given is not None:
        return pa.array(splits.choose_splits(names.to_pylist(), given.to_pylist(), spec), pa.string())
    distinct = names.dictionary_encode()
    return pa.array(splits.choose_splits(distinct.dictionary.to_pylist(), None, spec), pa.string()).take(distinct.indices)


def _check_all_split(rows: TableRows, start: int, given: pa.Array, has_splits: bool) -> None:
    """Refuse a batch of rows, of which `start` is the first, if some give a split and others do not."""
    is_given = numpy_array(compute.not_equal(given, "")).astype(np.bool_)
    for position in np.flatnonzero(is_given != has_splits)[:1].tolist():
        row = rows.row(start + position)
        where = f"is in {'a' if row.split else 'no'} split folder, unlike the first row"
        raise readers.line_error(row.file, row.line, f"{row.media[:80]!r} {where}; say the splits of all rows, or of none")


def _list_entries(rows: TableRows, root: Path) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """Return the entries of the tables in the manifest's meta, and the position of every row in them.

    A position is the line of the row, counted from 0 through all tables; error messages name a row by it.
    """
    entries: list[dict[str, Any]] = []
    positions = [np.zeros(0, np.int64)]
    before = 0
    for number, file in enumerate(rows.files):
        lines = rows.lines[rows.file_numbers == number]
        last = int(lines[-1])
        entries.append(readers.list_entry(file, root, last, unit=readers.line_unit(file)))
        positions.append(lines + (before - 1))
        before += last
    return entries, np.concatenate(positions)


def _media_type(rows: TableRows) -> str:
    """Return the type of media according to the suffixes, which must agree."""
    pattern = f"({'|'.join(map(re.escape, VIDEO_SUFFIXES))})$"
    start, is_first = 0, bool(rows.samples[0].media.as_posix().lower().endswith(VIDEO_SUFFIXES))
    for block in rows.samples.blocks(["media"]):
        is_video = compute.match_substring_regex(block.column(0), pattern, ignore_case=True)
        for position in np.flatnonzero(numpy_array(is_video).astype(np.bool_) != is_first)[:1].tolist():
            row = rows.row(start + position)
            raise readers.line_error(
                row.file, row.line, f"{row.media[:80]!r} makes images and videos in one table; --set media says which"
            )
        start += len(block)
    return "video" if is_first else "image"


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


def _read_tables(spec: Mapping[str, Any], root: Path, tables: Sequence[Path]) -> tuple[TableRows, list[str]]:
    """Return the rows of all tables, and warnings about their columns."""
    writer = RowWriter()
    warnings: list[str] = []
    folders: set[str] = set()  # that are labels
    example: tuple[Collection[str], Path, int] | None = None  # the columns and place of a row of a table without label column
    for table in tables:
        prefix = "" if spec["file"] or table.parent == root else f"{table.parent.relative_to(root).as_posix()}/"
        columns: dict[str, str] = {}
        for batch in read_batches(table):
            if not columns:
                columns = find_columns(spec, batch.names[0], table)
                warnings += _check_other_columns(spec, batch.names[0], columns, table, int(batch.lines[0]))
            labels = _read_batch(spec, batch, columns, prefix, table, writer)
            if "label" not in columns:
                folders.update(labels)
                example = batch.names[-1], table, int(batch.lines[-1])
    if example and not spec["folder_labels"]:
        shown = ", ".join(sorted(folders)[:5])
        if len(folders) == 1 or looks_like_splits(folders):
            raise no_label_column(spec, *example, f"the folders of the media are {shown}, no classes")
        warnings.append(f"the table has no label column: the labels are the {len(folders)} folders of the media: {shown}")
    return writer.finish(), warnings


def _check_other_columns(
    spec: Mapping[str, Any], names: Collection[str], columns: Mapping[str, str], table: Path, line: int
) -> list[str]:
    """Refuse a table without label column that has columns which may be it; return a warning if one may hold the texts."""
    others = [name for name in names if name not in columns.values() and name not in INDEX_COLUMNS]
    if others and "label" not in columns and not spec["folder_labels"]:
        raise no_label_column(spec, names, table, line)
    if others and "text" not in columns:
        looked_for = ", ".join(column_candidates(spec, "text"))
        return [f"{table.name} has no column of texts ({looked_for}); if one of {shown_names(others)} is it, say --text-column"]
    return []


def _read_batch(
    spec: Mapping[str, Any], batch: TableBatch, columns: Mapping[str, str], prefix: str, table: Path, writer: RowWriter
) -> set[str]:
    """Write some rows of a table whose columns by role are known, and return their labels.

    Raises:
        UserError: with file and line, for the first faulty row.
    """
    parser = BatchParser(table, batch.lines)
    _check_late_columns(spec, batch, columns, table, parser)
    nothing, num_rows = pa.nulls(len(batch.lines), pa.string()), len(batch.lines)
    media = parser.names(batch.cells(columns["media"]), _naming(columns["media"], _parse_media), ODD_PATH)
    media = compute.binary_join_element_wise(prefix, media, "") if prefix else media
    if "label" in columns:
        separator, name = spec["label_separator"], columns["label"]
        parse = _naming(name, lambda *cell: parse_labels(cell[0], separator, *cell[1:]))
        labels, codes = parser.each(batch.cells(name), parse)
    else:
        folders = compute.replace_substring_regex(media, "^(?:(.*)/)?[^/]*$", r"\1")
        labels, codes = parser.each(folders, functools.partial(_folder_label, spec, batch))
    if "split" in columns:
        split = parser.strings(batch.cells(columns["split"]), _naming(columns["split"], parse_split))
    elif spec["file"]:
        split = pa.repeat("", num_rows)
    else:
        split = parser.strings(compute.replace_substring_regex(media, "/.*", ""), _folder_split)
    id = pa.repeat("", num_rows)
    if "id" in columns:
        id = parser.names(batch.cells(columns["id"]), _naming(columns["id"], parse_name))
    group = nothing.fill_null("")
    if "group" in columns:
        group = parser.strings(batch.cells(columns["group"]), _naming(columns["group"], _parse_group))
    texts, half = parser.texts(batch.cells(columns["text"]) if "text" in columns else nothing)
    if parser.error:
        raise parser.error
    numbers = pa.array([[writer.number(label) for label in own] for own in labels], pa.list_(pa.int32()))
    writer.add(table, batch.lines, [id, split, media, texts, numbers.take(index_array(codes)), group], half)
    return {label for own in labels for label in own}


def _check_late_columns(
    spec: Mapping[str, Any], batch: TableBatch, columns: Mapping[str, str], table: Path, parser: BatchParser
) -> None:
    """Note the first row with a column that the first row of the table could have had, and has not."""
    absent = [name for role in spec["defaults"] if role not in columns for name in column_candidates(spec, role)]
    last: Collection[str] = ()
    for row, names in enumerate(batch.names):
        late = "" if names is last else next((name for name in absent if name in names), "")
        last = names
        if late:
            what = f"the column {late!r} is not in the first row; write it in every row, or in none"
            parser.stop(row, readers.line_error(table, int(batch.lines[row]), what))
            return


def _naming(column: str, parse: Parse) -> Parse:
    """Return a function that parses cells of a column, and names the column in its errors."""

    def parse_cell(cell: Any, table: Path, line: int) -> Any:
        try:
            return parse(cell, table, line)
        except UserError as error:
            raise UserError(f"{error} (column {column!r})") from error

    return parse_cell


def _parse_media(cell: Any, table: Path, line: int) -> str:
    return readers.parse_media_path(parse_name(cell, table, line), table, line)


def _parse_group(cell: Any, table: Path, line: int) -> str:
    return "" if cell in (None, "") else nfc(parse_name(cell, table, line))


def _folder_split(folder: str, table: Path, line: int) -> str:
    return SPLIT_ALIASES.get(folder.lower(), "")


def _folder_label(spec: Mapping[str, Any], batch: TableBatch, folder: str, table: Path, line: int) -> tuple[str, ...]:
    """Return the label of the media in a folder: the name of the folder itself."""
    name = folder.rpartition("/")[2]
    if name and name.lower() not in SPLIT_ALIASES:
        return (nfc(name),)
    why = f"{name!r} is a split folder and no class" if name else "there is neither a label column nor a class folder"
    raise no_label_column(spec, batch.names[int(np.searchsorted(batch.lines, line))], table, line, why)
