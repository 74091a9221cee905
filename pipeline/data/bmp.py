"""Read the BMPs whose pixels are bit fields, of 16 or 32 bits, by the masks of the header, that of alpha included."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.pixels import check_size
from pipeline.runtime.errors import UserError

UNCOMPRESSED, BIT_FIELDS, BIT_FIELDS_WITH_ALPHA = 0, 3, 6
DEFAULT_MASKS = {16: (0x7C00, 0x3E0, 0x1F), 32: (0xFF0000, 0xFF00, 0xFF)}  # red, green, blue


class _Header(NamedTuple):
    width: int
    height: int
    is_top_down: bool
    bits: int
    masks: tuple[int, int, int, int]  # red, green, blue, alpha
    offset: int  # of the pixels


def open_bit_fields(path: Path) -> Image.Image | None:
    """Return the picture of a BMP as RGB, or as RGBA if it has alpha; None if its pixels are not bit fields.

    The header of a picture without transparency may promise alpha and then leave it zero everywhere: then there is none.
    """
    with path.open("rb") as file:
        header = _read_header(file.read(14 + 124 + 16))
        if header is None:
            return None
        check_size(header.width, header.height)
        row_bytes = (header.width * header.bits + 31) // 32 * 4
        file.seek(header.offset)
        data = file.read(row_bytes * header.height)
    missing = row_bytes * header.height - len(data)
    if missing > row_bytes - header.width * header.bits // 8:  # the padding of the last row may be missing
        raise UserError("cut short: rows of the picture are missing")
    rows = np.frombuffer(data + bytes(missing), f"<u{header.bits // 8}").reshape(header.height, -1)[:, : header.width]
    channels = [_channel(rows, mask) for mask in header.masks]
    if not channels[3].any():
        channels = channels[:3]
    pixels = np.stack(channels, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels if header.is_top_down else pixels[::-1]))


def _read_header(start: bytes) -> _Header | None:
    """Return what the first bytes of a BMP say about its bit fields; None if it has none."""
    if len(start) < 14 + 40 or start[:2] != b"BM":
        return None
    (offset,), (size,) = struct.unpack_from("<I", start, 10), struct.unpack_from("<I", start, 14)
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", start, 18)
    if size not in (40, 52, 56, 64, 108, 124) or bits not in DEFAULT_MASKS:
        return None
    if compression not in (UNCOMPRESSED, BIT_FIELDS, BIT_FIELDS_WITH_ALPHA) or (size == 64 and compression != UNCOMPRESSED):
        return None
    num_masks = 4 if size in (56, 108, 124) or (size == 40 and compression == BIT_FIELDS_WITH_ALPHA) else 3
    masks = (*struct.unpack_from(f"<{num_masks}I", start, 14 + 40), 0)[:4] if len(start) >= 14 + 40 + 4 * num_masks else ()
    if compression == UNCOMPRESSED or not any(masks):
        # The masks of V4 and V5 headers are for bit fields, but that for alpha holds for every compression.
        colours, alpha = DEFAULT_MASKS[bits], masks[3] if size >= 108 and len(masks) == 4 else 0
        masks = (*colours, alpha if alpha < 1 << bits and not alpha & sum(colours) else 0)
    is_after_header = compression != UNCOMPRESSED and size == 40
    offset = offset or 14 + size + (4 * num_masks if is_after_header else 0)
    return _Header(width, abs(height), height < 0, bits, _checked_masks(masks, bits), offset)


def _checked_masks(masks: tuple[int, ...], bits: int) -> tuple[int, int, int, int]:
    red, green, blue, alpha = masks
    for mask in masks:
        lowest = mask & -mask
        if mask >= 1 << bits or (mask and (mask // lowest + 1) & (mask // lowest)):
            raise UserError(f"the mask {mask:#x} of a channel is not a row of bits")
    if (red | green | blue | alpha) != red + green + blue + alpha:
        raise UserError("the masks of its channels overlap")
    return red, green, blue, alpha


def _channel(rows: np.ndarray, mask: int) -> np.ndarray:
    """Return one channel of pixels as 0..255; zero where the mask is 0."""
    if not mask:
        return np.zeros(rows.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    top = mask >> shift
    values = (rows & mask) >> shift
    if top < 2**16:
        return (np.arange(top + 1) * 255 // top).astype(np.uint8)[values]
    return (values.astype(np.uint64) * 255 // top).astype(np.uint8)
