"""Read official list, label, tag, CSV and JSON files in bounded memory; whatever is wrong in them is named by file and line."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.files import file_sha256

LINE_LIMIT = 2**20  # bytes of one line, and characters of one field; the longest official line has about 10,000
JSON_LIMIT = 2**30  # bytes of one JSON file; MSR-VTT's have about 30 million
BLANK = " \t\r\n"  # the only white space of the official grammars: tags may hold U+0085 or U+00A0
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and halves of characters: no UTF-8 spells them
_DRIVE = re.compile(r"[A-Za-z]:")
_PATH_LIMIT = 1024  # characters
_SPACE = re.compile(r"[ \t\r\n]*")


def fault(path: Path, line: int, message: str) -> ValueError:
    """The error that every reader raises: file, line, what is wrong."""
    return ValueError(f"{path}, line {line}: {message}")


def sources(files: Iterable[Path], root: Path) -> dict[str, str]:
    """SHA-256 of every file by its path below `root`, or by folder and name when it lies elsewhere."""
    return {source_name(path, root): file_sha256(path) for path in files}


def source_name(path: Path, root: Path) -> str:
    """The path below `root`, or folder and name when it lies elsewhere: nothing of the machine."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else "/".join(path.parts[-2:])


def listing(path: Path, root: Path, num_rows: int, first: int = 1, unit: str = "line") -> dict[str, Any]:
    """An entry of meta["lists"] of a manifest: a file of `num_rows` samples, one on every line (or unit) from `first` on."""
    return {"file": source_name(path, root), "rows": num_rows, "first": first, "unit": unit}


def locate(root: Path, candidates: Sequence[str], what: str) -> Path:
    """The first candidate under `root` that exists, in any case of letters; `ValueError` names all places when none does.

    A candidate may be absolute, or start with "../" (a sibling of `root`); a symbolic link that leads elsewhere is refused.
    """
    found = _existing(root, candidates)
    if not found:
        places = ", ".join(str(root / candidate) for candidate in candidates)
        raise ValueError(f"{what} is missing: looked for {places}")
    return found


def locate_all(folder: Path, wanted: Sequence[Sequence[str]], what: str) -> list[Path]:
    """`locate` for several files of a folder; one `ValueError` names all that are missing."""
    found = [_existing(folder, candidates) for candidates in wanted]
    missing = [" or ".join(candidates) for candidates, path in zip(wanted, found, strict=True) if not path]
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} {what} are missing in {folder}: {', '.join(missing)}")
    return [path for path in found if path]


def _existing(root: Path, candidates: Iterable[str]) -> Path | None:
    """The first candidate of `locate` that exists; `ValueError` when it is a symbolic link that leads elsewhere."""
    for candidate in candidates:
        base = root.parent if candidate.startswith("../") else root
        path = _any_case(base, PurePosixPath(candidate.removeprefix("../")))
        if path.is_file() or path.is_dir():
            anchor = path.parent if PurePosixPath(candidate).is_absolute() else base
            if not path.resolve().is_relative_to(anchor.resolve()):
                raise ValueError(f"{path} is a symbolic link that leads out of {anchor}; give its real place instead")
            return path
    return None


def _any_case(base: Path, relative: PurePosixPath) -> Path:
    """`base / relative`; where that does not exist, the one entry whose name differs only in case."""
    path = base
    for part in relative.parts:
        exact = path / part
        if not exact.exists() and path.is_dir():
            others = sorted(entry for entry in path.iterdir() if entry.name.casefold() == part.casefold())
            exact = others[0] if others else exact
        path = exact
    return path


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes) of every line; `ValueError` for a line above `LINE_LIMIT`. Only LF ends a line."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise fault(path, number, f"the line is longer than {LINE_LIMIT} bytes")
            yield number, line


