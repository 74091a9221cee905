"""Animations of every kind with the frames they show, and animations that must be refused, with the reason.

What is drawn on what follows a model in NumPy, which keeps the canvas as floating point: colours 0..255 and opacity 0..1. It
knows nothing of files; these are written from the same list of parts, byte by byte. Each function yields the cases of one kind.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from media_corpus.png_pictures import png_file, png_rows
from media_corpus.values import saved, smooth

WIDTH, HEIGHT = 24, 16
KEEP, CLEAR, RESTORE = "keep", "clear", "restore"
BOXES = ((0, 0, 24, 16), (2, 2, 8, 8), (12, 4, 8, 8), (5, 5, 12, 3), (0, 0, 2, 2))  # left, top, width, height of each frame


class AnimationCase(NamedTuple):
    """A valid animation."""

    name: str
    data: bytes
    frames: list[np.ndarray]  # each [height, width, 3], 0..255, on white
    tolerance: float = 2.0


class RefusedAnimation(NamedTuple):
    """An animation that must end in the failure list."""

    name: str
    data: bytes
    reason: str  # part of it


class Drawn(NamedTuple):
    """A part of the canvas: its pixels, and what becomes of it."""

    corner: tuple[int, int]  # left, top
    pixels: np.ndarray  # [h, w, 4]: colours 0..255, opacity 0..1
    is_blended: bool
    disposal: str


def composed(parts: Sequence[Drawn], size: tuple[int, int] = (WIDTH, HEIGHT)) -> list[np.ndarray]:
    """Return each frame on white, [height, width, 3]."""
    canvas = np.zeros((size[1], size[0], 4))
    frames = []
    for (left, top), pixels, is_blended, disposal in parts:
        box = (slice(top, top + pixels.shape[0]), slice(left, left + pixels.shape[1]))
        before = canvas[box].copy()
        source = pixels[: before.shape[0], : before.shape[1]]
        if is_blended:
            upper, lower = source[..., 3:], before[..., 3:] * (1 - source[..., 3:])
            opacity = upper + lower
            mixed = (source[..., :3] * upper + before[..., :3] * lower) / np.where(opacity > 0, opacity, 1)
            canvas[box] = np.concatenate([mixed, opacity], axis=2)
        else:
            canvas[box] = source
        frames.append(canvas[..., :3] * canvas[..., 3:] + 255 * (1 - canvas[..., 3:]))
        if disposal == CLEAR:
            canvas[box] = 0
        elif disposal == RESTORE:
            canvas[box] = before
    return frames


class GifFrame(NamedTuple):
    """A frame of a GIF as it is stored."""

    corner: tuple[int, int]
    indices: np.ndarray  # [h, w]
    disposal: int
    transparent: int | None = None
    palette: np.ndarray | None = None  # its own, [256, 3]
    has_control: bool = True


DISPOSALS = {0: KEEP, 1: KEEP, 2: CLEAR, 3: RESTORE}
PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3))


def encode_gif(
    frames: Sequence[GifFrame],
    palette: np.ndarray | None = PALETTE,
    background: int = 3,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> bytes:
    data = struct.pack("<6sHHBBB", b"GIF89a", *size, 0xF7 if palette is not None else 0x70, background, 0)
    data += b"" if palette is None else bytes(palette.astype(np.uint8).ravel())
    data += b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
    for frame in frames:
        if frame.has_control:
            flags = frame.disposal << 2 | (frame.transparent is not None)
            data += struct.pack("<BBBBHBB", 0x21, 0xF9, 4, flags, 5, frame.transparent or 0, 0)
        height, width = frame.indices.shape
        data += struct.pack("<BHHHHB", 0x2C, *frame.corner, width, height, 0x87 if frame.palette is not None else 0)
        data += b"" if frame.palette is None else bytes(frame.palette.astype(np.uint8).ravel())
        data += b"\x08" + gif_blocks(gif_lzw(frame.indices.ravel().tolist()))
    return data + b";"


def gif_lzw(values: Sequence[int]) -> bytes:
    """Return LZW as GIF has it, of single bytes: the table is cleared before its codes become longer."""
    codes = [code for k, value in enumerate(values) for code in ([256, value] if k % 200 == 0 else [value])] + [257]
    number = sum(code << 9 * k for k, code in enumerate(codes))
    return number.to_bytes((9 * len(codes) + 7) // 8, "little")


def gif_blocks(data: bytes) -> bytes:
    return b"".join(bytes([len(data[k : k + 255])]) + data[k : k + 255] for k in range(0, len(data), 255)) + b"\0"


def drawn_gif(frame: GifFrame) -> Drawn:
    palette = PALETTE if frame.palette is None else frame.palette
    opacity = np.ones(frame.indices.shape) if frame.transparent is None else frame.indices != frame.transparent
    pixels = np.concatenate([palette[frame.indices], opacity[..., None]], axis=2)
    return Drawn(frame.corner, pixels.astype(float), True, DISPOSALS[frame.disposal])


def gif_frame(number: int, disposal: int, transparent: int | None, **more: Any) -> GifFrame:
    left, top, width, height = BOXES[number]
    indices = np.random.default_rng(number).integers(0, 8, (height, width))  # few colours: many pixels are transparent
    return GifFrame((left, top), indices, disposal, transparent, **more)


def gifs() -> Iterator[AnimationCase]:
    """All pairs of disposals, with a transparent index in all frames, in none, or in every other one."""
    choices = {"all": (5, 5, 5, 5, 5), "none": (None,) * 5, "mixed": (None, 5, None, 5, None), "mixed2": (5, None, 5, None, 5)}
    for (first, second), (name, transparent) in itertools.product(itertools.product(range(4), repeat=2), choices.items()):
        disposals = (first, second, first, second, 0)
        frames = [gif_frame(k, disposals[k], transparent[k]) for k in range(5)]
        yield AnimationCase(f"gif/{first}{second}-{name}.gif", encode_gif(frames), composed([drawn_gif(f) for f in frames]))


def odd_gifs() -> Iterator[AnimationCase]:
    """Own palettes, frames without a control, a first frame that is smaller or larger than the canvas, bytes behind it."""
    other = np.random.default_rng(1).integers(0, 256, (256, 3))
    for disposal in range(4):
        frames = [gif_frame(k, disposal if k else 1, 5, palette=other if k % 2 else None) for k in range(5)]
        expected = composed([drawn_gif(frame) for frame in frames])
        yield AnimationCase(f"gif/own-palettes-{disposal}.gif", encode_gif(frames), expected)
        for tail in (bytes(100), b";;;", b"\0" * 5000 + b"end"):
            yield AnimationCase(f"gif/tail-{len(tail)}-{disposal}.gif", encode_gif(frames) + tail, expected)
        all_own = [frame._replace(palette=other) for frame in frames]
        data = encode_gif(all_own, palette=None)
        yield AnimationCase(f"gif/no-palette-{disposal}.gif", data, composed([drawn_gif(frame) for frame in all_own]))
        plain = [
            frame if k % 2 == 0 else frame._replace(disposal=0, transparent=None, has_control=False)
            for k, frame in enumerate(frames)
        ]
        yield AnimationCase(
            f"gif/no-control-{disposal}.gif", encode_gif(plain), composed([drawn_gif(frame) for frame in plain])
        )
        small = [gif_frame(k, disposal, 5 if k % 2 else None) for k in (1, 2, 3, 4)]
        yield AnimationCase(
            f"gif/small-first-{disposal}.gif", encode_gif(small), composed([drawn_gif(frame) for frame in small])
        )
        sticking = [gif_frame(0, 1, None), gif_frame(2, disposal, 5)._replace(corner=(20, 12)), gif_frame(4, 0, None)]
        data = encode_gif(sticking)
        yield AnimationCase(f"gif/sticking-out-{disposal}.gif", data, composed([drawn_gif(frame) for frame in sticking]))
        data = encode_gif(frames, size=(8, 4))
        yield AnimationCase(f"gif/wrong-screen-{disposal}.gif", data, expected)
    grey = np.repeat(np.arange(256)[:, None], 3, axis=1)
    frames = [gif_frame(k, 2, 5) for k in range(5)]
    expected = composed([drawn_gif(frame._replace(palette=grey)) for frame in frames])
    yield AnimationCase("gif/without-any-palette.gif", encode_gif(frames, palette=None), expected)


class PngFrame(NamedTuple):
    """A frame of an animated PNG as it is stored."""

    corner: tuple[int, int]
    samples: np.ndarray  # [h, w, channels]
    disposal: int
    blend: int


class PngKind(NamedTuple):
    """How the samples of a PNG become colours."""

    colour_type: int
    depth: int
    channels: int
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    key: tuple[int, ...] = ()


OPACITY = np.array([0, 80, 160, 255, 255, 255, 255, 255])
PNG_KINDS = {
    "rgba": PngKind(6, 8, 4),
    "rgb": PngKind(2, 8, 3),
    "grey": PngKind(0, 8, 1),
    "grey-alpha": PngKind(4, 8, 2),
    "palette": PngKind(3, 8, 1, ((b"PLTE", bytes(PALETTE[:8].astype(np.uint8).ravel())),)),
    "palette-alpha": PngKind(
        3, 4, 1, ((b"PLTE", bytes(PALETTE[:8].astype(np.uint8).ravel())), (b"tRNS", bytes(OPACITY.astype(np.uint8))))
    ),
    "rgba-16": PngKind(6, 16, 4),
    "rgb-key": PngKind(2, 8, 3, ((b"tRNS", struct.pack(">3H", 1, 1, 1)),), (1, 1, 1)),
    "rgb-16-key": PngKind(2, 16, 3, ((b"tRNS", struct.pack(">3H", 1, 1, 1)),), (1, 1, 1)),
    "grey-key": PngKind(0, 2, 1, ((b"tRNS", struct.pack(">H", 1)),), (1,)),
}


def png_samples(kind: PngKind, number: int) -> np.ndarray:
    _, _, width, height = BOXES[number]
    rng = np.random.default_rng(number)
    top = {3: 8}.get(kind.colour_type, 2**kind.depth)
    samples = rng.integers(0, top, (height, width, kind.channels))
    if kind.key:
        samples[rng.random((height, width)) < 0.4] = kind.key
    return samples


def drawn_png(kind: PngKind, frame: PngFrame) -> Drawn:
    values = frame.samples / (2**kind.depth - 1) * 255
    opacity = np.ones((*values.shape[:2], 1))
    if kind.colour_type == 3:
        indices = frame.samples[..., 0]
        values = PALETTE[indices].astype(float)
        opacity = OPACITY[indices][..., None] / 255 if len(kind.chunks) == 2 else opacity
    elif kind.colour_type in (4, 6):
        values, opacity = values[..., :-1], values[..., -1:] / 255
    elif kind.key:
        opacity = (frame.samples != np.array(kind.key)).any(axis=2, keepdims=True)
    colours = np.broadcast_to(values, (*values.shape[:2], 3))
    return Drawn(
        frame.corner, np.concatenate([colours, opacity], axis=2), frame.blend == 1, (KEEP, CLEAR, RESTORE)[frame.disposal]
    )


def encode_apng(
    kind: PngKind, frames: Sequence[PngFrame], default: np.ndarray | None = None, *extra: tuple[bytes, bytes]
) -> bytes:
    """Return an animated PNG; `default` is a picture for old programs, which is no frame. Data are split over two chunks."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, kind.depth, kind.colour_type, 0, 0, 0)), *extra]
    chunks += [(b"acTL", struct.pack(">II", len(frames), 0)), *kind.chunks]
    chunks += [] if default is None else [(b"IDAT", zlib.compress(png_rows(default, kind.depth)))]
    number = 0
    for place, ((left, top), samples, disposal, blend) in enumerate(frames):
        height, width = samples.shape[:2]
        control = struct.pack(">IIIIIHHBB", number, width, height, left, top, 1, 10, disposal, blend)
        data = zlib.compress(png_rows(samples, kind.depth))
        chunks.append((b"fcTL", control))
        number += 1
        for piece in (data[:9], data[9:]):
            if place == 0 and default is None:
                chunks.append((b"IDAT", piece))
            else:
                chunks.append((b"fdAT", struct.pack(">I", number) + piece))
                number += 1
    return png_file(*chunks, (b"IEND", b""))


