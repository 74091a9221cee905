"""Whole picture files that could be taken for damaged ones: every option of the encoders, and oddities that decoders allow."""

from __future__ import annotations

import base64
import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from media_corpus.damaged import (
    HEIGHT,
    JPEG_SCAN,
    WIDTH,
    encoded,
    gif,
    gif_frame,
    lzw,
    lzw_codes,
    packbits,
    photo,
    png,
    png_chunks,
    png_of_chunks,
    png_rows,
    tiff,
)

GREYS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
# Of cjpeg, 24 x 16 pixels: red 10x, green 15y, blue 255 - 5x; Pillow cannot write these kinds.
UNUSUAL_JPEGS = {
    "arithmetic": "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8"
    "jhBplmUDiAeE-P+3kU!Z02l!Q5di<p00saM5C#9*00;pA002J#{^Tm<Sp&xu;qLYY?jy3+mVp1+",
    "arithmetic-progressive": "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R("
    "ZFhTtf`Lw8jhBplmUDiAeE-S-3kU!Z02l!Q5di<p00aOK|Jncu0RaF200I5UVFgV8%m4%s1^?Or2mt{A0R;l1<08)g%m4%s1^?Or2mt{A20sG8|I7dc"
    "5C#9*00;pA00BQC_1gd100;pA0000GQ2)#T1P}%P+5iXv0RRC%5Ys?i(Er&",
    "sampling": "|JeWF01!$>Nk#wx0RR9200961|JwjV02B@n5)Ta&5)cv>6%-gAG9exu93DL^E+jHZKuk+VKt@GST61DhRc%&9Mr4R(ZFhTtf`Lw8jhBpl"
    "mUDiAeE-`3Lje^R7akfOJ0T%Ed{ahKe0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0+R-e0=}F01*fP5C9kh0Wkmq5di}c"
    "0sq7R6#xMN000000000000000000C9|HJ?n5C8)K00000000000000000066VgJMc6#)SO000000000000000000F8|HJ?n5dZ@L000000000000000000"
    "97G5^{C3<CiG0ucid06zeZl3;|B1SFU-Qwzl07?NOwlLRD~A5#M&ZXf^I",
}


