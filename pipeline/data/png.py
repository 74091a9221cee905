"""Read a PNG, with its colour key compared at the depth of the file."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.damage import load_whole, open_picture
from pipeline.data.pixels import check_size, upper_bytes
from pipeline.runtime.errors import UserError

PNG_START = b"\x89PNG\r\n\x1a\n"
# Pillow keeps the upper byte of each sample of 16 bits. Told that they are in the other order, it keeps the lower one.
_LOWER_BYTES = "RGB;16L"


def open_png(source: Path | BinaryIO, check: Callable[[int, int], None] = check_size) -> Image.Image:
    """Return a PNG, turned upright; the pixels of its colour key, if it has one, are transparent.

    Args:
        source: the file.
        check: gets width and height before anything is decoded, and may raise an error.
    """
    with open_picture(source, ("PNG",)) if isinstance(source, Path) else Image.open(source, formats=("PNG",)) as opened:
        check(*opened.size)
        file = load_whole(source, opened) if isinstance(source, Path) else opened
        file.load()
        if "transparency" not in file.info or file.mode == "P":
            return ImageOps.exif_transpose(file)
        del file.info["transparency"]
        opacity = Image.fromarray(np.where(_matches_key(file, source), 0, 255).astype(np.uint8))
        picture = upper_bytes(file) if file.mode == "I;16" else file
        picture = picture.convert("RGB" if file.mode == "RGB" else "L")
        picture.putalpha(opacity)
        return ImageOps.exif_transpose(picture)


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the names and contents of the chunks of a PNG, up to its end."""
    file.seek(len(PNG_START))
    name = b""
    while name != b"IEND":
        size, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\xff"))
        data = file.read(size) if size < 2**31 else b""
        if len(data) < size or len(file.read(4)) < 4:
            raise UserError("cut short: the end of the PNG is missing")
        yield name, data


def _matches_key(image: Image.Image, source: Path | BinaryIO) -> np.ndarray:
    """Return whether each pixel [height, width] has the colour that is transparent, compared at the depth of the file."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return _matches_key(image, file)
    chunks: dict[bytes, bytes] = {}
    for name, data in png_chunks(source):
        chunks[name] = data
        if name == b"tRNS":
            break
    depth, channels = chunks[b"IHDR"][8], 3 if image.mode == "RGB" else 1
    key = np.frombuffer(chunks[b"tRNS"], ">u2", channels) & (2**depth - 1)  # the upper bits do not count
    samples = np.asarray(image)
    if depth == 16 and channels == 3:
        source.seek(0)
        with Image.open(source, formats=("PNG",)) as file:
            file.tile = [file.tile[0]._replace(args=_LOWER_BYTES)]
            samples = samples.astype(np.uint16) << 8 | np.asarray(file)
    elif 1 < depth < 8:
        samples = samples // (255 // (2**depth - 1))
    return (samples.reshape(*samples.shape[:2], channels) == key).all(axis=2)
