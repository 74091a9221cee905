"""Open the picture or the frames of a file, whatever it is: RGB pixels on white, or one reason why not."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.svg import draw_svg

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

SVG_LIMIT = 16 * 2**20  # bytes; a drawing larger than this is not an icon
FRAME_LIMIT = 50_000  # frames; half an hour at 25 per second
SAMPLING = "midpoints"  # the name of the rule of `sampled`, for identities
END_SLACK = 0.05  # share of its declared time that a video's last frames may be missing
ASPECT_LIMIT = 100  # longer side over shorter side: encoders bring the shorter one to some hundred pixels, whatever the other
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # read by libraries alone; of others, Pillow starts programs
ANIMATIONS = ("GIF", "PNG", "WEBP")
CONTAINERS = "mov,mp4,matroska,webm,avi"  # never playlists, which name other files
DAMAGED = (  # how Pillow and the readers of this module say so
    ValueError,
    TypeError,  # of damaged EXIF, as the next two
    AttributeError,
    ArithmeticError,
    SyntaxError,
    EOFError,
    LookupError,
    struct.error,
    RuntimeError,  # of what is written in C
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
WHITE = (255, 255, 255)


def open_image(path: Path, size: int) -> Image.Image:
    """The picture in a file as RGB; transparent parts become white.

    Raster files (JPEG, PNG, WebP, GIF, BMP, TIFF) keep their own size and are turned upright by their EXIF tag. SVG files are
    rendered to `size` x `size` pixels, without fonts and external files, and centred when they are not square.
    Raises `ValueError` with the file's name and the reason when there is no whole picture in it.
    """
    with _reasons(path):
        return _render(_read_drawing(path), size) if path.suffix.lower() == ".svg" else _decode(path)


def open_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """The frames `sampled` from a clip (mp4, mov, webm, mkv, avi, or animated GIF, WebP, PNG), as RGB, transparent parts white.

    What the file is decides, not what it is called. Frames keep their own size and are turned upright. Only the frames that
    are returned are kept in memory. Raises `ValueError` with the file's name and the reason when there is no whole clip in it:
    damaged, cut short, without a picture, or more than `FRAME_LIMIT` frames.
    """
    assert num_frames >= 1, num_frames
    with _reasons(path):
        return _frames(path, num_frames)


def sampled(num_frames: int, length: int) -> list[int]:
    """The frames in the middle of `num_frames` equal stretches of a clip of `length` frames, counted from 0 as displayed.

    Frame i of n is floor((2i + 1) * length / (2n)); a clip with fewer frames than n repeats them.
    """
    return [(2 * i + 1) * length // (2 * num_frames) for i in range(num_frames)]


@contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Every way in which reading a file fails becomes a `ValueError` that starts with the file's name."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")  # a pipe or a device may never end
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path.name}: no such file") from error
    except OSError as error:
        unknown = f"not a {', '.join(FORMATS)} or SVG picture"
        reason = unknown if isinstance(error, UnidentifiedImageError) else error.strerror or error
        raise ValueError(f"{path.name}: {reason}") from error
    except MemoryError as error:
        raise ValueError(f"{path.name}: it does not fit into memory") from error
    except DAMAGED as error:
        raise ValueError(f"{path.name}: {error}") from error


def _decode(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as file:
            _check_size(*file.size)
            file.load()
            return _on_white(ImageOps.exif_transpose(file))


def _frames(path: Path, num_frames: int) -> list[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            animation = Image.open(path, formats=ANIMATIONS)
        except UnidentifiedImageError:
            return _video_frames(path, num_frames)
        with animation:
            _check_size(*animation.size)
            return _animation_frames(path, animation, num_frames)


def _animation_frames(path: Path, file: Image.Image, num_frames: int) -> list[Image.Image]:
    first = 1 if file.info.get("default_image") else 0  # an animated PNG may start with a picture for old programs
    length = getattr(file, "n_frames", 1) - first
    _check_length(length)
    if file.format == "GIF":
        _check_trailer(path)
    shown: dict[int, Image.Image] = {}
    for wanted in sampled(num_frames, length):
        if wanted not in shown:
            file.seek(first + wanted)
            file.load()
            shown[wanted] = _on_white(ImageOps.exif_transpose(file))
    return [shown[wanted] for wanted in sampled(num_frames, length)]


def _check_trailer(path: Path) -> None:
    """`ValueError` when a GIF lacks its last byte: Pillow takes the frames before a cut for all of them."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 64), os.SEEK_END)  # some programs write a little after it
        if b"\x00;" not in file.read():
            raise ValueError("cut short: the end of the animation is missing")


