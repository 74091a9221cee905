"""Malformed media files: pictures, drawings and video clips that are damaged, cut off, hostile, or of another format."""

from __future__ import annotations

import base64
import gzip
import io
import os
import struct
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from helpers.encoder_cases import write_animation, write_video
from pipeline.data.media import MAX_FRAMES, MAX_SVG_BYTES

GREYS = [16, 60, 104, 148, 192, 214]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
THIN = (4, 4_000)  # pixels, as width and height
HUGE = 60_000
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20">{}</svg>'
TEXTS = {  # other files that were saved under a picture's name
    "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "note.png": "kein Bild, nur Text: äöü".encode(),
    "answer.webp": b'{"error": "too many requests"}',
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n",
    "script.gif": b"#!/bin/sh\necho GIF89a\n",
    "zeros.bmp": bytes(4096),
    "ones.tiff": b"\xff" * 4096,
    "paper.png": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF",
}


def encoded_picture(form: str, picture: Image.Image = NOISE) -> bytes:
    """Return the bytes of a small picture in this format."""
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def png_of_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of these chunks, with correct checksums."""
    body = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_header(width: int = 8, height: int = 8, depth: int = 8, kind: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)


def tiff_of_tags(*tags: tuple[int, int, int], following: int = 0) -> bytes:
    """Return a TIFF with one directory of (tag, type, value); `following` is the offset of the next directory."""
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following) + bytes(64)


def malformed_pictures() -> dict[str, bytes]:
    """Return malformed pictures by file name."""
    files = dict(TEXTS)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        data, suffix = encoded_picture(form), form.lower()
        files |= {f"empty.{suffix}": b"", f"half.{suffix}": data[: len(data) // 2], f"start.{suffix}": data[:20]}
    data, pixels, end = encoded_picture("PNG"), (b"IDAT", zlib.compress(bytes(8 * 25))), (b"IEND", b"")
    bitmap, photo = encoded_picture("BMP"), encoded_picture("JPEG")
    sizes = photo.index(b"\xff\xc0") + 5
    files |= {
        "damaged.png": data[:100] + bytes(50) + data[150:],
        "zipped.png": gzip.compress(data),
        "no-header.png": png_of_chunks(pixels, end),
        "no-pixels.png": png_of_chunks(png_header(), end),
        "no-size.png": png_of_chunks(png_header(0, 0), pixels, end),
        "odd-depth.png": png_of_chunks(png_header(depth=7), pixels, end),
        "garbage.png": png_of_chunks(png_header(), (b"IDAT", b"garbage"), end),
        "bomb-declared.png": png_of_chunks(png_header(HUGE, HUGE), pixels, end),
        "bomb-real.png": png_of_chunks(png_header(20_000, 20_000, 1, 0), (b"IDAT", zlib.compress(bytes(20_000 * 2_501))), end),
        "bomb.gif": b"GIF89a" + struct.pack("<HH", HUGE, HUGE) + b"\0\0\0," + struct.pack("<4H", 0, 0, HUGE, HUGE) + b"\0\2\0;",
        "bomb.bmp": bitmap[:18] + struct.pack("<ii", HUGE, HUGE) + bitmap[26:],
        "bomb.jpg": photo[:sizes] + struct.pack(">HH", HUGE, HUGE) + photo[sizes + 4 :],
        "bomb.tiff": tiff_of_tags((256, 4, HUGE), (257, 4, HUGE), (258, 3, 8), (262, 3, 1), (273, 4, 8), (279, 4, 1)),
        "bomb.webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xff\x3f\0\xff\x3f\0",
        "bomb.ppm": f"P6 {HUGE} {HUGE} 255\n".encode(),
        "no-frames.gif": b"GIF89a" + struct.pack("<HH", 8, 8) + b"\0\0\0;",
        "only-start.jpg": b"\xff\xd8",
        "no-scan.jpg": photo[: photo.index(b"\xff\xda")] + b"\xff\xd9",
        "no-size.jpg": photo[:sizes] + bytes(4) + photo[sizes + 4 :],
        "odd-depth.bmp": bitmap[:28] + struct.pack("<H", 7) + bitmap[30:],
        "no-pixels.tiff": tiff_of_tags((256, 4, 8), (257, 4, 8)),
        "endless.tiff": tiff_of_tags((256, 4, 8), following=8),
        "far.tiff": b"II*\0" + struct.pack("<I", 2**31),
        "no-picture.webp": b"RIFF" + struct.pack("<I", 4) + b"WEBP",
        "no-numbers.ppm": b"P6 eight eight 255\n" + bytes(192),
        **{f"whole.{form.lower()}": encoded_picture(form) for form in ("EPS", "ICO", "PCX", "PPM", "SGI", "TGA")},
        "script.jpg": encoded_picture("EPS"),
        "thin.png": encoded_picture("PNG", Image.new("1", (1, 40_000))),
        "thin.jpg": encoded_picture("JPEG", Image.new("L", (4_000, 4))),
        "archive.gif": zipped_gif(),
        "no-format.dds": encoded_picture("DDS")[:76] + bytes(400),
    }
    return files | malformed_drawings(data)


def zipped_gif() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("x.gif", encoded_picture("GIF"))
    return file.getvalue()


def malformed_drawings(picture: bytes) -> dict[str, bytes]:
    """Return malformed SVG drawings by file name."""
    entities = '<!ENTITY a0 "aaaaaaaaaa">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    texts = {
        "unclosed.svg": "<svg",
        "empty.svg": "",
        "page.svg": "<html><body>404</body></html>",
        "two.svg": SVG.format("") * 2,
        "no-size.svg": '<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0"/>',
        "entity-bomb.svg": f"<!DOCTYPE svg [{entities}]>{SVG.format('<text>&a9;</text>')}",
        "unknown-entity.svg": SVG.format("&nothing;"),
        "foreign-entity.svg": '<!DOCTYPE svg [<!ENTITY e SYSTEM "file:///etc/hostname">]>' + SVG.format("<text>&e;</text>"),
        "foreign-picture.svg": SVG.format('<image href="file:///etc/hostname" width="9" height="9"/>'),
        "huge.svg": " " * (MAX_SVG_BYTES + 1),
        "deep.svg": SVG.format("<g>" * 50_000 + "</g>" * 50_000),
        "far.svg": SVG.format('<g transform="rotate(330)"><path d="M10 10 L 5 5 C 1 0 3 4 1e10 6 Z"/></g>'),
    }
    files = {name: text.encode() for name, text in texts.items()}
    return files | {
        "picture.svg": picture,
        "zipped.svg": gzip.compress(SVG.format("").encode()),
        "latin.svg": SVG.format("<text>ä</text>").encode("latin-1"),
        "drawing.png": SVG.format("<rect width='9' height='9'/>").encode(),
        "base64.png": base64.b64encode(picture),
    }


def malformed_clips(folder: Path) -> dict[str, bytes]:
    """Return malformed video clips by file name; the valid clips that they are made from are written to a folder."""
    files = {f"{name}.mp4": data for name, data in TEXTS.items()}
    for name, codec in (("a.mp4", "libx264"), ("b.webm", "libvpx"), ("c.mkv", "libx264"), ("d.avi", "mpeg4")):
        data = write_video(folder / name, codec, GREYS).read_bytes()
        files |= {f"empty-{name}": b"", f"half-{name}": data[: len(data) // 2], f"start-{name}": data[:64]}
    for name in ("e.gif", "f.webp", "g.png"):
        data = write_animation(folder / name, GREYS).read_bytes()
        files |= {f"half-{name}": data[: len(data) // 2], f"empty-{name}": b""}
    movie = (folder / "a.mp4").read_bytes()
    bitmap = raw_video(folder / "raw.avi")
    size = bitmap.index(b"strf") + 12
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{folder / 'a.mp4'}\n"
    return files | {
        "no-index.mp4": movie.replace(b"moov", b"gone"),
        "no-pictures.mp4": movie.replace(b"vide", b"soun"),
        "huge.avi": bitmap[:size] + struct.pack("<ii", HUGE, HUGE) + bitmap[size + 8 :],
        "list.mp4": f"ffconcat version 1.0\nfile {folder / 'a.mp4'}\n".encode(),
        "playlist.mp4": playlist.encode(),
        "sound.mkv": sound_file(folder / "sound.mkv", with_cover=False),
        "music.mp4": sound_file(folder / "music.mp4", with_cover=True),
        "endless.avi": endless_video(folder / "endless.avi"),
        "thin.avi": write_video(folder / "thin.avi", "rawvideo", GREYS, THIN, "bgr24").read_bytes(),
        "thin.webp": encoded_picture("WEBP", Image.new("RGB", THIN)),
        "growing.avi": growing_video(folder / "growing.avi"),
        "no-frames.gif": b"GIF89a" + struct.pack("<HH", 8, 8) + b"\0\0\0;",
        "bomb.gif": malformed_pictures()["bomb.gif"],
    }


def sound_file(path: Path, with_cover: bool) -> bytes:
    """Return a file of sound without a video stream, or with a cover picture only."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=Fraction(1)) if with_cover else None
        assert isinstance(stream, av.AudioStream)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 8000
        if isinstance(cover, av.VideoStream):
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = Disposition.attached_pic
            container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            container.mux(cover.encode())
        container.mux([*stream.encode(samples), *stream.encode()])
    return path.read_bytes()


