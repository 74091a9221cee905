"""Hostile picture files: bombs, loops and lies about sizes. Each has the reason in the failure list, or is right anyway."""

from __future__ import annotations

import gzip
import io
import os
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from media_corpus.damaged import (
    JPEG_END,
    JPEG_SCAN,
    PIXELS,
    encoded,
    gif,
    gif_frame,
    lzw,
    lzw_codes,
    photo,
    png_chunks,
    png_of_chunks,
)

HUGE, LIMIT = 60_000, "pixels"
BOMB = zlib.compress(bytes(2**25), 9)  # 32 MiB in 32 kB
PICTURE = photo(0)


class HostileFile(NamedTuple):
    """A file, and a part of the reason in the failure list, or its pixels [height, width, 3] if it is harmless."""

    name: str
    data: bytes
    reason: str
    pixels: np.ndarray | None = None


def hostile_pictures() -> list[HostileFile]:
    """Return hostile files, at least three for each kind."""
    makers = (_huge, _packed_bombs, _many_scans, _hostile_exif, _hostile_tiff, _hostile_gif, _archives, _hostile_jpeg)
    return [file for maker in makers for file in maker()]


def harmless(name: str, data: bytes, form: str) -> HostileFile:
    """Return a file that must give the same pixels as the usual picture in this format."""
    with Image.open(io.BytesIO(encoded(PICTURE, form, **OPTIONS.get(form, {})))) as whole:
        return HostileFile(name, data, "", np.asarray(whole.convert("RGB")))


OPTIONS = {"WEBP": {"lossless": True}, "GIF": {"optimize": False}}


def _huge() -> Iterator[HostileFile]:
    """Yield files that declare more pixels than memory holds."""
    (_, header), *others = png_chunks(encoded(PICTURE, "PNG"))
    photograph, bitmap, film = encoded(PICTURE, "JPEG"), encoded(PICTURE, "BMP"), encoded(PICTURE, "GIF")
    lossy, lossless = encoded(PICTURE, "WEBP"), encoded(PICTURE, "WEBP", lossless=True)
    size = photograph.index(b"\xff\xc0") + 5
    for number, (width, height) in enumerate(((HUGE, HUGE), (HUGE, 2_000), (2_000, HUGE))):
        big = struct.pack(">II", width, height)
        yield HostileFile(f"huge-{number}.png", png_of_chunks([(b"IHDR", big + header[8:]), *others]), LIMIT)
        big = struct.pack(">HH", height, width)
        yield HostileFile(f"huge-{number}.jpg", photograph[:size] + big + photograph[size + 4 :], LIMIT)
        big = struct.pack("<ii", width, -height if number == 1 else height)
        yield HostileFile(f"huge-{number}.bmp", bitmap[:18] + big + bitmap[26:], LIMIT)
        big = struct.pack("<HH", width, height)
        yield HostileFile(f"huge-{number}.gif", film[:6] + big + film[10:], LIMIT)
        start = film.index(b",\0\0\0\0") + 5
        yield HostileFile(f"huge-frame-{number}.gif", film[:start] + big + film[start + 4 :], LIMIT)
        data = tiff_of_tags((256, 4, width), (257, 4, height), (258, 3, 8), (262, 3, 1), (273, 4, 8), (279, 4, 1))
        yield HostileFile(f"huge-{number}.tif", data, LIMIT)
        canvas = struct.pack("<I", 16_383 - number)[:3]
        extended = b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas * 2 + lossy[12:]
        yield HostileFile(f"huge-{number}.webp", b"RIFF" + struct.pack("<I", len(extended)) + extended, LIMIT)
        bits = struct.unpack_from("<I", lossless, 21)[0] | 0xFFFFFFF & ~(1 << number)
        yield HostileFile(f"huge-lossless-{number}.webp", lossless[:21] + struct.pack("<I", bits) + lossless[25:], LIMIT)


