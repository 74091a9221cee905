"""Read the cells of a user's table: names, labels, texts and splits; every error names file and line.

A list in a cell may be written as JSON, as Python and pandas write it, ['a cat', 'a dog'], or as NumPy does, ['a cat' 'a dog'].
"""

from __future__ import annotations

import ast
import json
import math
import re
import unicodedata
import warnings
from pathlib import Path
from typing import Any

from pipeline.data.readers import LINE_LIMIT, UNPRINTABLE, line_error

SPLIT_ALIASES = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}
_SPLIT_WORDS = {*SPLIT_ALIASES, "trainset", "testset", "valset", "eval", "evaluation", "holdout", "pred", "prediction", "query"}
_STRING = r"(?:'(?:[^'\\]|\\.)*+'|\"(?:[^\"\\]|\\.)*+\")"
_NUMBER = r"[-+]?(?:\d++\.?\d*+|\.\d++)(?:[eE][-+]?\d++)?"
_ITEM = re.compile(rf"(?:np\.\w++\()?({_STRING}|{_NUMBER}|None|nan)\)?(\s*+,\s*+|\s++|\Z)", re.DOTALL)
_ARRAY = re.compile(r"array\((.*?)(?:,\s*dtype=[^()]*)?\)", re.DOTALL)
_QUOTED_LIST = re.compile(  # whole, or cut off
    r"""[\[({][\[({\s]*['"].*(?:['"]|\.\.\.)[\s,\])}]*[\])}]|\[[\[\s]*['"].*?['"]\s*,\s*['"].*""", re.DOTALL
)
_PAIRS = {"[": "]", "(": ")", "{": "}"}
_HOW_TO_WRITE = 'write it as JSON, ["a cat", "a sleeping cat"]'


def nfc(text: str) -> str:
    """Return a text in Unicode's form NFC, in which é is one character: macOS writes names with two."""
    return unicodedata.normalize("NFC", text)


def looks_like_splits(folders: set[str]) -> bool:
    """Return whether all folders are named like splits, such as train2017 or seg_test, rather than like classes."""
    return bool(folders) and all(_SPLIT_WORDS & set(re.split(r"[^a-z]+", folder.lower())) for folder in folders)


def parse_name(value: Any, table: Path, line: int) -> str:
    """Return a path, id, group or class name: a short text without control characters.

    Raises:
        UserError: with file and line, for anything else.
    """
    if value is None or value == "":
        raise line_error(table, line, "the cell is empty")
    if type(value) is int:
        value = str(value)
    faults = (
        (not isinstance(value, str), "is no text"),
        (len(str(value)) > 1024, "is longer than 1024 characters"),
        (bool(UNPRINTABLE.search(str(value)[:1024])), "holds control characters, or half of one"),
    )
    fault = next((reason for is_fault, reason in faults if is_fault), "")
    if fault:
        raise line_error(table, line, f"{value!r:.60} {fault}")
    return value


def parse_labels(value: Any, separator: str, table: Path, line: int) -> tuple[str, ...]:
    """Return the labels in a cell: names in the form NFC, or ids as digits.

    Raises:
        UserError: with file and line, for a broken list, a negative number, or what is no name.
    """
    if isinstance(value, str) and (value.startswith("[") or _QUOTED_LIST.fullmatch(value.strip())):
        parsed = parse_list(value)
        if parsed is None:
            raise line_error(table, line, f"the label {value[:40]!r} is no JSON list; {_HOW_TO_WRITE}")
        value = parsed
    if isinstance(value, str):
        value = [part.strip() for part in (value.split(separator) if separator else [value])]
    items = [_whole(item) for item in (value if isinstance(value, list) else [value])]
    labels = [nfc(parse_name(item, table, line)) for item in items if item not in ("", None)]
    negative = next((label for label in labels if re.fullmatch(r"-\d+(\.0+)?", label)), "")
    if negative:
        raise line_error(table, line, f"{negative!r} is negative; a class id is 0 or more, and no label is an empty cell")
    return tuple(labels)


def _whole(value: Any) -> Any:
    """Return a whole number for a float like 3.0, which pandas makes of 3 in a column with gaps, and None for the gap, NaN."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def parse_texts(value: Any, table: Path, line: int) -> tuple[str, ...]:
    """Return the texts in a cell: one text, or a list of texts.

    Raises:
        UserError: with file and line, for what is no text, and for what looks like a list but is none.
    """
    if isinstance(value, str):
        stripped = value.strip()
        parsed = parse_list(stripped)
        if parsed and not any(isinstance(item, str) or item is None or _is_gap(item) for item in parsed):
            parsed = None  # numbers alone are a caption such as "[2020]"
        if parsed is None and _QUOTED_LIST.fullmatch(stripped):
            raise line_error(table, line, f"the list {value[:40]!r} cannot be read; {_HOW_TO_WRITE}")
        value = value if parsed is None else parsed
    texts = [None if _is_gap(text) else text for text in (value if isinstance(value, list) else [value])]
    for text in texts:
        if text is not None and (not isinstance(text, str) or len(text) > LINE_LIMIT):
            raise line_error(
                table, line, f"a text is no text, or longer than {LINE_LIMIT} characters: {str(text)[:40]!r}; {_HOW_TO_WRITE}"
            )
    return tuple(text for text in texts if text)


def _is_gap(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def parse_split(value: Any, table: Path, line: int) -> str:
    """Return the split in a cell: "train", "val" or "test".

    Raises:
        UserError: with file and line, for an unknown name.
    """
    split = SPLIT_ALIASES.get(str(value).strip().lower(), "")
    if not split:
        raise line_error(table, line, f"unknown split {str(value or '')[:40]!r}; choose one of: {', '.join(SPLIT_ALIASES)}")
    return split


def parse_list(cell: str) -> list[Any] | None:
    """Return the items of a list in a cell, or None if the cell is an ordinary text, such as "[applause] bravo" or "(left)".

    JSON lists may hold anything; the others hold strings, numbers, None and nan (as None).
    """
    array = _ARRAY.fullmatch(cell)
    cell = array[1] if array else cell
    if len(cell) < 2 or _PAIRS.get(cell[0]) != cell[-1]:
        return None
    if cell[0] == "[":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            pass  # Python's list, or an ordinary text
    return _literal_items(cell[1:-1].strip(), is_list=cell[0] == "[")


def _literal_items(body: str, is_list: bool) -> list[Any] | None:
    """Return the items between the brackets; only a list may do without commas, and one item in round ones needs one."""
    items: list[Any] = []
    has_comma: list[bool] = []
    position = 0
    while position < len(body):
        match = _ITEM.match(body, position)
        if not match:
            return None
        try:
            items.append(_value(match[1]))
        except ValueError:
            return None
        has_comma.append("," in match[2])
        position = match.end()
    inner = set(has_comma[:-1])
    is_plain = len(inner) < 2 and (is_list or (True in has_comma and all(isinstance(item, str) for item in items)))
    return items if is_plain else None


def _value(literal: str) -> Any:
    """Return what a literal says; ValueError if Python cannot read it."""
    if literal in ("None", "nan"):
        return None
    if literal[0] not in "'\"":
        return float(literal) if re.search(r"[.eE]", literal) else int(literal)
    if "\\" not in literal:
        return literal[1:-1]
    try:
        with warnings.catch_warnings(action="error"):  # "\\d" means nothing
            return ast.literal_eval(literal)
    except (SyntaxError, SyntaxWarning, DeprecationWarning) as error:
        raise ValueError(literal) from error