class WholeFile(NamedTuple):
    """A file, and its pixels [height, width, 3]; None: as Pillow decodes them."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None


def whole_pictures() -> list[WholeFile]:
    """Return whole pictures of every kind that a check of damage looks into."""
    makers = (_encoder_options, _odd_jpeg, _odd_png, _odd_gif, _odd_tiff)
    return [file for maker in makers for file in maker()]


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _encoder_options() -> Iterator[WholeFile]:
    """Yield what Pillow's encoders write with their options."""
    options = itertools.product(("RGB", "L", "CMYK", "YCbCr"), (False, True), (False, True), (0, 1, 2), (0, 1, 3))
    for number, (mode, progressive, optimize, subsampling, restart) in enumerate(options):
        data = encoded(
            photo(number, mode).crop((0, 0, WIDTH - number % 9, HEIGHT - number % 5)),
            "JPEG",
            quality=(1, 30, 75, 95, 100)[number % 5],
            progressive=progressive,
            optimize=optimize,
            subsampling=subsampling,
            restart_marker_blocks=restart,
        )
        yield WholeFile(f"options-{number}.jpg", data)
    for number, (mode, level) in enumerate(itertools.product(("1", "L", "LA", "RGB", "RGBA", "P"), (0, 1, 9))):
        yield WholeFile(f"options-{number}.png", encoded(photo(number, mode), "PNG", compress_level=level))
    deep = Image.fromarray(GREYS.astype(np.uint16) * 257)
    yield WholeFile("deep.png", encoded(deep, "PNG"), _rgb(GREYS))
    for number, (mode, interlace) in enumerate(itertools.product(("1", "L", "P", "RGB"), (0, 1))):
        yield WholeFile(f"options-{number}.gif", encoded(photo(number, mode), "GIF", interlace=interlace))
    compressions = ("raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "jpeg", "lzma", "zstd")
    for number, (mode, compression) in enumerate(itertools.product(("L", "RGB", "CMYK"), compressions)):
        yield WholeFile(f"options-{number}.tif", encoded(photo(number, mode), "TIFF", compression=compression))
    for number, compression in enumerate(("group3", "group4")):
        yield WholeFile(f"fax-{number}.tif", encoded(photo(number, "1"), "TIFF", compression=compression))
    for number, options in enumerate(({"lossless": True}, {"quality": 1}, {"quality": 100}, {"method": 6})):
        yield WholeFile(f"options-{number}.webp", encoded(photo(number), "WEBP", **options))
    for number, mode in enumerate(("1", "L", "P", "RGB")):
        yield WholeFile(f"options-{number}.bmp", encoded(photo(number, mode), "BMP"))


def _odd_jpeg() -> Iterator[WholeFile]:
    """Yield JPEGs with what libjpeg warns of without harm, and with other data before, between and after."""
    wholes = {"plain": {}, "progressive": {"progressive": True}, "grey": {}, "restart": {"restart_marker_blocks": 2}}
    for seed, (name, options) in enumerate(wholes.items()):
        data = encoded(photo(seed, "L" if name == "grey" else "RGB"), "JPEG", **options)
        with Image.open(io.BytesIO(data)) as file:
            pixels = np.asarray(file.convert("RGB"))
        table, scan, app = data.index(b"\xff\xdb"), data.index(JPEG_SCAN), data.index(b"JFIF\0")
        adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\7"  # a colour transform that does not exist
        profile = b"\xff\xe2\0\x12ICC_PROFILE\0\5\2xx"  # part 5 of 2
        thumbnail = b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data
        odd = {
            "no-end": data[:-2],
            "half-end": data[:-1],
            "film-after": data + b"\0\0\0\x18ftypmp42" + np.random.default_rng(seed).bytes(60_000) + JPEG_SCAN * 200,
            "picture-after": data + encoded(photo(9), "JPEG"),
            "zeros-after": data + bytes(512),
            "zeros-before-end": data[:-2] + bytes(40) + data[-2:],
            "zeros-between": data[:table] + bytes(5) + data[table:scan] + bytes(1000) + data[scan:],
            "bytes-between": data[:table] + b"\x12\x34\xff\0\xa5" + data[table:scan] + b" " * 999 + data[scan:],
            "bytes-after-text": data[:table] + b"\xff\xfe\0\4ab" + b"cd" + data[table:],
            "fill": data[:scan] + b"\xff" * 9 + data[scan:-2] + b"\xff" * 5 + data[-2:],
            "comment": data[:scan] + b"\xff\xfe\0\6\xff\xda\xff\xd9" + data[scan:],
            "revision": data[: app + 5] + b"\3" + data[app + 6 :],
            "profile": data[:table] + profile + data[table:],
            "thumbnail": data[:2] + thumbnail + data[2:],
            "no-header": data[:2] + data[table:],
        }
        if name != "progressive":
            length = struct.unpack_from(">H", data, scan + 2)[0]
            odd["parameters"] = data[: scan + length - 1] + b"\0\0\0" + data[scan + length + 2 :]
        if name == "grey":
            odd["transform"] = data[:2] + adobe + data[2:]
        for what, file in odd.items():
            yield WholeFile(f"{what}-{name}.jpg", file, pixels)
    frames = [photo(seed) for seed in range(3)]
    yield WholeFile("several.jpg", encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    for name, text in UNUSUAL_JPEGS.items():
        yield WholeFile(f"{name}.jpg", base64.b85decode(text))


def _odd_png() -> Iterator[WholeFile]:
    rows = png_rows(WIDTH)
    grey = np.frombuffer(rows, np.uint8).reshape(HEIGHT, WIDTH + 1)[:, 1:]
    data = zlib.compress(rows)
    pixels = _rgb(grey)
    whole = png([data], 8, 0)
    first, *others = png_chunks(whole)
    yield WholeFile("bytes-after.png", whole + b"more", pixels)
    long = zlib.compress(bytes(3_000_000))  # longer than what Pillow unpacks
    texts = {b"zTXt": b"Raw profile type exif\0\0", b"iTXt": b"workflow\0\1\0\0\0", b"iCCP": b"profile\0\0"}
    for name, start in texts.items():
        yield WholeFile(f"long-{name.decode()}.png", png_of_chunks([first, (name, start + long), *others]), pixels)
        if name != b"iCCP":
            after = [first, *others[:-1], (name, start + long), others[-1]]
            yield WholeFile(f"long-{name.decode()}-after.png", png_of_chunks(after), pixels)
    yield WholeFile("parts.png", png([data[i : i + 7] for i in range(0, len(data), 7)], 8, 0), pixels)
    yield WholeFile("empty-parts.png", png([b"", data[:50], b"", data[50:], b""], 8, 0), pixels)
    yield WholeFile("bytes-after-checksum.png", png([data + b"more"], 8, 0), pixels)
    yield WholeFile("other-chunks.png", png_of_chunks([first, (b"prVt", b"x" * 99), (b"tIME", bytes(7)), *others]), pixels)
    for window in range(9, 16):
        packer = zlib.compressobj(wbits=window)
        yield WholeFile(f"window-{window}.png", png([packer.compress(rows) + packer.flush()], 8, 0), pixels)
    passes = [rows for y, x, dy, dx in _PASSES for rows in _filtered(grey[y::dy, x::dx])]
    yield WholeFile("interlaced.png", png([zlib.compress(b"".join(passes))], 8, 0, interlaced=True), pixels)


_PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))  # y, x, steps


