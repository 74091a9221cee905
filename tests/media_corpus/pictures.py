"""Valid still pictures of every kind with the pixels they show, and pictures that say too little, with the reason.

Most files are written here byte by byte, by encoders that share nothing with the readers.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

from media_corpus.tiffs import DEFLATE, FLOAT, LZW, PACKBITS, SIGNED, Tiff

HEIGHT, WIDTH = 11, 17  # odd, so that rows of few bits end within a byte


class PictureCase(NamedTuple):
    """A valid picture."""

    name: str  # kind/what is special.suffix
    data: bytes
    pixels: np.ndarray  # [height, width, 3], 0..255, on white
    tolerance: float = 1.0


class RefusedPicture(NamedTuple):
    """A picture that must end in the failure list."""

    name: str
    data: bytes
    reason: str  # part of it


def unit(channels: int, seed: int = 0) -> np.ndarray:
    """Random values in 0..1, [HEIGHT, WIDTH, channels], black and white among them."""
    values = np.random.default_rng(seed).random((HEIGHT, WIDTH, channels))
    values[0, 0], values[-1, -1] = 0, 1
    return values


def whole(values: np.ndarray, bits: int) -> np.ndarray:
    """Values in 0..1 as whole numbers of this many bits."""
    return np.rint(values * (2**bits - 1)).astype(np.int64)


def shown(values: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
    """Values in 0..1, one or three channels, on white, as 0..255."""
    colours = np.broadcast_to(values, (*values.shape[:2], 3))
    return 255 * (colours if alpha is None else colours * alpha + 1 - alpha)


def picture_cases() -> Iterator[PictureCase]:
    """Yield every valid picture."""
    for cases in (grey_tiffs, packed_tiffs, colour_tiffs, other_tiffs, pngs, colour_keys, bitmaps, palette_bitmaps):
        yield from cases()
    for cases in (gifs, jpegs, unended_jpegs, turned, modern_formats, deep_jpeg2000):
        yield from cases()


def grey_tiffs() -> Iterator[PictureCase]:
    values = unit(1)
    for bits, order, photometric in itertools.product((1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 31, 32), "<>", (0, 1)):
        samples = whole(values, bits)
        stored = 2**bits - 1 - samples if photometric == 0 else samples
        layout = Tiff(bits, order, photometric)
        yield PictureCase(f"tiff/grey-{bits}-{order}-{photometric}.tif", layout.encode(stored), shown(samples / (2**bits - 1)))
    for bits, order in itertools.product((8, 12, 16, 32), "<>"):
        samples = whole(values, bits)
        data = Tiff(bits, order, 1, SIGNED).encode(samples - 2 ** (bits - 1))
        yield PictureCase(f"tiff/signed-{bits}-{order}.tif", data, shown(samples / (2**bits - 1)))
    for bits, order, photometric in itertools.product((16, 32, 64), "<>", (0, 1)):
        data = Tiff(bits, order, photometric, FLOAT).encode(values if photometric else 1 - values)
        yield PictureCase(f"tiff/float-{bits}-{order}-{photometric}.tif", data, shown(values))
    for kind, low, high in ((FLOAT, -3.0, 250.0), (SIGNED, 0.0, 1000.0), (SIGNED, -1024.0, 3071.0)):
        data = Tiff(32, "<", 1, kind, tags={340: low, 341: high}).encode(np.rint(low + values * (high - low)))
        yield PictureCase(f"tiff/limits-{kind}-{low}.tif", data, shown(values))


def packed_tiffs() -> Iterator[PictureCase]:
    """Compressions, predictors, tiles, the order of bits."""
    values = unit(1, 1)
    for compression, bits, tile in itertools.product((LZW, DEFLATE, PACKBITS), (8, 12, 16, 32), (None, (16, 16))):
        data = Tiff(bits, ">", compression=compression, tile=tile).encode(whole(values, bits))
        yield PictureCase(f"tiff/packed-{compression}-{bits}-{'tiles' if tile else 'strips'}.tif", data, shown(values))
    for compression, bits, order in itertools.product((LZW, DEFLATE), (8, 16, 32), "<>"):
        data = Tiff(bits, order, compression=compression, predictor=2).encode(whole(values, bits))
        yield PictureCase(f"tiff/differences-{compression}-{bits}-{order}.tif", data, shown(values))
    for bits, order, channels in itertools.product((16, 32), "<>", (1, 3)):
        colours, photometric = unit(channels, 2), 2 if channels == 3 else 1
        layout = Tiff(bits, order, photometric, FLOAT, compression=DEFLATE, predictor=3, tile=(16, 16))
        yield PictureCase(f"tiff/float-differences-{bits}-{order}-{channels}.tif", layout.encode(colours), shown(colours))
    for bits, compression in itertools.product((1, 8, 12, 16), (1, LZW)):
        data = Tiff(bits, fill_order=2, compression=compression).encode(whole(values, bits))
        yield PictureCase(f"tiff/reversed-{bits}-{compression}.tif", data, shown(whole(values, bits) / (2**bits - 1)))


def colour_tiffs() -> Iterator[PictureCase]:
    colours = unit(3, 3)
    for bits, order, planar, tile in itertools.product((4, 8, 12, 16, 32), "<>", (1, 2), (None, (16, 16))):
        data = Tiff(bits, order, 2, planar=planar, tile=tile).encode(whole(colours, bits))
        pixels = shown(whole(colours, bits) / (2**bits - 1))
        yield PictureCase(f"tiff/rgb-{bits}-{order}-{planar}-{'tiles' if tile else 'strips'}.tif", data, pixels)
    for order, planar in itertools.product("<>", (1, 2)):
        data = Tiff(32, order, 2, FLOAT, planar).encode(colours)
        yield PictureCase(f"tiff/rgb-float-{order}-{planar}.tif", data, shown(colours))
    alpha = unit(1, 4)
    for bits, planar, channels in itertools.product((8, 16, 32), (1, 2), (1, 3)):
        values, photometric = colours[..., :channels], 2 if channels == 3 else 1
        for kind in (0, 1, 2):
            stored = np.concatenate([values * alpha if kind == 1 else values, alpha], axis=2)
            data = Tiff(bits, ">", photometric, planar=planar, extra=(kind,)).encode(whole(stored, bits))
            pixels = shown(values, alpha if kind else None)
            yield PictureCase(f"tiff/extra-{kind}-{bits}-{planar}-{channels}.tif", data, pixels, 3.0)


def other_tiffs() -> Iterator[PictureCase]:
    """Palettes, inks, turned pictures, large files, tags that are missing or strange."""
    table = np.random.default_rng(5).integers(0, 256, (65_536, 3))
    for bits, order, is_short in itertools.product((1, 2, 4, 8, 16), "<>", (False, True)):
        indices = np.random.default_rng(6).integers(0, 2**bits, (HEIGHT, WIDTH, 1))
        used = table[: 2**bits]
        colour_map = (used if is_short else used * 257).T.ravel().tolist()
        data = Tiff(bits, order, 3, tags={320: colour_map}).encode(indices)
        yield PictureCase(f"tiff/palette-{bits}-{order}-{is_short}.tif", data, used[indices[..., 0]].astype(float))
    inks = unit(4, 7)
    for bits, planar in itertools.product((8, 16), (1, 2)):
        data = Tiff(bits, ">", 5, planar=planar).encode(whole(inks, bits))
        pixels = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])
        yield PictureCase(f"tiff/inks-{bits}-{planar}.tif", data, pixels, 2.0)
    colours = unit(3, 8)
    for orientation, bits in itertools.product(range(1, 9), (8, 12)):
        data = Tiff(bits, photometric=2, tags={274: orientation}).encode(whole(colours, bits))
        yield PictureCase(f"tiff/turned-{orientation}-{bits}.tif", data, turn(shown(colours), orientation))
    for planar, bits in itertools.product((1, 2), (8, 12)):
        data = Tiff(bits, photometric=2, planar=planar, is_big=True).encode(whole(colours, bits))
        yield PictureCase(f"tiff/big-{bits}-{planar}.tif", data, shown(colours))
    tags: dict[str, dict[int, object]] = {
        "one-strip": {278: None},
        "format-undefined": {339: [4, 4, 4]},
        "no-planes": {284: None},
    }
    for (name, changed), bits in itertools.product(tags.items(), (8, 12)):
        rows = HEIGHT if name == "one-strip" else 5
        data = Tiff(bits, photometric=2, rows_per_strip=rows, tags=changed).encode(whole(colours, bits))
        yield PictureCase(f"tiff/{name}-{bits}.tif", data, shown(colours))


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels as they are to be shown, by the table of the EXIF standard: where row 0 and column 0 of the file lie."""
    operations: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,  # top, left
        2: lambda a: a[:, ::-1],  # top, right
        3: lambda a: a[::-1, ::-1],  # bottom, right
        4: lambda a: a[::-1],  # bottom, left
        5: lambda a: a.transpose(1, 0, 2),  # left, top
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: lambda a: a.transpose(1, 0, 2)[::-1],  # left, bottom
    }
    return operations[orientation](pixels)


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
        runs = [b"".join(bytes([3, value if bits == 8 else value * 17]) for value in row[::3]) + b"\0\0" for row in indices]
        data = encode_bitmap(runs, (18, HEIGHT), bits, compression=compression, palette=palette[: 4 << bits])
        yield PictureCase(f"bmp/runs-{bits}.bmp", data, table[indices].astype(float))
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


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gifs() -> Iterator[PictureCase]:
    table = np.random.default_rng(20).integers(0, 256, (256, 3)).astype(np.uint8)
    indices = np.random.default_rng(21).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(table.ravel().tolist())
    for is_interlaced, transparent, tail in itertools.product((False, True), (None, 3, 200), (b"", bytes(300), b"; 4711 ;")):
        options = {} if transparent is None else {"transparency": transparent}
        data = saved(image, "GIF", interlace=is_interlaced, optimize=False, **options) + tail
        alpha = None if transparent is None else (indices != transparent)[..., None].astype(float)
        yield PictureCase(f"gif/{is_interlaced}-{transparent}-{len(tail)}.gif", data, shown(table[indices] / 255, alpha), 0.01)


