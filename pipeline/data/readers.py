"""Find official files and read lists and CSV files in bounded memory; every error names file and line."""

from __future__ import annotations

import csv
import errno
import os
import re
import stat
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256

LINE_LIMIT = 2**20  # most bytes of one line, and most characters of one field; the longest official line has about 10,000
WHITE_SPACE = " \t\r\n"  # nothing else is white space in the official files: tags may hold U+0085 or U+00A0
_FORMULA = re.compile(r"[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and lone surrogates, which UTF-8 cannot spell
_DRIVE = re.compile(r"[A-Za-z]:")
_PATH_LIMIT = 1024  # characters


def line_error(path: Path, line: int, message: str) -> UserError:
    """Return the error that every reader raises: file, line, what is wrong."""
    return UserError(f"{path}, {line_unit(path)} {line}: {message}")


def line_unit(path: Path) -> str:
    """Return what the number of a line counts in a file: "line", or "row" in a Parquet file."""
    return "row" if path.suffix.lower() == ".parquet" else "line"


def source_hashes(files: Iterable[Path], root: Path) -> dict[str, str]:
    """Return the SHA-256 of every file, by the name that `source_name` gives it."""
    return {source_name(path, root): file_sha256(path) for path in files}


def source_name(path: Path, root: Path) -> str:
    """Return a file's path relative to `root`, or its folder and name if it is elsewhere: the same on every machine."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else "/".join(path.parts[-2:])


def list_entry(path: Path, root: Path, num_rows: int, first: int = 1, unit: str = "line") -> dict[str, Any]:
    """Return an entry of meta["lists"] of a manifest: it says which line of which file a sample comes from.

    Args:
        path: a list with one sample on every line.
        root: the folder of official files.
        num_rows: number of samples in the list.
        first: number of the line of the first sample.
        unit: what is counted, such as "line" or "row".
    """
    return {"file": source_name(path, root), "rows": num_rows, "first": first, "unit": unit}


def locate(root: Path, candidates: Sequence[str], what: str) -> Path:
    """Return the first candidate that exists under `root`; upper and lower case are not distinguished.

    Args:
        root: the folder of official files.
        candidates: paths relative to `root`. A candidate may also be absolute, or start with "../" (a sibling of `root`).
        what: what is looked for, for the message.

    Raises:
        UserError: no candidate exists; the message lists all places.
    """
    found = _find_existing(root, candidates)
    if not found:
        places = ", ".join(str(root / candidate) for candidate in candidates)
        raise UserError(f"{what} is missing: looked for {places}")
    return found


def locate_all(folder: Path, wanted: Sequence[Sequence[str]], what: str) -> list[Path]:
    """Return the paths of several files of a folder, each found as by `locate`.

    Args:
        folder: the folder to look in.
        wanted: the candidates of each file.
        what: what the files are, for the message.

    Raises:
        UserError: files are missing; the message lists all of them.
    """
    found = [_find_existing(folder, candidates) for candidates in wanted]
    missing = [" or ".join(candidates) for candidates, path in zip(wanted, found, strict=True) if not path]
    if missing:
        raise UserError(f"{len(missing)} of {len(wanted)} {what} are missing in {folder}: {', '.join(missing)}")
    return [path for path in found if path]


def _find_existing(root: Path, candidates: Iterable[str]) -> Path | None:
    """Return the first candidate that exists, or None."""
    for candidate in candidates:
        base = root.parent if candidate.startswith("../") else root
        path = _ignore_case(base, PurePosixPath(candidate.removeprefix("../")))
        if path.is_file() or path.is_dir():
            return path
    return None


def _ignore_case(base: Path, relative: PurePosixPath) -> Path:
    """Return `base / relative`; for a part that does not exist, take the first entry that differs in case or Unicode form."""
    path = base
    for part in relative.parts:
        exact = path / part
        if not exact.exists() and path.is_dir():
            others = sorted(entry for entry in path.iterdir() if _caseless(entry.name) == _caseless(part))
            exact = others[0] if others else exact
        path = exact
    return path


def _caseless(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class LineReader(Iterator[str]):
    """The lines of an open file as UTF-8 text, with their line ends; only LF ends a line, and a byte order mark is removed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Read a file from where it is; `path` is its name for messages."""
        self.file, self.path = file, path
        self.number = 0  # of the last line that was read, from 1

    def raw(self) -> bytes:
        """Return the next line; b"" at the end. `UserError` if it is longer than `LINE_LIMIT`."""
        line = self.file.readline(LINE_LIMIT + 1)
        self.number += bool(line)
        if len(line) > LINE_LIMIT:
            raise line_error(self.path, self.number, f"the line is longer than {LINE_LIMIT} bytes")
        return line

    def __next__(self) -> str:
        line = self.raw()
        if not line:
            raise StopIteration
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise line_error(self.path, self.number, f"not UTF-8 text ({error.reason} at byte {error.start})") from error


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, bytes) for every line; only LF ends a line.

    Raises:
        UserError: a line is longer than `LINE_LIMIT`.
    """
    with path.open("rb") as file:
        lines = LineReader(file, path)
        while line := lines.raw():
            yield lines.number, line


def stripped_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text without white space around it) for every line of a list.

    Raises:
        UserError: a blank line is not at the end of the list.
    """
    blank = 0
    for number, line in enumerate(text_lines(path), start=1):
        text = line.strip(WHITE_SPACE)
        if text and blank:
            raise line_error(path, blank, "a blank line inside the list would shift every row after it; remove it")
        if text:
            yield number, text
        else:
            blank = blank or number


def read_names(path: Path, strip: str = WHITE_SPACE) -> list[str]:
    """Return the names in a file with one name on every line, without the characters `strip` at their ends."""
    return [text.rstrip(strip) for _, text in stripped_lines(path)]


def parse_whole_number(text: str, path: Path, line: int) -> int:
    """Parse a whole number below 10^18 that is written with the digits 0 to 9.

    Raises:
        UserError: with file and line, for any other text.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise line_error(path, line, f"{text[:40]!r} is no whole number")
    return int(text)


