"""The rows of a user's table or folder tree: their ids, rows of one sample, and their classes."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.columns import BATCH_ROWS, TEXT_COLUMN, ColumnWriter, Strings, compute, numpy_array
from pipeline.data.keys import first_positions, same_texts
from pipeline.data.readers import line_error, line_unit
from pipeline.data.sample_columns import SAMPLE_SCHEMA, SampleColumns, list_sizes
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

MAX_CLASSES = 100_000  # of numbered labels without class names; larger numbers are probably those of a wrong column
MAX_EMPTY_CLASSES = 10  # that numbered labels may leave out, unless more than that occur
MIN_CHECKED_SAMPLES = 100  # fewer may well have a class each
SHARED_SEPARATORS = (";", ",")  # that may stand in a class name, too
_MISSING = ("nan", "none", "null", "na", "n/a", "<na>", "nat")  # what programs write for a missing value, in small letters
_NUMBER = re.compile(r"0|[1-9]\d*")
_WHOLE_NUMBER = re.compile(r"(?:0|[1-9]\d*)(?:\.0+)?")


class TableRow(NamedTuple):
    """One row, as the table or the folder tree gives it."""

    file: Path  # the table, or the root of a folder tree
    line: int
    media: str  # relative to the root
    labels: tuple[str, ...]  # names, or ids as digits
    texts: tuple[str, ...]
    split: str  # "": neither a column nor a folder gives it
    id: str  # "": no column gives it
    group: str


@dataclass(frozen=True)
class TableRows:
    """All rows as columns; a row that is asked for is a `TableRow`."""

    samples: SampleColumns  # split and id are "" where nothing gives them; a label is its number in `labels`
    labels: Sequence[str]  # what is written in the table; several may be the same once they are `whole_labels`
    files: Sequence[Path]
    file_numbers: NDArray[np.int16]  # of the rows, in `files`
    lines: NDArray[np.int64]
    half: NDArray[np.int64]  # ascending positions of the rows whose texts, which are left out, hold half of a character

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, position: int) -> TableRow:
        """Return one row."""
        sample = self.samples[position]
        labels = tuple(self.labels[number] for number in sample.labels)
        file, line = self.files[self.file_numbers[position]], int(self.lines[position])
        return TableRow(file, line, sample.media.as_posix(), labels, sample.texts, sample.split, sample.id, sample.group)

    @staticmethod
    def of(rows: Iterable[TableRow]) -> TableRows:
        """Return the columns of rows."""
        writer, remaining = RowWriter(), iter(rows)
        while part := list(itertools.islice(remaining, BATCH_ROWS)):
            for file, own in itertools.groupby(part, key=lambda row: row.file):
                _, lines, media, labels, texts, split, id, group = zip(*own, strict=True)
                columns = (id, split, media, texts, [list(map(writer.number, each)) for each in labels], group)
                arrays = [pa.array(values, field.type) for values, field in zip(columns, SAMPLE_SCHEMA, strict=True)]
                writer.add(file, np.array(lines, np.int64), arrays)
        return writer.finish()


class RowWriter:
    """Collects rows by column."""

    def __init__(self) -> None:
        """Start without rows."""
        self._writer = ColumnWriter(SAMPLE_SCHEMA)
        self._numbers: dict[str, int] = {}
        self._files: dict[Path, int] = {}
        self._file_numbers = [np.zeros(0, np.int16)]
        self._lines = [np.zeros(0, np.int64)]
        self._half = [np.zeros(0, np.int64)]
        self._num_rows = 0

    def number(self, label: str) -> int:
        """Return the number of a label."""
        return self._numbers.setdefault(label, len(self._numbers))

    def add(
        self, file: Path, lines: NDArray[np.int64], arrays: Sequence[pa.Array], half: Sequence[int] | NDArray[Any] = ()
    ) -> None:
        """Add rows of a file: their columns in the order of `SAMPLE_SCHEMA`, and which of them hold half of a character."""
        self._writer.add(pa.RecordBatch.from_arrays(list(arrays), schema=SAMPLE_SCHEMA))
        self._file_numbers.append(np.full(len(lines), self._files.setdefault(file, len(self._files)), np.int16))
        self._lines.append(lines)
        self._half.append(np.asarray(half, np.int64) + self._num_rows)
        self._num_rows += len(lines)

    def finish(self) -> TableRows:
        """Return all rows."""
        return TableRows(
            SampleColumns(self._writer.finish()),
            list(self._numbers),
            list(self._files),
            np.concatenate(self._file_numbers),
            np.concatenate(self._lines),
            np.concatenate(self._half),
        )


def sample_ids(rows: TableRows) -> tuple[Strings, NDArray[np.int64]]:
    """Return the id of every row, and the position where that id stands first.

    An id is the given one, else the media path without its ending. The ending stays where the ids of several media would be the
    same: 1.png beside 1.jpg, or img.0001 and img.0002.
    """
    media = rows.samples.strings("media")
    is_given = _is_filled(rows.samples, "id")
    keeps_ending = np.zeros(len(rows), np.bool_)
    while True:
        ids = rows.samples.ids if is_given.all() else _make_ids(rows, keeps_ending)
        first = first_positions(ids)
        again = np.flatnonzero(first < np.arange(len(first)))
        is_shared = np.zeros(len(rows), np.bool_)
        is_shared[first[again[~same_texts(media, again, media, first[again])]]] = True
        found = np.flatnonzero(is_shared[first] & ~is_given & ~keeps_ending)
        if same_texts(ids, found, media, found).all():
            return ids, first
        keeps_ending[found] = True


def _make_ids(rows: TableRows, keeps_ending: NDArray[np.bool_]) -> Strings:
    writer, start = ColumnWriter(TEXT_COLUMN), 0
    for block in rows.samples.blocks(["id", "media"]):
        id, media = block.columns
        short = compute.replace_substring_regex(media, r"([^/.][^/]*)\.[^/.]*$", r"\1")  # as os.path.splitext
        own = compute.if_else(pa.array(keeps_ending[start : start + len(block)]), media, short)
        writer.add(pa.RecordBatch.from_arrays([compute.if_else(compute.equal(id, ""), own, id)], schema=TEXT_COLUMN))
        start += len(block)
    return Strings(writer.finish())


def _is_filled(samples: SampleColumns, column: str) -> NDArray[np.bool_]:
    """Return which rows have a text in a column."""
    return np.concatenate(
        [numpy_array(compute.not_equal(block.column(0), "")).astype(np.bool_) for block in samples.blocks([column])]
    )


def whole_labels(rows: TableRows, names: Collection[str]) -> TableRows:
    """Return the rows with labels such as "3.0" as "3", if all labels are whole numbers and not all are class names.

    pandas writes whole numbers so where a column has gaps. A single "3.5" or "v3" makes all of them names.
    """
    if set(rows.labels) <= set(names) or not all(_WHOLE_NUMBER.fullmatch(label) for label in rows.labels):
        return rows
    return replace(rows, labels=[label.partition(".")[0] for label in rows.labels])


def merge_rows(
    rows: TableRows, ids: Strings, first: NDArray[np.int64], spec: Mapping[str, Any]
) -> tuple[TableRows, NDArray[np.int64]]:
    """Return one row for each id, and the positions of these rows: the first of each id.

    Rows of one id, such as one per caption, become one row with all their texts if `spec["merge_rows"]` says so.

    Args:
        rows: all rows.
        ids: of the rows.
        first: the position where the id of each row stands first.
        spec: the spec of the dataset.

    Raises:
        UserError: with file and line, an id comes again and that is not allowed, or its rows differ in more than their text.
    """
    is_first = first == np.arange(len(first))
    kept, again = np.flatnonzero(is_first), np.flatnonzero(~is_first)
    if not len(again):
        return rows, kept
    if not spec["merge_rows"]:
        row, other = (rows.row(int(position)) for position in (again[0], first[again[0]]))
        raise line_error(
            row.file, row.line, f"{ids[int(again[0])][:80]!r} repeats the id of {_place(other)}; {_remedy(row, other)}"
        )
    is_multi = spec["labels"] == "multi"
    columns = ["media", "split", "group", *([] if is_multi else ["labels"])]
    for position in _different(rows, again, first[again], columns).tolist():
        _check_same_sample(rows.row(int(first[position])), rows.row(position), is_multi)
    half = np.searchsorted(kept, np.unique(first[rows.half]))
    return replace(
        rows, samples=_merge(rows, first, kept), file_numbers=rows.file_numbers[kept], lines=rows.lines[kept], half=half
    ), kept


def _different(
    rows: TableRows, ones: NDArray[np.int64], others: NDArray[np.int64], columns: Sequence[str]
) -> NDArray[np.int64]:
    """Return those of the positions `ones` whose rows differ in a column from those at `others`."""
    found = [np.zeros(0, np.bool_)]
    for start in range(0, len(ones), BATCH_ROWS):
        own, other = (_values(rows, positions[start : start + BATCH_ROWS], columns) for positions in (ones, others))
        found.append(np.fromiter(map(operator.ne, own, other), np.bool_))
    return ones[np.concatenate(found)]


def _values(rows: TableRows, positions: NDArray[np.int64], columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Yield what some rows have in some columns."""
    for block in rows.samples.select(positions).blocks(columns):
        yield from zip(*(column.to_pylist() for column in block.columns), strict=True)