def _filtered(part: np.ndarray) -> list[bytes]:
    """Return the rows of a part of a PNG, each after its filter byte; there are none if they would be empty."""
    return [b"\0" + row.tobytes() for row in part] if part.size else []


def _odd_gif() -> Iterator[WholeFile]:
    pixels = _rgb(GREYS)
    codes = lzw_codes([int(value) for value in GREYS.ravel()])
    frame = gif_frame(lzw(codes, "lowest"))
    whole = gif(frame)
    yield WholeFile("bytes-after.gif", whole + bytes(500) + b"more", pixels)
    yield WholeFile("no-end-code.gif", gif(gif_frame(lzw(codes[:-1], "lowest"))), pixels)
    yield WholeFile("zeros-between.gif", gif(b"\0", frame, b"\0\0"), pixels)
    yield WholeFile("no-trailer.gif", whole[:-1], pixels)
    for name, cut in (("end-of-blocks", 2), ("end-code", 3)):  # the last pixel is there
        yield WholeFile(f"no-{name}-and-trailer.gif", whole[:-cut], pixels)
    nothing = gif_frame(b"", (0, 0))
    yield WholeFile("frame-without-pixels.gif", gif(nothing, frame), np.full_like(pixels, 255))
    yield WholeFile("cut-in-second-frame.gif", gif(frame, frame)[:-200], pixels)
    yield WholeFile("comment.gif", gif(b"!\xfe\4;\0,x\0", frame), pixels)
    yield WholeFile("small-blocks.gif", gif(gif_frame(lzw(codes, "lowest"), block=1)), pixels)


def _odd_tiff() -> Iterator[WholeFile]:
    pixels, rows = _rgb(GREYS), GREYS.tobytes()
    data = zlib.compress(rows)
    strips = [rows[i : i + 9 * WIDTH] for i in range(0, len(rows), 9 * WIDTH)]
    full = [strip.ljust(9 * WIDTH, b"\0") for strip in strips]
    tiles = [np.pad(GREYS[y : y + 16], ((0, max(0, y + 16 - HEIGHT)), (0, 48 - WIDTH))).tobytes() for y in (0, 16)]
    codes = [lzw(lzw_codes(list(strip)), "highest") for strip in strips]
    yield WholeFile("one-strip.tif", tiff([data], 8, HEIGHT), pixels)
    yield WholeFile("all-rows.tif", tiff([data], 8, 2**32 - 1), pixels)
    yield WholeFile("strips.tif", tiff([zlib.compress(strip) for strip in strips], 8, 9), pixels)
    yield WholeFile("full-last-strip.tif", tiff([zlib.compress(strip) for strip in full], 8, 9), pixels)
    yield WholeFile("bytes-after-checksum.tif", tiff([data + b"more"], 8, HEIGHT), pixels)
    yield WholeFile("tiles.tif", tiff([zlib.compress(tile) for tile in tiles], 32946, 16, tiled=True), pixels)
    yield WholeFile("lzw-strips.tif", tiff(codes, 5, 9), pixels)
    yield WholeFile("packbits.tif", tiff([packbits(strip) for strip in strips], 32773, 9), pixels)
    yield WholeFile("packbits-nothing.tif", tiff([b"\x80" + packbits(rows) + b"\x80\x80"], 32773, HEIGHT), pixels)
    yield WholeFile("packbits-tiles.tif", tiff([packbits(tile) for tile in tiles], 32773, 16, tiled=True), pixels)
    flat = zlib.compress(bytes(8 * WIDTH))
    shared = tiff([flat, flat, flat], 8, 8)
    offsets = struct.pack("<3I", 8, 8 + len(flat), 8 + 2 * len(flat))
    yield WholeFile("shared-strips.tif", shared.replace(offsets, struct.pack("<3I", 8, 8, 8)), np.zeros_like(pixels))
