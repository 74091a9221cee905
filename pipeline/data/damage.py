"""Find damage in picture files that Pillow would decode without an error.

PNG has checksums (CRC-32 of chunks, Adler-32 of pixels), and so has deflate in TIFF. JPEG, GIF, LZW and PackBits have none, but
damaged codes often do not fit the size of the picture. Other formats are left to their decoders. docs/media.md lists what
can be found, and what nobody can tell.
"""

from __future__ import annotations

import io
import re
import stat
from pathlib import Path

from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from pipeline.data.jpeg_damage import check_jpeg, load_jpeg
from pipeline.data.lzw_damage import check_lzw
from pipeline.data.png_damage import check_png, inflate, without_texts
from pipeline.runtime.errors import UserError

MAX_PICTURE_BYTES = 2**30  # of a file; a larger one is no picture
MAX_PART_BYTES = 2**30  # of a strip or tile of a TIFF
SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "TIFF": re.compile(rb"II\*\0|MM\0\*"),
    "BMP": re.compile(rb"BM"),
}
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
DEFLATE, LZW, PACKBITS, JPEG_IN_TIFF = (8, 32946), (5,), (32773,), (7,)  # values of the tag "Compression"


def check_file(path: Path) -> None:
    """Refuse what is no file with content: reading a pipe or a device may never end.

    Raises:
        UserError: it is not a regular file, or it is empty.
        OSError: it does not exist, or cannot be looked at.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError("not a regular file")
    if not status.st_size:
        raise UserError("the file is empty")


def open_picture(path: Path, formats: tuple[str, ...]) -> Image.Image:
    """Open a file with Pillow, and say more than Pillow if its header is damaged.

    Raises:
        UserError: the header of a picture is damaged or cut short.
        UnidentifiedImageError: the file does not begin as one of these formats.
    """
    try:
        return Image.open(path, formats=formats)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
        return Image.open(io.BytesIO(without_texts(_read(path))), formats=("PNG",))
    except OSError as error:
        if not isinstance(error, UnidentifiedImageError) and str(error) != "could not create decoder object":  # of libwebp
            raise
        with path.open("rb") as file:
            start = file.read(12)
        form = next((form for form, signature in SIGNATURES.items() if form in formats and signature.match(start)), "")
        if form == "PNG":
            check_png(_read(path), all_frames=False)
        if form:
            raise UserError(
                f"it begins as {form}, but its header is damaged, cut short or of a kind that is not supported"
            ) from error
        raise


def load_whole(path: Path, file: Image.Image) -> Image.Image:
    """Load the first picture of a file, and check that its data are whole.

    This is as fast as loading without a check. simplejpeg decodes a JPEG with the same library as Pillow, to the same bits, but
    does not hide the library's warnings. A PNG is inflated here, up to its checksum, and Pillow gets the pixels uncompressed.

    Args:
        path: the file.
        file: the file as Pillow opened it; its pixels are not loaded, and its size has been checked.

    Returns:
        `file`, or another image of it, with the same pixels and metadata.

    Raises:
        UserError: the data are damaged or cut short; with the reason, but without the name of the file.
    """
    if isinstance(file, JpegImagePlugin.JpegImageFile):  # and MPO, which begins with a JPEG
        file = load_jpeg(_read(path), file)
    elif file.format == "PNG":
        uncompressed = check_png(_read(path), all_frames=False)
        file = Image.open(io.BytesIO(uncompressed), formats=("PNG",)) if uncompressed else file
    elif isinstance(file, TiffImagePlugin.TiffImageFile):
        check_tiff(path, file.tag_v2)
    try:
        file.load()
    except OSError as error:
        if str(error).startswith("decoder error"):  # of libtiff
            raise UserError("damaged: the compressed pixels cannot be decoded") from error
        raise
    return file


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise UserError(f"the file of a picture has at most {MAX_PICTURE_BYTES} bytes")
    return path.read_bytes()


def check_tiff(path: Path, tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    """Check the parts (strips or tiles) of the first picture of a TIFF, as far as libtiff does not."""
    compression, tables = tags.get(259, 1), tags.get(347, b"")
    offsets, lengths = (tags.get(324), tags.get(325)) if 324 in tags else (tags.get(273), tags.get(279))
    if compression not in (*DEFLATE, *LZW, *PACKBITS, *JPEG_IN_TIFF) or offsets is None or lengths is None:
        return
    most = min(_part_bytes(tags), MAX_PART_BYTES)
    parts = {(offset, length) for offset, length in zip(offsets, lengths, strict=False) if length}  # equal ones may be shared
    if sum(length for _, length in parts) > path.stat().st_size:
        raise UserError("damaged or cut short: its parts do not fit into the file")
    with path.open("rb") as file:
        for offset, length in sorted(parts):
            file.seek(offset)
            part = file.read(length)
            if tags.get(266) == 2 and compression not in JPEG_IN_TIFF:  # the lowest bit comes first
                part = part.translate(REVERSED_BITS)
            if compression in DEFLATE:
                _, is_whole = inflate(part, most)  # libtiff finds whether it is too short
                if not is_whole:
                    raise UserError("damaged or cut short: the compressed pixels do not fit the size of the picture")
            elif compression in LZW:
                check_lzw(part, most)
            elif compression in PACKBITS:
                _check_packbits(part, most)
            else:
                check_jpeg(tables[:-2] + part[2:] if tables else part)


def _part_bytes(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    """Return the largest number of bytes of a part of a TIFF, before compression."""
    width, height = tags[256], tags[257]
    columns, rows = (tags[322], tags[323]) if 324 in tags else (width, min(tags.get(278, height), height))
    bits = tags.get(258, (1,))
    samples = tags.get(277, 1) if tags.get(284, 1) == 1 else 1
    return rows * ((columns * samples * max(bits) + 7) // 8)


def _check_packbits(part: bytes, most: int) -> None:
    """Check that runs do not give more bytes than a part holds; libtiff finds whether they give too few."""
    position = total = 0
    while position < len(part) and total < most:
        length = part[position]
        total += length + 1 if length < 128 else 257 - length if length > 128 else 0
        position += length + 2 if length < 128 else 2 if length > 128 else 1
    if total > most or position > len(part):
        raise UserError("damaged: the runs of pixels do not fit the size of the picture")
