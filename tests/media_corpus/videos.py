"""Videos of every kind that must be read; what each one shows is known from how it was written, never from reading it back."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image

from media_corpus.matroska import Block, matroska
from media_corpus.video_writing import (
    CONTAINERS,
    RATE,
    SIZE,
    TICK,
    Video,
    boxes_of,
    numbered,
    numbers,
    packets_of,
    quadrants,
    remux,
    with_edits,
    write,
)

SHOWN_WIDTHS = {"dvvideo": 768, "h263": 192}  # the pixels of these formats for television and telephones are not square
MATRICES = {  # where the axes of the stored picture point, and the quadrants that are shown, row by row
    "upright": ((1, 0, 0, 1), "RGBW"),
    "mirrored": ((-1, 0, 0, 1), "GRWB"),
    "upside-down-mirrored": ((1, 0, 0, -1), "BWRG"),
    "half-turn": ((-1, 0, 0, -1), "WBGR"),
    "transposed": ((0, 1, 1, 0), "RBGW"),
    "transversed": ((0, -1, -1, 0), "WGBR"),
    "clockwise": ((0, 1, -1, 0), "BRWG"),
    "counterclockwise": ((0, -1, 1, 0), "GWRB"),
}


def container_codec_pairs(form: str) -> Iterator[Video]:
    """Every codec that PyAV writes into a container."""
    for name in sorted(av.codecs_available):
        video = _pair(form, name)
        if video:
            yield video


def _pair(form: str, name: str) -> Video | None:
    try:
        codec = av.Codec(name, "w")
    except ValueError:
        return None
    if codec.type != "video" or codec.name != name or "_" in name.removeprefix("prores_"):  # an alias, or for hardware
        return None
    offered = [pixels.name for pixels in codec.video_formats or []]
    pixels = "rgb24" if not offered else "yuv420p" if "yuv420p" in offered else offered[0]
    for size in (SIZE, (176, 144), (720, 576)):  # some codecs have a few sizes only
        try:
            data = write(form, name, [numbered(number, size) for number in range(8)], pixels)
            packets_of(data)
        except (ValueError, OSError, FFmpegError):  # this pair cannot be written, or holds what FFmpeg does not find again
            continue
        shown = (SHOWN_WIDTHS.get(name, size[0]), size[1])
        return Video(f"{name}-{form}.{CONTAINERS[form]}", data, tuple(numbered(number, shown) for number in range(8)))
    return None


def edit_lists() -> Iterator[Video]:
    """MP4 and MOV that show a part of what they hold."""
    shown = numbers(range(7, 20))
    for form, codec, pixels, options in [
        ("mp4", "libx264", "yuv420p", {"bf": "0"}),
        ("mp4", "libx264", "yuv420p", {"bf": "2"}),
        ("mov", "libx264", "yuv420p", {"bf": "3", "g": "5"}),
        ("mp4", "libx265", "yuv420p", {"x265-params": "log-level=0"}),
        ("mp4", "libvpx-vp9", "yuv420p", {"g": "30"}),
        ("mp4", "mpeg4", "yuv420p", {"bf": "2", "g": "10"}),
        ("mov", "mpeg4", "yuv420p", {"bf": "1"}),
        ("mp4", "mpeg2video", "yuv420p", {"bf": "2"}),
        ("mov", "prores", "yuv422p10le", {}),
        ("mov", "mjpeg", "yuvj420p", {}),
        ("mov", "qtrle", "rgb24", {}),
    ]:
        data = write(form, codec, numbers(range(20)), pixels, options, times=range(-7, 13))
        yield Video(f"{codec}-{len(data)}.{form}", data, shown)
    for flags in ("frag_keyframe+delay_moov", "dash+delay_moov", "frag_every_frame+delay_moov"):
        options = {"bf": "2", "g": "5"}
        data = write("mp4", "libx264", numbers(range(20)), "yuv420p", options, {"movflags": flags}, times=range(-7, 13))
        yield Video(f"{flags}.mp4", data, shown)
    whole = write("mp4", "libx264", numbers(range(20)), options={"bf": "2", "g": "5"})
    first = 2 * TICK  # the first frame is later than the first packet, because of B-frames
    parts = {
        "middle": ([(5, 3)], range(3, 8)),
        "two-parts": ([(5, 3), (3, 14)], [*range(3, 8), *range(14, 17)]),
        "other-order": ([(3, 14), (5, 3)], [*range(14, 17), *range(3, 8)]),
        "twice": ([(4, 6), (4, 6)], [*range(6, 10)] * 2),
        "late": ([(10, None), (5, 3)], range(3, 8)),
    }
    for name, (edits, wanted) in parts.items():
        entries = [(40 * length, -1 if start is None else first + TICK * start, 1.0) for length, start in edits]
        yield Video(f"{name}.mp4", with_edits(whole, entries), numbers(wanted))


def hidden_packets() -> Iterator[Video]:
    """VP8 and VP9 have packets that are decoded but not shown."""
    for form in ("webm", "matroska", "avi"):
        data = write(form, "libvpx", numbers(range(12)))
        yield Video(f"vp8.{CONTAINERS[form]}", _hide(data, form, 0x10), numbers([0, 1, 2, 3, 5, 6, 7, 8, 10, 11]))
        data = write(form, "libvpx-vp9", numbers(range(12)), options={"g": "1"})  # other frames say more than one bit
        yield Video(f"vp9.{CONTAINERS[form]}", _hide(data, form, 2), numbers([0, 1, 2, 3, 5, 6, 7, 8, 10, 11]))


def _hide(data: bytes, form: str, bit: int) -> bytes:
    """Clear a bit of the first byte of two of the packets."""

    def change(position: int, packet: av.Packet) -> list[av.Packet]:
        content = bytes(packet)
        return [_with_content(packet, bytes([content[0] & ~bit]) + content[1:])] if position in (4, 9) else [packet]

    return remux(data, form, change)


def _with_content(packet: av.Packet, content: bytes) -> av.Packet:
    changed = av.Packet(content)
    changed.pts, changed.dts, changed.time_base, changed.duration = packet.pts, packet.dts, packet.time_base, packet.duration
    changed.is_keyframe = packet.is_keyframe
    return changed


def split_superframes() -> Iterator[Video]:
    """VP9 whose packets were split, as streaming servers do."""
    for form in ("webm", "matroska", "mp4"):
        data = write(form, "libvpx-vp9", numbers(range(30)), options={"lag-in-frames": "25", "auto-alt-ref": "1"})
        with av.open(io.BytesIO(data)) as container:
            splitter = BitStreamFilterContext("vp9_superframe_split", container.streams.video[0])
        changed = remux(data, form, lambda _, packet, splitter=splitter: splitter.filter(packet))
        yield Video(f"split.{CONTAINERS[form]}", changed, numbers(range(30)))


def frames_in_another_order() -> Iterator[Video]:
    """B-frames: AVI does not say when they are shown; the other containers do."""
    for form, codec, options in [
        ("avi", "libx264", {"bf": "1"}),
        ("avi", "libx264", {"bf": "2"}),
        ("avi", "libx264", {"bf": "5", "x264-params": "b-pyramid=normal:b-adapt=0"}),
        ("avi", "mpeg4", {"bf": "2"}),
        ("avi", "mpeg2video", {"bf": "2"}),
        ("matroska", "libx264", {"bf": "5", "x264-params": "b-pyramid=normal:b-adapt=0"}),
        ("mov", "libx265", {"x265-params": "bframes=4:log-level=0"}),
    ]:
        data = write(form, codec, numbers(range(20)), options=options)
        yield Video(f"{codec}-{len(data)}.{CONTAINERS[form]}", data, numbers(range(20)))


def open_groups() -> Iterator[Video]:
    """Files that were cut at a key frame without encoding: frames after it refer to frames that are no longer there."""
    x26 = "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"
    for codec, options, starts in [
        ("libx264", {"x264-params": x26}, (8, 16)),
        ("libx265", {"x265-params": f"{x26}:log-level=0"}, (8, 16)),
        ("mpeg2video", {"g": "8", "bf": "2", "sc_threshold": "1000000000"}, (9, 15)),
    ]:
        data = write("matroska", codec, numbers(range(24)), options=options)
        keys = [position for position, packet in enumerate(packets_of(data)[0]) if packet.is_keyframe]
        for key, start in zip(keys[1:], starts, strict=False):
            for form in ("matroska", "mp4"):
                cut = remux(data, form, lambda position, packet, key=key: [packet] if position >= key else [])
                yield Video(f"{codec}-{start}.{CONTAINERS[form]}", cut, numbers(range(start, 24)))


def pixel_shapes() -> Iterator[Video]:
    """Pixels that are not square: the width is what changes."""
    stored = quadrants("RGBW")
    for form, codec, pixels in [
        ("mp4", "libx264", "yuv444p"),
        ("mov", "prores_ks", "yuv422p10le"),
        ("matroska", "libx264", "yuv444p"),
        ("avi", "mpeg4", "yuv420p"),
        ("mov", "png", "rgb24"),
    ]:
        for shape in (Fraction(2), Fraction(4, 3), Fraction(1, 2)):
            data = write(form, codec, [stored] * 2, pixels, setup=lambda stream, shape=shape: _set_pixel_shape(stream, shape))
            shown = _widened(stored, round(64 * shape))
            yield Video(f"{codec}-{shape.numerator}-{shape.denominator}.{CONTAINERS[form]}", data, (shown,) * 2)
    packets, _ = packets_of(write("webm", "libvpx", [stored] * 2))
    blocks = [Block(40 * position, bytes(packet)) for position, packet in enumerate(packets)]
    for width, height in ((128, 48), (64, 96), (160, 90)):
        shown = _widened(stored, round(48 * width / height))
        yield Video(f"{width}-{height}.webm", matroska("V_VP8", (64, 48), [blocks], display=(width, height)), (shown,) * 2)


def _set_pixel_shape(stream: av.VideoStream, shape: Fraction) -> None:
    stream.codec_context.sample_aspect_ratio = shape


def _widened(picture: np.ndarray, width: int) -> np.ndarray:
    return picture[:, np.arange(width) * picture.shape[1] // width]


def orientations() -> Iterator[Video]:
    """The eight ways in which a player turns or mirrors what is stored."""
    for form in ("mp4", "mov", "matroska"):
        for name, ((a, b, c, d), colours) in MATRICES.items():
            matrix = [*(value << 16 for value in (a, b)), 0, *(value << 16 for value in (c, d)), 0, 0, 0, 1 << 30]
            data = write(
                form,
                "libx264",
                [quadrants("RGBW")],
                "yuv444p",
                setup=lambda stream, matrix=matrix: stream.set_display_matrix(matrix),
            )
            shown = quadrants(colours) if a else quadrants(colours, 24, 32)
            yield Video(f"{name}.{CONTAINERS[form]}", data, (shown,))
    turned = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]  # clockwise, of pixels that are twice as wide as high

    def setup(stream: av.VideoStream) -> None:
        stream.set_display_matrix(turned)
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    shown = quadrants("BRWG", 24, 64)
    yield Video("wide-and-clockwise.mp4", write("mp4", "libx264", [quadrants("RGBW")], "yuv444p", setup=setup), (shown,))


def turned_by_exif() -> Iterator[Video]:
    """JPEGs as a camera writes them, with EXIF data, in AVI."""
    for orientation, colours in ((1, "RGBW"), (3, "WBGR"), (6, "BRWG"), (8, "GWRB")):
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = orientation, "camera"
        photo, file = io.BytesIO(), io.BytesIO()
        Image.fromarray(quadrants("RGBW")).save(photo, "JPEG", exif=exif, subsampling=0)
        with av.open(file, mode="w", format="avi") as container:
            stream = container.add_stream("mjpeg", rate=RATE)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj444p"
            for position in range(3):
                packet = av.Packet(photo.getvalue())
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, position, position, 1 / RATE
                container.mux(packet)
        shown = quadrants(colours) if orientation < 5 else quadrants(colours, 24, 32)
        yield Video(f"exif-{orientation}.avi", file.getvalue(), (shown,) * 3)


def transparency() -> Iterator[Video]:
    """A red box; the rest is transparent, and black below."""
    stored, shown = np.zeros((48, 64, 4), np.uint8), np.full((48, 64, 3), 255, np.uint8)
    stored[12:36, 16:48], shown[12:36, 16:48] = (255, 0, 0, 255), (255, 0, 0)
    for form, codec, pixels in [
        ("webm", "libvpx-vp9", "yuva420p"),
        ("matroska", "libvpx-vp9", "yuva420p"),
        ("mov", "png", "rgba"),
        ("mp4", "png", "rgba"),
        ("mov", "qtrle", "argb"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("matroska", "prores_ks", "yuva444p10le"),
        ("matroska", "ffv1", "bgra"),
        ("matroska", "ffv1", "yuva420p"),
        ("avi", "utvideo", "gbrap"),
        ("avi", "magicyuv", "gbrap"),
        ("avi", "huffyuv", "bgra"),
        ("avi", "ffvhuff", "yuva420p"),
        ("avi", "rawvideo", "bgra"),
        ("mov", "cfhd", "gbrap12le"),
    ]:
        data = write(form, codec, [stored] * 3, pixels)
        yield Video(f"{codec}-{pixels}.{CONTAINERS[form]}", data, (shown,) * 3)
    colour, _ = packets_of(write("webm", "libvpx", [quadrants("RRRR")] * 3))
    opaque = np.repeat(255 * (stored[..., 3:] > 0).astype(np.uint8), 3, 2)
    opacity, _ = packets_of(write("webm", "libvpx", [opaque] * 3))
    pairs = zip(colour, opacity, strict=True)
    blocks = [Block(40 * position, bytes(one), alpha=bytes(other)) for position, (one, other) in enumerate(pairs)]
    yield Video("vp8.webm", matroska("V_VP8", (64, 48), [blocks]), (shown,) * 3)
    filler = np.dstack([quadrants("RGBW"), np.zeros((48, 64), np.uint8)])
    for codec in ("rawvideo", "huffyuv", "ffvhuff"):  # a fourth byte of each pixel that nobody filled in
        yield Video(f"filler-{codec}.avi", write("avi", codec, [filler] * 2, "bgra"), (quadrants("RGBW"),) * 2)


def times() -> Iterator[Video]:
    """Late starts, times since 1970, gaps, varying frame rates, no duration: frames are counted, whenever they are shown."""
    shown = numbers(range(10))
    packets, _ = packets_of(write("webm", "libvpx", shown))
    contents = [bytes(packet) for packet in packets]
    for name, start, step in (
        ("late", 5_000, 120),
        ("since-1970", 1_700_000_000_000, 40),
        ("slow", 1_000, 3_000),
        ("days", 90_000_000, 40),
    ):
        blocks = [Block(start + step * position, content, position == 0) for position, content in enumerate(contents)]
        for duration in (None, start + 10.0 * step, 10.0 * step):
            data = matroska("V_VP8", SIZE, [blocks[:4], blocks[4:]], duration=duration)
            yield Video(f"{name}-{duration or 0:.0f}.webm", data, shown)
    uneven = [0, 1, 2, 6, 7, 12, 13, 20, 90, 91]
    for form, codec in (("mp4", "libx264"), ("mov", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")):
        yield Video(f"uneven-{codec}.{CONTAINERS[form]}", write(form, codec, shown, times=uneven), shown)
        if form != "avi":
            yield Video(f"starts-late.{CONTAINERS[form]}", write(form, codec, shown, times=range(200, 210)), shown)


class Pipe(io.BytesIO):
    """A file that cannot go back, so that sizes that are known only at the end are not written."""

    def seekable(self) -> bool:
        return False

    seek = None  # type: ignore[assignment]  # PyAV looks whether there is one


def recordings() -> Iterator[Video]:
    """Files whose container does not know how long they are, and fragments."""
    shown = numbers(range(20))
    for form, codec in (("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("avi", "mjpeg")):
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        yield Video(f"pipe-{codec}.{CONTAINERS[form]}", write(form, codec, shown, pixels, file=Pipe()), shown)
    packets, _ = packets_of(write("webm", "libvpx", shown))
    blocks = [Block(40 * position, bytes(packet), position == 0) for position, packet in enumerate(packets)]
    for crc, unknown in ((False, False), (True, False), (False, True)):
        data = matroska("V_VP8", SIZE, [blocks[:7], blocks[7:]], crc=crc, unknown=unknown)
        yield Video(f"by-hand-{crc}-{unknown}.webm", data, shown)
    for flags in (
        "frag_keyframe",
        "frag_keyframe+empty_moov",
        "cmaf",
        "dash",
        "frag_keyframe+skip_trailer",
        "negative_cts_offsets",
    ):
        options = {"bf": "2", "g": "5"}
        yield Video(
            f"{flags}.mp4", write("mp4", "libx264", shown, options=options, container_options={"movflags": flags}), shown
        )


def empty_samples() -> Iterator[Video]:
    """MP4 and MOV with samples of no bytes: the frame before is shown for longer."""
    for form, codec in (("mp4", "mpeg4"), ("mov", "mjpeg"), ("mov", "libx264"), ("mp4", "png")):
        pixels = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
        whole = write(form, codec, numbers(range(20)), pixels, {"g": "1"} if codec in ("mpeg4", "libx264") else {})
        for position in (9, 19):
            shown = numbers(number for number in range(20) if number != position)
            yield Video(f"empty-{codec}-{position}.{form}", _without_sample(whole, position), shown)


def _without_sample(data: bytes, position: int) -> bytes:
    """Return an MP4 file, all of its samples in one piece, in which one sample has no bytes."""
    sizes, offsets = data.index(b"stsz") + 16, data.index(b"stco") + 12
    media = boxes_of(data, 0, len(data))[b"mdat"]
    entries = struct.unpack_from(f">{position + 1}I", data, sizes)
    start = struct.unpack_from(">I", data, offsets)[0] + sum(entries[:-1])
    changed = bytearray(data)
    struct.pack_into(">I", changed, sizes + 4 * position, 0)
    struct.pack_into(">I", changed, media[0], media[1] - media[0] - entries[-1])
    return bytes(changed[:start] + changed[start + entries[-1] :])


def tracks() -> Iterator[Video]:
    """The video that is shown is not the first one in the file."""
    for form, codec in (("matroska", "libx264"), ("mp4", "libx264"), ("mov", "mpeg4"), ("webm", "libvpx")):
        file = io.BytesIO()
        with av.open(file, mode="w", format=form) as container:
            streams = [container.add_stream(codec, rate=RATE) for _ in range(2)]
            for stream, disposition in zip(streams, (Disposition(0), Disposition.default), strict=True):
                assert isinstance(stream, av.VideoStream)
                stream.width, stream.height, stream.pix_fmt, stream.disposition = *SIZE, "yuv420p", disposition
            for position in range(10):
                for stream, number in zip(streams, (63 - position, position), strict=True):
                    assert isinstance(stream, av.VideoStream)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
            for stream in streams:
                assert isinstance(stream, av.VideoStream)
                container.mux(stream.encode())
        yield Video(f"second-track.{CONTAINERS[form]}", file.getvalue(), numbers(range(10)))


KINDS: dict[str, Callable[[], Iterator[Video]]] = {
    "edit lists": edit_lists,
    "hidden packets": hidden_packets,
    "superframes": split_superframes,
    "order of frames": frames_in_another_order,
    "open groups": open_groups,
    "shapes of pixels": pixel_shapes,
    "orientations": orientations,
    "EXIF": turned_by_exif,
    "transparency": transparency,
    "times": times,
    "recordings": recordings,
    "empty samples": empty_samples,
    "tracks": tracks,
}
