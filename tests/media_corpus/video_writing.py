"""Write videos whose frames carry their number: six stripes, black or white, are its binary digits."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

SIZE = (96, 64)  # pixels, as width and height
RATE = Fraction(25)
TICK = 512  # units of time of a frame in the MP4 files that PyAV writes at this rate
CONTAINERS = {"mp4": "mp4", "mov": "mov", "matroska": "mkv", "webm": "webm", "avi": "avi"}
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


@dataclass(frozen=True)
class Video:
    """A file, and what must come of it: these frames, a failure with this reason, or anything but a crash."""

    name: str
    data: bytes
    frames: tuple[np.ndarray, ...] = ()  # uint8 [H,W,3], all that are shown, in order
    reason: str = ""  # a regular expression; "" for valid files
    undetectable: bool = False  # nothing in the file tells that it is damaged


def numbered(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Return a picture uint8 [H,W,3] with six stripes: the digits of the number, the last one first."""
    stripes = np.array([255 * (number >> digit & 1) for digit in range(6)], np.uint8)
    return np.repeat(np.repeat(stripes[None, np.arange(size[0]) * 6 // size[0]], size[1], 0)[..., None], 3, 2)


def numbers(wanted: Iterable[int]) -> tuple[np.ndarray, ...]:
    return tuple(numbered(number) for number in wanted)


def quadrants(colours: str, width: int = 32, height: int = 24) -> np.ndarray:
    """Return a picture of four rectangles; the letters are the colours, row by row."""
    grid = np.array([COLOURS[letter] for letter in colours], np.uint8).reshape(2, 2, 3)
    return np.repeat(np.repeat(grid, height, 0), width, 1)


def write(
    form: str,
    codec: str,
    pictures: Sequence[np.ndarray],
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    setup: Callable[[av.VideoStream], Any] = lambda stream: None,
    file: Any = None,
) -> bytes:
    """Return a video of these pictures (RGB or RGBA), encoded by PyAV; times count in frames; what is below 0 is cut off."""
    file = file or io.BytesIO()
    with av.open(file, mode="w", format=form, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=RATE)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], pixels
        stream.codec_context.options = {"strict": "experimental", **(options or {})}
        setup(stream)
        for position, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            frame.pts, frame.time_base = (times[position] if times else position), 1 / RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def packets_of(data: bytes) -> tuple[list[av.Packet], bytes]:
    """Return the packets of a video in the order of the file, and the private data of its codec."""
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        return [packet for packet in container.demux(stream) if packet.size], stream.codec_context.extradata or b""


def remux(data: bytes, form: str, change: Callable[[int, av.Packet], Iterable[av.Packet]]) -> bytes:
    """Return a video whose packets are changed, without decoding them."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data), mode="r") as source, av.open(file, mode="w", format=form) as target:
        old = source.streams.video[0]
        new = target.add_stream_from_template(old)
        for position, packet in enumerate(packet for packet in source.demux(old) if packet.size):
            for changed in change(position, packet):
                changed.stream = new
                target.mux(changed)
    return file.getvalue()


def boxes_of(data: bytes, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    """Return where each box starts and ends, the first of its kind."""
    found: dict[bytes, tuple[int, int]] = {}
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, start)
        found.setdefault(kind, (start, start + length))
        start += length
    return found


def with_edits(data: bytes, edits: Sequence[tuple[int, int, float]]) -> bytes:
    """Return an MP4 file, whose index is at its end, with another edit list: duration in ms, start in ticks, speed."""
    body = b"".join(struct.pack(">IiI", length, start, round(speed * 65536)) for length, start, speed in edits)
    body = struct.pack(">I4sII", 16 + len(body), b"elst", 0, len(edits)) + body
    body = struct.pack(">I4s", 8 + len(body), b"edts") + body
    movie = boxes_of(data, 0, len(data))[b"moov"]
    track = boxes_of(data, movie[0] + 8, movie[1])[b"trak"]
    inside = boxes_of(data, track[0] + 8, track[1])
    old = inside.get(b"edts", (inside[b"tkhd"][1],) * 2)
    changed = bytearray(data[: old[0]] + body + data[old[1] :])
    for start, end in (movie, track):
        changed[start : start + 4] = struct.pack(">I", end - start + len(body) - (old[1] - old[0]))
    return bytes(changed)


def with_index_first(data: bytes) -> bytes:
    """Return an MP4 file whose index is moved from the end to before the pictures (as `-movflags faststart` does)."""
    places = boxes_of(data, 0, len(data))
    movie, media = places[b"moov"], places[b"mdat"]
    index = bytearray(data[movie[0] : movie[1]])
    at = index.index(b"stco") + 8
    for entry in range(struct.unpack_from(">I", index, at)[0]):
        offset = struct.unpack_from(">I", index, at + 4 + 4 * entry)[0]
        struct.pack_into(">I", index, at + 4 + 4 * entry, offset + len(index))
    return data[: media[0]] + bytes(index) + data[media[0] : media[1]]


def top_boxes(data: bytes) -> list[tuple[bytes, int]]:
    """Return the kind and the end of each box of a file."""
    found, at = [], 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += length
        found.append((kind, at))
    return found