def parse_media_path(text: str, path: Path, line: int) -> str:
    """Return a media path from a list as a relative POSIX path.

    Raises:
        UserError: with file and line, if the path is absolute, empty or too long, or contains '..' or unprintable characters.
    """
    posix = text.replace("\\", "/")
    parts = [part for part in posix.split("/") if part not in ("", ".")]
    shown = repr(text if len(text) <= 80 else f"{text[:80]}…")
    if len(text) > _PATH_LIMIT:
        raise line_error(path, line, f"the path {shown} is longer than {_PATH_LIMIT} characters")
    if posix.startswith("/") or _DRIVE.match(posix):
        raise line_error(path, line, f"the path {shown} is absolute; paths are relative to the media folder")
    if ".." in parts or not parts or UNPRINTABLE.search(posix):
        raise line_error(path, line, f"the path {shown} holds '..' or unprintable characters, or is empty")
    return "/".join(parts)


def looks_like_formula(cell: str) -> bool:
    """Return whether a spreadsheet would run the cell: it starts with = + - @ tab or CR, and is not a number."""
    return bool(_FORMULA.match(cell)) and not _NUMBER.fullmatch(cell)


def guard_cell(cell: str) -> str:
    """Return a cell of a CSV file that a spreadsheet may open: an apostrophe goes before what it would run as a formula."""
    return f"'{cell}" if looks_like_formula(cell.lstrip("'")) else cell


def unguard_cell(cell: str) -> str:
    """Return what `guard_cell` was given."""
    return cell[1:] if cell.startswith("'") and looks_like_formula(cell.lstrip("'")) else cell


def media_file(root: Path, media: PurePath) -> Path:
    """Return the path of a media file below a root.

    If there is no file of exactly this name, it is the one whose name is the same in Unicode's form NFC: macOS, for one, may
    write é as two characters.
    """
    path = root / media
    if str(media).isascii() or os.path.lexists(path):
        return path
    path = root
    for part in media.parts:
        exact = path / part
        path = exact if os.path.lexists(exact) else path / _names_by_nfc(path).get(unicodedata.normalize("NFC", part), part)
    return path


def _names_by_nfc(folder: Path) -> Mapping[str, str]:
    try:
        return _read_names_by_nfc(folder, folder.stat().st_mtime_ns)
    except OSError:  # there is no such folder
        return {}


@lru_cache(maxsize=64)
def _read_names_by_nfc(folder: Path, _changed: int) -> Mapping[str, str]:
    """Return the names in a folder by their form NFC; `_changed`, when it was changed last, makes an old answer invalid."""
    return {unicodedata.normalize("NFC", name): name for name in sorted(os.listdir(folder), reverse=True)}


def find_missing_media(
    root: Path,
    media: Iterable[str],
    where: Callable[[int], str],
    follows_links: bool = False,
    find_member: Callable[[str], Any] = lambda path: None,
) -> list[int]:
    """Return the positions of the paths that are not a file under `root`; see `media_sizes`."""
    return np.flatnonzero(media_sizes(root, media, where, follows_links, find_member) < 0).tolist()


