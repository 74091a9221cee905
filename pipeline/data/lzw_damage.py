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
NUMBERS: np.ndarray = np.arange(MAX_CODES)


def check_lzw(data: bytes, most: int) -> None:
    """Check that the codes of a strip or tile give at most `most` bytes; libtiff finds whether they give too few.

    Raises:
        UserError: they give more, or a code is out of range.
    """
    if len(data) < 2 or (data[0] == 0 and data[1] & 1):  # the order of bits of very old programs
        return
    padded = np.frombuffer(data + bytes(2), np.uint8).astype(np.int32)
    words = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]  # the 24 bits from each byte on
    total = position = clears = 0
    while position + 9 <= 8 * len(data):
        codes = _codes(words, position)
        stops = np.flatnonzero((codes == CLEAR) | (codes == END))
        if not len(stops) and len(codes) == MAX_CODES:
            return  # the table is not cleared in time; libtiff reads some of these
        # without an end, the last bits may look like a code
        total, clears = total + _num_bytes(codes[: stops[0]] if len(stops) else codes[:-1]), clears + 1
        if total > most:
            raise UserError("damaged: the codes of a part do not fit the size of the picture")
        if MIN_BYTES * (clears - MAX_CLEARS) > total:
            raise UserError("damaged: almost all codes of a part only clear the table")
        if not len(stops) or codes[stops[0]] == END:
            return
        position += int(ENDS[stops[0]])


def _codes(words: np.ndarray, position: int) -> np.ndarray:
    """Return the codes from a bit on, where the table is empty, up to its size or the end, as if none of them cleared it."""
    count = int(np.searchsorted(ENDS, 8 * len(words) - position, side="right"))
    widths = WIDTHS[:count]
    starts = ENDS[:count] - widths + position
    return words[starts >> 3] >> (24 - widths - (starts & 7)) & ((1 << widths) - 1)


def _num_bytes(codes: np.ndarray) -> int:
    """Return how many bytes codes give: a code of the table gives one more than the code with which it was made."""
    made_by = codes - FIRST
    if (made_by >= NUMBERS[: len(codes)]).any():
        raise UserError("damaged: a code is out of range")
    total, left = len(codes), made_by[made_by >= 0]
    while len(left):  # one byte of each of those that are left, in each turn
        total += len(left)
        left = made_by[left]
        left = left[left >= 0]
    return total
