"""Find video files that are cut short or damaged by what their container says of its own size.

FFmpeg plays what is left of such a file as if it were the whole: frames would be chosen from a part of the clip. The sizes of
boxes (MP4, MOV), chunks (AVI) and elements (Matroska, WebM) tell how long the file must be, and many Matroska files have
checksums. Nothing is decoded.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.runtime.errors import UserError

MAX_PARTS = 2_000_000  # boxes, chunks or elements of a file; a hostile one could have some in every byte
MOVIE_BOXES = (b"ftyp", b"moov", b"mdat", b"moof", b"sidx", b"mfra", b"styp")
EBML, SEGMENT, TRACKS, CLUSTER = (bytes.fromhex(kind) for kind in ("1A45DFA3", "18538067", "1654AE6B", "1F43B675"))
TRACK, TRACK_NUMBER, TRACK_TYPE, CRC, VOID = b"\xae", b"\xd7", b"\x83", b"\xbf", b"\xec"
GROUP, BLOCK, SIMPLE_BLOCK = b"\xa0", b"\xa1", b"\xa3"
VIDEO_TYPE = 1
PARTS_OF = {  # the elements that may stand in each element whose inside is read
    # also: seek head, information, cues, attachments, chapters, tags
    SEGMENT: {TRACKS, CLUSTER, *map(bytes.fromhex, ("114D9B74", "1549A966", "1C53BB6B", "1941A469", "1043A770", "1254C367"))},
    # also: time, position, size of the cluster before, silent tracks, encrypted block
    CLUSTER: {GROUP, SIMPLE_BLOCK, b"\xe7", b"\xa7", b"\xab", b"\x58\x54", b"\xaf"},
    # also: additions, duration, priority, references, state of the codec, padding, slices, a frame of DivX, a virtual block
    GROUP: {BLOCK, b"\x75\xa1", b"\x9b", b"\xfa", b"\xfb", b"\xfd", b"\xa4", b"\x75\xa2", b"\x8e", b"\xc8", b"\xa2"},
}


class Part(NamedTuple):
    """A box or element: what it is, where its content starts and ends, in bytes from the start of the file."""

    kind: bytes
    start: int
    end: int


def check_container(file: BinaryIO) -> list[int]:
    """Check that a video file is as long as it says, that its checksums are right, and that its edit list is supported.

    Files of other formats pass: FFmpeg says what is wrong with them.

    Args:
        file: an open file that can be sought; its position afterwards is not defined.

    Returns:
        Of a Matroska file, how many packets each of its video tracks has at least, in the order of the file.

    Raises:
        UserError: with the reason, without the name of the file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF":
        _check_chunks(file, size)
    elif head[:4] == EBML:
        return _check_elements(file, size)
    elif head[4:8] in (*MOVIE_BOXES, b"wide", b"free", b"skip", b"pnot", b"uuid"):
        _check_boxes(file, size)
    return []


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
    return Part(head[:width], start, start + length if known else -1)


def _check_elements(file: BinaryIO, size: int) -> list[int]:
    """Return the number of blocks of each video track."""
    segment = _element(file, 0, size)
    while segment.kind != SEGMENT:
        if segment.end < 0 or segment.end >= size:
            raise UserError("cut short: the video is missing")
        segment = _element(file, segment.end, size)
    _check_end(segment.end, size)
    blocks: Counter[int] = Counter()
    tracks: list[int] = []
    for part in _count(_nested(file, Part(SEGMENT, segment.start, segment.end if segment.end >= 0 else size))):
        if part.kind in PARTS_OF[SEGMENT] and _has_crc(file, part):
            _check_crc(file, part)
        if part.kind == TRACKS and not tracks:
            tracks = _video_tracks(file, part)
        if part.kind in (BLOCK, SIMPLE_BLOCK) and part.end - part.start > 4:
            blocks[_track_of(file, part)] += 1
    return [blocks[track] for track in tracks]


def _nested(file: BinaryIO, parent: Part) -> Iterator[Part]:
    """Return the elements in a segment, a cluster or a group, and what is in them."""
    at, outer = parent.start, parent.kind
    while at < parent.end:
        part = _element(file, at, parent.end)
        if parent.kind == SEGMENT and part.kind in PARTS_OF[SEGMENT]:
            outer = SEGMENT  # here ends a cluster of unknown size
        if part.kind not in PARTS_OF[outer] and part.kind not in (CRC, VOID):
            raise UserError(f"damaged: the element at byte {at} is of an unknown kind")
        if part.end > parent.end:
            raise UserError(f"damaged or cut short: the element at byte {at} is longer than the part that it is in")
        yield part
        if part.end >= 0:
            yield from _nested(file, part) if part.kind in PARTS_OF else ()
            at = part.end
        elif part.kind == CLUSTER:
            at, outer = part.start, CLUSTER
        else:
            raise UserError(f"damaged: the element at byte {at} has no size")


def _track_of(file: BinaryIO, block: Part) -> int:
    head = _read(file, block.start, 4)
    width = 9 - head[0].bit_length()
    return int.from_bytes(head[:width]) & (1 << 7 * width) - 1


def _video_tracks(file: BinaryIO, tracks: Part) -> list[int]:
    """Return the numbers of the video tracks."""
    numbers = []
    for track in _count(_siblings(file, tracks)):
        parts = {part.kind: part for part in _count(_siblings(file, track))} if track.kind == TRACK else {}
        number, kind = (parts.get(field) for field in (TRACK_NUMBER, TRACK_TYPE))
        if number and kind and _number(file, kind) == VIDEO_TYPE:
            numbers.append(_number(file, number))
    return numbers


def _siblings(file: BinaryIO, parent: Part) -> Iterator[Part]:
    at = parent.start
    while at < parent.end:
        part = _element(file, at, parent.end)
        if not at < part.end <= parent.end:
            raise UserError(f"damaged: the element at byte {at} is longer than the part that it is in")
        yield part
        at = part.end


def _number(file: BinaryIO, part: Part) -> int:
    return int.from_bytes(_read(file, part.start, min(part.end - part.start, 8)))


def _has_crc(file: BinaryIO, part: Part) -> bool:
    return part.end - part.start >= 6 and _read(file, part.start, 2) == CRC + b"\x84"


def _check_crc(file: BinaryIO, part: Part) -> None:
    expected, crc, left = int.from_bytes(_read(file, part.start + 2, 4), "little"), 0, part.end - part.start - 6
    while left > 0 and (data := file.read(min(left, 1 << 20))):
        crc, left = zlib.crc32(data, crc), left - len(data)
    if crc != expected:
        raise UserError(f"damaged: a checksum is wrong in the part that starts at byte {part.start}")
