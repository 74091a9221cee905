"""Check that the data of a PNG are whole: Pillow reads neither the checksums of its pixels nor what follows the last row."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from isal import isal_zlib

from pipeline.data.pixels import check_clip
from pipeline.runtime.errors import UserError

MAX_CHUNKS = 200_000  # of a PNG
MAX_REPACKED_BYTES = 2**26  # of inflated pixels that are packed again
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # x, y, steps


class Chunk(NamedTuple):
    """A part of a PNG file, with a checksum of its own."""

    start: int  # position in the file
    name: bytes
    body: memoryview


def check_png(data: bytes, all_frames: bool) -> bytes:
    """Check all chunks of a PNG, and the pixels of its main picture or of all frames.

    Returns:
        The same file with uncompressed pixels; b"" if it would be large.
    """
    chunks = list(islice(_png_chunks(data), MAX_CHUNKS + 1))
    if len(chunks) > MAX_CHUNKS:
        raise UserError(f"more than {MAX_CHUNKS} chunks, could be a bomb")
    width, height, depth, color, _, _, passes = struct.unpack(">IIBBBBB", chunks[0].body)
    bits, interlaced = depth * PNG_CHANNELS.get(color, 0), bool(passes)
    main = [chunk for chunk in chunks if chunk.name == b"IDAT"]
    pixels = _inflate_frame([chunk.body for chunk in main], _png_bytes(width, height, bits, interlaced))
    if all_frames:
        later = _later_frames(chunks)
        check_clip(sum(width * height for (width, height), _ in later))
        for (width, height), parts in later:
            _inflate_frame(parts, _png_bytes(width, height, bits, interlaced))
    if len(pixels) > MAX_REPACKED_BYTES:
        return b""
    start, end = main[0].start, main[-1].start + 12 + len(main[-1].body)
    body = zlib.compress(pixels, 0)
    checksum = zlib.crc32(body, zlib.crc32(b"IDAT"))
    pixels = b"".join((struct.pack(">I4s", len(body), b"IDAT"), body, struct.pack(">I", checksum)))
    return without_texts(data[:start]) + pixels + without_texts(data[end:], 0)


def without_texts(data: bytes, position: int = 8) -> bytes:
    """Return chunks of a PNG without compressed texts and profiles: Pillow refuses long ones, and none is used.

    Args:
        data: the file, or a part of it.
        position: where its first chunk starts.
    """
    parts = [data[:position]]
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        chunk = data[position : position + 12 + length]
        body = chunk[8:-4]
        if not (name in (b"zTXt", b"iCCP") or (name == b"iTXt" and body.partition(b"\0")[2][:1] == b"\1")):
            parts.append(chunk)
        position += len(chunk)
    return b"".join(parts) + data[position:]


def _png_chunks(data: bytes) -> Iterator[Chunk]:
    """Yield the chunks of a PNG, up to the end of the picture; bytes after it are no part of it."""
    view, position, name = memoryview(data), 8, b""
    while name != b"IEND":
        if position + 12 > len(data):
            raise UserError("cut short: the end of the picture is missing")
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            raise UserError(f"cut short, or damaged: a chunk of {length} bytes goes beyond the end of the file")
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise UserError(f"damaged: the checksum of the chunk at byte {position} is wrong")
        yield Chunk(position, name, view[position + 8 : end])
        position = end + 4


def _later_frames(chunks: Sequence[Chunk]) -> list[tuple[tuple[int, int], list[memoryview]]]:
    """Return the size and the compressed parts of each frame of an animated PNG that is not its main picture."""
    frames: list[tuple[tuple[int, int], list[memoryview]]] = []
    for chunk in chunks:
        if chunk.name == b"fcTL":
            frames.append((struct.unpack_from(">II", chunk.body, 4), []))
        elif chunk.name == b"fdAT" and frames:
            frames[-1][1].append(chunk.body[4:])  # after its number
    return [frame for frame in frames if frame[1]]


def _png_bytes(width: int, height: int, bits: int, interlaced: bool) -> int:
    """Return the number of bytes of the pixels of a PNG, with one filter byte per row, before compression."""
    total = 0
    for x, y, step_x, step_y in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // step_x), -((y - height) // step_y)
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return total


def inflate(data: bytes, most: int) -> tuple[bytes, bool]:
    """Return the content of a zlib stream, and whether it ends after at most `most` bytes with the right checksum.

    Raises:
        UserError: the stream is damaged, or its checksum is wrong.
    """
    stream = isal_zlib.decompressobj()  # several times as fast as Python's zlib
    try:
        content = stream.decompress(data, most + 1)  # when one byte is left, it goes on to the checksum
    except isal_zlib.error as error:  # pyright: ignore[reportGeneralTypeIssues]  (its stub calls the class an object)
        raise UserError(f"damaged: the compressed pixels cannot be read: {error}") from error
    return content, stream.eof and len(content) <= most


def _inflate_frame(parts: Sequence[memoryview], expected: int) -> bytes:
    content, is_whole = inflate(b"".join(parts), expected)
    if len(content) != expected or not is_whole:
        raise UserError("damaged: the compressed pixels do not fit the size of the picture")
    return content