def png_frames(kind: PngKind, disposals: Sequence[int], blends: Sequence[int]) -> list[PngFrame]:
    return [PngFrame(BOXES[k][:2], png_samples(kind, k), disposals[k], blends[k]) for k in range(len(disposals))]


def pngs() -> Iterator[AnimationCase]:
    """All pairs of disposals and blends, of pictures with alpha; each of them for the other kinds of samples."""
    pairs = list(itertools.product(range(3), range(2)))
    for (first, second), name in itertools.product(itertools.product(pairs, repeat=2), ("rgba", "rgb")):
        kind = PNG_KINDS[name]
        frames = png_frames(kind, [first[0], second[0]] * 2 + [0], [first[1], second[1]] * 2 + [1])
        label = "".join(map(str, (*first, *second)))
        yield AnimationCase(
            f"apng/{name}-{label}.png", encode_apng(kind, frames), composed([drawn_png(kind, f) for f in frames])
        )
    for (name, kind), (disposal, blend) in itertools.product(PNG_KINDS.items(), pairs):
        frames = png_frames(kind, [0, *[disposal] * 3, 0], [blend] * 5)
        expected = composed([drawn_png(kind, frame) for frame in frames])
        yield AnimationCase(f"apng/kind-{name}-{disposal}{blend}.png", encode_apng(kind, frames), expected)


