"""Write a TIFF of any layout, sample by sample: an encoder that shares nothing with the readers that it tests."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
_TYPES = {int: ("I", 4), float: ("d", 12)}


@dataclass(frozen=True)
class Tiff:
    """The layout of a TIFF; the fields are named after its tags."""

    bits: int = 8
    order: str = "<"
    photometric: int = 1
    sample_format: int = UNSIGNED
    planar: int = 1
    compression: int = NONE
    predictor: int = 1
    fill_order: int = 1
    tile: tuple[int, int] | None = None  # width, height
    rows_per_strip: int = 5
    extra: tuple[int, ...] | None = None  # None: the tag is missing
    is_big: bool = False
    tags: Mapping[int, object] = field(default_factory=dict)  # more of them; None takes one away

    def encode(self, samples: np.ndarray) -> bytes:
        """Return a file of samples [height, width, channels]: whole numbers, or floating point."""
        height, width, channels = samples.shape
        planes = [samples] if self.planar == 1 else [samples[..., k : k + 1] for k in range(channels)]
        pieces = [self._pack(piece) for plane in planes for piece in self._pieces(plane)]
        tags: dict[int, object] = {256: width, 257: height, 258: [self.bits] * channels, 259: self.compression}
        tags |= {262: self.photometric, 277: channels, 284: self.planar, 339: [self.sample_format] * channels}
        tags |= {317: self.predictor} if self.predictor > 1 else {}
        tags |= {266: self.fill_order} if self.fill_order > 1 else {}
        tags |= {338: list(self.extra)} if self.extra is not None else {}
        tags |= {322: self.tile[0], 323: self.tile[1]} if self.tile else {278: self.rows_per_strip}
        tags |= self.tags
        return self._file({tag: value for tag, value in tags.items() if value is not None}, pieces)

    def _pieces(self, plane: np.ndarray) -> list[np.ndarray]:
        if not self.tile:
            return [plane[y : y + self.rows_per_strip] for y in range(0, len(plane), self.rows_per_strip)]
        width, height = self.tile
        down, across = math.ceil(plane.shape[0] / height), math.ceil(plane.shape[1] / width)
        padded = np.pad(plane, ((0, down * height - plane.shape[0]), (0, across * width - plane.shape[1]), (0, 0)), "edge")
        return [padded[y * height : (y + 1) * height, x * width : (x + 1) * width] for y in range(down) for x in range(across)]

    def _pack(self, piece: np.ndarray) -> bytes:
        rows = [self._row(row) for row in piece]
        data = b"".join(rows)
        pack = {NONE: bytes, LZW: lzw, DEFLATE: zlib.compress, PACKBITS: packbits}[self.compression]
        packed = pack(data)
        return bytes(int(f"{byte:08b}"[::-1], 2) for byte in packed) if self.fill_order == 2 else packed

    def _row(self, row: np.ndarray) -> bytes:
        """Return one row of pixels [width, channels] as bytes, filled up to a whole byte."""
        size, channels = self.bits // 8, row.shape[1]
        if self.sample_format == FLOAT and self.predictor == 3:
            data = row.astype(f">f{size}").tobytes()
            planes = [data[k::size] for k in range(size)]  # all first bytes, then all second bytes, ...
            flat = np.frombuffer(b"".join(planes), np.uint8)
            return np.concatenate([flat[:channels], flat[channels:] - flat[:-channels]]).tobytes()
        if self.sample_format == FLOAT:
            return row.astype(f"{self.order}f{size}").tobytes()
        values = [[int(value) % 2**self.bits for value in pixel] for pixel in row]
        if self.predictor == 2:
            before = [[0] * channels, *values[:-1]]
            values = [[(b - a) % 2**self.bits for a, b in zip(*pair, strict=True)] for pair in zip(before, values, strict=True)]
        flat_values = [value for pixel in values for value in pixel]
        if self.bits % 8 == 0:
            name = "little" if self.order == "<" else "big"
            return b"".join(value.to_bytes(size, name) for value in flat_values)
        text = "".join(f"{value:0{self.bits}b}" for value in flat_values)
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")

    def _file(self, tags: Mapping[int, object], pieces: list[bytes]) -> bytes:
        order, wide = self.order, "Q" if self.is_big else "I"
        header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if self.is_big else 42)
        header += struct.pack(f"{order}HHQ", 8, 0, 16) if self.is_big else struct.pack(f"{order}I", 8)
        names = (324, 325) if self.tile else (273, 279)
        tags = {**tags, names[0]: [0] * len(pieces), names[1]: [len(piece) for piece in pieces]}
        entry = 20 if self.is_big else 12
        at = len(header) + (8 if self.is_big else 2) + entry * len(tags) + (8 if self.is_big else 4)
        far = entries = b""
        for attempt in range(2):  # the second time, the offsets are known
            far = entries = b""
            for tag, value in sorted(tags.items()):
                values = value if isinstance(value, list) else [value]
                letter, code = _TYPES[type(values[0])]
                data = struct.pack(f"{order}{len(values)}{letter}", *values)
                room = 8 if self.is_big else 4
                if len(data) > room:
                    place, far = struct.pack(f"{order}{wide}", at + len(far)), far + data
                else:
                    place = data.ljust(room, b"\0")
                entries += struct.pack(f"{order}HH{wide}", tag, code, len(values)) + place
            offsets = [at + len(far) + sum(map(len, pieces[:k])) for k in range(len(pieces))]
            tags |= {names[0]: offsets} if attempt == 0 else {}
        count = struct.pack(f"{order}{'Q' if self.is_big else 'H'}", len(tags))
        return header + count + entries + struct.pack(f"{order}{wide}", 0) + far + b"".join(pieces)


def lzw(data: bytes) -> bytes:
    """Return LZW as TIFF has it, of single bytes: the table is cleared before its codes become longer."""
    codes = [code for k, byte in enumerate(data) for code in ([256, byte] if k % 200 == 0 else [byte])] + [257]
    text = "".join(f"{code:09b}" for code in codes)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def packbits(data: bytes) -> bytes:
    return b"".join(bytes([len(data[k : k + 128]) - 1]) + data[k : k + 128] for k in range(0, len(data), 128))
