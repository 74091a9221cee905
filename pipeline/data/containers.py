"""Find video files that are cut short or damaged by what their container says of its own size.

FFmpeg plays what is left of such a file as if it were the whole: frames would be chosen from a part of the clip. The sizes of
boxes (MP4, MOV), chunks (AVI) and elements (Matroska, WebM) tell how long the file must be, and many Matroska files have
checksums. Nothing is decoded.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.runtime.errors import UserError

MAX_PARTS = 2_000_000  # boxes, chunks or elements of a file; a hostile one could have some in every byte
EBML, SEGMENT, CLUSTER, CRC = 0x1A45DFA3, 0x18538067, 0x1F43B675, 0xBF
TOP_LEVEL = (SEGMENT, CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367)
MOVIE_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"sidx", b"mfra", b"styp")


class Part(NamedTuple):
    """A box, chunk or element: what it is, where its content starts and ends, in bytes from the start of the file."""

    kind: bytes | int
    start: int
    end: int


def check_container(file: BinaryIO) -> None:
    """Check that a video file is as long as it says, that its checksums are right, and that its edit list is supported.

    Files of other formats pass: FFmpeg says what is wrong with them.

    Args:
        file: an open file that can be sought; its position afterwards is not defined.

    Raises:
        UserError: with the reason, without the name of the file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF":
        _check_chunks(file, size)
    elif head[:4] == struct.pack(">I", EBML):
        _check_elements(file, size)
    elif head[4:8] in (*MOVIE_BOXES, b"wide", b"free", b"skip", b"pnot"):
        _check_boxes(file, size)


def _check_end(end: int, size: int) -> None:
    if end > size:
        raise UserError(f"cut short: {size} of {end} bytes are there")


def _count(parts: Iterator[Part]) -> Iterator[Part]:
    """Pass the parts on, and raise `UserError` when there are more than any real file has."""
    for number, part in enumerate(parts):
        if number >= MAX_PARTS:
            raise UserError(f"its container has more than {MAX_PARTS} parts")
        yield part


def _check_chunks(file: BinaryIO, size: int) -> None:
    """AVI: one RIFF chunk, or several of a gigabyte each."""
    at = 0
    for _ in range(MAX_PARTS):
        kind, length = struct.unpack("<4sI", _read(file, at, 8)) if at + 8 <= size else (b"", 0)
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):  # the size of a recording to a pipe is not known
            return
        _check_end(at + 8 + length, size)
        at += 8 + length + length % 2


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(at)
    data = file.read(length)
    if len(data) < length:
        raise UserError(f"cut short: {at + len(data)} of {at + length} bytes are there")
    return data


# MP4 and MOV


def _boxes(file: BinaryIO, at: int, end: int) -> Iterator[Part]:
    while at + 8 <= end:
        length, kind = struct.unpack(">I4s", _read(file, at, 8))
        start = at + 8
        if length == 1:
            length, start = struct.unpack(">Q", _read(file, start, 8))[0], at + 16
        stop = at + length if length else end
        if stop < start:
            return  # bytes after the last box that are no box
        yield Part(kind, start, stop)
        at = stop


def _check_boxes(file: BinaryIO, size: int) -> None:
    end, fragmented = 0, False
    for box in _count(_boxes(file, 0, size)):
        end, fragmented = box.end, fragmented or box.kind == b"moof"
        if box.kind in MOVIE_BOXES:
            _check_end(end, size)
        if box.kind == b"sidx":
            _check_end(_indexed_end(file, box), size)
        if box.kind == b"moov":
            for track in _find(file, box, b"trak"):
                _check_edits(file, track)
    if fragmented and end < size:
        _check_end(end + 8, size)  # the start of another fragment's box


def _find(file: BinaryIO, parent: Part, *path: bytes) -> list[Part]:
    """Return the boxes at the end of a path of kinds below a box; none reaches beyond the box that it is in."""
    found = [parent]
    for kind in path:
        inner = [(box, outer.end) for outer in found for box in _count(_boxes(file, outer.start, outer.end))]
        found = [Part(box.kind, box.start, min(box.end, end)) for box, end in inner if box.kind == kind]
    return found


