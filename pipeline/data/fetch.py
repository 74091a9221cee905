"""Download the archive of a dataset with a package client of this machine, and unpack it.

The content of an archive is not trusted.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import pyarrow as pa

from pipeline.data.readers import UNPRINTABLE
from pipeline.data.spec import SPEC_FOLDER, load_spec
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256, lock_file, sync_folder, write_atomic

ARCHIVE_RECORD = "archive.json"  # file in the folder, written by `fetch` and read by the builders of manifests
PACKAGE_CLIENTS = {
    "apt": ("apt-get", "download"),
    "npm": ("npm", "pack", "--silent", "--ignore-scripts"),
}
_AR_MAGIC = b"!<arch>\n"


def download_folder(dataset: str, home: Path) -> Path:
    """Return the folder where `fetch` puts the files of a dataset; it exists only when all files are there."""
    return home / "downloads" / dataset


def fetch(dataset: str, home: Path, archive: Path | None = None) -> Path:
    """Make sure that the files of a dataset are there, and return their folder; they are fetched only once.

    Args:
        dataset: name of the dataset.
        home: folder to write to.
        archive: an archive to unpack; None: download it with apt-get or npm.

    Raises:
        UserError: the dataset has no archive; the client is missing or fails (the message names the archive to supply); or the
            archive is damaged, unsafe, too large, not the one of this dataset, or another one than was unpacked before.
    """
    source = _archive_spec(dataset)
    target = download_folder(dataset, home)
    if archive is not None and not archive.is_file():
        raise UserError(f"{archive} is no file; --archive takes {source['file']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(target.parent / f".{dataset}.lock", f"another process is fetching {dataset}; wait for it"):
        if not target.is_dir():
            part = target.with_name(f".{dataset}.part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                _unpack_and_record(part, dataset, source, archive)
                os.sync()
                os.replace(part / "files", target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        elif archive is not None and file_sha256(archive) != read_archive_record(target)["sha256"]:
            raise UserError(f"{target} was unpacked from another archive than {archive.name}; remove it to fetch again")
    return target


def read_archive_record(root: Path) -> dict[str, Any]:
    """Return what `fetch` recorded about the archive: its name, bytes and sha256, and the numbers of files and links in it.

    Raises:
        UserError: the folder was not made by `fetch`.
    """
    try:
        return json.loads((root / ARCHIVE_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{root / ARCHIVE_RECORD} is missing or broken; remove the folder and fetch it again") from error


def unpack(archive: Path, into: Path, max_files: int, max_bytes: int) -> dict[str, int]:
    """Write the regular files of a .deb or .tgz archive to a new folder; links are left out.

    Args:
        archive: the archive.
        into: the folder; it must not exist.
        max_files: most entries that the archive may have.
        max_bytes: most bytes that the archive may unpack to.

    Returns:
        The number of "files" that were written, and of "links" that were left out.

    Raises:
        UserError: the archive is damaged, exceeds a limit, or contains a path that leaves the folder, a device, a sparse file,
            or a file more than once.
    """
    into.mkdir(parents=True)
    counts = {"files": 0, "links": 0}
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=_open_tar_stream(file, max_bytes), mode="r|") as tar:
            for member in _limited_entries(tar, max_files):
                kind = _write_entry(tar, member, into)
                if kind:
                    counts[kind] += 1
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, pa.ArrowException, gzip.BadGzipFile) as error:
        raise UserError(f"{archive.name} is damaged or no .deb or .tgz archive: {error}") from error
    except ValueError as error:
        raise UserError(f"{archive.name} is refused: {error}") from error
    return counts


def _archive_spec(dataset: str) -> Mapping[str, Any]:
    """Return the `archive` part of the spec of a dataset."""
    spec = load_spec(dataset)
    if "archive" not in spec:
        choices = sorted(path.stem for path in SPEC_FOLDER.glob("*.yaml") if "archive" in load_spec(path.stem))
        raise UserError(f"{dataset} cannot be fetched; datasets that can: {', '.join(choices)}")
    return spec["archive"]


def _unpack_and_record(part: Path, dataset: str, source: Mapping[str, Any], archive: Path | None) -> None:
    """Create `<part>/files` with all files of the archive and the record of it."""
    path = archive or _download(dataset, source, part / "download")
    files = part / "files"
    counts = unpack(path, files, source["max_files"], source["max_bytes"])
    if not (files / source["holds"]).is_dir():
        raise UserError(f"{path.name} is not {source['file']}: it has no folder {source['holds']}")
    archive_facts = {"archive": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), **counts}
    write_atomic(files / ARCHIVE_RECORD, json.dumps(archive_facts, indent=1, sort_keys=True) + "\n")


def _download(dataset: str, source: Mapping[str, Any], into: Path) -> Path:
    """Download the archive with the client that the spec names, and return its path."""
    command = [*PACKAGE_CLIENTS[source["client"]], source["package"]]
    remedy = f"get {source['file']} ({source['from']}) elsewhere and run: diffalign fetch {dataset} --archive FILE"
    if shutil.which(command[0]) is None:
        raise UserError(f"{dataset} comes by {command[0]}, which this machine does not have; {remedy}")
    into.mkdir(parents=True)
    code = subprocess.run(command, cwd=into, stdout=2, check=False).returncode  # its messages go to stderr
    found = list(into.iterdir())
    if code or len(found) != 1:
        raise UserError(f"`{' '.join(command)}` failed with code {code}; {source['hint']}, or {remedy}")
    return found[0]


def _open_tar_stream(file: IO[bytes], limit: int) -> IO[bytes]:
    """Open the decompressed tar stream of a .deb (its data.tar.*) or of a compressed tar; at most `limit` bytes can be read."""
    if file.read(len(_AR_MAGIC)) == _AR_MAGIC:
        file = _read_ar_member(file, "data.tar", limit)
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    stream = next((decompress(file) for magic, decompress in _DECOMPRESSORS if start.startswith(magic)), file)
    return cast(IO[bytes], _BoundedReader(stream, limit))  # of a stream, tarfile only calls `read`


def _open_zstd(file: IO[bytes]) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


_DECOMPRESSORS: tuple[tuple[bytes, Callable[[IO[bytes]], Any]], ...] = (
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x1f\x8b", gzip.open),
    (b"\x28\xb5\x2f\xfd", _open_zstd),
)


class _BoundedReader:
    """A reader that raises `UserError` after `limit` bytes."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit, self._left = stream, limit, limit

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise UserError(f"it unpacks to more than {self._limit} bytes")
        return data


