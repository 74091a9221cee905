"""Check that the data of a GIF are whole: Pillow fills what is missing of a frame with whatever follows in the file."""

from __future__ import annotations

import struct

from PIL import Image

from pipeline.data.pixels import check_clip
from pipeline.runtime.errors import UserError

GIF_UNSET = 255  # a pixel that no code has set; or the last of 256 colours
GIF_IMAGE, GIF_EXTENSION, GIF_END, GIF_NOTHING = 0x2C, 0x21, 0x3B, 0


def check_gif(data: bytes, all_frames: bool) -> None:
    """Check the blocks of a GIF, and the codes of the first frame or of all frames.

    Raises:
        UserError: the blocks do not follow each other, codes are damaged, a frame has too few or too many pixels, or the end is
            missing where all frames are asked for.
    """
    position, total = 13 + _palette_bytes(data[10]), 0
    try:
        while data[position] != GIF_END:
            kind = data[position]
            if kind == GIF_IMAGE:
                width, height, flags = struct.unpack_from("<4xHHB", data, position + 1)
                total += width * height
                check_clip(total)
                codes = position + 10 + _palette_bytes(flags)
                position = _end_of_blocks(data, codes + 1)
                _check_gif_pixels(data[codes + 1 : position], data[codes], width * height)
                if not all_frames:
                    return
            elif kind == GIF_EXTENSION:
                position = _end_of_blocks(data, position + 2)
            elif kind == GIF_NOTHING:
                position += 1
            else:
                raise UserError(f"damaged: there is no block of a GIF at byte {position}")
    except (IndexError, struct.error) as error:
        raise UserError("cut short: the end of the animation is missing") from error


def _palette_bytes(flags: int) -> int:
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


def _end_of_blocks(data: bytes, position: int) -> int:
    """Return the position after a chain of sub-blocks; `IndexError` if the file ends before."""
    while data[position]:
        position += 1 + data[position]
    return position + 1


def _check_gif_pixels(blocks: bytes, bits: int, num_pixels: int) -> None:
    """Check that LZW codes give exactly this number of pixels, by decoding them as a row that is one pixel longer."""
    if num_pixels > (Image.MAX_IMAGE_PIXELS or num_pixels):
        raise UserError("a frame exceeds Pillow's limit of pixels, could be a bomb")
    row = Image.new("L", (num_pixels + 1, 1), GIF_UNSET)
    if _fill(row, blocks, bits):
        raise UserError("damaged: the codes of a frame give too many pixels")
    is_last_set = not num_pixels or row.getpixel((num_pixels - 1, 0)) != GIF_UNSET
    if not is_last_set and not _fill(Image.new("L", (num_pixels, 1)), blocks, bits):
        raise UserError("damaged or cut short: the codes of a frame give too few pixels")


def _fill(row: Image.Image, blocks: bytes, bits: int) -> bool:
    """Decode LZW codes into a row of pixels, and return whether there are enough."""
    try:
        row.frombytes(blocks, "gif", bits, 0, -1)
    except ValueError as error:
        if "not enough" not in str(error):
            raise UserError("damaged: a code of a frame is out of range") from error
        return False
    return True
