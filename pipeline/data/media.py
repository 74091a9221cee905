"""Open images and video clips as RGB pixels; transparent parts become white.

A file that cannot be read is a `UserError` with the name of the file and the reason.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, UnidentifiedImageError

from pipeline.data.animations import animation_frames
from pipeline.data.damage import check_file
from pipeline.data.pictures import IMAGE_FORMATS, decode_picture
from pipeline.data.pixels import WHITE
from pipeline.data.svg import decode_xml, draw_svg
from pipeline.data.tar_members import local_file
from pipeline.data.video import video_frames
from pipeline.runtime.errors import UserError

MAX_SVG_BYTES = 16 * 2**20  # a larger drawing is not an icon
MAX_FRAMES = 50_000  # half an hour at 25 frames per second
FRAME_SAMPLING = "midpoints"  # name of the rule of `midpoint_frames`, for identities of encoders
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

    Raster images (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000) keep their size and are turned upright as their EXIF tag
    says. docs/media.md has a table of the kinds that are supported.

    Args:
        path: the file.
        size: SVG files are rendered to `size` x `size` pixels, without fonts and external files, and centred if they are not
            square.

    Raises:
        UserError: there is no whole image in the file; with the name of the file and the reason.
    """
    with _explain_errors(path) as file:
        return _render_svg(_read_svg(file), size) if path.suffix.lower() == ".svg" else _decode_raster(file)


def open_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """Return evenly spaced frames of a clip as RGB; transparent parts become white.

    A clip is a video (mp4, mov, webm, mkv, avi) or an animation (GIF, WebP, PNG, AVIF). The format is found from the content of
    the file, not from its name. Frames keep their size, unless their pixels are not square, and are turned upright. Only the
    returned frames are held in memory. docs/media.md and docs/videos.md have tables of what is supported.

    Args:
        path: the file.
        num_frames: number of frames, at least 1; `midpoint_frames` says which ones.

    Raises:
        UserError: with the name of the file and the reason, if there is no whole clip in it: it is damaged, cut short, has no
            picture, or has more than `MAX_FRAMES` frames.
    """
    assert num_frames >= 1, num_frames
    with _explain_errors(path) as file:
        return _decode_frames(file, num_frames)


def midpoint_frames(num_frames: int, length: int) -> list[int]:
    """Divide a clip into equal segments, and return the number of the frame in the middle of each segment.

    Frame i of n is floor((2i + 1) * length / (2n)). A clip with fewer frames than n repeats them.

    Args:
        num_frames: number of segments, n.
        length: number of frames of the clip; they are counted from 0 in the order in which they are shown.
    """
    return [(2 * i + 1) * length // (2 * num_frames) for i in range(num_frames)]


@contextmanager
def _explain_errors(path: Path) -> Iterator[Path]:
    """Give the file to read, and turn every error of reading it into a `UserError` that starts with the name of the file."""
    try:
        with local_file(path) as file:
            check_file(file)
            yield file
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
        return decode_picture(path)


def _decode_frames(path: Path, num_frames: int) -> list[Image.Image]:
    def choose(length: int) -> list[int]:
        _check_length(length)
        return midpoint_frames(num_frames, length)

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        frames = animation_frames(path, choose)
    return video_frames(path, choose) if frames is None else frames


def _check_length(length: int) -> None:
    if length > MAX_FRAMES:
        raise UserError(f"more than {MAX_FRAMES} frames; cut it into clips first")


def _read_svg(path: Path) -> str:
    """Return the text of an SVG file; raise `UserError` if it is huge or refers to external images."""
    with path.open("rb") as file:
        data = file.read(MAX_SVG_BYTES + 1)
    if len(data) > MAX_SVG_BYTES:
        raise UserError(f"the drawing is larger than {MAX_SVG_BYTES} bytes")
    drawing = decode_xml(data)
    for element in ElementTree.fromstring(drawing).iter():
        links = [value for name, value in element.attrib.items() if name.rpartition("}")[2] == "href"]
        if element.tag.rpartition("}")[2] in ("image", "feImage") and not all(v.startswith(("data:", "#")) for v in links):
            raise UserError("the drawing refers to an external picture")
    return drawing


def _render_svg(drawing: str, size: int) -> Image.Image:
    png = draw_svg(drawing, size)
    with Image.open(io.BytesIO(png), formats=("PNG",)) as file:
        image = file.convert("RGB")
    if image.size == (size, size):
        return image
    canvas = Image.new("RGB", (size, size), WHITE)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
