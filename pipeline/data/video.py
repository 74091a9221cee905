"""Choose among the frames of a video that are shown, and return them as a player shows them.

What is shown is what FFmpeg's decoder returns for the whole file: not the parts that an edit list cuts off, not hidden frames
of VP8 and VP9, not frames that refer to others before the start. Packets are counted first, because that is fast; where the
decoder returns another number of frames, the file is decoded once more. Only the chosen frames are held in memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from pipeline.data.containers import MAX_PARTS, check_container
from pipeline.data.pixels import check_size, on_white
from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

OPTIONS = {"format_whitelist": "mov,mp4,matroska,webm,avi"}  # no playlists, because they name other files
# The decoders that leave out what is damaged, unless they are told to give up, and what they have to check.
STRICT_DECODERS = dict.fromkeys(("hevc", "mpeg1video", "mpeg2video"), "explode") | {"png": "crccheck+explode"}
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ones ignore the second stream with the transparency
PADDED_CODECS = ("rawvideo", "huffyuv", "ffvhuff")  # in AVI their fourth channel is often a filler of zeros
# The display matrix says where the axes of a stored frame point: (a, b) is the direction of x, (c, d) that of y, downwards.
ORIENTATIONS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # a quarter turn clockwise; Pillow counts counterclockwise
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 0, 0, 0): None,  # some programs write nothing but zeros
}
QUARTER_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
MESSAGES = Lock()  # one thread at a time reads the messages of FFmpeg
MAX_SKEW = 0.02  # of the longer axis: what is taken for rounding


def video_frames(path: Path, choose: Callable[[int], Sequence[int]]) -> list[Image.Image]:
    """Return frames of a video as RGB: upright, with square pixels, transparent parts white.

    Args:
        path: the file: MP4, MOV, Matroska, WebM or AVI, whatever its name says.
        choose: gets the number of frames that are shown, and returns those that are wanted, counted from 0, in ascending order.

    Raises:
        UserError: with the reason, without the name of the file.
    """
    from av.error import FFmpegError  # only videos need it

    try:
        with path.open("rb") as file:  # a file object, because FFmpeg may take a name for an address
            expected = _count_packets(file, check_container(file))
            images, shown = _decode(file, choose(expected))
            if shown != expected:
                images, shown = _decode(file, choose(shown))
    except FFmpegError as error:
        raise UserError(f"not a whole video: {error.strerror}") from error
    return images


@contextmanager
def _open_stream(file: BinaryIO) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file at its start, and return the video stream that is shown; the cover image of a music file is not one."""
    import av
    from av.stream import Disposition

    file.seek(0)
    with av.open(file, mode="r", options=OPTIONS) as container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            found = ", ".join(stream.type for stream in container.streams) or "nothing"
            raise UserError(f"there is no video in it, but {found}")
        stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
        if stream.codec_context is None:
            raise UserError("its video is in a format that cannot be decoded")
        check_size(stream.width, stream.height)
        yield container, stream


def _count_packets(file: BinaryIO, blocks: list[int]) -> int:
    """Return the number of packets that an edit list does not cut off, mostly that of shown frames; nothing is decoded.

    Args:
        file: the file.
        blocks: what `check_container` returns.
    """
    with _open_stream(file) as (container, stream):
        packets = shown = 0
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise UserError(f"damaged or cut short at frame {packets + 1}")
            packets += bool(packet.size)  # the last packet is empty: the end of the stream
            shown += bool(packet.size) and not packet.is_discard
            if packets > MAX_PARTS:
                raise UserError(f"it has more than {MAX_PARTS} packets")
        position = container.streams.video.index(stream)
        listed = blocks[position] if position < len(blocks) else len(stream.index_entries)
        if packets < listed and position >= len(blocks):
            listed = sum(entry.size > 0 for entry in stream.index_entries)
    if packets < listed:
        raise UserError(f"damaged or cut short: {packets} of {listed} frames can be read")
    return shown