def media_sizes(
    root: Path,
    media: Iterable[str],
    where: Callable[[int], str],
    follows_links: bool = False,
    find_member: Callable[[str], Any] = lambda path: None,
) -> NDArray[np.int64]:
    """Return the size of each file in bytes; -1: it is no file under `root`.

    Args:
        root: the folder of media.
        media: paths relative to `root`.
        where: returns the list and line of the path at a position, for messages.
        follows_links: whether symbolic links may lead out of `root`; not those of a downloaded archive.
        find_member: returns the `Member` of a tar file that an absolute path means, or None.

    Raises:
        UserError: a symbolic link leads out of `root` and may not, or a file cannot be looked at.
    """
    real_root = os.path.realpath(root)
    prefix = os.path.join(real_root, "")
    inside: dict[str, bool] = {}
    sizes = array("q")
    for position, name in enumerate(media):
        folder = name.rpartition("/")[0]
        if folder not in inside:
            inside[folder] = follows_links or _is_inside(os.path.join(real_root, folder), real_root)
        full = prefix + name if name.isascii() else str(media_file(Path(real_root), PurePosixPath(name)))
        member = find_member(full)
        full = member.tar if member else full
        sizes.append(-1)
        try:
            status = os.lstat(full)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise UserError(f"{where(position)}: {name} cannot be looked at: {error.strerror}") from error
            continue
        is_link = stat.S_ISLNK(status.st_mode)
        if not inside[folder] or (is_link and not follows_links and not _is_inside(full, real_root)):
            raise UserError(f"{where(position)}: {name} is a symbolic link that leads out of the media folder {root}")
        if stat.S_ISREG(status.st_mode) or (is_link and os.path.isfile(full)):
            sizes[-1] = member.size if member else os.stat(full).st_size if is_link else status.st_size
    return np.array(sizes, np.int64)


def _is_inside(path: str, real_root: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(real_root)


def binary_column(path: Path, num_rows: int) -> NDArray[np.int64]:
    """Read a file with one `0` or `1` on every line.

    Returns:
        The ascending numbers, from 0, of the lines with a `1`.

    Raises:
        UserError: a line holds neither (the first one is named), or the number of lines is not `num_rows`.
    """
    if path.stat().st_size > (num_rows + 1) * 16:
        raise UserError(f"{path} has more than 16 bytes for each of the {num_rows} images: it is no column of 0 and 1")
    values = path.read_bytes().translate(None, b" \t\r").rstrip(b"\n").split(b"\n")
    if len(values) != num_rows:
        raise line_error(path, len(values), f"the file ends after {len(values)} values, the image list has {num_rows}")
    if not {b"0", b"1"}.issuperset(values):
        line, value = next((line, value) for line, value in enumerate(values, start=1) if value not in (b"0", b"1"))
        raise line_error(path, line, f"{value[:40].decode(errors='replace')!r} is neither 0 nor 1")
    return np.flatnonzero(np.frombuffer(b"".join(values), np.uint8) == ord("1"))


def binary_rows(path: Path, width: int) -> Iterator[NDArray[np.int64]]:
    """Read a file with `width` zeros and ones on every line; yield for each line the ascending columns that hold a `1`.

    Raises:
        UserError: with file and line, for anything else.
    """
    expected = 2 * width - 1
    for number, line in raw_lines(path):
        body = line.strip(WHITE_SPACE.encode())
        digits = body[::2]
        if len(body) != expected or body[1::2].translate(None, b"\t ") or digits.translate(None, b"01"):
            digits = _split_digits(body.split(), path, number, width)  # irregular spacing, or a faulty line
        yield np.flatnonzero(np.frombuffer(digits, np.uint8) == ord("1"))


def _split_digits(values: list[bytes], path: Path, line: int, width: int) -> bytes:
    wrong = next((value for value in values if value not in (b"0", b"1")), b"")
    if wrong:
        raise line_error(path, line, f"{wrong[:40].decode(errors='replace')!r} is neither 0 nor 1")
    if len(values) != width:
        raise line_error(path, line, f"{len(values)} values where {width} are due")
    return b"".join(values)


def csv_rows(path: Path, separator: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its first line, cells) for every row of a UTF-8 CSV file.

    Raises:
        UserError: with file and line, for a huge field, or broken quoting.
    """
    with path.open("rb") as file:
        yield from rows_of_lines(LineReader(file, path), separator)


def rows_of_lines(lines: LineReader, separator: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file as `csv_rows` does, from where its lines are; no more lines are read than a row has."""
    csv.field_size_limit(LINE_LIMIT)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        first = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise line_error(lines.path, first, str(error)) from error
        if cells:
            yield first, cells


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their line ends; a byte order mark is removed.

    Raises:
        UserError: with file and line, for bytes that are not UTF-8, and for a line that is longer than `LINE_LIMIT`.
    """
    with path.open("rb") as file:
        yield from LineReader(file, path)
