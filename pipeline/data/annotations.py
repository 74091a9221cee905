"""Lists that label things: pictures by indicators, class numbers or a CSV of names; photo ids by words; emoji by subgroups."""

from __future__ import annotations

import ast
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pipeline.data.readers import csv_rows, fault, rows, text_lines, whole_number

_EMOJI = re.compile(r"([0-9A-F]+(?: [0-9A-F]+)*) *; *([a-z-]+) *# (\S+) E[0-9.]+ (\S.*)")


class Labelled(NamedTuple):
    """One line of such a list."""

    file: Path
    line: int
    media: str  # as it stands in the file
    split: str
    labels: tuple[int, ...]  # ascending


class Emoji(NamedTuple):
    """A line of Unicode's emoji-test.txt under its headings."""

    points: tuple[str, ...]  # code points, upper-case hexadecimal
    status: str
    text: str  # the characters
    name: str  # English
    group: str
    subgroup: str


def indicators(files: Mapping[str, Path], class_names: list[str]) -> tuple[list[str], list[Labelled]]:
    """Class names and lines of one indicator list per split; names of its own when the lists have another number of classes."""
    lines = [line for split, path in files.items() for line in _indicator_list(path, split)]
    widths = {split: next((width for width, line in lines if line.split == split), 0) for split in files}
    if len(set(widths.values())) != 1:
        raise ValueError(f"the lists have different numbers of classes: {widths}")
    width = max(widths.values())
    names = class_names if width == len(class_names) else [f"class {number}" for number in range(width)]
    return names, [line for _, line in lines]


def numbers(files: Mapping[str, Path], class_names: list[str]) -> tuple[list[str], list[Labelled]]:
    """Class names and lines of one list of class numbers per split."""
    return class_names, [line for split, path in files.items() for line in _number_list(path, split, len(class_names))]


def named(path: Path, splits: Mapping[str, str]) -> tuple[list[str], list[Labelled]]:
    """Class names, sorted, and lines of a CSV whose columns are path, a list such as "['sky', 'sea']", and split.

    The columns count, not their names; a first line whose split is not in `splits` is the header.
    """
    table = list(_named_csv(path, splits))
    names = sorted({name for _, _, present, _ in table for name in present})
    label = {name: number for number, name in enumerate(names)}
    return names, [
        Labelled(path, line, media, split, tuple(sorted({label[name] for name in present})))
        for line, media, present, split in table
    ]


def _indicator_list(path: Path, split: str) -> Iterator[tuple[int, Labelled]]:
    """(number of classes, line) of `path 0 1 0 …` lines."""
    width = 0
    for line, text in rows(path):
        media, *marks = text.split()
        width = width or len(marks)
        wrong = next((mark for mark in marks if mark not in ("0", "1")), "")
        if wrong:
            raise fault(path, line, f"{wrong[:40]!r} is neither 0 nor 1")
        if not marks or len(marks) != width:
            raise fault(path, line, f"{len(marks)} marks where {width or 'some'} are due")
        yield width, Labelled(path, line, media, split, tuple(label for label, mark in enumerate(marks) if mark == "1"))


def _number_list(path: Path, split: str, num_classes: int) -> Iterator[Labelled]:
    """Lines `path 3 17 …`: the numbers of the classes that are present, from 0."""
    for line, text in rows(path):
        media, *words = text.split()
        if len(words) >= num_classes:
            raise fault(path, line, f"{len(words)} numbers for {num_classes} classes: are these zeros and ones?")
        labels = sorted({whole_number(word, path, line) for word in words})
        if len(labels) < len(words) or (labels and labels[-1] >= num_classes):
            raise fault(path, line, f"the class numbers must be distinct and below {num_classes}")
        yield Labelled(path, line, media, split, tuple(labels))


def _named_csv(path: Path, splits: Mapping[str, str]) -> Iterator[tuple[int, str, list[str], str]]:
    for number, (line, cells) in enumerate(csv_rows(path)):
        if len(cells) != 3:
            raise fault(path, line, f"{len(cells)} cells where path, labels and split are due")
        media, names, split = cells
        if split in splits:
            yield line, media, _name_list(names, path, line), splits[split]
        elif number:
            raise fault(path, line, f"unknown split {split[:40]!r}; choose one of: {', '.join(splits)}")


def _name_list(cell: str, path: Path, line: int) -> list[str]:
    try:
        names = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise fault(path, line, f"{cell[:40]!r} is no list of class names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise fault(path, line, f"{cell[:40]!r} is no list of class names")
    return names


def words_by_id(path: Path, vocabulary: list[str]) -> dict[int, list[int]]:
    """For every id of `id word word …` lines: ascending vocabulary positions of its words; other words are left out.

    An id that comes back keeps all its words: photos that stand in two folders have one line for each.
    """
    position = {word: number for number, word in enumerate(vocabulary)}
    found: dict[int, set[int]] = {}
    for line, text in rows(path):
        number, *words = text.replace("\t", " ").split(" ")
        if {number, *words} <= {"0", "1"}:
            raise fault(path, line, "zeros and ones where an id and its words are due; a matrix of tags cannot be joined by id")
        found.setdefault(whole_number(number, path, line), set()).update(position[word] for word in words if word in position)
    return {number: sorted(words) for number, words in found.items()}


def packaged(package: str, file: str) -> Path:
    """A file or folder of an installed package; `ValueError` with the remedy when the package is not there."""
    try:
        return Path(str(importlib.resources.files(package))) / file
    except ModuleNotFoundError as error:
        raise ValueError(f'the package {error.name} is missing; run: pip install "diffalign[demo]"') from error


def emoji_list(path: Path) -> Iterator[Emoji]:
    """The emoji of an emoji-test.txt, in its order; `ValueError` with file and line where the grammar is broken."""
    group = subgroup = ""
    for number, line in enumerate(text_lines(path), start=1):
        text = line.strip()
        if text.startswith("# group: "):
            group, subgroup = text.removeprefix("# group: "), ""
        elif text.startswith("# subgroup: "):
            subgroup = text.removeprefix("# subgroup: ")
        elif text and not text.startswith("#"):
            match = _EMOJI.fullmatch(text)
            if not match or not subgroup:
                raise fault(path, number, f"{text[:80]!r} is not 'points ; status # characters E1.0 name' below a subgroup")
            yield Emoji(tuple(match[1].split()), match[2], match[3], match[4], group, subgroup)