def _read_ar_member(file: IO[bytes], prefix: str, limit: int) -> IO[bytes]:
    """Return the first member of an ar archive whose name starts with `prefix`; `file` is positioned after the magic bytes."""
    while header := file.read(60):
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        digits = header[48:58].strip()
        if len(header) < 60 or header[58:] != b"`\n" or not digits.isdigit():
            raise UserError("its ar header is broken")
        size = int(digits)
        if name.startswith(prefix):
            if size > limit:
                raise UserError(f"{name} is larger than {limit} bytes")
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, os.SEEK_CUR)
    raise UserError(f"it has no {prefix}")


def _limited_entries(tar: tarfile.TarFile, limit: int) -> Iterator[tarfile.TarInfo]:
    for number, member in enumerate(tar, start=1):
        if number > limit:
            raise UserError(f"it holds more than {limit} entries")
        yield member


def _write_entry(tar: tarfile.TarFile, member: tarfile.TarInfo, into: Path) -> str:
    """Write one entry; return "files", "links" (nothing is written) or "" (a folder)."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or UNPRINTABLE.search(member.name):
        raise UserError(f"the path {member.name[:200]!r} is absolute, leaves the folder or holds odd characters")
    if member.isdir():
        return ""
    if member.issym() or member.islnk():
        return "links"
    source = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if source is None or not path.parts or path == PurePosixPath(ARCHIVE_RECORD):
        raise UserError(f"{member.name[:200]!r} is no regular file")
    destination = into / path
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with source, destination.open("xb") as out:
            shutil.copyfileobj(source, out)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"it holds {member.name[:200]!r} more than once") from error
    return "files"
