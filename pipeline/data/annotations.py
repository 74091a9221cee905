"""Read the files that hold annotations: labels of images, tags of photos, names and groups of emoji.

Labels of images come in three forms: zeros and ones, class numbers, or a CSV file with class names.
"""

from __future__ import annotations

import ast
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.readers import csv_rows, line_error, parse_whole_number, stripped_lines, text_lines
from pipeline.runtime.errors import UserError

_EMOJI_LINE = re.compile(r"([0-9A-F]+(?: [0-9A-F]+)*) *; *([a-z-]+) *# (\S+) E[0-9.]+ (\S.*)")
_CLOCK_FACE = re.compile(r"[a-z]+(?: o’clock|-thirty)")
# words in the names of emoji that say who is shown, in which colour or size: pictures that differ only in these are variants
_VARIANT_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
        man woman person men women people man’s woman’s men’s women’s boy girl child old older and merman mermaid merperson
        Mrs. Mx Santa black white grey red orange yellow green blue purple brown pink large medium medium-small small
        """,
    )
)


class LabelledLine(NamedTuple):
    """One line of a list that gives the labels of media files."""

    file: Path
    line: int
    media: str  # path, as it is written in the file
    split: str
    labels: tuple[int, ...]  # ascending


class Emoji(NamedTuple):
    """An emoji from Unicode's emoji-test.txt, with the headings it is listed under."""

    code_points: tuple[str, ...]  # upper-case hexadecimal
    status: str
    characters: str
    name: str  # in English
    group: str
    subgroup: str


def read_indicator_lists(files: Mapping[str, Path], class_names: list[str]) -> tuple[list[str], list[LabelledLine]]:
    """Read lists of lines `path 0 1 0 …`: for each class a 1 if it is present, else a 0.

    Args:
        files: the list of each split.
        class_names: the names of the classes. If the lists have another number of classes, "class 0", "class 1", … are used.

    Returns:
        The class names, and the lines of all lists.

    Raises:
        UserError: a line is faulty, or the lists have different numbers of classes.
    """
    lines = [line for split, path in files.items() for line in _read_indicator_list(path, split)]
    widths = {split: next((width for width, line in lines if line.split == split), 0) for split in files}
    if len(set(widths.values())) != 1:
        raise UserError(f"the lists have different numbers of classes: {widths}")
    width = max(widths.values())
    names = class_names if width == len(class_names) else [f"class {number}" for number in range(width)]
    return names, [line for _, line in lines]


def read_class_number_lists(files: Mapping[str, Path], class_names: list[str]) -> tuple[list[str], list[LabelledLine]]:
    """Read lists of lines `path 3 17 …`: the numbers, from 0, of the classes that are present.

    Args:
        files: the list of each split.
        class_names: the names of the classes.

    Returns:
        The class names, unchanged, and the lines of all lists.

    Raises:
        UserError: a line is faulty.
    """
    return class_names, [
        line for split, path in files.items() for line in _read_class_number_list(path, split, len(class_names))
    ]


def read_class_name_csv(path: Path, splits: Mapping[str, str]) -> tuple[list[str], list[LabelledLine]]:
    """Read a CSV file with three columns: path, a list of class names such as "['sky', 'sea']", and split.

    Columns are found by position. The first line is taken for a header if its split is not in `splits`.

    Args:
        path: the CSV file.
        splits: split in the file -> split in `LabelledLine`.

    Returns:
        The sorted class names, and the lines.

    Raises:
        UserError: a line is faulty.
    """
    table = list(_read_class_name_rows(path, splits))
    class_names = sorted({name for _, _, present, _ in table for name in present})
    label = {name: number for number, name in enumerate(class_names)}
    return class_names, [
        LabelledLine(path, line, media, split, tuple(sorted({label[name] for name in present})))
        for line, media, present, split in table
    ]


def _read_indicator_list(path: Path, split: str) -> Iterator[tuple[int, LabelledLine]]:
    """Yield (number of classes, line) for each line `path 0 1 0 …`."""
    width = 0
    for line, text in stripped_lines(path):
        media, *marks = text.split()
        width = width or len(marks)
        wrong = next((mark for mark in marks if mark not in ("0", "1")), "")
        if wrong:
            raise line_error(path, line, f"{wrong[:40]!r} is neither 0 nor 1")
        if not marks or len(marks) != width:
            raise line_error(path, line, f"{len(marks)} marks where {width or 'some'} are due")
        yield width, LabelledLine(path, line, media, split, tuple(label for label, mark in enumerate(marks) if mark == "1"))


def _read_class_number_list(path: Path, split: str, num_classes: int) -> Iterator[LabelledLine]:
    """Yield each line `path 3 17 …`."""
    for line, text in stripped_lines(path):
        media, *words = text.split()
        if len(words) >= num_classes:
            raise line_error(path, line, f"{len(words)} numbers for {num_classes} classes: are these zeros and ones?")
        labels = sorted({parse_whole_number(word, path, line) for word in words})
        if len(labels) < len(words) or (labels and labels[-1] >= num_classes):
            raise line_error(path, line, f"the class numbers must be distinct and below {num_classes}")
        yield LabelledLine(path, line, media, split, tuple(labels))


