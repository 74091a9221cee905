"""Pictures that say too little, are not supported, or lack a part, with the reason in the failure list."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from media_corpus.bitmaps import encode_bitmap
from media_corpus.tiffs import DEFLATE, FLOAT, LZW, SIGNED, Tiff
from media_corpus.values import HEIGHT, WIDTH, RefusedPicture, saved, smooth, unit, whole


def unclear_tiffs() -> Iterator[RefusedPicture]:
    """TIFFs that do not say what is black, what is white, or what their channels are."""
    values = unit(1, 30)
    for bits, order in itertools.product((16, 32, 64), "<>"):
        layout = Tiff(bits, order, 1, FLOAT)
        for name, wrong in (
            ("bytes", 255 * values),
            ("heights", values - 0.5),
            ("nan", np.where(values > 0.5, np.nan, values)),
        ):
            yield RefusedPicture(f"tiff/float-{name}-{bits}-{order}.tif", layout.encode(wrong), "does not say which are black")
    for bits, order in itertools.product((8, 12, 16, 32), "<>"):
        data = Tiff(bits, order, 1, SIGNED).encode(whole(values, bits - 1))
        yield RefusedPicture(f"tiff/not-negative-{bits}-{order}.tif", data, "does not say whether black is 0")
    for bits in (1, 8, 12, 16):
        data = Tiff(bits, tags={262: None}).encode(whole(values, bits))
        yield RefusedPicture(f"tiff/no-photometric-{bits}.tif", data, "PhotometricInterpretation is missing")
    for bits, channels in itertools.product((8, 16), (3, 5)):
        data = Tiff(bits, extra=(0,) * (channels - 1)).encode(whole(unit(channels), bits))
        yield RefusedPicture(f"tiff/channels-{bits}-{channels}.tif", data, f"it has {channels} channels")


def unsupported_files() -> Iterator[RefusedPicture]:
    """Kinds that the documentation lists as not supported."""
    colours = whole(unit(3, 31), 8)
    for depths in ([5, 6, 5], [8, 8, 16], [1, 8, 8]):
        data = Tiff(8, photometric=2, tags={258: depths}).encode(colours)
        yield RefusedPicture(f"tiff/depths-{depths[0]}-{depths[2]}.tif", data, "different bit depths")
    for sample_format in (5, 6, 9):
        data = Tiff(32, tags={339: sample_format}).encode(whole(unit(1), 32))
        yield RefusedPicture(f"tiff/format-{sample_format}.tif", data, "not supported")
    for photometric, bits in itertools.product((6, 8, 32_803), (12, 16)):
        data = Tiff(bits, photometric=photometric).encode(whole(unit(3), bits))
        yield RefusedPicture(f"tiff/photometric-{photometric}-{bits}.tif", data, "not supported")
    for bits in (40, 48, 64):
        yield RefusedPicture(f"tiff/whole-{bits}.tif", Tiff(bits).encode(whole(unit(1), 30)), "not supported")
    for samples in (0, 65, 2**31):
        data = Tiff(8, tags={277: samples}).encode(whole(unit(1), 8))
        yield RefusedPicture(f"tiff/samples-{samples}.tif", data, "samples in each pixel")
    for subsampling in ([2, 2], [2, 1], [4, 1]):
        data = Tiff(8, photometric=6, tags={530: subsampling}).encode(colours[:5])
        number = data.index(struct.pack("<HHII", 257, 4, 1, 5))  # twice as many rows as there would be room for
        taller = data[: number + 8] + struct.pack("<I", 10) + data[number + 12 :]
        yield RefusedPicture(f"tiff/subsampling-{subsampling[0]}-{subsampling[1]}.tif", taller, "subsampling is not supported")
    for bits, order in ((8, "<"), (8, ">"), (16, "<")):
        data = Tiff(bits, order, photometric=2, tags={254: 1, 330: 8}).encode(whole(unit(3), bits))
        yield RefusedPicture(f"tiff/small-copy-{bits}-{'II' if order == '<' else 'MM'}.tif", data, "small copy of another")
    for width in (32, 64, 128):
        lines = Image.fromarray(np.tile(np.arange(width) // 5 % 2 == 0, (8, 1)))
        yield RefusedPicture(f"tiff/words-{width}.tif", saved(lines, "TIFF", compression="tiff_raw_16"), "not supported")
    for bits in (8, 12, 16):
        data = Tiff(bits, ">", is_big=True).encode(whole(unit(1), bits))
        yield RefusedPicture(f"tiff/big-endian-{bits}.tif", data, "BigTIFF in big-endian")
    for compression, bits, channels in itertools.product((1, LZW, DEFLATE), (8, 12), (1, 3)):
        layout = Tiff(bits, photometric=2 if channels == 3 else 1, compression=compression, tile=(16, 16))
        data = layout.encode(whole(unit(channels), bits))
        file = io.BytesIO(data)
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        offsets, sizes = (struct.pack("<2I", *tags[tag]) for tag in (324, 325))
        place = data.index(offsets)  # the sizes follow
        for name, kept in (("one", 4), ("all", 0)):
            sparse = data[:place] + offsets[:kept].ljust(8, b"\0") + sizes[:kept].ljust(8, b"\0") + data[place + 16 :]
            yield RefusedPicture(f"tiff/sparse-{name}-{compression}-{bits}-{channels}.tif", sparse, "are not stored")
    for planar, bits in ((1, 12), (2, 8), (2, 16)):
        data = Tiff(bits, photometric=2, planar=planar).encode(whole(unit(3), bits))
        yield RefusedPicture(f"tiff/cut-{planar}-{bits}.tif", data[:-40], "cut short")
    rows = [bytes(4 * WIDTH)] * HEIGHT
    for masks in ((0xFF, 0xFF, 0xFF00, 0), (0xF0F, 0xF0, 0xF000, 0), (0xFF, 0xFF00, 0xFF0000, 0xFF0000)):
        data = encode_bitmap(rows, (WIDTH, HEIGHT), 32, 108, 3, masks)
        yield RefusedPicture(f"bmp/masks-{masks[0]}-{masks[3]}.bmp", data, "mask")
    for size in (4, 200, 700):
        data = encode_bitmap(rows, (WIDTH, HEIGHT), 32)
        yield RefusedPicture(f"bmp/cut-{size}.bmp", data[:-size], "cut short")
    image = saved(Image.fromarray(smooth().astype(np.uint8)), "JPEG2000")
    space = image.index(b"colr") + 7
    for number in (14, 24, 99):
        data = image[:space] + struct.pack(">I", number) + image[space + 4 :]
        yield RefusedPicture(f"jpeg2000/space-{number}.jp2", data, f"colour space {number}")
    depth = image.index(b"\xff\x4f\xff\x51") + 42
    for component in range(3):
        data = image[: depth + 3 * component] + b"\x0b" + image[depth + 3 * component + 1 :]
        yield RefusedPicture(f"jpeg2000/depths-{component}.jp2", data, "different depths")


def cut_jpegs() -> Iterator[RefusedPicture]:
    """JPEGs that end too early: within a scan, before a restart, between the scans of a progressive one."""
    noise = np.random.default_rng(32).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    flat = np.full((40, 56, 3), 90, np.uint8)
    kinds: dict[str, dict[str, Any]] = {
        "baseline": {},
        "progressive": {"progressive": True},
        "restart": {"restart_marker_blocks": 2},
    }
    for (name, options), (look, pixels) in itertools.product(kinds.items(), (("noise", noise), ("flat", flat))):
        data = saved(Image.fromarray(pixels), "JPEG", **options)
        for size in (4, 5, 9, 25):
            yield RefusedPicture(f"jpeg/cut-{name}-{look}-{size}.jpg", data[:-size], "(truncated|damaged|cut short)")
        marks = [k for k in range(data.index(b"\xff\xda") + 1, len(data) - 2) if data[k] == 255 and data[k + 1] not in (0, 217)]
        for position in marks[-3:]:
            yield RefusedPicture(f"jpeg/cut-{name}-{look}-at-{position}.jpg", data[:position], "(truncated|damaged|cut short)")
