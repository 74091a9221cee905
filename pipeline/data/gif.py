"""Read a GIF, and check that it is whole: Pillow fills what is missing of a frame with whatever follows in the file."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.data.pixels import check_area, check_clip
from pipeline.runtime.errors import UserError

GIF_UNSET = 255  # a pixel that no code has set; or the last of 256 colours
GIF_PASSES = ((0, 8), (4, 8), (2, 4), (1, 2))  # of interlaced rows: the first one, and the step
GIF_PICTURE, GIF_EXTENSION, GIF_END, GIF_NOTHING = 0x2C, 0x21, 0x3B, 0
GIF_CONTROL, GIF_TEXT = 0xF9, 0x01  # extensions: how the next picture is drawn; a text, which nobody draws


class GifPicture(NamedTuple):
    """One frame as it is stored."""

    corner: tuple[int, int]  # left and top
    size: tuple[int, int]  # width and height
    colours: np.ndarray  # [256, 4]: red, green, blue, alpha
    is_interlaced: bool
    bits: int  # of the codes of single pixels
    codes: bytes  # in blocks
    disposal: str  # what becomes of its part of the canvas before the next frame: keep, clear or restore

    def draw(self) -> Image.Image:
        """Return its pixels as RGBA; raise what `indices` raises."""
        return Image.frombytes("RGBA", self.size, self.colours.view(np.uint32)[:, 0][self.indices()].tobytes())

    def draw_on_white(self) -> Image.Image:
        """Return its pixels as RGB, the transparent ones white; raise what `indices` raises."""
        colours = np.where(self.colours[:, 3:], self.colours[:, :3], 255).astype(np.uint8)
        picture = Image.fromarray(self.indices())
        picture.putpalette(colours.tobytes())
        return picture.convert("RGB")

    def indices(self) -> np.ndarray:
        """Return its pixels, [height, width], as numbers of colours.

        Raises:
            UserError: the codes give too few or too many pixels, or cannot be read.
        """
        width, height = self.size
        if width and height:  # some frames have no pixels
            check_area(width, height)
        pixels = _decoded(self.codes, self.bits, width * height).reshape(height, width)
        if not self.is_interlaced:
            return pixels
        return pixels[np.argsort([row for first, step in GIF_PASSES for row in range(first, height, step)])]


def _decoded(codes: bytes, bits: int, num_pixels: int) -> np.ndarray:
    """Return the pixels of LZW codes. They are decoded as a row that is one pixel longer, which must be left over."""
    row = Image.new("L", (num_pixels + 1, 1), GIF_UNSET)
    if _fill(row, codes, bits):
        raise UserError("damaged: the codes of a frame give too many pixels")
    pixels = np.asarray(row)[0, :num_pixels]
    if num_pixels and pixels[-1] == GIF_UNSET and not _fill(Image.new("L", (num_pixels, 1)), codes, bits):
        raise UserError("damaged or cut short: the codes of a frame give too few pixels")
    return pixels


def _fill(row: Image.Image, codes: bytes, bits: int) -> bool:
    """Decode LZW codes into a row of pixels, and return whether there are enough."""
    try:
        row.frombytes(codes, "gif", bits, 0, -1)
    except ValueError as error:
        if "not enough" not in str(error):
            raise UserError("damaged: a code of a frame is out of range") from error
        return False
    return True


def read_gif(data: bytes, only_first: bool = False) -> tuple[tuple[int, int], list[GifPicture]]:
    """Return the size of the canvas and the frames of a GIF; what stands behind its trailer does not count.

    Args:
        data: the content of the file.
        only_first: the rest of the file may be missing after the pixels of the first frame.

    Raises:
        UserError: the blocks do not follow each other, the end is missing, or there are too many pixels.
    """
    reader = _Reader(data, only_first)
    pictures: list[GifPicture] = []
    (width, height, flags, _, _) = reader.take("<HHBBB", at=6)
    colours = reader.colours(flags)
    transparent, disposal, num_pixels = -1, "keep", 0
    while (kind := reader.take("<B")[0]) != GIF_END:
        if kind == GIF_EXTENSION:
            (label,) = reader.take("<B")
            block = reader.contents()
            if label == GIF_CONTROL and len(block) >= 4:
                transparent = block[3] if block[0] & 1 else -1
                disposal = {2: "clear", 3: "restore"}.get(block[0] >> 2 & 7, "keep")
            elif label == GIF_TEXT:  # it is a picture, too
                transparent, disposal = -1, "keep"
        elif kind == GIF_PICTURE:
            pictures.append(reader.picture(colours, transparent, disposal))
            num_pixels += pictures[-1].size[0] * pictures[-1].size[1]
            check_clip(num_pixels)
            transparent, disposal = -1, "keep"
            if only_first:
                break
        elif kind != GIF_NOTHING:  # some programs write the end of a block twice
            raise UserError(f"damaged: there is no block of a GIF at byte {reader.at - 1}")
    if not pictures:
        raise UserError("there is no frame in it")
    first = pictures[0]  # if it sticks out, the size of the canvas is wrong
    return (max(width, first.corner[0] + first.size[0]), max(height, first.corner[1] + first.size[1])), pictures


class _Reader:
    """Read the bytes of a GIF one after the other."""

    def __init__(self, data: bytes, allows_open_end: bool) -> None:
        self.data, self.allows_open_end, self.at = data, allows_open_end, 0

    def take(self, form: str, at: int | None = None) -> tuple[int, ...]:
        """Return numbers; the place moves behind them."""
        start = self.at if at is None else at
        self.at = start + struct.calcsize(form)
        if self.at > len(self.data):
            raise UserError("cut short: the end of the GIF is missing")
        return struct.unpack_from(form, self.data, start)

    def colours(self, flags: int) -> bytes:
        """Return the table of colours that stands here, if the flags say so; else nothing."""
        if not flags & 0x80:
            return b""
        start, size = self.at, 3 << ((flags & 7) + 1)
        self.take(f"{size}x")
        return self.data[start : self.at]

    def contents(self) -> bytes:
        """Return what is in the blocks that stand here, up to the empty one."""
        found = bytearray()
        while size := self.take("<B")[0]:
            self.take(f"{size}x")
            found += self.data[self.at - size : self.at]
        return bytes(found)

    def blocks(self) -> bytes:
        """Return the blocks that stand here, with their sizes, up to the empty one; or, where that is allowed, to the end."""
        start = last = at = self.at
        while at < len(self.data) and self.data[at]:
            last, at = at, at + 1 + self.data[at]
        if at >= len(self.data) and not self.allows_open_end:
            raise UserError("cut short: the end of the GIF is missing")
        self.at = at + 1
        if at < len(self.data):
            return self.data[start : self.at]
        rest = self.data[last + 1 :]
        return self.data[start:last] + bytes([len(rest)]) + rest + b"\0"

    def picture(self, colours: bytes, transparent: int, disposal: str) -> GifPicture:
        """Return the picture that stands here; without a table of colours, they are shades of grey."""
        left, top, width, height, flags = self.take("<HHHHB")
        own = self.colours(flags) or colours or bytes(np.repeat(np.arange(256, dtype=np.uint8), 3))
        table = np.zeros((256, 4), np.uint8)
        table[: len(own) // 3, :3] = np.frombuffer(own, np.uint8).reshape(-1, 3)
        table[:, 3] = 255
        if transparent >= 0:
            table[transparent] = 0
        (bits,) = self.take("<B")
        return GifPicture((left, top), (width, height), table, bool(flags & 0x40), bits, self.blocks(), disposal)
