"""Find how many bytes the LZW codes of a TIFF give: libtiff stops when it has enough, and does not see that codes are left."""

from __future__ import annotations

import numpy as np

from pipeline.runtime.errors import UserError

CLEAR, END, FIRST = 256, 257, 258  # codes; the first one of the table
MAX_CODES = 4096  # of a table; there is a code for "clear" before it is full
MIN_BYTES, MAX_CLEARS = 64, 1000  # that many bytes a table gives on average, apart from so many tables
# The width in bits of each code after a "clear": a code is one bit longer when the table is about to need it.
WIDTHS: np.ndarray = 9 + np.searchsorted([512 - FIRST, 1024 - FIRST, 2048 - FIRST], np.arange(MAX_CODES), side="right")
ENDS: np.ndarray = np.cumsum(WIDTHS)  # in bits


def check_lzw(data: bytes, most: int) -> None:
    """Check that the codes of a strip or tile give at most `most` bytes; libtiff finds whether they give too few.

    Raises:
        UserError: they give more, or a code is out of range.
    """
    if len(data) < 2 or (data[0] == 0 and data[1] & 1):  # the order of bits of very old programs
        return
    total = position = clears = 0
    while position + 9 <= 8 * len(data):
        codes = _codes(_bits(data, position))
        stops = np.flatnonzero((codes == CLEAR) | (codes == END))
        if not len(stops) and len(codes) == MAX_CODES:
            return  # the table is not cleared in time; libtiff reads some of these
        # without an end, the last bits may look like a code
        lengths = _lengths(codes[: stops[0]] if len(stops) else codes[:-1])
        total, clears = total + int(lengths.sum()), clears + 1
        if total > most:
            raise UserError("damaged: the codes of a part do not fit the size of the picture")
        if MIN_BYTES * (clears - MAX_CLEARS) > total:
            raise UserError("damaged: almost all codes of a part only clear the table")
        if not len(stops) or codes[stops[0]] == END:
            return
        position += int(ENDS[stops[0]])


def _bits(data: bytes, position: int) -> np.ndarray:
    """Return the bits from a position on, as many as the codes of a table have at most."""
    start = position // 8
    part = np.frombuffer(data, np.uint8, min(len(data) - start, int(ENDS[-1]) // 8 + 1), start)
    return np.unpackbits(part)[position % 8 :]


def _codes(bits: np.ndarray) -> np.ndarray:
    """Return the codes of bits that begin where the table is empty, as if none of them cleared it."""
    count = int(np.searchsorted(ENDS, len(bits), side="right"))
    codes = np.zeros(count, np.int64)
    for width in (9, 10, 11, 12):
        chosen = np.flatnonzero(WIDTHS[:count] == width)
        if len(chosen):
            start, end = int(ENDS[chosen[0]]) - width, int(ENDS[chosen[-1]])
            codes[chosen] = bits[start:end].reshape(-1, width) @ (1 << np.arange(width - 1, -1, -1))
    return codes


def _lengths(codes: np.ndarray) -> np.ndarray:
    """Return how many bytes each code gives: a code of the table gives one more than the code with which it was made."""
    made_by = codes - FIRST
    is_entry = made_by >= 0
    if (made_by[is_entry] >= np.flatnonzero(is_entry)).any():
        raise UserError("damaged: a code is out of range")
    numbers = np.arange(len(codes))
    lengths, source = is_entry.astype(np.int64), np.where(is_entry, made_by, numbers)
    while (source != source[source]).any():  # each turn doubles the way that is gone
        lengths, source = lengths + lengths[source], source[source]
    return lengths + 1
