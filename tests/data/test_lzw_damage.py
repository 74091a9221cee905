"""The number of bytes that LZW codes of a TIFF give, against what libtiff wrote."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from pipeline.data.lzw_damage import check_lzw
from pipeline.runtime.errors import UserError

RNG = np.random.default_rng(0)
PICTURES = {
    "flat": np.zeros((60, 700), np.uint8),  # the longest runs
    "noise": RNG.integers(0, 256, (60, 700)).astype(np.uint8),
    "few-values": RNG.integers(0, 3, (60, 700)).astype(np.uint8),
    "steps": np.broadcast_to(np.arange(700) // 3 % 256, (60, 700)).astype(np.uint8),
}


@pytest.mark.parametrize("pixels", PICTURES.values(), ids=PICTURES.keys())
@pytest.mark.parametrize("rows", [1, 7, 60])
def test_codes_of_whole_strips_give_exactly_their_bytes(pixels: np.ndarray, rows: int) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", compression="tiff_lzw", tiffinfo={278: rows})
    with Image.open(file) as picture:
        assert isinstance(picture, TiffImagePlugin.TiffImageFile)
        tags = picture.tag_v2
    strips = [file.getvalue()[start : start + size] for start, size in zip(tags[273], tags[279], strict=True)]
    left = pixels.size
    for strip in strips:
        size = min(tags[278] * 700, left)
        left -= size
        check_lzw(strip, size)
        with pytest.raises(UserError, match="do not fit the size"):
            check_lzw(strip, size - 1)
    assert not left


def test_codes_that_only_clear_the_table_take_no_time() -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match="only clear the table"):
        check_lzw(np.packbits(np.tile([1, 0, 0, 0, 0, 0, 0, 0, 0], 800_000)).tobytes(), 2**30)
    assert time.monotonic() - started < 5