def rows(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text without white space around it) of a list; blank lines may only stand at its end."""
    blank = 0
    for number, line in enumerate(text_lines(path), start=1):
        text = line.strip(BLANK)
        if text and blank:
            raise fault(path, blank, "a blank line inside the list would shift every row after it; remove it")
        if text:
            yield number, text
        else:
            blank = blank or number


def read_names(path: Path, strip: str = BLANK) -> list[str]:
    """The names of a list of names, one a line."""
    return [text.rstrip(strip) for _, text in rows(path)]


def whole_number(text: str, path: Path, line: int) -> int:
    """A number of the digits 0 to 9, below 10^18; `ValueError` with file and line for anything else."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise fault(path, line, f"{text[:40]!r} is no whole number")
    return int(text)


def media_path(text: str, path: Path, line: int) -> str:
    """A media path of a list as relative POSIX path; '..', absolute paths, unprintable characters and formulas are refused."""
    posix = text.replace("\\", "/")
    parts = [part for part in posix.split("/") if part not in ("", ".")]
    shown = repr(text if len(text) <= 80 else f"{text[:80]}…")
    if len(text) > _PATH_LIMIT:
        raise fault(path, line, f"the path {shown} is longer than {_PATH_LIMIT} characters")
    if posix.startswith("/") or _DRIVE.match(posix):
        raise fault(path, line, f"the path {shown} is absolute; paths are relative to the media folder")
    if ".." in parts or not parts or UNPRINTABLE.search(posix) or formula_like(posix):
        raise fault(path, line, f"the path {shown} holds '..' or unprintable characters, is empty, or looks like a formula")
    return "/".join(parts)


def formula_like(cell: str) -> bool:
    """Whether a spreadsheet would run the cell: it starts with = + - @ tab or CR and is not a number."""
    return bool(_FORMULA.match(cell)) and not _NUMBER.fullmatch(cell)


def missing_media(root: Path, media: Iterable[str], where: Callable[[int], str]) -> list[int]:
    """Positions of the paths that are no file under `root`; `ValueError` when a symbolic link leads out, or none may look.

    `where(position)` names the list and line of a path.
    """
    real_root = os.path.realpath(root)
    inside: dict[str, bool] = {}
    missing = []
    for position, name in enumerate(media):
        folder = name.rpartition("/")[0]
        if folder not in inside:
            inside[folder] = _is_inside(os.path.join(real_root, folder), real_root)
        full = os.path.join(real_root, name)
        try:
            mode = os.lstat(full).st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise ValueError(f"{where(position)}: {name} cannot be looked at: {error.strerror}") from error
            missing.append(position)
            continue
        is_link = stat.S_ISLNK(mode)
        if not inside[folder] or (is_link and not _is_inside(full, real_root)):
            raise ValueError(f"{where(position)}: {name} is a symbolic link that leads out of the media folder {root}")
        if not (stat.S_ISREG(mode) or (is_link and os.path.isfile(full))):
            missing.append(position)
    return missing