def smooth() -> np.ndarray:
    """Colours that lossy formats keep nearly as they are, [48, 64, 3]."""
    y, x = np.mgrid[:48, :64] / 64
    return np.stack([255 * x, 255 * y, 128 + 64 * np.sin(3 * x)], axis=2)


def jpegs() -> Iterator[PictureCase]:
    pixels, image = smooth(), Image.fromarray(smooth().astype(np.uint8))
    for subsampling, is_progressive in itertools.product((0, 1, 2), (False, True)):
        data = saved(image, "JPEG", quality=95, subsampling=subsampling, progressive=is_progressive)
        yield PictureCase(f"jpeg/colour-{subsampling}-{is_progressive}.jpg", data, pixels, 8)
        yield PictureCase(f"jpeg/tail-{subsampling}-{is_progressive}.jpg", data + bytes(99), pixels, 8)
    for is_progressive in (False, True):
        data = saved(image.convert("L"), "JPEG", quality=95, progressive=is_progressive)
        grey = (pixels @ [0.299, 0.587, 0.114])[..., None]
        yield PictureCase(f"jpeg/grey-{is_progressive}.jpg", data, np.broadcast_to(grey, pixels.shape), 5)
        inks = np.concatenate([255 - pixels, np.full((48, 64, 1), 60.0)], axis=2)
        light = pixels * (1 - 60 / 255)
        data = saved(Image.fromarray(inks.astype(np.uint8), "CMYK"), "JPEG", quality=95, progressive=is_progressive)
        yield PictureCase(f"jpeg/inks-{is_progressive}.jpg", data, light, 6)
        # The same inks as YCCK: three of them as luma and chroma.
        luma = np.asarray(Image.fromarray(255 - np.asarray(image)).convert("YCbCr"))
        ycck = np.concatenate([255 - luma, np.full((48, 64, 1), 60, np.uint8)], axis=2)
        data = saved(Image.fromarray(ycck, "CMYK"), "JPEG", quality=95, progressive=is_progressive)
        marker = data.index(b"Adobe")
        yield PictureCase(f"jpeg/ycck-{is_progressive}.jpg", data[: marker + 11] + b"\2" + data[marker + 12 :], light, 8)
        data = saved(image, "JPEG", quality=95, keep_rgb=True, progressive=is_progressive)
        yield PictureCase(f"jpeg/rgb-{is_progressive}.jpg", data, pixels, 5)


