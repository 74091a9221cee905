"""Corruptions do to pixels what their table says, in strengths that grow, and are functions of sample, kind and strength."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from torchvision.transforms.v2 import InterpolationMode, Resize

from pipeline.data.corruptions import CORRUPTED_SIDE, CORRUPTION_LEVELS, STRENGTHS, Corruption, all_corruptions, corrupt
from pipeline.runtime.errors import UserError


@cache
def picture(height: int = 90, width: int = 120) -> Image.Image:
    """Smooth shapes of many colours: neighbouring pixels are alike, as in photographs."""
    noise = np.random.default_rng(3).uniform(size=(height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (6, 6, 0))
    return Image.fromarray((255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8))


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def changed(image: Image.Image, kind: str, strength: int, sample_id: str = "sample") -> np.ndarray:
    (copy,) = corrupt([image], Corruption(kind, strength), sample_id)
    assert copy.mode == "RGB"
    return pixels_of(copy)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_noise_has_the_standard_deviation_of_its_level(strength: int) -> None:
    """On grey, measured; where a pixel would leave 0..255, the moments are those of a censored normal distribution."""
    sigma = 255 * Corruption("noise", strength).level
    noise = changed(Image.new("RGB", (250, 200), (128, 128, 128)), "noise", strength) - 128
    draws = np.clip(np.random.default_rng(0).normal(0, sigma, 400_000), -128, 127)
    assert noise.std() == pytest.approx(draws.std(), rel=0.01)
    assert abs(noise.mean() - draws.mean()) < 4 * sigma / np.sqrt(noise.size)
    if strength == 1:
        assert noise.std() == pytest.approx(sigma, rel=0.01)
    neighbours = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in ((noise[1:], noise[:-1]), (noise[..., 0], noise[..., 1]))]
    assert np.abs(neighbours).max() < 0.02


@pytest.mark.parametrize("strength", STRENGTHS)
def test_blur_is_a_gaussian_filter_of_a_share_of_the_shorter_side(strength: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8))
    sigma = Corruption("blur", strength).level * 160
    expected = ndimage.gaussian_filter(pixels_of(image), (sigma, sigma, 0), mode="nearest")
    inner = (slice(20, -20), slice(20, -20))
    difference = (changed(image, "blur", strength) - expected)[inner]  # Pillow's filter is three box filters
    assert difference.std() < 0.15 * expected[inner].std() + 0.5
    assert abs(difference.mean()) < 0.6


@pytest.mark.parametrize("strength", STRENGTHS)
def test_brightness_is_added_and_contrast_shrinks_the_distance_to_the_mean_colour(strength: int) -> None:
    pixels = pixels_of(picture())
    brighter = pixels + 255 * CORRUPTION_LEVELS["brightness"][strength - 1]
    assert np.abs(changed(picture(), "brightness", strength) - np.minimum(brighter, 255)).max() <= 0.501
    factor, mean = CORRUPTION_LEVELS["contrast"][strength - 1], pixels.mean(axis=(0, 1))
    assert np.abs(changed(picture(), "contrast", strength) - (factor * pixels + (1 - factor) * mean)).max() <= 0.501


@pytest.mark.parametrize("strength", STRENGTHS)
def test_jpeg_is_what_pillow_saves_with_this_quality(strength: int) -> None:
    file = io.BytesIO()
    picture().save(file, format="jpeg", quality=(25, 18, 12, 8, 5)[strength - 1])
    assert np.array_equal(changed(picture(), "jpeg", strength), pixels_of(Image.open(file)))


@pytest.mark.parametrize("size", [(120, 90), (31, 200), (2, 3)])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_occlusion_covers_its_share_with_one_rectangle_inside_the_picture(strength: int, size: tuple[int, int]) -> None:
    image, corners = Image.new("RGB", size, (10, 200, 30)), set()
    for number in range(40):
        copy = changed(image, "occlusion", strength, f"sample {number}")
        covered = (copy == 128).all(axis=2)
        assert np.array_equal(copy[~covered], pixels_of(image)[~covered])
        rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
        assert covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert covered.sum() == len(rows) * len(columns)
        if min(size) > 30:
            assert covered.mean() == pytest.approx(CORRUPTION_LEVELS["occlusion"][strength - 1], rel=0.12)
        corners.add((rows[0], columns[0]))
    if min(size) > 30:
        assert len(corners) > 20


@pytest.mark.parametrize("kind", CORRUPTION_LEVELS)
def test_a_higher_strength_changes_more(kind: str) -> None:
    before = pixels_of(picture())
    amounts = [np.abs(changed(picture(), kind, strength) - before).mean() for strength in STRENGTHS]
    if kind == "occlusion":  # how much is lost depends on the place
        amounts = [float(((changed(picture(), kind, strength) == 128).all(axis=2)).sum()) for strength in STRENGTHS]
    assert amounts == sorted(amounts)
    assert len(set(amounts)) == 5


def test_random_numbers_are_those_of_sample_kind_and_strength_in_any_order() -> None:
    cases = [(each, sample_id) for each in all_corruptions(["noise", "occlusion"]) for sample_id in ("a", "b", "ä/1")]

    def all_copies(order: Sequence[int]) -> dict[int, bytes]:
        return {place: corrupt([picture()], cases[place][0], cases[place][1])[0].tobytes() for place in order}

    first = all_copies(range(len(cases)))
    assert all_copies(range(len(cases) - 1, -1, -1)) == first
    assert len(set(first.values())) == len(cases)
    noise = [changed(Image.new("RGB", (40, 40), (128,) * 3), "noise", strength) - 128 for strength in (1, 2)]
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1


def test_frames_of_a_clip_have_noise_of_their_own_and_one_rectangle() -> None:
    frames = [picture()] * 3
    noisy = [pixels_of(copy) for copy in corrupt(frames, Corruption("noise", 3), "clip")]
    assert all(np.abs(a - b).mean() > 5 for a, b in itertools.combinations(noisy, 2))
    for kind in set(CORRUPTION_LEVELS) - {"noise"}:
        copies = [copy.tobytes() for copy in corrupt(frames, Corruption(kind, 3), "clip")]
        assert copies == [corrupt([picture()], Corruption(kind, 3), "clip")[0].tobytes()] * 3


@pytest.mark.parametrize(("size", "side", "expected"), [((600, 301), 0, 256), ((301, 600), 320, 301), ((900, 700), 320, 320)])
def test_large_pictures_are_reduced_to_what_the_encoder_reads(size: tuple[int, int], side: int, expected: int) -> None:
    image = picture(*size[::-1])
    (copy,) = corrupt([image], Corruption("brightness", 1), "sample", side)
    reduced = pixels_of(Resize([expected], InterpolationMode.BICUBIC)(image)) if min(size) > expected else pixels_of(image)
    assert np.abs(pixels_of(copy) - np.minimum(reduced + 25.5, 255)).max() <= 0.501
    assert CORRUPTED_SIDE == 256


def test_names_of_corruptions_and_their_evaluations() -> None:
    assert [each.name for each in all_corruptions()] == [f"{kind}{k}" for kind in CORRUPTION_LEVELS for k in range(1, 6)]
    assert all_corruptions(["jpeg", "blur"], [5, 1]) == [
        Corruption(*each) for each in itertools.product(("blur", "jpeg"), (1, 5))
    ]
    corruption = Corruption("noise", 3)
    assert [corruption.evaluation(name) for name in ("test", "val@draws=8")] == ["test~noise3", "val~noise3@draws=8"]
    assert Corruption.of_identity({"corruption": corruption.identity()}) == corruption
    with pytest.raises(UserError, match=r"unknown corruption 'nose'; choose one of: noise, .*did you mean 'noise'"):
        all_corruptions(["nose"])
    for strengths in ([], [0], [1, 6]):
        with pytest.raises(UserError, match="--strengths takes some of 1, 2, 3, 4, 5"):
            all_corruptions([], strengths)
