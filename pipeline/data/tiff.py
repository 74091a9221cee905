"""Read a TIFF by its own bit depth, sign, byte order, photometric interpretation and planar layout.

Pillow reads samples of 8 bits, bilevel pictures, and colours of 16 bits. The other layouts are read here; libtiff, through
Pillow, undoes their compression. Black and white are the ends of what the samples can hold: 0 and 2^b - 1 for b bits, -2^(b-1)
and 2^(b-1) - 1 if they are signed, 0 and 1 for floating point. SMinSampleValue and SMaxSampleValue, if they are there, say what
is black and white of signed and of floating-point samples.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

from pipeline.data.damage import REVERSED_BITS, check_tiff, load_whole, open_picture
from pipeline.data.pixels import check_size
from pipeline.runtime.errors import UserError

TIFF_PREFIXES = tuple(PREFIXES)
MAX_RAW_BYTES = 2**30  # of all samples of a picture
MAX_SAMPLES = 64  # of a pixel
NUM_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}  # photometric interpretation: samples that are not extra ones
# Compressions of bytes, whatever the samples are: none, LZW, deflate (two numbers), PackBits, LZMA, Zstandard.
BYTE_COMPRESSIONS = (1, 5, 8, 32946, 32773, 34925, 50000)
REDUCED = 1  # a bit of the tag "NewSubfileType"
FAX_IN_WORDS = 32771  # where a word begins, libtiff takes from the address in memory: it may read the pixels wrong


def open_tiff(path: Path) -> Image.Image:
    """Return the first picture of a TIFF, turned upright, its samples scaled to 0..255.

    Raises:
        UserError: the layout is not supported, or says too little to tell black from white; with the reason.
    """
    with path.open("rb") as file:
        tags = _read_tags(file)
        kind = tags.get(254)
        if isinstance(kind, int) and kind & REDUCED and (330 in tags or tags.next):
            raise UserError("its first picture is a small copy of another one, as in raw files of cameras; convert it first")
        layout = _Layout.of_tags(tags)
        check_size(layout.width, layout.height)
        layout.check()
        if not layout.is_plain:
            check_tiff(path, tags)
            return _turn(_picture(_eight_bits(file, layout), layout), layout.orientation)
    with open_picture(path, ("TIFF",)) as picture:
        return ImageOps.exif_transpose(load_whole(path, picture))


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the tags of a TIFF say about its samples; the names are those of the specification."""

    width: int
    height: int
    bits: int
    sample_format: int  # 1: unsigned, 2: signed, 3: floating point, 4: undefined, which means unsigned
    samples: int  # per pixel
    extra: tuple[int, ...]  # 0: without a meaning, 1: associated alpha, 2: unassociated alpha
    photometric: int
    is_planar: bool
    compression: int
    predictor: int
    fill_order: int
    byte_order: str
    orientation: int
    segment_size: tuple[int, int]  # width and height of a strip or a tile
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    colour_map: tuple[int, ...]
    limits: tuple[float, float] | None  # SMinSampleValue and SMaxSampleValue
    subsampling: tuple[int, ...]

    @staticmethod
    def of_tags(tags: ImageFileDirectory_v2) -> _Layout:
        def numbers(tag: int, *default: int) -> tuple[int, ...]:
            value = tags.get(tag, default)
            found = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(each, int) for each in found):
                raise UserError(f"tag {tag} of the TIFF is not a whole number")
            return found

        def number(tag: int, default: int) -> int:
            return (numbers(tag, default) or (default,))[0]

        def same(tag: int, default: int, what: str) -> int:
            found = numbers(tag, default)
            if len(set(found)) != 1:
                raise UserError(f"its samples have different {what}: {found}")
            return found[0]

        if 262 not in tags:
            raise UserError("it does not say what its samples mean: PhotometricInterpretation is missing")
        width, height, photometric = number(256, 0), number(257, 0), number(262, 0)
        colours, extra = NUM_COLOURS.get(photometric, 3), numbers(338)
        samples = number(277, 1)
        if not 0 < samples <= MAX_SAMPLES:
            raise UserError(f"{samples} samples in each pixel; at most {MAX_SAMPLES} are read")
        if not extra and samples > colours:  # not marked as the specification asks: the fourth sample of a colour is alpha
            extra = (2, *[0] * (samples - colours - 1)) if photometric == 2 else (0,) * (samples - colours)
        tile = (number(322, 0), number(323, 0))
        limits = (tags.get(340), tags.get(341))
        ends = [float(each[0] if isinstance(each, tuple) else each) for each in limits if each not in (None, ())]
        return _Layout(
            width=width,
            height=height,
            bits=same(258, 1, "bit depths"),
            sample_format=same(339, 1, "kinds of numbers"),
            samples=samples,
            extra=extra,
            photometric=photometric,
            is_planar=number(284, 1) == 2 and samples > 1,
            compression=number(259, 1),
            predictor=number(317, 1),
            fill_order=number(266, 1),
            byte_order="<" if tags.prefix == b"II" else ">",
            orientation=number(274, 1),
            segment_size=tile if 324 in tags else (width, min(number(278, height), height)),
            offsets=numbers(324 if 324 in tags else 273),
            counts=numbers(325 if 324 in tags else 279),
            colour_map=numbers(320),
            limits=(ends[0], ends[1]) if len(ends) == 2 else None,
            subsampling=numbers(530, 2, 2),
        )

    @property
    def colours(self) -> int:
        return NUM_COLOURS[self.photometric]

    @property
    def alpha(self) -> int | None:
        """The number of the sample that is alpha."""
        return next((self.samples - len(self.extra) + i for i, kind in enumerate(self.extra) if kind in (1, 2)), None)

    @property
    def is_plain(self) -> bool:
        """Whether Pillow reads it as its tags say."""
        if self.compression not in BYTE_COMPRESSIONS or self.photometric not in NUM_COLOURS:
            return True  # JPEG, fax; YCbCr, Lab: `check` has refused depths for which that is not true
        has_8_bit_map = bool(self.colour_map) and max(self.colour_map) < 256
        if self.is_planar or self.sample_format != 1 or self.fill_order != 1 or has_8_bit_map:
            return False
        is_known = self.samples == self.colours or (self.photometric, self.samples) == (2, 4)
        return is_known and (self.bits == 8 or (self.bits, self.colours) == (1, 1) or (self.bits == 16 and self.colours > 1))

    def check(self) -> None:
        """Raise `UserError` for layouts that neither Pillow nor this module reads right."""
        if not all(self.offsets):
            raise UserError("parts of it are not stored, as in a sparse GeoTIFF; fill them, e.g. with gdal_translate")
        what = f"photometric interpretation {self.photometric}, compression {self.compression}, {self.bits} bits"
        if self.photometric not in NUM_COLOURS or self.compression not in BYTE_COMPRESSIONS:
            is_known = (self.bits, self.sample_format) == (8, 1) or (self.bits, self.samples) == (1, 1)
            if self.compression == FAX_IN_WORDS or not is_known:
                raise UserError(f"a TIFF of this layout is not supported: {what}")
            is_packed = self.photometric == 6 and self.compression == 1 and self.subsampling != (1, 1)
            if is_packed and sum(self.counts) < 3 * self.width * self.height:
                raise UserError(f"uncompressed YCbCr with subsampling is not supported: {what}")
            return
        depths = {1: range(1, 33), 2: range(2, 33), 3: (16, 32, 64), 4: range(1, 33)}.get(self.sample_format, ())
        if self.bits not in depths or self.predictor not in (1, 2, 3):
            raise UserError(f"a TIFF of this layout is not supported: {what}, sample format {self.sample_format}")
        if self.samples - len(self.extra) != self.colours:
            raise UserError(f"{self.samples} samples in each pixel, {len(self.extra)} of them extra, do not fit: {what}")
        if self.colours == 1 and len(self.extra) > 1 and self.alpha is None:
            raise UserError(f"it has {self.samples} channels, and does not say what they are")
        if self.photometric == 5 and self.alpha is not None:
            raise UserError(f"inks with transparency are not supported: {what}")
        if self.photometric == 3 and (
            self.sample_format not in (1, 4) or self.bits > 16 or len(self.colour_map) != 3 << self.bits
        ):
            raise UserError(f"its colour map does not fit: {what}")
        if self.width * self.height * self.samples * self.bits > 8 * MAX_RAW_BYTES:
            raise UserError(f"its samples take more than {MAX_RAW_BYTES} bytes")


