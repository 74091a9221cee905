"""BMPs with every header, of bit fields, palettes, and run lengths, and the pixels they show."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from media_corpus.png_pictures import png_rows
from media_corpus.values import HEIGHT, WIDTH, PictureCase, shown, unit, whole


def encode_bitmap(
    rows: Sequence[bytes],
    size: tuple[int, int],
    bits: int,
    header: int = 40,
    compression: int = 0,
    masks: Sequence[int] = (),
    palette: bytes = b"",
    is_top_down: bool = False,
) -> bytes:
    """Return a BMP of rows, the upper one first; they are filled up to four bytes, unless they are compressed."""
    width, height = size
    ordered = rows if is_top_down else rows[::-1]
    pixels = b"".join(row if compression in (1, 2) else row + bytes(-len(row) % 4) for row in ordered)
    info = struct.pack("<iiHHIIiiII", width, -height if is_top_down else height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    words = b"".join(struct.pack("<I", mask) for mask in masks)
    info = (info + words).ljust(header - 4, b"\0") if header > 40 else info + words
    body = struct.pack("<I", header) + info + palette
    return struct.pack("<2sIHHI", b"BM", 14 + len(body) + len(pixels), 0, 0, 14 + len(body)) + body + pixels


MASKS = {
    "555": (16, (0x7C00, 0x3E0, 0x1F, 0)),
    "565": (16, (0xF800, 0x7E0, 0x1F, 0)),
    "1555": (16, (0x7C00, 0x3E0, 0x1F, 0x8000)),
    "4444": (16, (0xF00, 0xF0, 0xF, 0xF000)),
    "8888": (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    "rgba": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    "abgr": (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
    "888": (32, (0xFF0000, 0xFF00, 0xFF, 0)),
    "1010102": (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
    "odd": (32, (0x1F, 0x7E00, 0x7F0000, 0)),
}


def bitmaps() -> Iterator[PictureCase]:
    """Bit fields in every header, with and without alpha."""
    values = unit(4, 14)
    for (name, (bits, masks)), header, is_top_down in itertools.product(MASKS.items(), (40, 52, 56, 108, 124), (False, True)):
        for opacity in ("some", "zero") if masks[3] else ("some",):
            numbers, channels = np.zeros((HEIGHT, WIDTH), np.int64), []
            for k, mask in enumerate(masks):
                size = f"{mask:b}".count("1")
                samples = whole(values[..., k], size) if size and (k < 3 or opacity == "some") else np.zeros_like(numbers)
                numbers |= samples * (mask & -mask)
                channels.append(samples[..., None] / (2**size - 1 or 1))
            has_alpha = bool(masks[3]) and header >= 56 and opacity == "some"
            rows = [row.astype(f"<u{bits // 8}").tobytes() for row in numbers]
            used = masks if header >= 56 else masks[:3]
            data = encode_bitmap(rows, (WIDTH, HEIGHT), bits, header, 3, used, is_top_down=is_top_down)
            pixels = shown(np.concatenate(channels[:3], axis=2), channels[3] if has_alpha else None)
            yield PictureCase(f"bmp/fields-{name}-{header}-{is_top_down}-{opacity}.bmp", data, pixels)


def palette_bitmaps() -> Iterator[PictureCase]:
    """Bitmaps without masks: palettes, run lengths, 24 bits, and 16 and 32 bits in their usual order."""
    table = np.random.default_rng(15).integers(0, 256, (256, 3))
    for bits, is_top_down in itertools.product((1, 4, 8), (False, True)):
        indices = np.random.default_rng(16).integers(0, 2**bits, (HEIGHT, WIDTH, 1))
        rows = [png_rows(row[None], bits)[1:] for row in indices]
        palette = b"".join(bytes([*colour[::-1], 0]) for colour in table[: 2**bits].astype(np.uint8))
        data = encode_bitmap(rows, (WIDTH, HEIGHT), bits, palette=palette, is_top_down=is_top_down)
        yield PictureCase(f"bmp/palette-{bits}-{is_top_down}.bmp", data, table[indices[..., 0]].astype(float))
    indices = np.repeat(np.random.default_rng(17).integers(0, 16, (HEIGHT, 6)), 3, axis=1)
    palette = b"".join(bytes([*colour[::-1], 0]) for colour in table.astype(np.uint8))
    for bits, compression in ((8, 1), (4, 2)):
        runs = [b"".join(bytes([3, value if bits == 8 else value * 17]) for value in row[::3]) for row in indices]
        plain = [row.astype(np.uint8) if bits == 8 else (row[::2] * 16 + row[1::2]).astype(np.uint8) for row in indices]
        for kind, rows in (("runs", runs), ("plain", [bytes([0, 18]) + row.tobytes() + bytes(len(row) % 2) for row in plain])):
            for name, end in (("both-ends", b"\0\0\0\1"), ("end-of-row", b"\0\0"), ("end", b"\0\1"), ("no-end", b"")):
                stored = [rows[0] + end, *(row + b"\0\0" for row in rows[1:])]  # the lowest row comes first
                data = encode_bitmap(stored, (18, HEIGHT), bits, compression=compression, palette=palette[: 4 << bits])
                yield PictureCase(f"bmp/{kind}-{bits}-{name}.bmp", data, table[indices].astype(float))
    colours = whole(unit(3, 18), 8).astype(np.uint8)
    five = whole(unit(3, 18), 5)
    fives = [(row @ [1 << 10, 1 << 5, 1]).astype("<u2").tobytes() for row in five]
    for is_top_down, header in itertools.product((False, True), (40, 108, 124)):
        size = (WIDTH, HEIGHT)
        rows = [row[:, ::-1].tobytes() for row in colours]
        padded = [np.pad(row[:, ::-1], ((0, 0), (0, 1)), constant_values=90).tobytes() for row in colours]
        for bits, each, expected in ((24, rows, colours / 255), (32, padded, colours / 255), (16, fives, five / 31)):
            data = encode_bitmap(each, size, bits, header, is_top_down=is_top_down)
            yield PictureCase(f"bmp/plain-{bits}-{header}-{is_top_down}.bmp", data, shown(expected))
    alpha = whole(unit(1, 19), 8).astype(np.uint8)
    rows = [row.tobytes() for row in np.concatenate([colours[..., ::-1], alpha], axis=2)]
    for header in (108, 124):
        masks = (0, 0, 0, 0xFF000000)
        data = encode_bitmap(rows, (WIDTH, HEIGHT), 32, header, masks=masks)
        yield PictureCase(f"bmp/plain-alpha-{header}.bmp", data, shown(colours / 255, alpha / 255))