def _is_inside(path: str, real_root: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(real_root)


def binary_column(path: Path, num_rows: int) -> NDArray[np.int64]:
    """Ascending rows that hold `1` in a file of one `0` or `1` a line; `ValueError` names the first line that is neither."""
    if path.stat().st_size > (num_rows + 1) * 16:
        raise ValueError(f"{path} has more than 16 bytes for each of the {num_rows} images: it is no column of 0 and 1")
    values = path.read_bytes().translate(None, b" \t\r").rstrip(b"\n").split(b"\n")
    if len(values) != num_rows:
        raise fault(path, len(values), f"the file ends after {len(values)} values, the image list has {num_rows}")
    if not {b"0", b"1"}.issuperset(values):
        line, value = next((line, value) for line, value in enumerate(values, start=1) if value not in (b"0", b"1"))
        raise fault(path, line, f"{value[:40].decode(errors='replace')!r} is neither 0 nor 1")
    return np.flatnonzero(np.frombuffer(b"".join(values), np.uint8) == ord("1"))


def binary_rows(path: Path, width: int) -> Iterator[NDArray[np.int64]]:
    """For every line of a file of `width` zeros and ones a line: ascending columns that hold `1`."""
    expected = 2 * width - 1
    for number, line in raw_lines(path):
        body = line.strip(BLANK.encode())
        digits = body[::2]
        if len(body) != expected or body[1::2].translate(None, b"\t ") or digits.translate(None, b"01"):
            digits = _digits(body.split(), path, number, width)  # irregular spacing, or a fault
        yield np.flatnonzero(np.frombuffer(digits, np.uint8) == ord("1"))


def _digits(values: list[bytes], path: Path, line: int, width: int) -> bytes:
    wrong = next((value for value in values if value not in (b"0", b"1")), b"")
    if wrong:
        raise fault(path, line, f"{wrong[:40].decode(errors='replace')!r} is neither 0 nor 1")
    if len(values) != width:
        raise fault(path, line, f"{len(values)} values where {width} are due")
    return b"".join(values)


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of a UTF-8 CSV file; `ValueError` for formulas, huge fields and broken quoting."""
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(text_lines(path), strict=True)
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise fault(path, reader.line_num, str(error)) from error
        formula = next((cell for cell in cells if formula_like(cell)), "")
        if formula:
            raise fault(path, reader.line_num, f"the cell {formula[:40]!r} would be run as a formula by a spreadsheet")
        if cells:
            yield reader.line_num, cells


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte order mark; `ValueError` with file and line for other bytes."""
    for number, line in raw_lines(path):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise fault(path, number, f"not UTF-8 text ({error.reason} at byte {error.start})") from error


def json_records(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of the array of objects under a top-level key; a file without the key has none.

    `ValueError` with file and line for broken JSON, an entry that is no object, or one above `LINE_LIMIT` characters.
    """
    if path.stat().st_size > JSON_LIMIT:
        raise ValueError(f"{path} is larger than {JSON_LIMIT} bytes")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    scanner = _Scanner(path, text)
    for name in scanner.members("{", "}"):
        if name == key and scanner.peek() == "[":
            for _ in scanner.members("[", "]"):
                scanner.peek()
                start = scanner.at
                record = scanner.value()
                yield scanner.line, _checked(record, scanner.at - start, path, scanner.line)
        else:
            scanner.value()


def _checked(record: Any, size: int, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise fault(path, line, f"{str(record)[:40]!r} is no object with keys")
    if size > LINE_LIMIT:
        huge = [
            f"the field {name[:40]!r}" for name, value in record.items() if isinstance(value, str) and len(value) > LINE_LIMIT
        ]
        raise fault(path, line, f"{(huge or ['the entry'])[0]} has more than {LINE_LIMIT} characters")
    return record


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


class _Scanner:
    """Walks through one JSON text without building the whole of it; `line` is the line of the value read last."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.at = path, text, 0
        self.line, self._counted = 1, 0
        self._decode = json.JSONDecoder(parse_constant=_no_number).raw_decode

    def peek(self) -> str:
        """The next character that is no white space, or ""."""
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The value that starts here."""
        self.peek()
        self.line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        try:
            value, self.at = self._decode(self.text, self.at)
        except json.JSONDecodeError as error:
            raise fault(self.path, error.lineno, f"broken JSON: {error.msg}") from error
        except RecursionError as error:
            raise fault(self.path, self.line, "the JSON is nested too deeply") from error
        except ValueError as error:  # a number of thousands of digits, or NaN
            raise fault(self.path, self.line, f"broken JSON: {str(error)[:80]}") from error
        return value

    def members(self, opening: str, closing: str) -> Iterator[str]:
        """Stops before every value of the object or array that starts here; yields the key, or ""."""
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
            raise fault(self.path, line, f"broken JSON: {found or 'the end'!r} where {expected!r} is due")
        self.at += 1
