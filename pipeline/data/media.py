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
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from PIL import Image, UnidentifiedImageError

from pipeline.data.animations import animation_frames
from pipeline.data.damage import check_file
from pipeline.data.pictures import IMAGE_FORMATS, decode_picture
from pipeline.data.pixels import WHITE, check_size
from pipeline.data.svg import draw_svg
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_SVG_BYTES = 16 * 2**20  # a larger drawing is not an icon
MAX_FRAMES = 50_000  # half an hour at 25 frames per second
FRAME_SAMPLING = "midpoints"  # name of the rule of `midpoint_frames`, for identities of encoders
MAX_MISSING_SHARE = 0.05  # of the declared duration of a video, the share that may be missing at its end
VIDEO_CONTAINERS = "mov,mp4,matroska,webm,avi"  # no playlists, because they name other files
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
    with _explain_errors(path):
        return _render_svg(_read_svg(path), size) if path.suffix.lower() == ".svg" else _decode_raster(path)


def open_frames(path: Path, num_frames: int) -> list[Image.Image]:
    """Return evenly spaced frames of a clip as RGB; transparent parts become white.

    A clip is a video (mp4, mov, webm, mkv, avi) or an animation (GIF, WebP, PNG, AVIF). The format is found from the content of
    the file, not from its name. Frames keep their size and are turned upright. Only the returned frames are held in memory.

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
        check_file(path)
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
        return decode_picture(path)


def _decode_frames(path: Path, num_frames: int) -> list[Image.Image]:
    def choose(length: int) -> list[int]:
        _check_length(length)
        return midpoint_frames(num_frames, length)

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        frames = animation_frames(path, choose)
    return _video_frames(path, num_frames) if frames is None else frames


def _check_length(length: int) -> None:
    if length > MAX_FRAMES:
        raise UserError(f"more than {MAX_FRAMES} frames; cut it into clips first")


def _video_frames(path: Path, num_frames: int) -> list[Image.Image]:
    import av  # only videos need it
    from av.error import FFmpegError

    options = {"format_whitelist": VIDEO_CONTAINERS}
    try:
        with path.open("rb") as file:  # a file object, because FFmpeg may take a name for an address
            with av.open(file, mode="r", options=options) as container:
                times = _display_times(container, _video_stream(container))
            file.seek(0)
            with av.open(file, mode="r", options=options) as container:
                wanted = [times[i] for i in midpoint_frames(num_frames, len(times))]
                return _frames_at_times(container, _video_stream(container), wanted)
    except FFmpegError as error:
        raise UserError(f"not a whole video: {error.strerror}") from error


def _video_stream(container: InputContainer) -> VideoStream:
    """Return the first video stream; the cover image of a music file is not one."""
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        found = ", ".join(stream.type for stream in container.streams) or "nothing"
        raise UserError(f"there is no video in it, but {found}")
    stream = streams[0]
    if stream.codec_context is None:
        raise UserError("its video is in a format that cannot be decoded")
    check_size(stream.width, stream.height)
    stream.codec_context.thread_count = 1  # extraction decodes in several processes already
    return stream


def _display_times(container: InputContainer, stream: VideoStream) -> list[int]:
    """Return the time at which each frame is shown, ascending, in units of the stream's time base; nothing is decoded."""
    times: list[int] = []
    end = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue  # the end of the stream
        if packet.is_corrupt:
            raise UserError(f"damaged or cut short at frame {len(times) + 1}")
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            raise UserError(f"frame {len(times) + 1} does not say when it is shown")
        times.append(time)
        end = max(end, time + (packet.duration or 0))
        _check_length(len(times))
    if not times:
        raise UserError("there is no frame in it")
    seconds, declared = _seconds(stream, end - min(times)), _declared_seconds(container, stream)
    if seconds < (1 - MAX_MISSING_SHARE) * declared:
        raise UserError(f"cut short: {seconds:.2f} of {declared:.2f} seconds are there")
    return sorted(times)


def _seconds(stream: VideoStream, ticks: int) -> float:
    assert stream.time_base is not None, stream
    return float(ticks * stream.time_base)


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Return the duration of the video that the file declares; 0 if it declares none, or one for sound and video together."""
    if "DURATION" in stream.metadata:  # Matroska and WebM: 00:00:06.000000000
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    if stream.duration:
        return _seconds(stream, stream.duration)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0  # microseconds


def _frames_at_times(container: InputContainer, stream: VideoStream, wanted: list[int]) -> list[Image.Image]:
    """Return the first frame at or after each of the ascending times; decoding stops at the last one."""
    images: list[Image.Image] = []
    for frame in container.decode(stream):
        time = frame.pts if frame.pts is not None else frame.dts
        if frame.is_corrupt or time is None:  # later frames are computed from it
            raise UserError(f"damaged: of the {len(wanted)} frames asked for, only {len(images)} come before the fault")
        if time < wanted[len(images)]:
            continue
        check_size(frame.width, frame.height)  # the size may change within a video
        image = frame.to_image().rotate(frame.rotation, expand=True)
        while len(images) < len(wanted) and wanted[len(images)] <= time:
            images.append(image)
        if len(images) == len(wanted):
            return images
    raise UserError(f"ends before frame {len(images) + 1} of the {len(wanted)} that were asked for")


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
