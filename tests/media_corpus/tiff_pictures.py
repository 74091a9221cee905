"""TIFFs of every layout that is supported, and the pixels they show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from media_corpus.tiffs import DEFLATE, FLOAT, LZW, PACKBITS, SIGNED, Tiff
from media_corpus.values import HEIGHT, WIDTH, PictureCase, shown, turn, unit, whole


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
