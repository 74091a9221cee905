"""Decode still pictures by what each file itself says about its samples, and put them on white."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.animations import GIF_STARTS, first_gif_frame
from pipeline.data.bmp import open_bit_fields
from pipeline.data.damage import load_whole, open_picture
from pipeline.data.pixels import check_size, on_white
from pipeline.data.png import PNG_START, open_png
from pipeline.data.tiff import TIFF_PREFIXES, open_tiff
from pipeline.runtime.errors import UserError

# Pillow reads these formats with libraries; for some others it starts programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
JPEG2000_STARTS = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
JPEG2000_COLOURS = (0, 12, 15, 16, 17, 18)  # enumerated spaces that Pillow reads: bilevel, CMYK, sRGB, grey, sYCC


def decode_picture(path: Path) -> Image.Image:
    """Return the picture in a raster file as RGB, turned upright; transparent parts become white.

    Raises:
        UserError: this kind of file is not supported, or says too little; with the reason. Pillow's own errors pass through.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(TIFF_PREFIXES):
        return on_white(open_tiff(path))
    if start.startswith(PNG_START):
        return on_white(open_png(path))
    if start.startswith(GIF_STARTS):
        return first_gif_frame(path)
    if start.startswith(b"BM"):
        picture = open_bit_fields(path)
        return on_white(_open_plain(path) if picture is None else picture)
    return on_white(_open_jpeg2000(path) if start.startswith(JPEG2000_STARTS) else _open_plain(path))


def starts_like_picture(path: Path) -> bool:
    """Return whether the first bytes of a regular file are those of a format that is read; not if it cannot be opened."""
    Image.init()
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    accepts = (Image.OPEN[name][1] for name in IMAGE_FORMATS if name in Image.OPEN)
    return any(accept is not None and bool(accept(start)) for accept in accepts)


def _open_plain(path: Path) -> Image.Image:
    """Return the picture that Pillow reads, turned upright, if its data are whole."""
    with open_picture(path, IMAGE_FORMATS) as file:
        check_size(*file.size)
        picture = load_whole(path, file)
        ImageOps.exif_transpose(picture, in_place=True)
        return picture


def _open_jpeg2000(path: Path) -> Image.Image:
    """Return a JPEG 2000 picture. Pillow moves the bits of its samples up; they are scaled here, so that white is white."""
    with path.open("rb") as file:
        start = file.read(2**20)
    found = re.search(rb"(?:^|jp2c|jp2c.{8})\xff\x4f\xff\x51(.{38})", start, re.DOTALL)
    if not found:
        raise UserError("no JPEG 2000 data in it")
    space = re.search(rb"colr\x01..(.{4})", start[: found.start()], re.DOTALL)
    if space and int.from_bytes(space[1], "big") not in JPEG2000_COLOURS:
        raise UserError(f"the JPEG 2000 colour space {int.from_bytes(space[1], 'big')} is not supported")
    (components,) = struct.unpack_from(">H", found[1], 36)
    depths = {1 + (depth & 127) for depth in start[found.end() : found.end() + 3 * components : 3]}
    if len(depths) != 1:
        raise UserError(f"its channels have different depths: {sorted(depths)} bits")
    picture = _open_plain(path)
    (bits,), container = depths, 16 if picture.mode == "I;16" else 8
    if bits >= container or picture.mode == "P":
        return picture
    samples = np.asarray(picture).astype(np.uint32) >> (container - bits)
    scaled = (samples * 255 // (2**bits - 1)).astype(np.uint8)
    return Image.frombytes("L" if container == 16 else picture.mode, picture.size, scaled.tobytes())