def odd_pngs() -> Iterator[AnimationCase]:
    """Animations with a picture for old programs, turned ones, narrow frames, one frame, bytes behind the end."""
    for name, kind in PNG_KINDS.items():
        frames = png_frames(kind, [1, 2, 1, 0, 0], [1, 0, 1, 0, 1])
        expected = composed([drawn_png(kind, frame) for frame in frames])
        default = png_samples(kind, 0)[::-1]
        yield AnimationCase(f"apng/default-{name}.png", encode_apng(kind, frames, default), expected)
        small = encode_apng(kind, frames[1:], default)
        yield AnimationCase(f"apng/small-first-{name}.png", small, composed([drawn_png(kind, frame) for frame in frames[1:]]))
        yield AnimationCase(f"apng/one-{name}.png", encode_apng(kind, frames[:1]), expected[:1])
        yield AnimationCase(f"apng/tail-{name}.png", encode_apng(kind, frames) + bytes(500), expected)
    kind = PNG_KINDS["rgba"]
    frames = png_frames(kind, [0, 0, 0, 0, 0], [1, 1, 1, 1, 1])
    expected = composed([drawn_png(kind, frame) for frame in frames])
    for orientation, quarter_turns in ((3, 2), (6, -1), (8, 1)):
        exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0" + struct.pack("<HHI", orientation, 0, 0)
        data = encode_apng(kind, frames, None, (b"eXIf", exif))
        yield AnimationCase(f"apng/turned-{orientation}.png", data, [np.rot90(frame, quarter_turns) for frame in expected])


