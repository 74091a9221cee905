"""Every valid picture and animation of the corpus has its right pixels; every other one is refused with the reason."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from media_corpus.animations import ANIMATIONS, REFUSED_ANIMATIONS, AnimationCase, RefusedAnimation
from media_corpus.pictures import PICTURES, REFUSED_PICTURES
from media_corpus.png_pictures import encode_png
from media_corpus.tiffs import Tiff
from media_corpus.values import PictureCase, RefusedPicture
from pipeline.data.media import open_frames, open_image

Case = PictureCase | AnimationCase | RefusedPicture | RefusedAnimation


@cache
def cases(kind: Callable[[], Iterator[Case]]) -> list[Case]:
    return list(kind())


def difference(found: Sequence[Image.Image], expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference of a channel of a pixel; infinity if the sizes differ."""
    pairs = [(np.asarray(image), pixels) for image, pixels in zip(found, expected, strict=True)]
    if any(ours.shape != pixels.shape for ours, pixels in pairs):
        return float("inf")
    return max(float(np.abs(ours - pixels).max()) for ours, pixels in pairs)


@pytest.mark.parametrize("kind", [*PICTURES, *ANIMATIONS])
def test_valid_files_are_right(kind: Callable[[], Iterator[Case]], tmp_path: Path) -> None:
    wrong, path = {}, tmp_path / "x"
    for case in cases(kind):
        path.write_bytes(case.data)
        if isinstance(case, PictureCase):
            by = difference([open_image(path, 9)], [case.pixels])
        else:
            assert isinstance(case, AnimationCase)
            by = difference(open_frames(path, len(case.frames)), case.frames)
        if not by <= case.tolerance:
            wrong[case.name] = by
    assert wrong == {}


@pytest.mark.parametrize("kind", [*REFUSED_PICTURES, *REFUSED_ANIMATIONS])
def test_other_files_are_refused_with_the_reason(kind: Callable[[], Iterator[Case]], tmp_path: Path) -> None:
    path = tmp_path / "x"
    for case in cases(kind):
        assert isinstance(case, RefusedPicture | RefusedAnimation)
        path.write_bytes(case.data)
        with pytest.raises(ValueError, match=f"^x: .*{case.reason}"):
            open_image(path, 9) if isinstance(case, RefusedPicture) else open_frames(path, 5)


def test_sixteen_bits_become_eight_by_one_rule(tmp_path: Path) -> None:
    """Grey and colours, PNG and TIFF, with and without a colour key and alpha: the upper byte, to the bit."""
    grey = (np.arange(2048) * 32 + np.arange(2048) % 32).reshape(32, 64, 1)  # black and white are among them, 3 is not
    rgb, alpha = np.repeat(grey, 3, axis=2), np.full_like(grey, 65535)
    colours = {0: grey, 2: rgb, 4: np.concatenate([grey, alpha], 2), 6: np.concatenate([rgb, alpha], 2)}
    files = [encode_png(samples, kind, 16) for kind, samples in colours.items()]
    files += [
        encode_png(colours[kind], kind, 16, False, (b"tRNS", struct.pack(f">{n}H", *[3] * n))) for kind, n in ((0, 1), (2, 3))
    ]
    files += [Tiff(16, order).encode(grey) for order in "<>"]
    files += [Tiff(16, order, 2, planar=planar).encode(rgb) for order in "<>" for planar in (1, 2)]
    for data in files:
        (tmp_path / "x").write_bytes(data)
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x", 9)), rgb >> 8)


def test_the_corpus_is_large_and_no_kind_is_rare() -> None:
    """At least 800 valid and 100 refused files; 3 refused ones of every kind, which is the name up to its first hyphen."""
    valid = [case.name for kind in (*PICTURES, *ANIMATIONS) for case in cases(kind)]
    refused = [case.name for kind in (*REFUSED_PICTURES, *REFUSED_ANIMATIONS) for case in cases(kind)]
    assert len(valid) >= 800
    assert len(refused) >= 100
    assert len({*valid, *refused}) == len(valid) + len(refused)
    kinds = [name.split("-")[0] for name in refused]
    assert {kind for kind in kinds if kinds.count(kind) < 3} == set()
