"""Small .deb and .tgz archives for the tests."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from collections.abc import Mapping, Sequence

import pyarrow as pa


def special_member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Return an entry that is not a regular file: a link, a device, a folder."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar(files: Mapping[str, bytes] | Sequence[tuple[str, bytes]], others: Sequence[tarfile.TarInfo] = ()) -> bytes:
    """Return an uncompressed tar archive: the other entries first, then the regular files."""
    pairs = list(files.items()) if isinstance(files, Mapping) else files
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as out:
        for info in others:
            out.addfile(info)
        for name, content in pairs:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return data.getvalue()


def tgz(tarred: bytes) -> bytes:
    """Compress a tar archive as `npm pack` does."""
    return gzip.compress(tarred, mtime=0)


def deb(tarred: bytes, suffix: str = ".xz") -> bytes:
    """Return a Debian package with this data: an ar archive of three members, those of odd length padded.

    Args:
        tarred: the tar archive of the data.
        suffix: its compression: ".xz" (Debian), ".zst" (Ubuntu), ".gz" or "" (old tools).
    """
    packed = {
        ".xz": lzma.compress,
        ".gz": tgz,
        ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
        "": bytes,
    }[suffix](tarred)
    members = {"debian-binary": b"2.0\n", "control.tar.gz": tgz(tar({"./control": b"x"})), f"data.tar{suffix}": packed}
    data = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        data += header.encode() + content + b"\n" * (len(content) % 2)
    return data