def modern_animations() -> Iterator[AnimationCase]:
    """WebP and AVIF, whose libraries compose the frames themselves."""
    frames = [smooth() * (1 - k / 8) for k in range(4)]
    alpha = np.broadcast_to(np.linspace(0, 1, 64)[:, None], (48, 64, 1))
    with_alpha = [np.concatenate([frame, 255 * alpha], axis=2) for frame in frames]
    on_white = [255 - (255 - frame) * alpha for frame in frames]
    formats: list[tuple[str, dict[str, Any], float]] = [
        ("WEBP", {"lossless": True}, 2),
        ("WEBP", {"quality": 95}, 12),
        ("WEBP", {"lossless": True, "kmax": 0}, 2),
        ("AVIF", {"quality": 98}, 10),
        ("AVIF", {"quality": 98, "subsampling": "4:4:4"}, 8),
        ("AVIF", {"quality": 95, "speed": 10}, 14),
    ]
    for (form, options, tolerance), (name, stored, expected) in itertools.product(
        formats, (("rgb", frames, frames), ("rgba", with_alpha, on_white))
    ):
        first, *rest = [Image.fromarray(frame.astype(np.uint8)) for frame in stored]
        data = saved(first, form, save_all=True, append_images=rest, **options)
        label = "-".join([form, name, *map(str, options)])
        yield AnimationCase(f"modern/{label}.bin", data, expected, tolerance)


