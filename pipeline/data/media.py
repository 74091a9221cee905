"""Open images and video clips as RGB pixels; transparent parts become white.

A file that cannot be read is a `UserError` with the name of the file and the reason.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.pixels import WHITE, check_size, on_white
from pipeline.data.svg import draw_svg
from pipeline.data.video import video_frames
from pipeline.runtime.errors import UserError

MAX_SVG_BYTES = 16 * 2**20  # a larger drawing is not an icon
MAX_FRAMES = 50_000  # half an hour at 25 frames per second
FRAME_SAMPLING = "midpoints"  # name of the rule of `midpoint_frames`, for identities of encoders
# Pillow reads these formats with libraries; for some others it starts programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ANIMATION_FORMATS = ("GIF", "PNG", "WEBP")
DAMAGE_ERRORS = (  # errors that Pillow and this module raise for damaged files
    ValueError,
    TypeError,  # this and the next two: damaged EXIF
    AttributeError,
    ArithmeticError,
    SyntaxError,
    EOFError,
    LookupError,
    struct.error,
    RuntimeError,  # from code that is written in C
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def open_image(path: Path, size: int) -> Image.Image:
    """Return the image in a file as RGB; transparent parts become white.

    Raster images (JPEG, PNG, WebP, GIF, BMP, TIFF) keep their size and are turned upright as their EXIF tag says.

    Args:
        path: the file.
        size: SVG files are rendered to `size` x `size` pixels, without fonts and external files, and centred if they are not
            square.

    Raises:
        UserError: there is no whole image in the file; with the name of the file and the reason.
    """
    with _explain_errors(path):
        return _render_svg(_read_svg(path), size) if path.suffix.lower() == ".svg" else _decode_raster(path)


def open_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """Return evenly spaced frames of a clip as RGB; transparent parts become white.

    A clip is a video (mp4, mov, webm, mkv, avi) or an animation (GIF, WebP, PNG). The format is found from the content of the
    file, not from its name. Frames keep their size, unless their pixels are not square, and are turned upright. Only the
    returned frames are held in memory. docs/videos.md has a table of what is supported.

    Args:
        path: the file.
        num_frames: number of frames, at least 1; `midpoint_frames` says which ones.

    Raises:
        UserError: with the name of the file and the reason, if there is no whole clip in it: it is damaged, cut short, has no
            picture, or has more than `MAX_FRAMES` frames.
    """
    assert num_frames >= 1, num_frames
    with _explain_errors(path):
        return _decode_frames(path, num_frames)


def midpoint_frames(num_frames: int, length: int) -> list[int]:
    """Divide a clip into equal segments, and return the number of the frame in the middle of each segment.

    Frame i of n is floor((2i + 1) * length / (2n)). A clip with fewer frames than n repeats them.

    Args:
        num_frames: number of segments, n.
        length: number of frames of the clip; they are counted from 0 in the order in which they are shown.
    """
    return [(2 * i + 1) * length // (2 * num_frames) for i in range(num_frames)]


@contextmanager
def _explain_errors(path: Path) -> Iterator[None]:
    """Turn every error of reading a file into a `UserError` that starts with the name of the file."""
    try:
        if path.exists() and not path.is_file():
            raise UserError("not a regular file")  # reading a pipe or a device may never end
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path.name}: no such file") from error
    except OSError as error:
        unknown = f"not a {', '.join(IMAGE_FORMATS)} or SVG picture"
        reason = unknown if isinstance(error, UnidentifiedImageError) else error.strerror or error
        raise UserError(f"{path.name}: {reason}") from error
    except MemoryError as error:
        raise UserError(f"{path.name}: it does not fit into memory") from error
    except DAMAGE_ERRORS as error:
        raise UserError(f"{path.name}: {error}") from error


def _decode_raster(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            check_size(*file.size)
            file.load()
            return on_white(ImageOps.exif_transpose(file))


def _decode_frames(path: Path, num_frames: int) -> list[Image.Image]:
    def choose(length: int) -> list[int]:
        _check_length(length)
        return midpoint_frames(num_frames, length)

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            animation = Image.open(path, formats=ANIMATION_FORMATS)
        except UnidentifiedImageError:
            return video_frames(path, choose)
        with animation:
            check_size(*animation.size)
            return _animation_frames(path, animation, num_frames)


def _animation_frames(path: Path, file: Image.Image, num_frames: int) -> list[Image.Image]:
    first = 1 if file.info.get("default_image") else 0  # an animated PNG may start with an image for old programs
    length = getattr(file, "n_frames", 1) - first
    _check_length(length)
    if file.format == "GIF":
        _check_gif_end(path)
    shown: dict[int, Image.Image] = {}
    for wanted in midpoint_frames(num_frames, length):
        if wanted not in shown:
            file.seek(first + wanted)
            file.load()
            shown[wanted] = on_white(ImageOps.exif_transpose(file))
    return [shown[wanted] for wanted in midpoint_frames(num_frames, length)]


def _check_gif_end(path: Path) -> None:
    """Check that the end of a GIF is there: Pillow reads a GIF that is cut short as a whole one with fewer frames."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 64), os.SEEK_END)  # some programs write a few bytes after the end
        if b"\x00;" not in file.read():
            raise UserError("cut short: the end of the animation is missing")


def _check_length(length: int) -> None:
    if length > MAX_FRAMES:
        raise UserError(f"more than {MAX_FRAMES} frames; cut it into clips first")


def _read_svg(path: Path) -> str:
    """Return the text of an SVG file; raise `UserError` if it is huge or refers to external images."""
    with path.open("rb") as file:
        data = file.read(MAX_SVG_BYTES + 1)
    if len(data) > MAX_SVG_BYTES:
        raise UserError(f"the drawing is larger than {MAX_SVG_BYTES} bytes")
    for element in ElementTree.fromstring(data).iter():
        links = [value for name, value in element.attrib.items() if name.rpartition("}")[2] == "href"]
        if element.tag.rpartition("}")[2] in ("image", "feImage") and not all(v.startswith(("data:", "#")) for v in links):
            raise UserError("the drawing refers to an external picture")
    return data.decode("utf-8")


def _render_svg(drawing: str, size: int) -> Image.Image:
    png = draw_svg(drawing, size)
    with Image.open(io.BytesIO(png), formats=("PNG",)) as file:
        image = file.convert("RGB")
    if image.size == (size, size):
        return image
    canvas = Image.new("RGB", (size, size), WHITE)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
