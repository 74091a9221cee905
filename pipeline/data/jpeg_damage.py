"""Load JPEG pictures, and find what libjpeg warns of: Pillow hides the warnings, and the pixels are wrong.

simplejpeg decodes with the same library as Pillow, to the same bits, and raises an error for the first warning.
"""

from __future__ import annotations

import io
import re

import simplejpeg
from PIL import Image, JpegImagePlugin

from pipeline.runtime.errors import UserError

MAX_SCANS = 100  # of a JPEG; real ones have up to some twenty, and each is as much work as a picture
MAX_ZEROS = 2  # bytes at the end of a scan; more of them are no codes
MIN_SEGMENT = 4  # bytes, of marker and length
JPEG_END = b"\xff\xd9"
JPEG_SCAN_START = b"\xff\xda"
JPEG_SCAN, JPEG_COMMENT, JPEG_APPLICATIONS = 0xDA, 0xFE, range(0xE0, 0xF0)
JPEG_PROGRESSIVE = (0xC2, 0xCA)
JPEG_FRAMES = (0xC0, 0xC1, 0xC9, *JPEG_PROGRESSIVE)
JPEG_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # one that ends a scan
JPEG_NEXT = re.compile(rb"\xff[^\x00\xff]")  # where a segment may begin
JPEG_SHOWN = re.compile(rb"Adobe|Exif\0\0")  # what begins a segment that says how pixels become colours, and which side is up
JPEG_COLORS = {"L": "GRAY", "RGB": "RGB"}  # a mode of Pillow, and its name in simplejpeg


def load_jpeg(data: bytes, file: JpegImagePlugin.JpegImageFile) -> Image.Image:
    """Return an opened JPEG with its pixels, or with what Pillow needs to load them.

    Args:
        data: the content of the file.
        file: the file as Pillow opened it.

    Raises:
        UserError: the data are damaged or cut short. A missing end marker alone is allowed.
    """
    if file.info.get("progressive") and data.count(JPEG_SCAN_START) > MAX_SCANS:  # perhaps in what follows the picture
        _plain_jpeg(data)
    if file.mode in JPEG_COLORS:
        try:
            pixels = simplejpeg.decode_jpeg(data, JPEG_COLORS[file.mode])
        except ValueError:
            pass  # damage, oddities without harm, or a kind that only Pillow reads
        else:
            if pixels.shape[:2] != file.size[::-1]:
                raise UserError("damaged: it has two sizes")
            file.im = Image.frombuffer(file.mode, file.size, pixels, "raw", file.mode, 0, 1).im
            file.tile = []  # nothing is left to load
            return file
    check_jpeg(data)
    return Image.open(io.BytesIO(data + JPEG_END), formats=("JPEG",))


def check_jpeg(data: bytes) -> None:
    """Look for the warnings of libjpeg that mean wrong pixels, by decoding an eighth of the size.

    The end marker may be missing if all scans are there. libjpeg tells its first warning only, so metadata and parameters that
    decoders ignore are left out before.

    Raises:
        UserError: there is such a warning.
    """
    body, is_complete = _plain_jpeg(data)
    if not is_complete:
        raise UserError("cut short: there are fewer scans than the picture needs")
    try:
        simplejpeg.decode_jpeg(body, "GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1)
    except ValueError as error:
        reason = str(error).rpartition("(): ")[2]
        if reason.startswith(("Corrupt JPEG data", "Premature end", "Inconsistent progression")):
            raise UserError(f"damaged: {reason}") from error


def _check_padding(padding: bytes) -> None:
    """Raise `UserError` if bytes between two segments are one that the picture needs, with a damaged marker."""
    is_segment = len(padding) >= MIN_SEGMENT and int.from_bytes(padding[2:4], "big") == len(padding) - 2
    if is_segment or JPEG_SHOWN.search(padding):
        raise UserError("damaged: there are extraneous bytes before a marker, which are a segment")


def _plain_jpeg(data: bytes) -> tuple[bytes, bool]:
    """Return a JPEG without metadata, and whether it has an end or at least all its scans.

    Bytes between the segments, which some cameras and editors of metadata leave, are left out, too.

    Raises:
        UserError: a segment is cut short, or bytes between two of them are the rest of a third one.
    """
    parts, position, is_sequential, num_scans = [data[:2]], 2, True, 0
    needed: set[tuple[int, int]] = set()  # (component, coefficient) that a scan has to complete
    while position + 2 <= len(data):
        found = JPEG_NEXT.search(data, position)
        if not found:
            break
        _check_padding(data[position : found.start()])
        position, marker = found.start(), data[found.start() + 1]
        if marker == JPEG_END[1]:
            needed.clear()
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end > len(data):
            raise UserError("cut short, or damaged: a segment goes beyond the end of the file")
        segment = data[position:end]
        if marker in JPEG_FRAMES:
            is_sequential = marker not in JPEG_PROGRESSIVE
            needed = {(component, i) for component in segment[10::3] for i in range(64)}
        if marker == JPEG_SCAN:
            segment = segment[:-3] + b"\0\x3f\0" if is_sequential else segment  # some encoders write other parameters
            first, last, bits = segment[-3:]
            if not bits % 16:
                needed -= {(component, i) for component in segment[5:-3:2] for i in range(first, last + 1)}
            found = JPEG_MARKER.search(data, end)
            start, end = end, found.start() if found else len(data)
            codes = data[start:end]
            shorter = codes.rstrip(b"\0")
            if len(codes) - len(shorter) > MAX_ZEROS:
                codes = shorter + b"\0" * shorter.endswith(b"\xff")  # a byte 0xFF of codes is followed by a zero
            segment += codes
            num_scans += 1
            if num_scans > MAX_SCANS:
                raise UserError(f"more than {MAX_SCANS} scans, could be a bomb")
        if not (marker in JPEG_APPLICATIONS or marker == JPEG_COMMENT):
            parts.append(segment)
        position = end
    return b"".join((*parts, JPEG_END)), not needed