def raw_video(path: Path) -> bytes:
    """Return an uncompressed video, whose frame size stands only in the container."""
    return write_video(path, "rawvideo", GREYS, pixels="bgr24").read_bytes()


def endless_video(path: Path) -> bytes:
    """Return a video that repeats one frame more often than `MAX_FRAMES`."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(10))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        (packet, *_) = [*stream.encode(picture), *stream.encode()]
        for time in range(MAX_FRAMES + 1):
            packet.pts = packet.dts = time
            container.mux(packet)
    return path.read_bytes()


def growing_video(path: Path) -> bytes:
    """Return a video whose later frames are larger than its header says."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mjpeg", rate=Fraction(10))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        for time in range(4):
            packet = av.Packet(encoded_picture("JPEG", Image.new("RGB", (16, 16) if time == 0 else THIN)))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, time, time, Fraction(1, 10)
            container.mux(packet)
    return path.read_bytes()


def unreadable_names(folder: Path) -> list[str]:
    """Return file names in a folder that cannot be read: missing files, folders, pipes, and links that lead outside."""
    outside = folder.parent / "outside.png"
    NOISE.save(outside)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    links = {"dangling.png": "nothing", "loop.png": "loop.png", "outside.png": outside, "device.png": "/dev/zero"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return ["missing.png", f"{'long' * 100}.png", "folder.png", "pipe.png", *links]