def _read_tags(file: BinaryIO) -> ImageFileDirectory_v2:
    header = file.read(8)
    if header[2:4] == b"\0+":
        raise UserError("a BigTIFF in big-endian byte order is not supported")
    header += file.read(8) if header[2:4] == b"+\0" else b""  # BigTIFF
    tags = ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    if 256 not in tags or 257 not in tags:
        raise UserError("damaged or cut short: the TIFF does not say how large it is")
    return tags


def _eight_bits(file: BinaryIO, layout: _Layout) -> np.ndarray:
    """Return colours and, last, alpha of the pixels, [height, width, channels], as 0..255; of a palette, its indices."""
    wanted = [*range(layout.colours), *([] if layout.alpha is None else [layout.alpha])]
    scale = _Scale(layout)
    pixels = np.empty((layout.height, layout.width, len(wanted)), np.uint16 if layout.photometric == 3 else np.uint8)
    for plane, x, y, samples in _segments(file, layout):
        if plane is not None and plane not in wanted:
            continue
        target = slice(None) if plane is None else slice(wanted.index(plane), wanted.index(plane) + 1)
        part = pixels[y : y + samples.shape[0], x : x + samples.shape[1], target]
        chosen = samples[: part.shape[0], : part.shape[1]][..., wanted if plane is None else slice(None)]
        part[:] = chosen if layout.photometric == 3 else scale(chosen)
    scale.check()
    if layout.photometric == 0:
        pixels[..., 0] = 255 - pixels[..., 0]
    return pixels