def _packed_bombs() -> Iterator[HostileFile]:
    """Yield small files that grow to 32 MiB when they are inflated."""
    chunks = list(png_chunks(encoded(PICTURE, "PNG")))
    texts = {"zTXt": b"k\0\0" + BOMB, "iTXt": b"k\0\1\0\0\0" + BOMB, "iCCP": b"k\0\0" + BOMB}
    for name, body in texts.items():
        file = png_of_chunks([chunks[0], (name.encode(), body), *chunks[1:]])
        yield harmless(f"bomb-{name}.png", file, "PNG")  # nobody inflates it
    kinds = {"rgb": (8, 2), "grey": (8, 0), "bilevel": (1, 0)}
    for name, (depth, color) in kinds.items():
        header = struct.pack(">IIBBBBB", 8, 8, depth, color, 0, 0, 0)
        bomb = png_of_chunks([(b"IHDR", header), (b"IDAT", BOMB), (b"IEND", b"")])
        yield HostileFile(f"bomb-{name}.png", bomb, "do not fit the size")
    for number, compression in enumerate((8, 32946, 8)):
        tags = [(256, 4, 8), (257, 4, 8), (258, 3, 8 + 8 * (number == 2)), (259, 3, compression), (262, 3, 1), (273, 4, 8)]
        bomb = tiff_of_tags(*tags, (279, 4, len(BOMB)), data=BOMB)
        yield HostileFile(f"bomb-{number}.tif", bomb, "do not fit the size")


def _many_scans() -> Iterator[HostileFile]:
    """Yield JPEGs that repeat a scan hundreds of times: each repetition is as much work as the picture."""
    for number, mode in enumerate(("RGB", "L", "CMYK")):
        data = encoded(photo(number, mode), "JPEG", progressive=True)
        scan = data[data.rindex(JPEG_SCAN) : -2]
        yield HostileFile(f"scans-{mode}.jpg", data[:-2] + scan * 300 + JPEG_END, "more than 100 scans")


def exif(*entries: bytes, following: int = 0) -> bytes:
    """Return EXIF data of raw directory entries; `following` is the offset of the next directory."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", following)


def _hostile_exif() -> Iterator[HostileFile]:
    """Yield whole pictures whose metadata loop, lie about their length, or have an orientation that does not exist."""
    entries = {
        "itself": exif(struct.pack("<HHII", 0x8769, 4, 1, 8)),
        "loop": exif(struct.pack("<HHII", 0x010F, 4, 1, 0), following=8),
        "gps-loop": exif(struct.pack("<HHII", 0x8825, 4, 1, 8), struct.pack("<HHII", 0xA005, 4, 1, 8)),
        "beyond": exif(struct.pack("<HHII", 0x010F, 2, 2**31, 2**31)),
        "orientation-99": exif(struct.pack("<HHII", 0x0112, 3, 1, 99)),
        "orientation-0": exif(struct.pack("<HHII", 0x0112, 3, 1, 0)),
    }
    for name, data in entries.items():
        for form in ("JPEG", "PNG", "WEBP"):
            file = encoded(PICTURE, form, exif=data, **OPTIONS.get(form, {}))
            yield harmless(f"exif-{name}.{form.lower()}", file, form)
    entities = '<!ENTITY a0 "aaaaaaaaaa">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    packet = f"<?xpacket?><!DOCTYPE x [{entities}]><x:xmpmeta>&a9;</x:xmpmeta>"
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", packet)
    yield harmless("xmp.png", encoded(PICTURE, "PNG", pnginfo=text), "PNG")
    yield harmless("xmp.jpg", encoded(PICTURE, "JPEG", xmp=packet.encode()), "JPEG")
    yield harmless("xmp.webp", encoded(PICTURE, "WEBP", xmp=packet, lossless=True), "WEBP")


def tiff_of_tags(*tags: tuple[int, int, int], following: int = 0, data: bytes = b"") -> bytes:
    """Return a TIFF with one directory of (tag, type, value), after the data."""
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(64)


def _hostile_tiff() -> Iterator[HostileFile]:
    usual = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    changes = {
        "far-strip": ({273: 2**31}, "truncated"),
        "long-strip": ({259: 8, 279: 2**32 - 1}, "do not fit into the file"),
        "long-packbits": ({259: 32773, 279: 2**31}, "do not fit into the file"),
        "long-jpeg": ({259: 7, 279: 2**30}, "do not fit into the file"),
        "no-bits": ({258: 0}, "not supported"),
        "many-bits": ({258: 65_535}, "not supported"),
        "many-samples": ({277: 65_535}, "samples in each pixel"),
        "no-compression": ({259: 9_999}, "begins as TIFF"),
        "no-meaning": ({262: 60_000}, "begins as TIFF"),
    }
    for name, (change, reason) in changes.items():
        tags = [(tag, 4, value) for tag, value in sorted({**usual, **change}.items())]
        yield HostileFile(f"{name}.tif", tiff_of_tags(*tags, data=bytes(64)), reason)
    for number, following in enumerate((8, 8 + 64, 2**31)):  # the directory itself, after the data, far away
        tags = [(tag, 4, value) for tag, value in sorted(usual.items())]
        file = tiff_of_tags(*tags, data=bytes(64), following=following)
        yield HostileFile(f"next-{number}.tif", file, "", np.zeros((8, 8, 3), np.uint8))


def _hostile_gif() -> Iterator[HostileFile]:
    codes = lzw(lzw_codes([0] * PIXELS), "lowest")
    whole = gif(gif_frame(codes))
    frame = whole.index(b",\0\0\0\0")
    for bits in (0, 13, 255):
        yield HostileFile(f"code-size-{bits}.gif", whole[: frame + 10] + bytes([bits]) + whole[frame + 11 :], "of a frame")
    for number in range(3):
        comment = b"!\xfe" + (b"\xff" + b"x" * 255) * (number + 1)
        yield HostileFile(f"endless-comment-{number}.gif", whole[:frame] + comment, "cut short")
        size = [(0, 0), (0, 5), (5, 0)][number]
        yield HostileFile(f"no-size-{number}.gif", gif(gif_frame(codes, size)), "too many pixels")
        larger = [(2_000, 2_000), (9_000, 900), (900, 9_000)][number]
        yield HostileFile(f"larger-frame-{number}.gif", gif(gif_frame(codes, larger)), "too few pixels")


def _archives() -> Iterator[HostileFile]:
    """Yield archives under a picture's name, and pictures with an archive behind them, which are pictures."""
    for form in ("PNG", "JPEG", "GIF"):
        data, suffix = encoded(PICTURE, form), form.lower()
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"x.{suffix}", data)
            archive.writestr("zeros", bytes(2**22))
        yield HostileFile(f"zipped.{suffix}", packed.getvalue(), "not a JPEG")
        yield HostileFile(f"gzipped.{suffix}", gzip.compress(data), "not a JPEG")
        yield harmless(f"before-archive.{suffix}", data + packed.getvalue(), form)