def unended_jpegs() -> Iterator[PictureCase]:
    """JPEGs without the marker of the end, or with half of it; nothing else is missing."""
    image = Image.fromarray(np.random.default_rng(22).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    kinds: dict[str, dict[str, Any]] = {
        "baseline": {},
        "progressive": {"progressive": True},
        "restart": {"restart_marker_blocks": 2},
        "fine": {"subsampling": 0, "quality": 98},
    }
    for (name, options), mode in itertools.product(kinds.items(), ("RGB", "L")):
        data = saved(image.convert(mode), "JPEG", **options)
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        for tail in (b"", b"\xff", bytes(7)):
            yield PictureCase(f"jpeg/unended-{name}-{mode}-{len(tail)}-{tail[:1].hex()}.jpg", data[:-2] + tail, pixels, 0)


def turned() -> Iterator[PictureCase]:
    pixels = smooth()
    image = Image.fromarray(pixels.astype(np.uint8))
    formats: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95},
        "PNG": {},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 95},
    }
    for (form, options), orientation in itertools.product(formats.items(), range(1, 9)):
        exif = Image.Exif()
        exif[274] = orientation
        data = saved(image, form, exif=exif, **options)
        yield PictureCase(f"turned/{form}-{orientation}.bin", data, turn(pixels, orientation), 8)


