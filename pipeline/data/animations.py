"""Show the frames of GIF, PNG, WebP and AVIF animations, each drawn on what the frames before it left."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.damage import open_picture
from pipeline.data.gif import GifPicture, read_gif
from pipeline.data.pixels import WHITE, check_area, check_size, on_white
from pipeline.data.png import PNG_START, open_png, png_chunks
from pipeline.data.png_damage import check_png
from pipeline.runtime.errors import UserError

GIF_STARTS = (b"GIF87a", b"GIF89a")
MAX_ANIMATION_BYTES = 2**30  # of a GIF or PNG file, which is held in memory
CLEARED = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Part:
    """One frame as it is stored: a picture that is drawn into a part of the canvas."""

    draw: Callable[[], Image.Image]  # gives it as RGBA
    corner: tuple[int, int]  # left and top
    size: tuple[int, int]
    is_blended: bool  # drawn over what is there, instead of replacing it
    disposal: str  # what becomes of its part of the canvas before the next frame: keep, clear or restore


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
        size, pictures = read_gif(_read(path))
        wanted = choose(len(pictures))
        shown = dict(_compose(size, _gif_parts(pictures), wanted, b""))
        for picture in pictures[max(wanted) + 1 :]:  # they may be damaged, too
            picture.indices()
    elif start == PNG_START:
        data = _read(path)
        check_png(data, all_frames=True)
        chunks = list(png_chunks(io.BytesIO(data)))
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
    size, (picture, *_) = read_gif(_read(path), only_first=True)
    check_size(*size)
    drawn = picture.draw_on_white()
    if picture.size == size:
        return drawn
    frame = Image.new("RGB", size, WHITE)
    frame.paste(drawn, picture.corner)
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
        picture = part.draw()
        if 0 in part.size:
            pass  # a GIF may have frames without pixels
        elif part.is_blended:
            canvas.alpha_composite(picture, part.corner)
        else:
            canvas.paste(picture, part.corner)
        if number in wanted:
            yield number, on_white(ImageOps.exif_transpose(canvas))
        if part.disposal != "keep":
            canvas.paste(before, box)


def _gif_parts(pictures: Sequence[GifPicture]) -> list[_Part]:
    return [_Part(picture.draw, picture.corner, picture.size, True, picture.disposal) for picture in pictures]


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
    data = PNG_START + b"".join(body)
    return _Part(lambda: _draw_png(data), (left, top), (width, height), blend == 1, kinds[disposal])


def _draw_png(data: bytes) -> Image.Image:
    return open_png(io.BytesIO(data), check_area).convert("RGBA")
