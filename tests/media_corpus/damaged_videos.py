"""Videos that are cut short, damaged or not supported, with the reason of their failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from media_corpus.matroska import Block, matroska
from media_corpus.video_writing import (
    CONTAINERS,
    SIZE,
    TICK,
    Video,
    numbers,
    packets_of,
    quadrants,
    top_boxes,
    with_edits,
    with_index_first,
    write,
)


def flipped(data: bytes, at: int, count: int = 1) -> bytes:
    return data[:at] + bytes(byte ^ 0x10 for byte in data[at : at + count]) + data[at + count :]


def _noise(number: int) -> np.ndarray:
    still = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return np.roll(np.repeat(np.repeat(still, 4, 0), 4, 1), 5 * number, 1)


def cut_short() -> Iterator[Video]:
    """The end is missing."""
    pictures = [_noise(number) for number in range(12)]
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    for name, form, codec, pixels, container_options in [
        ("h264", "mp4", "libx264", "yuv420p", {}),
        ("h265", "mp4", "libx265", "yuv420p", {}),
        ("fragments", "mp4", "libx264", "yuv420p", fragments),
        ("dash", "mp4", "libx264", "yuv420p", {"movflags": "dash"}),
        ("mjpeg", "mov", "mjpeg", "yuvj420p", {}),
        ("prores", "mov", "prores", "yuv422p10le", {}),
        ("h264", "matroska", "libx264", "yuv420p", {}),
        ("clusters", "matroska", "libx264", "yuv420p", {"cluster_size_limit": "2000"}),
        ("ffv1", "matroska", "ffv1", "yuv420p", {}),
        ("vp8", "webm", "libvpx", "yuv420p", {}),
        ("vp9", "webm", "libvpx-vp9", "yuv420p", {}),
        ("mpeg4", "avi", "mpeg4", "yuv420p", {}),
        ("mjpeg", "avi", "mjpeg", "yuvj420p", {}),
        ("raw", "avi", "rawvideo", "bgr24", {}),
    ]:
        data = write(form, codec, pictures, pixels, {"g": "4"} if codec != "mjpeg" else {}, container_options)
        for cut in (len(data) // 3, len(data) // 2, len(data) * 9 // 10, len(data) - 1):
            reason = r"cut short|not a whole video|there is no"
            yield Video(f"{name}-{cut}.{CONTAINERS[form]}", data[:cut], reason=reason)
    data = with_index_first(write("mp4", "libx264", pictures))
    for share in (0.4, 0.7, 0.99):
        yield Video(f"index-first-{share}.mp4", data[: int(len(data) * share)], reason="cut short")
    fragments = write("mp4", "libx264", pictures, options={"g": "4"}, container_options={"movflags": "dash"})
    for position in range(3):  # cut between two fragments, which an index at the start lists
        ends = [end for kind, end in top_boxes(fragments) if kind == b"sidx"]
        yield Video(f"indexed-{position}.mp4", fragments[: ends[position]], reason="cut short")


def damaged() -> Iterator[Video]:
    """Bytes were changed where a checksum, a codec or the container tells."""
    pictures = [_noise(number) for number in range(8)]
    for name, form, codec, pixels in [
        ("checksum-of-cluster", "matroska", "libx264", "yuv420p"),
        ("checksum-of-cluster", "matroska", "mpeg4", "yuv420p"),
        ("checksum-of-frame", "matroska", "ffv1", "yuv420p"),
        ("checksum-of-frame", "avi", "ffv1", "yuv420p"),
        ("checksum-of-frame", "mov", "png", "rgb24"),
        ("checksum-of-frame", "avi", "png", "rgb24"),
    ]:
        data = write(form, codec, pictures, pixels)
        for number, packet in enumerate(packets_of(data)[0][:3]):
            assert packet.pos is not None
            at = packet.pos + packet.size // 2
            yield Video(f"{name}-{codec}-{number}.{CONTAINERS[form]}", flipped(data, at), reason="damaged|not a whole video")
    for form, codec in (("mp4", "libx264"), ("mp4", "libx265"), ("mov", "mpeg4"), ("avi", "mpeg4")):
        data = write(form, codec, pictures, options={"g": "4"})
        for number, packet in enumerate(packets_of(data)[0][1:4]):
            assert packet.pos is not None
            at = packet.pos + 12
            changed = data[:at] + bytes(packet.size - 12) + data[packet.pos + packet.size :]
            yield Video(f"zeros-{codec}-{number}.{CONTAINERS[form]}", changed, reason="damaged|not a whole video")
    packets, _ = packets_of(write("webm", "libvpx", numbers(range(12))))
    blocks = [Block(40 * position, bytes(packet), position == 0) for position, packet in enumerate(packets)]
    data = matroska("V_VP8", SIZE, [blocks[:6], blocks[6:]])
    block = data.index(blocks[3].data)
    for name, at, value in (
        ("track", block - 4, 0x8F),
        ("lacing", block - 1, 6),
        ("size", block - 6, 0xFF),
        ("kind", block - 13, 0x42),
    ):
        changed = data[:at] + bytes([value]) + data[at + 1 :]
        yield Video(f"{name}-of-block.webm", changed, reason="damaged|cut short")


def not_supported() -> Iterator[Video]:
    """What FFmpeg would show wrong."""
    whole = write("mp4", "libx264", numbers(range(20)), options={"bf": "0"})
    for name, edits in {
        "pause": [(200, 3 * TICK, 1.0), (400, -1, 1.0), (120, 14 * TICK, 1.0)],
        "two-pauses": [(80, -1, 1.0), (80, 0, 1.0), (80, -1, 1.0), (80, 0, 1.0)],
        "pause-at-the-end": [(200, 3 * TICK, 1.0), (400, -1, 1.0)],
    }.items():
        yield Video(f"{name}.mp4", with_edits(whole, edits), reason="pause in the middle")
    for speed in (2.0, 0.5, 0.0):
        yield Video(f"speed-{speed}.mp4", with_edits(whole, [(200, 3 * TICK, speed)]), reason="changes the speed")
    yield Video("nothing.mp4", with_edits(whole, [(0, 3 * TICK, 1.0)]), reason="no frame")
    for angle in (30, 45, 100):
        turned = write(
            "mp4", "libx264", [quadrants("RGBW")], setup=lambda stream, angle=angle: stream.set_display_rotation(angle)
        )
        yield Video(f"turned-{angle}.mp4", turned, reason="no quarter turn")


def undetectable_damage() -> Iterator[Video]:
    """Files whose damage nothing in them tells: they give frames, some of them wrong, or a reason; the docs say so."""
    pictures = [_noise(number) for number in range(8)]
    for form, codec, pixels in [
        ("webm", "libvpx", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("mp4", "libx264", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("avi", "huffyuv", "yuv422p"),
    ]:
        data = write(form, codec, pictures, pixels)
        for number, packet in enumerate(packets_of(data)[0][2:5]):
            assert packet.pos is not None
            changed = flipped(data, packet.pos + packet.size * 2 // 3)
            yield Video(f"bit-{codec}-{number}.{CONTAINERS[form]}", changed, undetectable=True)
    data = write("mp4", "libx264", pictures, options={"g": "2"}, container_options={"movflags": "frag_keyframe+empty_moov"})
    for end in [end for kind, end in top_boxes(data) if kind == b"mdat"][:3]:
        yield Video(f"fragments-{end}.mp4", data[:end], undetectable=True)


DAMAGED_KINDS: dict[str, Callable[[], Iterator[Video]]] = {
    "cut short": cut_short,
    "damaged": damaged,
    "not supported": not_supported,
}
