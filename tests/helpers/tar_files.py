"""Tar files of samples, written by Python's tarfile."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

Members = list[tuple[str | tarfile.TarInfo, bytes]]


def picture(colour: int, form: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 255 - colour, 40)).save(file, form)
    return file.getvalue()


def write_tar(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(content) if isinstance(name, str) else info.size
            tar.addfile(info, io.BytesIO(content))


def sample(key: str, number: int, **parts: bytes) -> Members:
    given = {"png": picture(number), "txt": f"picture {number}\n".encode(), "cls": b"%d" % (number % 2), **parts}
    return [(f"{key}.{part}", content) for part, content in given.items() if content]