def _merge(rows: TableRows, first: NDArray[np.int64], kept: NDArray[np.int64]) -> SampleColumns:
    """Return the first row of each id, with the texts and labels of all rows of that id."""
    order = np.argsort(first, kind="stable")
    sizes = np.diff(np.append(np.searchsorted(first[order], kept), len(order))).tolist()
    numbers = {label: number for number, label in enumerate(rows.labels)}
    same = [numbers[label] for label in rows.labels]  # the same number where two labels are the same
    members = _values(rows, order, ["texts", "labels"])
    writer = ColumnWriter(SAMPLE_SCHEMA)
    for start in range(0, len(kept), BATCH_ROWS):
        positions = kept[start : start + BATCH_ROWS]
        texts: list[Sequence[str]] = []
        labels: list[Sequence[int]] = []
        for size in sizes[start : start + BATCH_ROWS]:
            own, of = zip(*itertools.islice(members, size), strict=True)
            texts.append(own[0] if size == 1 else list(dict.fromkeys(itertools.chain(*own))))
            labels.append(of[0] if size == 1 else list(dict.fromkeys(same[label] for label in itertools.chain(*of))))
        id, split, media, group = (rows.samples.strings(name).take(positions) for name in ("id", "split", "media", "group"))
        writer.add_lists(id, split, media, texts, labels, group)
    return SampleColumns(writer.finish())


