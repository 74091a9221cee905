"""PNGs of every colour type and depth, with and without a colour key, and the pixels they show."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from media_corpus.values import HEIGHT, WIDTH, PictureCase, shown, unit, whole

PNG_KINDS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type: channels
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def encode_png(samples: np.ndarray, kind: int, depth: int, is_interlaced: bool = False, *extra: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of samples [height, width, channels]; `extra` chunks stand before the data."""
    height, width = samples.shape[:2]
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, int(is_interlaced)))
    return png_file(header, *extra, (b"IDAT", zlib.compress(png_rows(samples, depth, is_interlaced))), (b"IEND", b""))


def png_file(*chunks: tuple[bytes, bytes]) -> bytes:
    body = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_rows(samples: np.ndarray, depth: int, is_interlaced: bool = False) -> bytes:
    passes = [samples[y::dy, x::dx] for x, y, dx, dy in ADAM7] if is_interlaced else [samples]
    rows = b""
    for row in itertools.chain.from_iterable(each for each in passes if each.size):
        text = "".join(f"{int(value):0{depth}b}" for value in row.ravel())
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    return rows


def pngs() -> Iterator[PictureCase]:
    for kind, is_interlaced in itertools.product((0, 2, 4, 6), (False, True)):
        for depth in PNG_DEPTHS[kind]:
            samples = whole(unit(PNG_KINDS[kind], 9), depth)
            values = samples / (2**depth - 1)
            pixels = shown(values[..., :-1], values[..., -1:]) if kind in (4, 6) else shown(values)
            data = encode_png(samples, kind, depth, is_interlaced)
            yield PictureCase(f"png/{kind}-{depth}-{is_interlaced}.png", data, pixels, 2.0)
    table = np.random.default_rng(10).integers(0, 256, (256, 3))
    opacity = np.random.default_rng(11).integers(0, 256, 256)
    for number, transparent in itertools.product(range(4), ("none", "some", "one")):
        depth = 2**number
        indices = np.random.default_rng(12).integers(0, 2**depth, (HEIGHT, WIDTH, 1))
        alpha = {"none": [], "some": opacity[: 2**depth].tolist(), "one": [255, 0]}[transparent]
        chunks = [(b"PLTE", bytes(table[: 2**depth].astype(np.uint8).ravel()))]
        chunks += [(b"tRNS", bytes(alpha))] if alpha else []
        levels = np.array([*alpha, *[255] * (256 - len(alpha))])[indices] / 255
        data = encode_png(indices, 3, depth, False, *chunks)
        yield PictureCase(f"png/palette-{depth}-{transparent}.png", data, shown(table[indices[..., 0]] / 255, levels))


def colour_keys() -> Iterator[PictureCase]:
    """One colour is transparent; at 16 bits, others differ from it in one byte only. Of a key, only the lower bits count."""
    for kind, is_interlaced, is_high in itertools.product((0, 2), (False, True), (False, True)):
        for depth in PNG_DEPTHS[kind]:
            samples = whole(unit(PNG_KINDS[kind], 13), depth)
            key = samples[4, 5].copy()
            samples[:3] = key
            samples[6] = key ^ 1
            samples[7] = key ^ 256 if depth == 16 else key
            written = key + (3 << depth if is_high and depth < 8 else 0)
            data = encode_png(samples, kind, depth, is_interlaced, (b"tRNS", struct.pack(f">{len(key)}H", *written)))
            alpha = (samples != key).any(axis=2, keepdims=True).astype(float)
            yield PictureCase(
                f"png/key-{kind}-{depth}-{is_interlaced}-{is_high}.png", data, shown(samples / (2**depth - 1), alpha)
            )