def _decode(file: BinaryIO, wanted: Sequence[int]) -> tuple[list[Image.Image], int]:
    """Decode a whole video; return those of the wanted frames that there are, and how many are shown."""
    images: dict[int, Image.Image] = {}
    chosen, shown = set(wanted), 0
    with _open_stream(file) as (container, stream), _open_decoder(container, stream) as decoder:
        for frame in _shown_frames(container, stream, decoder):
            check_size(frame.width, frame.height)  # the size may change within a video
            if shown in chosen:
                images[shown] = _as_shown(frame, stream, container.format.name == "avi")
            shown += 1
    if not shown:
        raise UserError("there is no frame in it")
    return [images[number] for number in wanted if number in images], shown


@contextmanager
def _open_decoder(container: InputContainer, stream: VideoStream) -> Iterator[VideoCodecContext]:
    """Return a decoder that finds as much damage as it can."""
    import av
    import av.logging as ffmpeg_messages

    decoder = stream.codec_context
    name = decoder.codec.name
    if stream.metadata.get("alpha_mode") == "1" and name in ALPHA_DECODERS:
        decoder = av.CodecContext.create(ALPHA_DECODERS[name], "r")
        assert isinstance(decoder, av.VideoCodecContext)
    decoder.thread_count = 1  # extraction decodes in several processes already
    decoder.options = {"max_pixels": str(Image.MAX_IMAGE_PIXELS)} if Image.MAX_IMAGE_PIXELS else {}
    if name in STRICT_DECODERS:
        decoder.options |= {"err_detect": STRICT_DECODERS[name]}
    if name != "ffv1":
        yield decoder
        return
    with MESSAGES:  # FFV1 has checksums; a wrong one is a message only
        before = ffmpeg_messages.get_level()
        ffmpeg_messages.set_level(ffmpeg_messages.ERROR)
        try:
            with ffmpeg_messages.Capture() as messages:
                yield decoder
        finally:
            ffmpeg_messages.set_level(before)
    if any("CRC mismatch" in text for _, _, text in messages):
        raise UserError("damaged: a checksum of a frame is wrong")


def _shown_frames(container: InputContainer, stream: VideoStream, decoder: VideoCodecContext) -> Iterator[VideoFrame]:
    has_edits = container.format.name.startswith("mov")
    number = 0
    packets = (packet for packet in container.demux(stream) if packet.size)  # an empty one goes on with the frame before it
    for packet in chain(packets, (None,)):
        for frame in decoder.decode(packet):
            number += 1
            if frame.is_corrupt:  # later frames are computed from it
                raise UserError(f"damaged at frame {number}")
            if not (has_edits and frame.pts is not None and frame.pts < 0):  # in fragments FFmpeg leaves this to us
                yield frame


def _as_shown(frame: VideoFrame, stream: VideoStream, is_avi: bool) -> Image.Image:
    """Return a frame as RGB with square pixels (its width is changed, not its height), upright, transparent parts on white."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = Image.fromarray(frame.to_ndarray(format="rgba", threads=1))
        may_be_filler = frame.format.has_palette or (is_avi and stream.codec_context.codec.name in PADDED_CODECS)
        is_filler = may_be_filler and image.getchannel("A").getextrema() == (0, 0)
        image = image.convert("RGB") if is_filler else on_white(image)
    else:
        image = frame.to_image(threads=1)  # a process that is forked later cannot end threads of this one
    width = round(image.width * (stream.sample_aspect_ratio or 1))
    if width != image.width:
        check_size(width, image.height)
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    turn = _orientation(frame)
    return image if turn is None else image.transpose(turn)


def _orientation(frame: VideoFrame) -> Image.Transpose | None:
    """Return how to turn or mirror a stored frame so that it is upright."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know all kinds of data beside a frame (EXIF), and lists none of them then
        return QUARTER_TURNS[round(frame.rotation / 90) % 4]
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    rounding = MAX_SKEW * max(map(abs, (a, b, c, d)))
    x_right, x_down, y_right, y_down = ((v > rounding) - (v < -rounding) for v in (a, b, c, d))
    axes = (x_right, x_down, y_right, y_down)
    if axes not in ORIENTATIONS:
        raise UserError("it is turned by an angle that is no quarter turn, which is not supported; turn it with ffmpeg")
    return ORIENTATIONS[axes]