def _place(row: TableRow) -> str:
    return f"{row.file.name}, {line_unit(row.file)} {row.line}"


def _remedy(row: TableRow, other: TableRow) -> str:
    if row.media == other.media:
        return "one row per text? --set merge_rows=true makes one sample of the rows of a file"
    return "another file has it; name a column that tells them apart, --set id_column=NAME"


def _check_same_sample(first: TableRow, row: TableRow, is_multi: bool) -> None:
    """Refuse a row that differs from the first one of its sample in more than texts, and, if there may be several, labels."""
    pairs = {"file": (first.media, row.media), "split": (first.split, row.split), "group": (first.group, row.group)}
    pairs |= {} if is_multi else {"labels": (sorted({*first.labels}), sorted({*row.labels}))}
    for what, (one, two) in pairs.items():
        if one != two:
            hint = "; several labels of one sample: --set labels=multi" if what == "labels" else ""
            where = f"has the {what} {two!r:.80}, but {_place(first)}, of the same sample, has {one!r:.80}"
            raise line_error(row.file, row.line, where + hint)


def label_ids(
    rows: TableRows, wanted: str, names: Sequence[str], numbers: str
) -> tuple[Literal["single", "multi"], tuple[str, ...], NDArray[np.int32]]:
    """Return the kind of labels, the class names, and the class id of each of `rows.labels`.

    Args:
        rows: all rows.
        wanted: "single", exactly one label in every row; "multi"; or "auto", what is found.
        names: the given class names; if there are none, the classes follow from the labels.
        numbers: what labels are that are all numbers: "ids" of classes, counted from 0, or "names". "auto": ids, but those
            that leave out most classes are refused.

    Raises:
        UserError: with file and line, for a label that is no class, for several where one is due, and for zeros and ones.
    """
    written = set(rows.labels)
    is_numeric = all(_NUMBER.fullmatch(label) for label in written)
    numbered = numbers != "names" and is_numeric and not written <= set(names)
    is_multi = wanted == "multi" or (wanted == "auto" and _has_several(rows))
    kind = "multi" if is_multi else "single"
    if not written and not is_multi:
        row = rows.row(0)
        what = "0 labels where one is due, as in all rows; name the column of labels with --label-column"
        raise line_error(row.file, row.line, f"{what}, or say --set labels=multi, which allows rows without one")
    by_name = sorted(written, key=int) if is_numeric else sorted(written)
    classes = names or (_numbered_classes(written, rows, numbers) if numbered else by_name)
    ids = {str(i) if numbered else name: i for i, name in enumerate(classes)}
    found = np.array([ids.get(label, -1) for label in rows.labels], np.int32)
    for position in _rows_to_check(rows, found, is_multi, numbered):
        row = rows.row(position)
        fault = _label_fault(row.labels, kind, ids, are_ids=numbered)
        if fault:
            raise line_error(row.file, row.line, fault)
    return kind, tuple(classes), found