class _Scale:
    """Scale samples to 0..255, and refuse those that do not say what is black and what is white."""

    def __init__(self, layout: _Layout) -> None:
        self.layout = layout
        self.has_negative = False
        self.top = 2**layout.bits - 1
        self.table = self._scaled(np.arange(self.top + 1)) if layout.bits <= 16 else None

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        bits, limits = self.layout.bits, self.layout.limits
        if self.layout.sample_format == 3:
            return self._between(samples, *(limits or (0.0, 1.0)))
        if self.layout.sample_format == 2:
            middle = samples.dtype.type(1 << (bits - 1))
            self.has_negative = self.has_negative or bool((samples & middle).any())
            samples = samples ^ middle  # the smallest number becomes 0
            if limits:
                return self._between(samples.astype(np.float64) - float(middle), *limits)
        return self._scaled(samples) if self.table is None else self.table[samples]

    def _scaled(self, samples: np.ndarray) -> np.ndarray:
        if self.layout.bits == 16:
            return (samples >> 8).astype(np.uint8)  # as Pillow reads colours of 16 bits
        return ((samples.astype(np.uint64) * 255 + self.top // 2) // self.top).astype(np.uint8)

    def _between(self, values: np.ndarray, black: float, white: float) -> np.ndarray:
        low, high = float(values.min()), float(values.max())
        if not (black < white and black <= low and high <= white):  # not a number, too
            found = f"its samples go from {low:g} to {high:g}"
            raise UserError(f"{found}, and it does not say which are black and white: save it with whole numbers, or as 0 to 1")
        return np.rint((values.astype(np.float64) - black) * (255 / (white - black))).astype(np.uint8)

    def check(self) -> None:
        if self.layout.sample_format == 2 and not self.has_negative and not self.layout.limits:
            raise UserError("signed samples, none of them negative: it does not say whether black is 0; save it as unsigned")


def _segments(file: BinaryIO, layout: _Layout) -> Iterator[tuple[int | None, int, int, np.ndarray]]:
    """Yield the strips or tiles: the plane, if they have one, the left and top pixel, and samples [rows, columns, channels]."""
    width, height = layout.segment_size
    if width < 1 or height < 1:
        raise UserError("its tiles have no size")
    across, down = math.ceil(layout.width / width), math.ceil(layout.height / height)
    planes = layout.samples if layout.is_planar else 1
    channels = 1 if layout.is_planar else layout.samples
    row_bytes = math.ceil(width * channels * layout.bits / 8)
    if across * down * planes * height * row_bytes > 4 * MAX_RAW_BYTES:
        raise UserError("its tiles are far larger than the picture")
    if len(layout.offsets) < across * down * planes or (layout.counts and len(layout.counts) != len(layout.offsets)):
        raise UserError("cut short: parts of the picture are missing")
    for number in range(across * down * planes):
        plane, place = divmod(number, across * down)
        x, y = place % across * width, place // across * height
        rows = min(height, layout.height - y) if width == layout.width else height  # only the last strip may be shorter
        data = _segment_bytes(file, layout, number, rows, row_bytes)
        yield plane if layout.is_planar else None, x, y, _samples(data, layout, width, channels)


def _segment_bytes(file: BinaryIO, layout: _Layout, number: int, rows: int, row_bytes: int) -> np.ndarray:
    """Return the bytes [rows, row_bytes] of a strip or tile, without compression."""
    size = layout.counts[number] if layout.counts else 0
    if layout.compression == 1:
        size = size or rows * row_bytes
        if size < rows * row_bytes:
            raise UserError("cut short: parts of the picture are missing")
        size = rows * row_bytes
    file.seek(layout.offsets[number])
    data = file.read(size)
    if len(data) < max(size, 1):
        raise UserError("cut short: parts of the picture are missing")
    if layout.compression == 1:
        plain = np.frombuffer(data, np.uint8).reshape(rows, row_bytes)
        return np.frombuffer(REVERSED_BITS, np.uint8)[plain] if layout.fill_order == 2 else plain
    tags = {256: row_bytes, 257: rows, 258: 8, 259: layout.compression, 262: 1, 266: layout.fill_order, 277: 1, 278: rows}
    tags |= {273: 8 + 2 + 12 * 10 + 4, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    grey = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data
    with Image.open(io.BytesIO(grey), formats=("TIFF",)) as picture:  # libtiff reads it as a grey picture of bytes
        return np.asarray(picture)


def _samples(data: np.ndarray, layout: _Layout, width: int, channels: int) -> np.ndarray:
    """Return samples [rows, width, channels], floating point or whole numbers without sign, of bytes [rows, row_bytes]."""
    bits, rows, count = layout.bits, len(data), width * channels
    if layout.predictor == 3:
        if layout.sample_format != 3:
            raise UserError("a predictor for floating point, but whole numbers")
        steps = np.add.accumulate(data.reshape(rows, -1, channels), axis=1, dtype=np.uint8)
        planes = steps.reshape(rows, bits // 8, count).transpose(0, 2, 1)  # the highest bytes come first
        return np.ascontiguousarray(planes).view(f">f{bits // 8}").reshape(rows, width, channels)
    if bits in (8, 16, 32, 64):
        samples = np.ascontiguousarray(data).view(f"{layout.byte_order}u{bits // 8}").astype(f"u{bits // 8}")
    elif bits == 24:
        high, middle, low = (0, 1, 2) if layout.byte_order == ">" else (2, 1, 0)
        three = data.reshape(rows, count, 3).astype(np.uint32)
        samples = three[..., high] << 16 | three[..., middle] << 8 | three[..., low]
    else:
        stream = np.unpackbits(data, axis=1, count=count * bits).reshape(rows, count, bits)
        samples = np.zeros((rows, count), np.uint8 if bits < 8 else np.uint16 if bits < 16 else np.uint32)
        for bit in range(bits):
            samples = samples << 1 | stream[..., bit]
    samples = samples.reshape(rows, width, channels)
    if layout.predictor == 2:
        if bits not in (8, 16, 32, 64):
            raise UserError(f"differences of samples of {bits} bits are not supported")
        samples = np.add.accumulate(samples, axis=1, dtype=samples.dtype)
    return samples.view(f"f{bits // 8}") if layout.sample_format == 3 else samples


def _picture(pixels: np.ndarray, layout: _Layout) -> Image.Image:
    """Return the picture of channels [height, width, channels]; the last one is alpha, if there is one."""
    if layout.photometric == 3:
        colours = np.asarray(layout.colour_map).reshape(3, -1).T
        table = (colours if colours.max() < 256 else colours >> 8).astype(np.uint8)  # old programs wrote 8 bits
        alpha = (pixels[..., 1:].astype(np.uint32) * 255 // (2**layout.bits - 1)).astype(np.uint8)
        pixels = np.concatenate([table[pixels[..., 0]], alpha], axis=2)
    elif layout.photometric == 5:
        return Image.frombytes("CMYK", (layout.width, layout.height), pixels.tobytes())
    elif pixels.shape[2] <= 2:
        pixels = np.concatenate([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=2)
    is_associated = layout.alpha is not None and layout.extra[layout.alpha - layout.colours] == 1
    mode = "RGB" if pixels.shape[2] == 3 else "RGBa" if is_associated else "RGBA"
    return Image.frombytes(mode, (layout.width, layout.height), pixels.tobytes())


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[274] = orientation
    return ImageOps.exif_transpose(image)
