"""Damaged picture files, each with the reason that the failure list must give, and those whose damage nobody can tell.

The damage has the same effect in every version of the encoders.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from media_corpus.bitmaps import encode_bitmap

WIDTH, HEIGHT = 40, 24
PIXELS = WIDTH * HEIGHT
JPEG_END, JPEG_SCAN = b"\xff\xd9", b"\xff\xda"
NO_HUFFMAN_CODE = b"\xff\0" * 12  # one bits only
CHECKSUM, CUT, UNFIT, UNDECODABLE = "checksum of the chunk", "cut short", "do not fit the size", "cannot be decoded"
UNREADABLE, EARLY_END, EXTRANEOUS = "pixels cannot be read", "premature end of data segment", "extraneous bytes before"
CLEAR, END = 256, 257  # codes of LZW for pixels of eight bits


class DamagedFile(NamedTuple):
    """A file that must end in the failure list; or one that cannot, if `reason` is empty."""

    name: str
    data: bytes
    reason: str  # part of it


def photo(seed: int, mode: str = "RGB") -> Image.Image:
    """Return a small picture with smooth parts and noise."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack([x * 5, y * 8, 200 - x - y], axis=-1)
    noise = np.random.default_rng(seed).integers(0, 40, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    """Return the data with one bit changed."""
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def overwritten(data: bytes, position: int) -> bytes:
    """Return the data with four other bytes at a position."""
    return data[:position] + bytes(byte ^ 0x5A for byte in data[position : position + 4]) + data[position + 4 :]


def damaged_pictures() -> list[DamagedFile]:
    """Return damaged pictures, at least three for each format and kind of damage."""
    makers = (_damaged_png, _damaged_zlib, _damaged_jpeg, _damaged_gif, _damaged_tiff, _damaged_webp, _damaged_bmp)
    return [file for maker in makers for file in maker()]


# PNG


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(parts: Sequence[bytes], depth: int, color: int, interlaced: bool = False) -> bytes:
    """Return a PNG with the right checksums around parts of compressed pixels."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, color, 0, 0, interlaced)
    return png_of_chunks([(b"IHDR", header), *((b"IDAT", part) for part in parts), (b"IEND", b"")])


def png_rows(row_bytes: int) -> bytes:
    """Return rows of noise, each after its filter byte."""
    rng = np.random.default_rng(0)
    return b"".join(b"\0" + rng.bytes(row_bytes) for _ in range(HEIGHT))


def _damaged_png() -> Iterator[DamagedFile]:
    deep = Image.fromarray(np.arange(PIXELS, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 60)
    palette = encoded(photo(2).quantize(16), "PNG", transparency=3)
    wholes = {
        "rgb": encoded(photo(0), "PNG"),
        "grey": encoded(photo(1, "L"), "PNG"),
        "palette": palette,
        "alpha": encoded(photo(3, "RGBA"), "PNG"),
        "deep": encoded(deep, "PNG"),
    }
    for name, data in wholes.items():
        middle = (data.index(b"IDAT") + len(data)) // 2
        yield DamagedFile(f"bit-{name}.png", flipped(data, middle, 5), CHECKSUM)
        yield DamagedFile(f"bytes-{name}.png", overwritten(data, middle), CHECKSUM)
        yield DamagedFile(f"checksum-{name}.png", flipped(data, len(data) - 13), CHECKSUM)
        yield DamagedFile(f"half-{name}.png", data[:middle], CUT)
        yield DamagedFile(f"no-end-{name}.png", data[:-12], CUT)
        yield DamagedFile(f"half-end-{name}.png", data[:-3], CUT)
    for name in (b"PLTE", b"tRNS"):
        yield DamagedFile(f"bit-{name.decode()}.png", flipped(palette, palette.index(name) + 5, 2), CHECKSUM)
    yield DamagedFile("bit-IEND.png", flipped(palette, len(palette) - 1), CHECKSUM)


def _damaged_zlib() -> Iterator[DamagedFile]:
    """Yield PNGs whose pixels are damaged inside of chunks with right checksums."""
    kinds = {"rgb": (8, 2, 3 * WIDTH), "grey": (8, 0, WIDTH), "bilevel": (1, 0, WIDTH // 8)}
    for name, (depth, color, row_bytes) in kinds.items():
        rows = png_rows(row_bytes)
        data = zlib.compress(rows)
        damage = {
            "adler": ([data[:-1] + bytes([data[-1] ^ 1])], UNREADABLE),
            "stored-bit": ([flipped(zlib.compress(rows, 0), 60, 3)], UNREADABLE),
            "no-adler": ([data[:-4]], UNFIT),
            "half": ([zlib.compress(rows[: len(rows) // 2])], UNFIT),
            "row-less": ([zlib.compress(rows[: -row_bytes - 1])], UNFIT),
            "byte-more": ([zlib.compress(rows + b"\0")], UNFIT),
            "type": ([data[:2] + b"\7" + data[3:]], UNREADABLE),
            "method": ([b"\x77" + data[1:]], UNREADABLE),
            "none": ([b""], UNFIT),
        }
        for what, (parts, reason) in damage.items():
            yield DamagedFile(f"zlib-{what}-{name}.png", png(parts, depth, color), reason)
        yield DamagedFile(f"zlib-passes-{name}.png", png([data], depth, color, interlaced=True), UNFIT)


# JPEG


def _damaged_jpeg() -> Iterator[DamagedFile]:
    wholes = {
        "plain": encoded(photo(0), "JPEG", quality=90),
        "grey": encoded(photo(1, "L"), "JPEG", quality=90),
        "full": encoded(photo(2), "JPEG", quality=90, subsampling=0),
        "progressive": encoded(photo(3), "JPEG", quality=90, progressive=True),
        "cmyk": encoded(photo(4, "CMYK"), "JPEG", quality=90),
        "restart": encoded(photo(5), "JPEG", quality=90, restart_marker_blocks=1),
    }
    for name, data in wholes.items():
        scan = data.index(JPEG_SCAN) + 14
        last = data.rindex(JPEG_SCAN)
        middle = (last + len(data)) // 2
        yield DamagedFile(f"huffman-{name}.jpg", data[:scan] + NO_HUFFMAN_CODE + data[scan:], "Corrupt JPEG data")
        yield DamagedFile(f"cut-{name}.jpg", data[:middle], EARLY_END)
        yield DamagedFile(f"cut-end-{name}.jpg", data[:middle] + JPEG_END, EARLY_END)
        yield DamagedFile(f"extraneous-{name}.jpg", data[:-2] + b"\x12\x34" * 20 + JPEG_END, EXTRANEOUS)
        for marker in (b"\xff\xdb", b"\xff\xc4"):  # without it, the segment is bytes between two others
            yield DamagedFile(f"marker-{marker[1]}-{name}.jpg", overwritten(data, data.index(marker) - 2), EXTRANEOUS)
        size = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data) + 5
        taller = data[:size] + struct.pack(">H", 4 * HEIGHT) + data[size + 2 :]
        yield DamagedFile(f"taller-{name}.jpg", taller, "found marker" if name == "restart" else EARLY_END)
    turned = Image.Exif()
    turned[274] = 6
    shown = {"ink": wholes["cmyk"], "colours": encoded(photo(6), "JPEG", keep_rgb=True)}
    shown |= {"side": encoded(photo(7), "JPEG", exif=turned)}
    for name, plain in shown.items():
        data = plain[:2] + b"\xff\xfe\0\4ab" + plain[2:]
        text = data.index(b"Exif" if name == "side" else b"Adobe")
        yield DamagedFile(f"marker-{name}.jpg", overwritten(data, text - 4), EXTRANEOUS)
    progressive = wholes["progressive"]
    scans = [i for i in range(len(progressive)) if progressive[i : i + 2] == JPEG_SCAN]
    for number in (1, 2, -1):
        yield DamagedFile(f"scans-{number}.jpg", progressive[: scans[number]], "fewer scans")
        yield DamagedFile(f"scan-segment-{number}.jpg", progressive[: scans[number] + 5], CUT)
    restart = wholes["restart"]
    for number in range(3):
        marker = restart.index(bytes([0xFF, 0xD0 + number]))
        following = restart.index(bytes([0xFF, 0xD1 + number]))
        yield DamagedFile(f"restart-less-{number}.jpg", restart[:marker] + restart[following:], "Corrupt JPEG data")
        yield DamagedFile(f"restart-other-{number}.jpg", flipped(restart, marker + 1, 2), "Corrupt JPEG data")


# GIF


def lzw(codes: Sequence[int], first: str) -> bytes:
    """Return codes of nine bits; the `first` bit of a byte is its "lowest" (GIF) or its "highest" (TIFF)."""
    order = np.arange(9) if first == "lowest" else np.arange(8, -1, -1)
    bits = (np.asarray(codes)[:, None] >> order) & 1
    return np.packbits(bits.ravel().astype(np.uint8), bitorder="little" if first == "lowest" else "big").tobytes()


def lzw_codes(pixels: Sequence[int]) -> list[int]:
    """Return codes that do not compress: each pixel is one, and a table never grows beyond nine bits."""
    codes: list[int] = []
    for start in range(0, len(pixels), 200):
        codes += [CLEAR, *pixels[start : start + 200]]
    return [*codes, END]


def gif_frame(codes: bytes, size: tuple[int, int] = (WIDTH, HEIGHT), block: int = 255) -> bytes:
    """Return a frame of a GIF, its codes in blocks of so many bytes."""
    blocks = b"".join(bytes([len(codes[i : i + block])]) + codes[i : i + block] for i in range(0, len(codes), block))
    return b"," + struct.pack("<4HB", 0, 0, *size, 0) + b"\x08" + blocks + b"\0"


def gif(*frames: bytes) -> bytes:
    """Return a GIF of grey frames of the usual size."""
    palette = bytes(value for value in range(256) for _ in range(3))
    return b"GIF89a" + struct.pack("<HHBBB", WIDTH, HEIGHT, 0xF7, 0, 0) + palette + b"".join(frames) + b";"


def damaged_codes() -> dict[str, tuple[list[int], str]]:
    """Return damaged LZW codes of a picture by kind of damage, with the reason that is given for a GIF."""
    pixels = list(np.random.default_rng(0).integers(0, 256, PIXELS))
    whole = lzw_codes(pixels)
    damage = {}
    for number, place in enumerate((2, 300, 700)):
        damage |= {
            f"range-{number}": ([*whole[:place], 500, *whole[place + 1 :]], "out of range"),
            f"few-{number}": (lzw_codes(pixels[: -10 * number - 1]), "too few pixels"),
            f"end-{number}": ([*whole[:place], END, *whole[place + 1 :]], "too few pixels"),
            f"many-{number}": (lzw_codes([*pixels, *range(10 * number + 1)]), "too many pixels"),
        }
    return damage


def _damaged_gif() -> Iterator[DamagedFile]:
    for name, (codes, reason) in damaged_codes().items():
        yield DamagedFile(f"{name}.gif", gif(gif_frame(lzw(codes, "lowest"))), reason)
    for number, picture in enumerate((photo(0).quantize(16), photo(1, "L"), photo(2, "1"))):
        data = encoded(picture, "GIF")
        start = data.index(b",\0\0\0\0") + 10
        yield DamagedFile(f"half-{number}.gif", data[: (start + len(data)) // 2], CUT)
        yield DamagedFile(f"pixels-less-{number}.gif", data[: -6 - number], "cut short: the codes of a frame give too few")
        yield DamagedFile(
            f"wider-{number}.gif", data[: start - 5] + struct.pack("<H", WIDTH + 8) + data[start - 3 :], "too few"
        )
        yield DamagedFile(f"lower-{number}.gif", data[: start - 3] + struct.pack("<H", 8) + data[start - 1 :], "too many")
        yield DamagedFile(f"block-{number}.gif", data[: start - 10] + b"\x77" + data[start - 10 :], "no block")


# TIFF


def tiff(parts: Sequence[bytes], compression: int, rows: int, tiled: bool = False) -> bytes:
    """Return a grey TIFF of compressed strips with this number of rows, or of tiles 48 pixels wide."""
    offsets = [8 + sum(map(len, parts[:i])) for i in range(len(parts))]
    data = b"".join(parts)
    arrays = 8 + len(data)
    names = (322, 323, 324, 325) if tiled else (278, 278, 273, 279)
    values = {256: [WIDTH], 257: [HEIGHT], 258: [8], 259: [compression], 262: [1], 277: [1]}
    values |= ({names[0]: [48]} if tiled else {}) | {
        names[1]: [rows],
        names[2]: offsets,
        names[3]: [len(part) for part in parts],
    }
    entries, tail = b"", b""
    for tag, numbers in sorted(values.items()):
        inline = len(numbers) == 1
        entries += struct.pack("<HHII", tag, 4, len(numbers), numbers[0] if inline else arrays + len(tail))
        tail += b"" if inline else struct.pack(f"<{len(numbers)}I", *numbers)
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", arrays + len(tail)) + data + tail + directory


def packbits(data: bytes) -> bytes:
    """Return data as literal runs of at most 100 bytes."""
    return b"".join(bytes([len(data[i : i + 100]) - 1]) + data[i : i + 100] for i in range(0, len(data), 100))


def _damaged_tiff() -> Iterator[DamagedFile]:
    yield from _damaged_deflate()
    pixels = np.random.default_rng(0).integers(0, 256, PIXELS)
    for name, (codes, reason) in damaged_codes().items():
        expected = {"too few pixels": UNDECODABLE, "too many pixels": UNFIT}.get(reason, reason)
        yield DamagedFile(f"lzw-{name}.tif", tiff([lzw(codes, "highest")], 5, HEIGHT), expected)
    rows = pixels.astype(np.uint8).tobytes()
    for number in range(3):
        runs = packbits(rows)
        place = 101 * number
        yield DamagedFile(f"packbits-many-{number}.tif", tiff([packbits(rows + rows[: 9 + number])], 32773, HEIGHT), UNFIT)
        yield DamagedFile(f"packbits-few-{number}.tif", tiff([packbits(rows[: -9 - number])], 32773, HEIGHT), UNDECODABLE)
        yield DamagedFile(f"packbits-run-{number}.tif", tiff([flipped(runs, place, 7)], 32773, HEIGHT), UNFIT)
    for seed, mode in enumerate(("RGB", "L", "YCbCr")):
        photograph = encoded(photo(seed, mode), "TIFF", compression="jpeg", quality=90)
        scan = photograph.index(JPEG_SCAN) + 14
        end = photograph.index(JPEG_END, scan)
        broken = photograph[:scan] + NO_HUFFMAN_CODE + photograph[scan + 24 :]
        yield DamagedFile(f"jpeg-huffman-{mode}.tif", broken, "Corrupt JPEG data")
        early = photograph[: end - 40] + JPEG_END + photograph[end - 38 :]
        yield DamagedFile(f"jpeg-early-{mode}.tif", early, "Corrupt JPEG data")
        plain = encoded(photo(seed, mode), "TIFF")
        packed = encoded(photo(seed, mode), "TIFF", compression="tiff_lzw")
        yield DamagedFile(f"raw-half-{mode}.tif", plain[: len(plain) // 2], "truncated")
        for name, data in (("lzw", packed), ("jpeg", photograph)):  # their tags are at the end
            yield DamagedFile(f"{name}-half-{mode}.tif", data[: len(data) // 2], CUT)


def _damaged_deflate() -> Iterator[DamagedFile]:
    for number, (rows, width, tiled) in enumerate(((HEIGHT, WIDTH, False), (8, WIDTH, False), (16, 48, True))):
        rng = np.random.default_rng(number)
        whole = [zlib.compress(rng.bytes(rows * width)) for _ in range(0, HEIGHT, rows)]
        *others, last = whole
        damage = {
            "adler": (flipped(last, len(last) - 1), UNREADABLE),
            "bit": (flipped(zlib.compress(rng.bytes(rows * width), 0), 60, 3), UNREADABLE),
            "bytes": (overwritten(zlib.compress(rng.bytes(rows * width), 0), 90), UNREADABLE),
            "no-adler": (last[:-4], UNFIT),
            "half": (last[: len(last) // 2], UNFIT),
            "few": (zlib.compress(rng.bytes(rows * width // 3)), UNDECODABLE),
            "many": (zlib.compress(rng.bytes(rows * width * 3)), UNFIT),
            "type": (last[:2] + b"\7" + last[3:], UNREADABLE),
        }
        for what, (part, reason) in damage.items():
            data = tiff([*others, part], (8, 32946, 8)[number], rows, tiled)
            yield DamagedFile(f"deflate-{what}-{number}.tif", data, reason)


# WebP and BMP


def _damaged_webp() -> Iterator[DamagedFile]:
    for seed in range(3):
        kinds = {"lossy": {"quality": 80}, "lossless": {"lossless": True}}
        for name, options in kinds.items():
            data = encoded(photo(seed), "WEBP", **options)
            yield DamagedFile(f"half-{name}-{seed}.webp", data[: len(data) // 2], CUT)
            yield DamagedFile(f"cut-{name}-{seed}.webp", data[: -4 - seed], CUT)
            yield DamagedFile(f"start-{name}-{seed}.webp", flipped(data, 20 if name == "lossless" else 23, 3), CUT)
            yield DamagedFile(f"chunk-{name}-{seed}.webp", flipped(data, 12, seed), CUT)


def _damaged_bmp() -> Iterator[DamagedFile]:
    for seed, mode in enumerate(("RGB", "L", "1")):
        data = encoded(photo(seed, mode), "BMP")
        yield DamagedFile(f"half-{mode}.bmp", data[: len(data) // 2], "truncated")
        yield DamagedFile(f"cut-{mode}.bmp", data[: -8 - seed], "truncated")
        yield DamagedFile(f"depth-{mode}.bmp", flipped(data, 28, 1), "depth")
        runs = b"".join(bytes([HEIGHT, value, 0, 0]) for value in range(4 + seed))  # of a picture that is 8 rows high
        short = encode_bitmap([runs], (HEIGHT, 8), 8, compression=1, palette=bytes(4 * 256))
        yield DamagedFile(f"runs-end-{mode}.bmp", short + b"\0\1", "not enough image data")
        yield DamagedFile(f"runs-cut-{mode}.bmp", short[: -3 + seed], "not enough image data")
        yield DamagedFile(f"compression-{mode}.bmp", flipped(data, 30, 4), "compression")


# Clips


def damaged_clips() -> Iterator[DamagedFile]:
    """Yield animations with damage in one of their frames."""
    frames = [photo(seed) for seed in range(6)]
    animated = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    chunks = list(png_chunks(animated))
    for frame in range(1, 6):
        place = [i for i, (name, _) in enumerate(chunks) if name == b"fdAT"][frame - 1]
        body = chunks[place][1]
        position = animated.index(body)
        other_body = body[:-1] + bytes([body[-1] ^ 1])
        shorter_body = body[:4] + zlib.compress(png_rows(3 * WIDTH)[: -3 * WIDTH])
        yield DamagedFile(f"bit-{frame}.png", flipped(animated, position + len(body) // 2, 4), CHECKSUM)
        yield DamagedFile(f"bytes-{frame}.png", overwritten(animated, position + len(body) // 2), CHECKSUM)
        yield DamagedFile(
            f"adler-{frame}.png", png_of_chunks([*chunks[:place], (b"fdAT", other_body), *chunks[place + 1 :]]), UNREADABLE
        )
        yield DamagedFile(
            f"short-{frame}.png", png_of_chunks([*chunks[:place], (b"fdAT", shorter_body), *chunks[place + 1 :]]), UNFIT
        )
        yield DamagedFile(f"cut-{frame}.png", animated[: position + len(body) // 2], CUT)
    whole = gif_frame(lzw(lzw_codes([number % 256 for number in range(PIXELS)]), "lowest"))
    for name, (codes, reason) in damaged_codes().items():
        yield DamagedFile(f"{name}.gif", gif(whole, gif_frame(lzw(codes, "lowest")), whole), reason)
    for number in range(3):
        clip = gif(*[whole] * (number + 2))
        yield DamagedFile(f"no-end-{number}.gif", clip[:-1], CUT)
        yield DamagedFile(f"half-frame-{number}.gif", clip[: -len(whole) // 2], CUT)
        film = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1 : number + 3])
        yield DamagedFile(f"half-{number}.webp", film[: len(film) // 2], CUT)
        yield DamagedFile(f"cut-{number}.webp", film[: -9 - number], CUT)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the body of each chunk of a PNG."""
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        yield data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        position += 12 + length


def png_of_chunks(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG of these chunks, with the right checksums."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(name, body) for name, body in chunks)