def refused_gifs() -> Iterator[RefusedAnimation]:
    gif = encode_gif([gif_frame(k, 2, 5) for k in range(5)])
    for size in (1, 2, 9, 200):
        yield RefusedAnimation(f"gif/cut-{size}.gif", gif[:-size], "cut short")
    first = gif.index(b"\x2c", 13 + 768)
    for kind in (0x2D, 0x99, 0xFF):
        yield RefusedAnimation(f"gif/block-{kind}.gif", gif[:first] + bytes([kind]) + gif[first + 1 :], "damaged")
    for length in (0, 3, 30):
        yield RefusedAnimation(f"gif/no-frames-{length}.gif", gif[: 13 + 768] + bytes(length) + b";", "no frame")


def refused_pngs() -> Iterator[RefusedAnimation]:
    kind = PNG_KINDS["rgba"]
    frames = png_frames(kind, [0] * 5, [1] * 5)
    for number in (0, 2, 4, 6, 9):
        data = encode_apng(kind, frames)
        at = data.index(b"acTL") + 4
        body = struct.pack(">II", number if number != 5 else 7, 0)
        changed = data[:at] + body + struct.pack(">I", zlib.crc32(b"acTL" + body)) + data[at + 12 :]
        yield RefusedAnimation(f"apng/declares-{number}.png", changed, "cut short")
    whole = encode_apng(kind, frames)
    for size in (1, 12, 60, 400):
        yield RefusedAnimation(f"apng/cut-{size}.png", whole[:-size], "cut short")
    for name, corner in (("right", (23, 4)), ("below", (2, 15)), ("far", (2**31, 2))):
        moved = [*frames[:2], frames[2]._replace(corner=corner), *frames[3:]]
        yield RefusedAnimation(f"apng/outside-{name}.png", encode_apng(kind, moved), "does not lie within")
    for disposal, blend in ((3, 0), (0, 2), (9, 9)):
        odd = [*frames[:2], frames[2]._replace(disposal=disposal, blend=blend), *frames[3:]]
        yield RefusedAnimation(f"apng/kind-{disposal}-{blend}.png", encode_apng(kind, odd), "damaged")
    chunks = [position for position in range(len(whole)) if whole[position : position + 4] in (b"fcTL", b"fdAT")]
    for position in (chunks[1], chunks[2], chunks[-1]):
        yield RefusedAnimation(f"apng/order-{position}.png", whole[: position + 7] + b"\x63" + whole[position + 8 :], "damaged")


ANIMATIONS: tuple[Callable[[], Iterator[AnimationCase]], ...] = (gifs, odd_gifs, pngs, odd_pngs, modern_animations)
REFUSED_ANIMATIONS: tuple[Callable[[], Iterator[RefusedAnimation]], ...] = (refused_gifs, refused_pngs)
