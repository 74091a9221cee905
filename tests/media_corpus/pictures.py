"""Valid still pictures of every kind with the pixels they show, and pictures that must be refused, with the reason.

Most files are written byte by byte, by encoders that share nothing with the readers. Each function yields cases of one kind.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

from media_corpus.bitmaps import bitmaps, palette_bitmaps
from media_corpus.png_pictures import colour_keys, pngs
from media_corpus.refused_pictures import cut_jpegs, unclear_tiffs, unsupported_files
from media_corpus.tiff_pictures import colour_tiffs, grey_tiffs, other_tiffs, packed_tiffs
from media_corpus.values import HEIGHT, WIDTH, PictureCase, RefusedPicture, saved, shown, smooth, turn, unit, whole


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
        for tail in (b"", b"\xff"):
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


PICTURES: tuple[Callable[[], Iterator[PictureCase]], ...] = (
    *(grey_tiffs, packed_tiffs, colour_tiffs, other_tiffs),
    *(pngs, colour_keys, bitmaps, palette_bitmaps, gifs),
    *(jpegs, unended_jpegs, turned, modern_formats, deep_jpeg2000),
)
REFUSED_PICTURES: tuple[Callable[[], Iterator[RefusedPicture]], ...] = (unclear_tiffs, unsupported_files, cut_jpegs)
