"""Decode still pictures by what each file itself says about its samples, and put them on white."""

from __future__ import annotations

import io
import re
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from pipeline.data.animations import GIF_STARTS, first_gif_frame
from pipeline.data.bmp import open_bit_fields
from pipeline.data.pixels import check_size, on_white
from pipeline.data.png import PNG_START, open_png
from pipeline.data.tiff import TIFF_PREFIXES, open_tiff
from pipeline.runtime.errors import UserError

# Pillow reads these formats with libraries; for some others it starts programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
JPEG_START = b"\xff\xd8\xff"
JPEG2000_STARTS = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
JPEG2000_COLOURS = (0, 12, 15, 16, 17, 18)  # enumerated spaces that Pillow reads: bilevel, CMYK, sRGB, grey, sYCC
MAX_UNENDED_BYTES = 2**28  # of a JPEG without an end, which is decoded in memory
# What may stand behind the data of a JPEG without an end, to see whether its pixels are all there.
FILLERS = (b"", bytes(64), b"\x55" * 64, b"\xaa" * 64, bytes(range(1, 65)))
FILLERS += tuple(b"".join(bytes([0xFF, 0xD0 + k]) + fill * 16 for k in range(8)) for fill in (b"\x55", b"\xaa"))  # restarts


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
    if start.startswith(JPEG_START):
        return on_white(_open_jpeg(path))
    return on_white(_open_jpeg2000(path) if start.startswith(JPEG2000_STARTS) else _open_plain(path))


def _open_plain(source: Path | BinaryIO) -> Image.Image:
    """Return the picture that Pillow reads, turned upright."""
    with Image.open(source, formats=IMAGE_FORMATS) as file:
        check_size(*file.size)
        file.load()
        return ImageOps.exif_transpose(file)


def _open_jpeg(path: Path) -> Image.Image:
    """Return a JPEG, turned upright; its marker of the end may be missing, but no pixels."""
    try:
        return _open_plain(path)
    except OSError as error:
        if "truncated" not in str(error) or path.stat().st_size > MAX_UNENDED_BYTES:
            raise
        data = path.read_bytes().removesuffix(b"\xff")
        if not _has_all_scans(data):
            raise
        # libjpeg would make up the missing pixels. None is missing if they do not depend on what stands behind the data.
        pictures = [_open_plain(io.BytesIO(data + filler + b"\xff\xd9")) for filler in FILLERS]
        if len({picture.tobytes() for picture in pictures}) > 1:
            raise
        return pictures[0]


def _has_all_scans(jpeg: bytes) -> bool:
    """Return whether the scans that begin in a JPEG give all bits of all coefficients of all components."""
    missing: dict[int, list[int]] = {}  # for each component, how many bits of each coefficient are not known
    is_progressive = False
    at = 2
    while marker := re.compile(rb"\xff([\xc0-\xcf\xda-\xfe])(..)", re.DOTALL).search(jpeg, at):
        kind, length = marker[1][0], int.from_bytes(marker[2], "big")
        at = marker.end() + length - 2
        body = jpeg[marker.end() : at]
        if len(body) != length - 2:
            return False
        if kind in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
            is_progressive = kind in (0xC2, 0xCA)
            missing = {component: [14] * 64 for component in body[6::3]}
        if kind == 0xDA:
            first, last, point = (body[-3], body[-2], body[-1] & 15) if is_progressive else (0, 63, 0)
            for component in body[1 : 1 + 2 * body[0] : 2]:
                missing.setdefault(component, [14] * 64)[first : last + 1] = [point] * (last + 1 - first)
    return bool(missing) and not any(any(each) for each in missing.values())


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