def _has_several(rows: TableRows) -> bool:
    """Return whether a row has more than one label."""
    numbers = {label: number for number, label in enumerate(rows.labels)}
    same = np.array([numbers[label] for label in rows.labels], np.int32)
    blocks = rows.samples.blocks(["labels"])
    return any(bool((list_sizes(class_lists(block.column(0), same)) > 1).any()) for block in blocks)


def _rows_to_check(rows: TableRows, ids: NDArray[np.int32], is_multi: bool, numbered: bool) -> Iterator[int]:
    """Yield the positions of rows whose labels may be faulty."""
    is_bit = np.array([label in ("0", "1") for label in rows.labels], np.bool_)
    start = 0
    for block in rows.samples.blocks(["labels"]):
        sizes, flat = list_sizes(block.column(0)), numpy_array(block.column(0).flatten())
        row_of = np.repeat(np.arange(len(sizes)), sizes)
        is_odd = np.zeros(len(sizes), np.bool_) if is_multi else sizes != 1
        is_odd[row_of[ids[flat] < 0]] = True
        if numbered:
            is_odd |= (sizes > 2) & (np.bincount(row_of[is_bit[flat]], minlength=len(sizes)) == sizes)
        yield from (start + np.flatnonzero(is_odd)).tolist()
        start += len(sizes)


def class_lists(labels: pa.Array, ids: NDArray[np.int32]) -> pa.Array:
    """Return lists of labels as sorted lists of class ids, each once.

    Args:
        labels: lists of positions in `ids`.
        ids: the class id of each label.
    """
    sizes, found = list_sizes(labels), ids[numpy_array(labels.flatten())]
    if (sizes > 1).any():
        row_of = np.repeat(np.arange(len(sizes)), sizes)
        order = np.lexsort((found, row_of))  # keeps row_of as it is
        found = found[order]
        is_new = np.append(True, (found[1:] != found[:-1]) | (row_of[1:] != row_of[:-1]))
        found, sizes = found[is_new], np.bincount(row_of[is_new], minlength=len(sizes))
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(bounds), pa.array(found))