def _indexed_end(file: BinaryIO, box: Part) -> int:
    """Return where the last fragment ends that a segment index lists."""
    wide = _read(file, box.start, 1) != b"\0"
    fields = struct.Struct(">QQHH" if wide else ">IIHH")  # first time, distance to the first fragment, reserved, number
    _, offset, _, number = fields.unpack(_read(file, box.start + 12, fields.size))
    entries = _read(file, box.start + 12 + fields.size, 12 * number)
    return box.end + offset + sum(size & 0x7FFFFFFF for size, _, _ in struct.iter_unpack(">III", entries))


def _check_edits(file: BinaryIO, track: Part) -> None:
    """Check that FFmpeg shows what an edit list says: it does for parts in any order, but not for pauses and slow motion."""
    handlers = [_read(file, box.start + 8, 4) for box in _find(file, track, b"mdia", b"hdlr")]
    for box in _find(file, track, b"edts", b"elst") if b"vide" in handlers else []:
        head = _read(file, box.start, 8)
        layout = struct.Struct(">QqI" if head[0] else ">IiI")
        number = min(struct.unpack(">I", head[4:])[0], (box.end - box.start - 8) // layout.size)
        data = _read(file, box.start + 8, number * layout.size)
        edits = list(layout.iter_unpack(data))
        while edits and edits[0][1] == -1:  # a late start
            edits = edits[1:]
        if any(start == -1 for _, start, _ in edits):
            raise UserError("its edit list has a pause in the middle, which is not supported; convert it with ffmpeg")
        if any(rate != 1 << 16 for _, _, rate in edits):
            raise UserError("its edit list changes the speed, which is not supported; convert it with ffmpeg")


# Matroska and WebM


def _element(file: BinaryIO, at: int, limit: int) -> Part:
    """Return the element that starts here; it ends at -1 if its size is not known (a recording to a pipe)."""
    head = _read(file, at, min(12, limit - at))
    width = 9 - head[0].bit_length()
    sized = head[width] if 0 < width <= 4 and width < len(head) else 0
    bytes_of_size = 9 - sized.bit_length()
    start = at + width + bytes_of_size
    if not sized or start > limit:
        raise UserError(f"damaged or cut short: there is no element at byte {at}")
    length = int.from_bytes(head[width : width + bytes_of_size]) & (1 << 7 * bytes_of_size) - 1
    known = length != (1 << 7 * bytes_of_size) - 1
    return Part(int.from_bytes(head[:width]), start, start + length if known else -1)


def _check_elements(file: BinaryIO, size: int) -> None:
    segment = _element(file, 0, size)
    while segment.kind != SEGMENT:
        if segment.end < 0 or segment.end >= size:
            raise UserError("cut short: the video is missing")
        segment = _element(file, segment.end, size)
    _check_end(segment.end, size)
    for part in _count(_nested(file, Part(SEGMENT, segment.start, segment.end if segment.end >= 0 else size))):
        if part.kind in TOP_LEVEL and _has_crc(file, part):
            _check_crc(file, part)


def _nested(file: BinaryIO, parent: Part) -> Iterator[Part]:
    """Return the elements in a segment, and those of its clusters too unless a checksum covers them."""
    at = parent.start
    while at < parent.end:
        part = _element(file, at, parent.end)
        if part.end > parent.end:
            raise UserError(f"damaged or cut short: the element at byte {at} is longer than the part that it is in")
        yield part
        if part.kind == CLUSTER and part.end >= 0 and not _has_crc(file, part):
            yield from _nested(file, part)
        at = part.end if part.end >= 0 else part.start  # what follows an unknown size is read as if it were outside


def _has_crc(file: BinaryIO, part: Part) -> bool:
    return part.end - part.start >= 6 and _read(file, part.start, 2) == bytes([CRC, 0x84])


def _check_crc(file: BinaryIO, part: Part) -> None:
    expected, crc, left = int.from_bytes(_read(file, part.start + 2, 4), "little"), 0, part.end - part.start - 6
    while left > 0 and (data := file.read(min(left, 1 << 20))):
        crc, left = zlib.crc32(data, crc), left - len(data)
    if crc != expected:
        raise UserError(f"damaged: a checksum is wrong in the part that starts at byte {part.start}")