def modern_formats() -> Iterator[PictureCase]:
    pixels = smooth()
    alpha = np.broadcast_to(np.linspace(0, 1, 64)[:, None], (48, 64, 1))
    grey = np.broadcast_to(pixels[..., :1], pixels.shape)
    files = {
        "RGB": (Image.fromarray(pixels.astype(np.uint8)), pixels),
        "L": (Image.fromarray(pixels[..., 0].astype(np.uint8)), grey),
        "RGBA": (
            Image.fromarray(np.concatenate([pixels, 255 * alpha], axis=2).astype(np.uint8)),
            shown(pixels / 255, alpha),
        ),
        "LA": (
            Image.fromarray(np.concatenate([pixels[..., :1], 255 * alpha], axis=2).astype(np.uint8), "LA"),
            shown(grey / 255, alpha),
        ),
    }
    formats: list[tuple[str, dict[str, Any], float]] = [
        ("WEBP", {"lossless": True, "exact": True}, 2),
        ("WEBP", {"quality": 95}, 10),
        ("AVIF", {"quality": 98}, 8),
        ("AVIF", {"quality": 98, "subsampling": "4:4:4"}, 6),
        ("JPEG2000", {}, 2),
        ("JPEG2000", {"irreversible": True, "quality_mode": "dB", "quality_layers": [60]}, 6),
        ("JPEG2000", {"no_jp2": True}, 2),
    ]
    for (form, options, tolerance), (mode, (image, expected)) in itertools.product(formats, files.items()):
        name = "-".join([form, mode, *map(str, options)])
        yield PictureCase(f"modern/{name}.bin", saved(image, form, **options), expected, tolerance)
    deep = whole(unit(1, 23), 16)[..., 0]
    for is_raw in (False, True):
        data = saved(Image.fromarray(deep.astype(np.uint16)), "JPEG2000", no_jp2=is_raw)
        yield PictureCase(f"modern/jpeg2000-16-{is_raw}.bin", data, shown(deep[..., None] / 65_535))
    inks = whole(unit(4, 24), 8).astype(np.uint8)
    expected = 255 * (1 - inks[..., :3] / 255) * (1 - inks[..., 3:] / 255)
    yield PictureCase("modern/jpeg2000-inks.bin", saved(Image.fromarray(inks, "CMYK"), "JPEG2000"), expected, 2)


def deep_jpeg2000() -> Iterator[PictureCase]:
    """JPEG 2000 of unusual depths, encoded by FFmpeg without loss."""
    depths = {
        "gray9le": 9,
        "gray10le": 10,
        "gray12le": 12,
        "gray14le": 14,
        "gray16le": 16,
        "gray": 8,
        "rgb24": 8,
        "rgb48le": 16,
    }
    for name, bits in depths.items():
        channels = 3 if name.startswith("rgb") else 1
        samples = whole(smooth()[..., :channels] / 255, bits)
        array = samples if channels == 3 else samples[..., 0]
        stored = array.astype(np.uint8) if bits == 8 else array.astype(np.uint16)
        frame = av.VideoFrame.from_ndarray(stored, format=name)
        encoder = av.CodecContext.create("jpeg2000", "w")
        assert isinstance(encoder, av.VideoCodecContext)
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 48, name, Fraction(1)
        encoder.options = {"pred": "dwt53", "format": "j2k"}
        data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode()])
        yield PictureCase(f"modern/{name}.j2k", data, shown(samples / (2**bits - 1)), 2)
