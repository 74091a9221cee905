"""Write Matroska and WebM files by hand, with what no library writes on request: late starts, alpha, pixel shapes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN = b"\x01" + b"\xff" * 7  # the size of an element of a recording to a pipe


@dataclass(frozen=True)
class Block:
    """One packet of the video."""

    time: int  # milliseconds
    data: bytes
    is_key: bool = True
    alpha: bytes = b""  # a packet of the second video, whose grey is the opacity


def element(kind: str, *parts: bytes, crc: bool = False, unknown: bool = False) -> bytes:
    """Return an element of the kind that is given in hexadecimal digits."""
    body = b"".join(parts)
    if crc:
        body = b"\xbf\x84" + struct.pack("<I", zlib.crc32(body)) + body
    return bytes.fromhex(kind) + (UNKNOWN if unknown else struct.pack(">Q", len(body) | 1 << 56)) + body


def number(kind: str, value: int) -> bytes:
    return element(kind, value.to_bytes(max(1, (value.bit_length() + 7) // 8)))


def matroska(
    codec: str,
    size: tuple[int, int],
    clusters: Sequence[Sequence[Block]],
    private: bytes = b"",
    display: tuple[int, int] | None = None,
    duration: float | None = None,  # milliseconds
    crc: bool = False,
    unknown: bool = False,
) -> bytes:
    """Return a file with one video track; the times of all blocks of a cluster are within 32 seconds of its first one."""
    shape = number("54b0", display[0]) + number("54ba", display[1]) if display else b""
    has_alpha = any(block.alpha for blocks in clusters for block in blocks)
    alpha = number("53c0", 1) if has_alpha else b""
    video = element("e0", number("b0", size[0]), number("ba", size[1]), shape, alpha)
    extra = (element("63a2", private) if private else b"") + (number("55ee", 1) if has_alpha else b"")
    track = element("ae", number("d7", 1), number("73c5", 1), number("83", 1), element("86", codec.encode()), extra, video)
    length = element("4489", struct.pack(">d", duration)) if duration is not None else b""
    info = element("1549a966", number("2ad7b1", 1_000_000), length, element("4d80", b"test"), element("5741", b"test"), crc=crc)
    header = element("1a45dfa3", element("4282", b"webm" if codec.startswith("V_VP") else b"matroska"), number("4287", 4))
    written = [
        element(
            "1f43b675",
            number("e7", blocks[0].time),
            *(_block(block, blocks[0].time) for block in blocks),
            crc=crc,
            unknown=unknown,
        )
        for blocks in clusters
    ]
    return header + element("18538067", info, element("1654ae6b", track, crc=crc), *written, unknown=unknown)


def _block(block: Block, start: int) -> bytes:
    if not block.alpha:
        return element("a3", b"\x81", struct.pack(">hB", block.time - start, 0x80 * block.is_key), block.data)
    more = element("75a1", element("a6", number("ee", 1), element("a5", block.alpha)))
    return element("a0", element("a1", b"\x81", struct.pack(">hB", block.time - start, 0), block.data), more)
