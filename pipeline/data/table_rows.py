"""The rows of a user's table or folder tree: their ids, rows of one sample, and their classes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.data.manifest import repeated_keys
from pipeline.data.readers import line_error
from pipeline.data.sample_columns import SampleColumns
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

MAX_CLASSES = 100_000  # of numbered labels without class names; larger numbers are probably those of a wrong column
MAX_EMPTY_CLASSES = 10  # that numbered labels may leave out, unless more than that occur
MIN_CHECKED_SAMPLES = 100  # fewer may well have a class each
SHARED_SEPARATORS = (";", ",")  # that may stand in a class name, too
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


def sample_ids(rows: Sequence[TableRow]) -> list[str]:
    """Return the id of every row: the given one, else the media path without its ending.

    The ending stays where the ids of several media would be the same: 1.png beside 1.jpg, or img.0001 and img.0002.
    """
    ids = [row.id or os.path.splitext(row.media)[0] for row in rows]
    while True:
        shared = {key for key, i, k in repeated_keys(ids, str) if rows[i].media != rows[k].media}
        changed = [i for i, row in enumerate(rows) if not row.id and ids[i] in shared and ids[i] != row.media]
        if not changed:
            return ids
        for i in changed:
            ids[i] = rows[i].media


def whole_labels(rows: list[TableRow], names: Collection[str]) -> list[TableRow]:
    """Return the rows with labels such as "3.0" as "3", if all labels are whole numbers and not all are class names.

    pandas writes whole numbers so where a column has gaps. A single "3.5" or "v3" makes all of them names.
    """
    written = {label for row in rows for label in row.labels}
    if written <= set(names) or not all(_WHOLE_NUMBER.fullmatch(label) for label in written):
        return rows
    return [row._replace(labels=tuple(label.partition(".")[0] for label in row.labels)) for row in rows]


def merge_rows(rows: list[TableRow], ids: list[str], spec: Mapping[str, Any]) -> tuple[list[TableRow], list[int]]:
    """Return one row for each id, and the positions of these rows: the first of each id.

    Rows of one id, such as one per caption, become one row with all their texts if `spec["merge_rows"]` says so.

    Raises:
        UserError: with file and line, an id comes again and that is not allowed, or its rows differ in more than their text.
    """
    merged: dict[int, TableRow] = {}
    left_out: set[int] = set()
    for key, first, again in repeated_keys(ids, str):
        row, other = rows[again], rows[first]
        if not spec["merge_rows"]:
            raise line_error(row.file, row.line, f"{key[:80]!r} repeats the id of {_place(other)}; {_remedy(row, other)}")
        merged[first] = _merge_two(merged.get(first, other), row, spec["labels"] == "multi")
        left_out.add(again)
    kept = [i for i in range(len(rows)) if i not in left_out]
    return [merged.get(i, rows[i]) for i in kept], kept


def _place(row: TableRow) -> str:
    return f"{row.file.name}, line {row.line}"


def _remedy(row: TableRow, other: TableRow) -> str:
    if row.media == other.media:
        return "one row per text? --set merge_rows=true makes one sample of the rows of a file"
    return "another file has it; name a column that tells them apart, --set id_column=NAME"


def _merge_two(first: TableRow, row: TableRow, is_multi: bool) -> TableRow:
    """Return the first row with the texts of another one of the same sample, and, if there may be several, its labels."""
    pairs = {"file": (first.media, row.media), "split": (first.split, row.split), "group": (first.group, row.group)}
    pairs |= {} if is_multi else {"labels": (sorted({*first.labels}), sorted({*row.labels}))}
    for what, (one, two) in pairs.items():
        if one != two:
            hint = "; several labels of one sample: --set labels=multi" if what == "labels" else ""
            where = f"has the {what} {two!r:.80}, but {_place(first)}, of the same sample, has {one!r:.80}"
            raise line_error(row.file, row.line, where + hint)
    texts, labels = (tuple(dict.fromkeys(both)) for both in ((*first.texts, *row.texts), (*first.labels, *row.labels)))
    return first._replace(texts=texts, labels=labels)


def label_ids(
    rows: Sequence[TableRow], wanted: str, names: Sequence[str], numbers: str
) -> tuple[Literal["single", "multi"], tuple[str, ...], list[tuple[int, ...]]]:
    """Return the kind of labels, the class names, and the sorted label ids of every row.

    Args:
        rows: all rows.
        wanted: "single", exactly one label in every row; "multi"; or "auto", what is found.
        names: the given class names; if there are none, the classes follow from the labels.
        numbers: what labels are that are all numbers: "ids" of classes, counted from 0, or "names". "auto": ids, but those
            that leave out most classes are refused.

    Raises:
        UserError: with file and line, for a label that is no class, for several where one is due, and for zeros and ones.
    """
    is_multi = wanted == "multi" or (wanted == "auto" and any(len(set(row.labels)) > 1 for row in rows))
    kind = "multi" if is_multi else "single"
    written = {label for row in rows for label in row.labels}
    is_numeric = all(_NUMBER.fullmatch(label) for label in written)
    numbered = numbers != "names" and is_numeric and not written <= set(names)
    by_name = sorted(written, key=int) if is_numeric else sorted(written)
    classes = names or (_numbered_classes(written, rows, numbers) if numbered else by_name)
    ids = {str(i) if numbered else name: i for i, name in enumerate(classes)}
    result: list[tuple[int, ...]] = []
    for row in rows:
        fault = _label_fault(row.labels, kind, ids, are_ids=numbered)
        if fault:
            raise line_error(row.file, row.line, fault)
        result.append(tuple(sorted({ids[label] for label in row.labels})))
    return kind, tuple(classes), result


def _label_fault(labels: Sequence[str], kind: str, ids: Collection[str], are_ids: bool) -> str:
    """Return what is wrong with the labels of a row, or ""."""
    if are_ids and len(labels) > 2 and set(labels) <= {"0", "1"}:
        return f"the labels {', '.join(labels)[:40]} are zeros and ones of all classes; write the ids of those that are there"
    unknown = next((label for label in labels if label not in ids), None)
    if unknown is not None:
        return f"the label {unknown!r} is none of the {len(ids)} class names"
    if kind == "single" and len(set(labels)) != 1:
        return f"{len(labels)} labels where one is due; for none or several: --set labels=multi"
    return ""


def _numbered_classes(written: Iterable[str], rows: Sequence[TableRow], numbers: str) -> list[str]:
    """Return the class names "0", "1", … up to the largest number."""
    present = {int(label) for label in written}
    largest = max(present, default=0)
    if largest >= MAX_CLASSES:
        raise UserError(
            f"{rows[0].file}: the label {largest} is above {MAX_CLASSES - 1}; give a list of class names, --set "
            "class_names=FILE, or, if the numbers are names themselves, --set numbers=names"
        )
    num_empty = largest + 1 - len(present)
    if numbers == "auto" and num_empty > max(MAX_EMPTY_CLASSES, len(present)):
        raise UserError(
            f"{rows[0].file}: the labels are numbers up to {largest}, which make {largest + 1} classes, {num_empty} of them "
            "without a sample; if they are names, say --set numbers=names; if they are the ids of so many classes, --set "
            "numbers=ids, or give the list of class names, --set class_names=FILE"
        )
    return [str(i) for i in range(largest + 1)]


def warn_about_classes(classes: Sequence[str], samples: Sequence[Sample]) -> list[str]:
    """Return warnings: one class alone, classes without a sample, several labels in a cell, or so many that it is no label."""
    used = set(np.unique(SampleColumns.of(samples).labels()[1]).tolist())
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
    if len(samples) > MIN_CHECKED_SAMPLES and len(used) > len(samples) / 2:
        warnings.append(f"there are {len(used)} classes for {len(samples)} samples: is it the column of labels?")
    return warnings
