"""Show the frames of GIF, PNG, WebP and AVIF animations, each drawn on what the frames before it left."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.damage import check_animation, open_picture
from pipeline.data.gif_damage import check_gif
from pipeline.data.pixels import check_area, check_size, on_white
from pipeline.data.png import PNG_START, open_png, png_chunks
from pipeline.runtime.errors import UserError

GIF_STARTS = (b"GIF87a", b"GIF89a")
MAX_ANIMATION_BYTES = 2**30  # of a GIF or PNG file, which is held in memory
CLEARED = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Part:
    """One frame as it is stored: a picture that is drawn into a part of the canvas."""

    data: bytes  # a whole picture file
    colours: bytes  # of a GIF: 256 times red, green, blue, alpha
    corner: tuple[int, int]  # left and top
    size: tuple[int, int]
    is_blended: bool  # drawn over what is there, instead of replacing it
    disposal: str  # what becomes of its part of the canvas before the next frame: keep, clear or restore

    def draw(self) -> Image.Image:
        """Return the picture of this part as RGBA."""
        if not self.colours:
            return open_png(io.BytesIO(self.data), check_area).convert("RGBA")
        with Image.open(io.BytesIO(self.data), formats=("GIF",)) as file:
            check_area(*file.size)
            indices = np.asarray(file)
        return Image.fromarray(np.frombuffer(self.colours, np.uint8).reshape(256, 4)[indices])


def animation_frames(path: Path, choose: Callable[[int], Sequence[int]]) -> list[Image.Image] | None:
    """Return frames of an animation as RGB, turned upright; transparent parts become white.

    A part of the canvas that is disposed of becomes transparent, whatever background colour a GIF names, as in all browsers.

    Args:
        path: the file.
        choose: gets the number of frames, and returns those that are wanted, counted from 0, in ascending order.

    Returns:
        The frames that are wanted; None if the file is no GIF, PNG, WebP or AVIF.

    Raises:
        UserError: the animation is damaged or cut short.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(GIF_STARTS):
        check_animation(path, "GIF")
        size, parts = _read_gif(_read(path))
        wanted = choose(len(parts))
        shown = dict(_compose(size, parts, wanted, b""))
    elif start == PNG_START:
        check_animation(path, "PNG")
        chunks = list(png_chunks(io.BytesIO(_read(path))))
        parts = _png_parts(chunks)
        wanted = choose(len(parts) or 1)
        exif = next((b"Exif\0\0" + data for name, data in chunks if name == b"eXIf"), b"")
        size = struct.unpack_from(">II", chunks[0][1])
        shown = dict(_compose(size, parts, wanted, exif)) if parts else {0: on_white(open_png(path))}
    else:
        try:
            file = open_picture(path, ("WEBP", "AVIF"))
        except UnidentifiedImageError:
            return None
        with file:
            check_size(*file.size)
            wanted = choose(getattr(file, "n_frames", 1))
            shown = {number: _seek(file, number) for number in wanted}
    return [shown[number] for number in wanted]


def first_gif_frame(path: Path) -> Image.Image:
    """Return the first frame of a GIF as RGB; transparent parts become white."""
    data = _read(path)
    check_gif(data, all_frames=False)
    size, parts = _read_gif(data, only_first=True)
    (_, frame), *_ = _compose(size, parts, (0,), b"")
    return frame


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_ANIMATION_BYTES:
        raise UserError(f"the file is larger than {MAX_ANIMATION_BYTES} bytes")
    return path.read_bytes()


def _seek(file: Image.Image, number: int) -> Image.Image:
    file.seek(number)
    file.load()
    return on_white(ImageOps.exif_transpose(file))


def _compose(
    size: tuple[int, int], parts: Sequence[_Part], wanted: Collection[int], exif: bytes
) -> Iterator[tuple[int, Image.Image]]:
    """Yield the wanted frames, and their numbers; the EXIF data say how to turn them upright."""
    check_size(*size)
    canvas = Image.new("RGBA", size, CLEARED)
    if exif:
        canvas.info["exif"] = exif
    for number, part in enumerate(parts[: max(wanted) + 1]):
        box = (*part.corner, part.corner[0] + part.size[0], part.corner[1] + part.size[1])
        before = canvas.crop(box) if part.disposal == "restore" else CLEARED
        if 0 in part.size:
            pass  # a GIF may have frames without pixels
        elif part.is_blended:
            canvas.alpha_composite(part.draw(), part.corner)
        else:
            canvas.paste(part.draw(), part.corner)
        if number in wanted:
            yield number, on_white(ImageOps.exif_transpose(canvas))
        if part.disposal != "keep":
            canvas.paste(before, box)


