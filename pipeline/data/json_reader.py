"""Read the records of a large JSON file one by one, in bounded memory; every error names file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.readers import LINE_LIMIT, line_error
from pipeline.runtime.errors import UserError

JSON_LIMIT = 2**30  # most bytes of one JSON file; those of MSR-VTT have about 30 million
_SPACE = re.compile(r"[ \t\r\n]*")


def json_records(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, record) for the array of objects under a top-level key; nothing if the file lacks the key.

    Raises:
        UserError: with file and line, for broken JSON, an entry that is not an object, or one of more than `LINE_LIMIT`
            characters.
    """
    if path.stat().st_size > JSON_LIMIT:
        raise UserError(f"{path} is larger than {JSON_LIMIT} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    scanner = _Scanner(path, text)
    for name in scanner.members("{", "}"):
        if name == key and scanner.peek() == "[":
            for _ in scanner.members("[", "]"):
                scanner.peek()
                start = scanner.at
                record = scanner.value()
                yield scanner.line, _check_record(record, scanner.at - start, path, scanner.line)
        else:
            scanner.value()


def _check_record(record: Any, size: int, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise line_error(path, line, f"{str(record)[:40]!r} is no object with keys")
    if size > LINE_LIMIT:
        huge = [
            f"the field {name[:40]!r}" for name, value in record.items() if isinstance(value, str) and len(value) > LINE_LIMIT
        ]
        raise line_error(path, line, f"{(huge or ['the entry'])[0]} has more than {LINE_LIMIT} characters")
    return record


def _refuse_constant(name: str) -> float:
    raise UserError(f"{name} is no number of JSON")


class _Scanner:
    """Read a JSON text value by value, without building the whole; `line` is the line of the last value."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.at = path, text, 0
        self.line, self._counted = 1, 0
        self._decode = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode

    def peek(self) -> str:
        """Skip white space, and return the next character, or "" at the end."""
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """Read the value that starts here."""
        self.peek()
        self.line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        try:
            value, self.at = self._decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise line_error(self.path, error.lineno, f"broken JSON: {error.msg}") from error
        except RecursionError as error:
            raise line_error(self.path, self.line, "the JSON is nested too deeply") from error
        except ValueError as error:  # a number with thousands of digits, or NaN
            raise line_error(self.path, self.line, f"broken JSON: {str(error)[:80]}") from error
        return value

    def members(self, opening: str, closing: str) -> Iterator[str]:
        """Yield the key of every value of the object or array that starts here ("" in an array); the caller reads the value."""
        self._take(opening)
        while self.peek() != closing:
            name = ""
            if opening == "{":
                name = str(self.value())
                self._take(":")
            yield name
            if self.peek() != closing:
                self._take(",")
                if self.peek() == closing:
                    self._take("a value")
        self._take(closing)

    def _take(self, expected: str) -> None:
        found = self.peek()
        if found != expected:
            line = self.text.count("\n", 0, self.at) + 1
            raise line_error(self.path, line, f"broken JSON: {found or 'the end'!r} where {expected!r} is due")
        self.at += 1
