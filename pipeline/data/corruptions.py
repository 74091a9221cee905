"""Corruptions of pictures in five strengths, after ImageNet-C (Hendrycks & Dietterich 2019), with levels of our own.

Every corruption works on RGB pixels 0..255 before an encoder's preprocessing. What has a size is a share of the picture's, so
that large and small pictures suffer alike. The random numbers of a picture are a function of (sample id, kind, strength), so
a corrupted copy is the same on every machine, in every order. docs/robustness.md has the levels as a table.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json

CORRUPTION_LEVELS: Mapping[str, tuple[float, ...]] = {  # kind -> its level at the strengths 1 to 5
    "noise": (0.05, 0.10, 0.15, 0.25, 0.40),  # standard deviation of Gaussian noise, as a share of the range of pixels
    "blur": (0.005, 0.01, 0.015, 0.02, 0.03),  # standard deviation of a Gaussian, as a share of the shorter side
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to every pixel, as a share of their range
    "contrast": (0.5, 0.35, 0.25, 0.15, 0.08),  # factor of the distance to the mean colour
    "jpeg": (25, 18, 12, 8, 5),  # quality of Pillow's JPEG
    "occlusion": (0.05, 0.10, 0.15, 0.20, 0.30),  # share of the area under a grey rectangle at a random place
}
STRENGTHS = (1, 2, 3, 4, 5)
CORRUPTED_SIDE = 256  # pixels; larger pictures are reduced to this shorter side first, as encoders of this size do anyhow
OCCLUSION_GREY = 128
CORRUPTION_RECIPE = 1  # raised whenever the same picture would be corrupted in another way

Change = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, slots=True)
class Corruption:
    """One kind of corruption in one strength, 1 to 5."""

    kind: str
    strength: int

    @property
    def name(self) -> str:
        """The kind and the strength in one word: "noise3"."""
        return f"{self.kind}{self.strength}"

    @property
    def level(self) -> float:
        """The strength in the unit of the kind, see `CORRUPTION_LEVELS`."""
        return CORRUPTION_LEVELS[self.kind][self.strength - 1]

    @staticmethod
    def of_identity(identity: Mapping[str, Any]) -> Corruption:
        """Return the corruption in the identity of a cache of corrupted copies."""
        return Corruption(identity["corruption"]["kind"], identity["corruption"]["strength"])

    def identity(self) -> dict[str, Any]:
        """Return everything that can change the corrupted pixels, as plain JSON values."""
        return {"kind": self.kind, "strength": self.strength, "level": self.level, "recipe": CORRUPTION_RECIPE}

    def evaluation(self, clean: str) -> str:
        """Return the name of an evaluation on copies with this corruption: "test~noise3@draws=8" for "test@draws=8"."""
        split, at, settings = clean.partition("@")
        return f"{split}~{self.name}{at}{settings}"


def all_corruptions(kinds: Sequence[str] = (), strengths: Sequence[int] = STRENGTHS) -> list[Corruption]:
    """Return every kind in every strength, in the order of the table.

    Args:
        kinds: Some of `CORRUPTION_LEVELS`; (): all of them.
        strengths: Some of 1 to 5.

    Raises:
        UserError: there is no such kind or strength.
    """
    for kind in kinds:
        if kind not in CORRUPTION_LEVELS:
            raise unknown_choice(kind, f"unknown corruption {kind!r}", list(CORRUPTION_LEVELS))
    if not strengths or not set(strengths) <= set(STRENGTHS):
        raise UserError(f"--strengths takes some of {', '.join(map(str, STRENGTHS))}, not {', '.join(map(str, strengths))}")
    chosen = [kind for kind in CORRUPTION_LEVELS if kind in kinds or not kinds]
    return [Corruption(kind, strength) for kind in chosen for strength in sorted(set(strengths))]


def corrupt(pictures: Sequence[Image.Image], corruption: Corruption, sample_id: str, side: int = 0) -> list[Image.Image]:
    """Return corrupted copies of the picture, or of the frames of the clip, of a sample.

    Noise differs from frame to frame; a rectangle stays where it is.

    Args:
        pictures: RGB.
        corruption: What is done to them.
        sample_id: The sample, whose random numbers are used.
        side: The shorter side in pixels that an encoder reduces pictures to. A larger picture is reduced to it, or to
            `CORRUPTED_SIDE` if that is larger, so that noise reaches the encoder and is not averaged away.
    """
    digest = hashlib.sha256(canonical_json([sample_id, corruption.kind, corruption.strength]).encode()).digest()
    change = _CHANGES[corruption.kind](corruption.level, np.random.default_rng(int.from_bytes(digest, "little")))
    return [change(_reduce(picture, max(side, CORRUPTED_SIDE))) for picture in pictures]


def _reduce(picture: Image.Image, side: int) -> Image.Image:
    shorter = min(picture.size)
    if shorter <= side:
        return picture
    width, height = (int(side * length / shorter) for length in picture.size)  # rounded as torchvision does
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _on_pixels(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Return a change of pixels float32 [H,W,3] as one of pictures: its results are rounded and clipped to 0..255."""

    def apply(picture: Image.Image) -> Image.Image:
        changed = change(np.asarray(picture.convert("RGB"), dtype=np.float32))
        return Image.fromarray(np.clip(np.rint(changed), 0, 255).astype(np.uint8))

    return apply


def _noise(level: float, rng: np.random.Generator) -> Change:
    return _on_pixels(lambda pixels: pixels + 255 * level * rng.standard_normal(pixels.shape, dtype=np.float32))


def _blur(level: float, rng: np.random.Generator) -> Change:
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(level * min(picture.size)))


def _brightness(level: float, rng: np.random.Generator) -> Change:
    return _on_pixels(lambda pixels: pixels + 255 * level)


def _contrast(level: float, rng: np.random.Generator) -> Change:
    def change(pixels: np.ndarray) -> np.ndarray:
        mean = pixels.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
        return mean + level * (pixels - mean)

    return _on_pixels(change)


def _jpeg(level: float, rng: np.random.Generator) -> Change:
    def change(picture: Image.Image) -> Image.Image:
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=int(level))
        with Image.open(data, formats=("JPEG",)) as file:
            return file.convert("RGB")

    return change


def _occlusion(level: float, rng: np.random.Generator) -> Change:
    place = rng.random(2)  # of the rectangle's corner among all places where it is inside, each 0..1

    def change(picture: Image.Image) -> Image.Image:
        lengths = [max(1, round(level**0.5 * length)) for length in picture.size]
        left, top = (int(share * (whole - own + 1)) for share, whole, own in zip(place, picture.size, lengths, strict=True))
        copy = picture.copy()
        copy.paste((OCCLUSION_GREY,) * 3, (left, top, left + lengths[0], top + lengths[1]))
        return copy

    return change


_CHANGES: Mapping[str, Callable[[float, np.random.Generator], Change]] = {
    "noise": _noise,
    "blur": _blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "jpeg": _jpeg,
    "occlusion": _occlusion,
}