def _read_gif(data: bytes, only_first: bool = False) -> tuple[tuple[int, int], list[_Part]]:
    """Return the size of the canvas and the frames of a GIF; what stands behind its trailer does not count."""
    reader = _GifReader(data)
    parts: list[_Part] = []
    (width, height, flags, _, _) = reader.take("<HHBBB", at=6)
    colours = reader.colours(flags)
    transparent, disposal = -1, "keep"
    while (kind := reader.take("<B")[0]) != 0x3B:
        if kind == 0x21:
            (label,) = reader.take("<B")
            block = reader.blocks()
            if label == 0xF9 and len(block) >= 4:  # how the next picture is drawn
                transparent = block[3] if block[0] & 1 else -1
                disposal = {2: "clear", 3: "restore"}.get(block[0] >> 2 & 7, "keep")
            elif label == 0x01:  # a text, which nobody draws, is a picture, too
                transparent, disposal = -1, "keep"
        elif kind == 0x2C:
            part = reader.picture(colours, transparent, disposal)
            parts.append(part)
            transparent, disposal = -1, "keep"
            if only_first:
                break
        elif kind != 0:  # some programs write the end of a block twice
            raise UserError(f"damaged: there is no block of kind {kind:#x} in a GIF")
    if not parts:
        raise UserError("there is no frame in it")
    first = parts[0]  # if it sticks out, the size of the canvas is wrong
    return (max(width, first.corner[0] + first.size[0]), max(height, first.corner[1] + first.size[1])), parts


class _GifReader:
    """Read the bytes of a GIF one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

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

    def blocks(self) -> bytes:
        """Return the contents of the blocks that stand here, up to the empty one."""
        found = bytearray()
        while size := self.take("<B")[0]:
            self.take(f"{size}x")
            found += self.data[self.at - size : self.at]
        return bytes(found)

    def picture(self, colours: bytes, transparent: int, disposal: str) -> _Part:
        """Return the picture that stands here."""
        left, top, width, height, flags = self.take("<HHHHB")
        own = self.colours(flags) or colours or bytes(np.repeat(np.arange(256, dtype=np.uint8), 3))
        table = np.zeros((256, 4), np.uint8)
        table[: len(own) // 3, :3] = np.frombuffer(own, np.uint8).reshape(-1, 3)
        table[:, 3] = 255
        if transparent >= 0:
            table[transparent] = CLEARED
        start = self.at
        self.take("<B")
        self.blocks()
        # Without a table of colours, Pillow gives the indices.
        header = struct.pack("<6sHHBBBBHHHHB", b"GIF87a", width, height, 0, 0, 0, 0x2C, 0, 0, width, height, flags & 0x40)
        data = header + self.data[start : self.at] + b";"
        return _Part(data, table.tobytes(), (left, top), (width, height), True, disposal)


def _png_parts(chunks: Sequence[tuple[bytes, bytes]]) -> list[_Part]:
    """Return the frames of an animated PNG; none if it is a still picture."""
    names = [name for name, _ in chunks]
    if b"acTL" not in names or b"IDAT" in names[: names.index(b"acTL")]:
        return []
    (header,) = (data for name, data in chunks if name == b"IHDR")
    (declared,) = struct.unpack_from(">I", dict(chunks)[b"acTL"])
    shared = [(name, data) for name, data in chunks if name in (b"PLTE", b"tRNS")]
    frames: list[tuple[bytes, list[bytes]]] = []  # frame controls and data; an IDAT before the first control is no frame
    number = 0
    for name, data in chunks:
        if name in (b"fcTL", b"fdAT"):
            if struct.unpack_from(">I", data)[0] != number:
                raise UserError(f"damaged: part {number} of the animation is not where it belongs")
            number += 1
        if name == b"fcTL":
            frames.append((data, []))
        elif name == b"fdAT" or (name == b"IDAT" and frames):
            frames[-1][1].append(data[4:] if name == b"fdAT" else data)
    if len(frames) != declared:
        raise UserError(f"cut short: {len(frames)} of {declared} frames are there")
    return [_png_part(header, shared, control, pixels) for control, pixels in frames]


def _png_part(header: bytes, shared: Sequence[tuple[bytes, bytes]], control: bytes, pixels: Sequence[bytes]) -> _Part:
    _, width, height, left, top, _, _, disposal, blend = struct.unpack(">IIIIIHHBB", control)
    canvas_width, canvas_height = struct.unpack_from(">II", header)
    if not 0 < width <= canvas_width - left or not 0 < height <= canvas_height - top or disposal > 2 or blend > 1:
        raise UserError("damaged: a frame does not lie within the picture")
    own = struct.pack(">II", width, height) + header[8:]
    chunks = [(b"IHDR", own), *shared, (b"IDAT", b"".join(pixels)), (b"IEND", b"")]
    body = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    kinds = ("keep", "clear", "restore")
    return _Part(PNG_START + b"".join(body), b"", (left, top), (width, height), blend == 1, kinds[disposal])