def _read_class_name_rows(path: Path, splits: Mapping[str, str]) -> Iterator[tuple[int, str, list[str], str]]:
    """Yield (line, path of the media file, class names, split) for each row."""
    for number, (line, cells) in enumerate(csv_rows(path)):
        if len(cells) != 3:
            raise line_error(path, line, f"{len(cells)} cells where path, labels and split are due")
        media, names, split = cells
        if split in splits:
            yield line, media, _parse_name_list(names, path, line), splits[split]
        elif number:
            raise line_error(path, line, f"unknown split {split[:40]!r}; choose one of: {', '.join(splits)}")


def _parse_name_list(cell: str, path: Path, line: int) -> list[str]:
    try:
        names = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise line_error(path, line, f"{cell[:40]!r} is no list of class names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise line_error(path, line, f"{cell[:40]!r} is no list of class names")
    return names


def read_tags_by_id(path: Path, vocabulary: list[str]) -> dict[int, list[int]]:
    """Read lines `id word word …`: a photo id and its tags, parted by single blanks or tabs.

    An id may have several lines, because a photo may be in two folders; its tags are then collected from all of them.

    Args:
        path: the file.
        vocabulary: the tags to keep; other words are left out.

    Returns:
        For every id, the ascending positions of its tags in the vocabulary.

    Raises:
        UserError: a line does not start with an id, or holds only zeros and ones: a matrix of tags has no ids.
    """
    position = {word: number for number, word in enumerate(vocabulary)}
    found: dict[int, set[int]] = {}
    for line, text in stripped_lines(path):
        number, *words = text.replace("\t", " ").split(" ")
        if {number, *words} <= {"0", "1"}:
            raise line_error(
                path, line, "zeros and ones where an id and its words are due; a matrix of tags cannot be joined by id"
            )
        found.setdefault(parse_whole_number(number, path, line), set()).update(
            position[word] for word in words if word in position
        )
    return {number: sorted(words) for number, words in found.items()}


def package_path(package: str, file: str) -> Path:
    """Return the path of a file or folder in an installed package.

    Raises:
        UserError: the package is not installed; the message says how to install it.
    """
    try:
        return Path(str(importlib.resources.files(package))) / file
    except ModuleNotFoundError as error:
        raise UserError(f'the package {error.name} is missing; run: pip install "diffalign[demo]"') from error


def select_emoji(path: Path, select: Mapping[str, Any]) -> list[Emoji]:
    """Return the emoji in a file emoji-test.txt that a spec selects, in the order of the file.

    Args:
        path: the file.
        select: the `status` that they have, the groups that are left out (`skip_groups`), and the code points that none of
            them has (`skip_code_points`).

    Raises:
        UserError: a line is faulty; names file and line.
    """
    skipped = set(select["skip_code_points"])
    return [
        emoji
        for emoji in read_emoji_list(path)
        if emoji.status == select["status"]
        and emoji.group not in select["skip_groups"]
        and not skipped & set(emoji.code_points)
    ]


def picture_group(emoji: Emoji) -> str:
    """Return the name of the group of emoji that are variants of one picture: the subgroup, "/", and the base name.

    The base name is the name without the words for who is shown (man, old woman, merperson, …), for colours and for sizes. Of
    names of people it is what stands before a colon or "facing right". Clock faces are one picture.
    """
    name = emoji.name.replace("light blue", "blue").removesuffix(" facing right")
    if emoji.group == "People & Body":
        name = name.partition(":")[0]
    words = [word for word in name.split() if word not in _VARIANT_WORDS]
    base = "clock face" if _CLOCK_FACE.fullmatch(name) else " ".join(words) or "person"
    return f"{emoji.subgroup}/{base}"


def read_emoji_list(path: Path) -> Iterator[Emoji]:
    """Yield the emoji in a file emoji-test.txt, in the order of the file.

    Raises:
        UserError: a line is faulty; names file and line.
    """
    group = subgroup = ""
    for number, line in enumerate(text_lines(path), start=1):
        text = line.strip()
        if text.startswith("# group: "):
            group, subgroup = text.removeprefix("# group: "), ""
        elif text.startswith("# subgroup: "):
            subgroup = text.removeprefix("# subgroup: ")
        elif text and not text.startswith("#"):
            match = _EMOJI_LINE.fullmatch(text)
            if not match or not subgroup:
                raise line_error(
                    path, number, f"{text[:80]!r} is not 'points ; status # characters E1.0 name' below a subgroup"
                )
            yield Emoji(tuple(match[1].split()), match[2], match[3], match[4], group, subgroup)