def _check_size(width: int, height: int) -> None:
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(f"{width} x {height} pixels exceed Pillow's limit, could be a bomb")
    if max(width, height) > ASPECT_LIMIT * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {ASPECT_LIMIT} times the other")


def _check_length(length: int) -> None:
    if length > FRAME_LIMIT:
        raise ValueError(f"more than {FRAME_LIMIT} frames; cut it into clips first")


def _video_frames(path: Path, num_frames: int) -> list[Image.Image]:
    import av  # only videos need it
    from av.error import FFmpegError

    options = {"format_whitelist": CONTAINERS}
    try:
        with path.open("rb") as file:  # a file object, so that no name is taken for an address
            with av.open(file, mode="r", options=options) as container:
                times = _display_times(container, _video_stream(container))
            file.seek(0)
            with av.open(file, mode="r", options=options) as container:
                wanted = [times[i] for i in sampled(num_frames, len(times))]
                return _at_times(container, _video_stream(container), wanted)
    except FFmpegError as error:
        raise ValueError(f"not a whole video: {error.strerror}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    """The first moving picture; a cover on a piece of music is none."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        found = ", ".join(stream.type for stream in container.streams) or "nothing"
        raise ValueError(f"there is no video in it, but {found}")
    stream = streams[0]
    if stream.codec_context is None:
        raise ValueError("its video is in a format that cannot be decoded")
    _check_size(stream.width, stream.height)
    stream.codec_context.thread_count = 1  # extraction has its own processes
    return stream


def _display_times(container: InputContainer, stream: VideoStream) -> list[int]:
    """When each frame is shown, ascending, in units of the stream's time base, read without decoding."""
    times: list[int] = []
    end = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue  # the end of the stream
        if packet.is_corrupt:
            raise ValueError(f"damaged or cut short at frame {len(times) + 1}")
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            raise ValueError(f"frame {len(times) + 1} does not say when it is shown")
        times.append(time)
        end = max(end, time + (packet.duration or 0))
        _check_length(len(times))
    if not times:
        raise ValueError("there is no frame in it")
    seconds, declared = _seconds(stream, end - min(times)), _declared_seconds(container, stream)
    if seconds < (1 - END_SLACK) * declared:
        raise ValueError(f"cut short: {seconds:.2f} of {declared:.2f} seconds are there")
    return sorted(times)


def _seconds(stream: VideoStream, ticks: int) -> float:
    assert stream.time_base is not None, stream
    return float(ticks * stream.time_base)


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float:
    """How long the file says that its video is; 0 when it does not say, or says it of sound and video together."""
    if "DURATION" in stream.metadata:  # Matroska and WebM: 00:00:06.000000000
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    if stream.duration:
        return _seconds(stream, stream.duration)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0  # microseconds


def _at_times(container: InputContainer, stream: VideoStream, wanted: list[int]) -> list[Image.Image]:
    """The first frame at or after each of the ascending times; decoding stops at the last of them."""
    images: list[Image.Image] = []
    for frame in container.decode(stream):
        time = frame.pts if frame.pts is not None else frame.dts
        if frame.is_corrupt or time is None:  # later frames build on it
            raise ValueError(f"damaged: of the {len(wanted)} frames asked for, only {len(images)} come before the fault")
        if time < wanted[len(images)]:
            continue
        _check_size(frame.width, frame.height)  # which may change on the way
        image = frame.to_image().rotate(frame.rotation, expand=True)
        while len(images) < len(wanted) and wanted[len(images)] <= time:
            images.append(image)
        if len(images) == len(wanted):
            return images
    raise ValueError(f"ends before frame {len(images) + 1} of the {len(wanted)} that were asked for")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16-bit greys: PIL's own conversion clips instead of scaling
        image = image.point(lambda value: value / 257).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _read_drawing(path: Path) -> str:
    """The text of an SVG file; `ValueError` when it is huge or wants files from outside."""
    with path.open("rb") as file:
        data = file.read(SVG_LIMIT + 1)
    if len(data) > SVG_LIMIT:
        raise ValueError(f"the drawing is larger than {SVG_LIMIT} bytes")
    for element in ElementTree.fromstring(data).iter():
        links = [value for name, value in element.attrib.items() if name.rpartition("}")[2] == "href"]
        if element.tag.rpartition("}")[2] in ("image", "feImage") and not all(v.startswith(("data:", "#")) for v in links):
            raise ValueError("the drawing refers to an external picture")
    return data.decode("utf-8")


def _render(drawing: str, size: int) -> Image.Image:
    png = draw_svg(drawing, size)
    with Image.open(io.BytesIO(png), formats=("PNG",)) as file:
        image = file.convert("RGB")
    if image.size == (size, size):
        return image
    canvas = Image.new("RGB", (size, size), WHITE)
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas
