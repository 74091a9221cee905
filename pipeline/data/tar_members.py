"""Files inside tar files: what is in a tar, and a path that says where a member lies, <tar file>/<offset>+<size><ending>.

Such a path is enough to read the member: no tar is searched twice. Only plain tar files are read, because others cannot be
entered in the middle. A tar may also lie in an object store (see `remote_tars`); then the path begins with its address.
"""

from __future__ import annotations

import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pipeline.data.readers import parse_media_path
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import is_address

MAX_HEADER_BYTES = 2**20  # of a member; the header of a hostile one may claim to be as long as the file
MAX_MEMBER_BYTES = 2**30
_MEMBER_PATH = re.compile(r"(.*\.tar)/(\d{1,18})\+(\d{1,10})(\.[\w-]{1,40})", re.DOTALL)
_KINDS = (
    (tarfile.TarInfo.issym, "a symbolic link"),
    (tarfile.TarInfo.islnk, "a hard link"),
    (tarfile.TarInfo.issparse, "sparse"),
)


class Member(NamedTuple):
    """Where the bytes of a member are."""

    tar: str
    offset: int
    size: int
    suffix: str


class TarEntry(NamedTuple):
    """A member as it is found in a tar, with the reason why it is not read; "": it is."""

    name: str
    offset: int
    size: int
    problem: str
    content: bytes = b""  # of a small member that was read on the way


def member_path(tar: str, entry: TarEntry) -> str:
    """Return the path of a member, relative to what the path of the tar is relative to.

    Raises:
        UserError: the ending of its name is none that such a path may have.
    """
    path = f"{tar}/{entry.offset}+{entry.size}{os.path.splitext(entry.name)[1].lower()}"
    if not _MEMBER_PATH.fullmatch(path):
        raise UserError(f"the name {entry.name[-80:]!r} does not end with a dot and at most 40 letters, digits, - and _")
    return path


def find_member(path: str) -> Member | None:
    """Return the member that a path means; None for the path of a file."""
    match = _MEMBER_PATH.fullmatch(path) if ".tar/" in path else None
    is_there = match and (is_address(match[1]) or os.path.isfile(match[1]))
    return Member(match[1], int(match[2]), int(match[3]), match[4]) if match and is_there else None


def file_on_disk(path: str) -> str:
    """Return the file that has to be there for a path: the tar of a member, else the path itself."""
    member = find_member(path)
    return member.tar if member else path


def read_member(member: Member) -> bytes:
    """Return the content of a member.

    Raises:
        UserError: the tar is not the one any more in which the member was found, or is cut short.
    """
    with open(member.tar, "rb") as file:
        file.seek(max(0, member.offset - tarfile.BLOCKSIZE))
        header, content = file.read(tarfile.BLOCKSIZE), file.read(member.size)
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        found = -1
    if found != member.size or len(content) != member.size:
        raise UserError(f"{os.path.basename(member.tar)} was changed since it was prepared; prepare the data set again")
    return content


@contextmanager
def local_file(path: Path) -> Iterator[Path]:
    """Give a path that can be opened: the path itself, or a copy of the member that it means, which is removed afterwards."""
    member = None if path.parent.suffix != ".tar" else find_member(str(path))
    if member is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(read_member(member))
        yield copy


class _HeaderReader:
    """A file of which no more is read at once than a header may have."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has more than {MAX_HEADER_BYTES} bytes")
        return self._read(size)


def scan_tar(file: BinaryIO) -> Iterator[TarEntry]:
    """Yield the files in a tar in their order; only headers are read. Folders are left out.

    Raises:
        UserError: the tar is damaged or cut short, after the members that were found before; without the name of the file.
    """
    reader: Any = _HeaderReader(file)
    size, last, place = file.seek(0, os.SEEK_END), "no member", 0
    file.seek(0)
    try:
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            while info := tar.next():
                vars(tar)["members"].clear()  # the names of millions are not kept
                if info.size < 0 or info.offset_data <= place:  # tarfile would go back, and find the same members for ever
                    raise tarfile.ReadError(f"a header claims {info.size} bytes")
                place = info.offset_data
                if not info.isdir():
                    last = repr(info.name[:80])
                    yield TarEntry(info.name, info.offset_data, info.size, _problem(info, size))
            end = tar.offset
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        raise UserError(f"damaged, cut short or no plain tar file, after {last}: {error}") from error
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes what is no header for the end
        raise UserError(f"damaged or cut short after {last}")
    if any(block.strip(b"\0") for block in iter(lambda: file.read(MAX_HEADER_BYTES), b"")):
        raise UserError(
            f"its end comes after {last}, but more follows, which is not read; join tar files with tar --concatenate"
        )


def _problem(info: tarfile.TarInfo, size: int) -> str:
    kind = next((kind for is_kind, kind in _KINDS if is_kind(info)), "" if info.isreg() else "a device or pipe")
    if kind:
        return f"it is {kind}"
    if info.size > MAX_MEMBER_BYTES:
        return f"it has more than {MAX_MEMBER_BYTES} bytes"
    if info.offset_data + info.size > size:
        return "it is cut short"
    try:
        parse_media_path(info.name, Path(), 0)
    except UserError as error:
        return str(error).partition(": ")[2]
    return ""