def _hostile_jpeg() -> Iterator[HostileFile]:
    data = encoded(PICTURE, "JPEG")
    header = b"II*\0\x08\0\0\0"
    for number, (count, offset) in enumerate(((2**31, 8), (100_000, 2**31), (0, 8))):
        entries = struct.pack("<HHII", 0xB001, 4, 1, count) + struct.pack("<HHII", 0xB002, 7, 16 * count % 2**32, offset)
        body = b"MPF\0" + header + struct.pack("<H", 2) + entries + bytes(4)
        segment = b"\xff\xe2" + struct.pack(">H", len(body) + 2) + body
        yield harmless(f"pictures-{number}.jpg", data[:2] + segment + data[2:], "JPEG")
    for number, part in enumerate((b"\xff", b"\xff\xfe\0\2", b"\xff\xfe\xff\xff" + bytes(65_533))):
        yield harmless(f"fill-{number}.jpg", data[:2] + part * (20_000, 2_000, 8)[number] + data[2:], "JPEG")


def unreadable_files(folder: Path) -> list[str]:
    """Make files in a folder that are no files of data, and links to such; reading some of them would never end."""
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.gif"))
    links = {
        "to-pipe.png": folder / "pipe.png",
        "to-folder.gif": folder / "folder.jpg",
        "to-socket.webp": folder / "socket.gif",
        "zeros.png": Path("/dev/zero"),
        "null.jpg": Path("/dev/null"),
        "random.tif": Path("/dev/urandom"),
        "keyboard.bmp": Path("/dev/tty"),
        "full.svg": Path("/dev/full"),
        "to-zeros.mp4": folder / "zeros.png",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return ["pipe.png", "folder.jpg", "socket.gif", *links]