def _label_fault(labels: Sequence[str], kind: str, ids: Collection[str], are_ids: bool) -> str:
    """Return what is wrong with the labels of a row, or ""."""
    if are_ids and len(labels) > 2 and set(labels) <= {"0", "1"}:
        return f"the labels {', '.join(labels)[:40]} are zeros and ones of all classes; write the ids of those that are there"
    unknown = next((label for label in labels if label not in ids), None)
    if unknown is not None:
        return f"the label {unknown!r} is none of the {len(ids)} class names"
    if kind == "single" and len(set(labels)) != 1:
        correct = "keep one" if labels else "fill the cell, or leave the row out"
        return f"{len(labels)} labels where one is due; {correct}; for data with none or several: --set labels=multi"
    return ""


def _numbered_classes(written: Iterable[str], rows: TableRows, numbers: str) -> list[str]:
    """Return the class names "0", "1", … up to the largest number."""
    present = {int(label) for label in written}
    largest = max(present, default=0)
    if largest >= MAX_CLASSES:
        raise UserError(
            f"{rows.files[0]}: the label {largest} is above {MAX_CLASSES - 1}; give a list of class names, --set "
            "class_names=FILE, or, if the numbers are names themselves, --set numbers=names"
        )
    num_empty = largest + 1 - len(present)
    if numbers == "auto" and num_empty > max(MAX_EMPTY_CLASSES, len(present)):
        raise UserError(
            f"{rows.files[0]}: the labels are numbers up to {largest}, which make {largest + 1} classes, {num_empty} of them "
            "without a sample; if they are names, say --set numbers=names; if they are the ids of so many classes, --set "
            "numbers=ids, or give the list of class names, --set class_names=FILE"
        )
    return [str(i) for i in range(largest + 1)]


def warn_about_classes(classes: Sequence[str], samples: Sequence[Sample]) -> list[str]:
    """Return warnings: one class alone, classes without a sample, several labels in a cell, odd names, or too many."""
    used = set(np.flatnonzero(np.bincount(SampleColumns.of(samples).labels()[1])).tolist())
    empty = [name for label, name in enumerate(classes) if label not in used]
    warnings = [f"all samples are of one class, {classes[0]!r}: a head has nothing to learn"] if len(classes) == 1 else []
    if empty:
        warnings.append(f"{len(empty)} of {len(classes)} classes have no sample: {', '.join(empty[:10])}")
    for separator in ("|", *SHARED_SEPARATORS):
        joined = [name for name in classes if separator in name.strip(separator)]
        parts = {part.strip() for name in joined for part in name.split(separator)}
        if joined and (separator not in SHARED_SEPARATORS or parts & set(classes)):
            what = f"{len(joined)} of {len(classes)} class names contain {separator!r}, such as {joined[0]!r:.60}"
            warnings.append(f"{what}: are they several labels? Then say --set label_separator='{separator}'")
    first: dict[str, str] = {}
    alike = [(first[name.casefold()], name) for name in classes if first.setdefault(name.casefold(), name) != name]
    if alike:
        names = f"{alike[0][0]!r:.60} and {alike[0][1]!r:.60}"
        warnings.append(f"{len(alike)} of {len(classes)} class names are another one in other capital letters, such as {names}")
    if missing := [name for name in classes if name.casefold() in _MISSING]:
        warnings.append(f"the class {missing[0]!r} looks like a missing label: is it one? Then leave its rows out")
    if len(samples) > MIN_CHECKED_SAMPLES and len(used) > len(samples) / 2:
        warnings.append(f"there are {len(used)} classes for {len(samples)} samples: is it the column of labels?")
    return warnings
