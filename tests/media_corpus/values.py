"""What the cases of the corpus are made of: values in 0..1, and how they look on white."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 11, 17  # odd, so that rows of few bits end within a byte


class PictureCase(NamedTuple):
    """A valid picture."""

    name: str  # kind/what is special.suffix
    data: bytes
    pixels: np.ndarray  # [height, width, 3], 0..255, on white
    tolerance: float = 1.0


class RefusedPicture(NamedTuple):
    """A picture that must end in the failure list."""

    name: str
    data: bytes
    reason: str  # part of it


def unit(channels: int, seed: int = 0) -> np.ndarray:
    """Random values in 0..1, [HEIGHT, WIDTH, channels], black and white among them."""
    values = np.random.default_rng(seed).random((HEIGHT, WIDTH, channels))
    values[0, 0], values[-1, -1] = 0, 1
    return values


def whole(values: np.ndarray, bits: int) -> np.ndarray:
    """Values in 0..1 as whole numbers of this many bits."""
    return np.rint(values * (2**bits - 1)).astype(np.int64)


def shown(values: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
    """Values in 0..1, one or three channels, on white, as 0..255."""
    colours = np.broadcast_to(values, (*values.shape[:2], 3))
    return 255 * (colours if alpha is None else colours * alpha + 1 - alpha)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels as they are to be shown, by the table of the EXIF standard: where row 0 and column 0 of the file lie."""
    operations: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,  # top, left
        2: lambda a: a[:, ::-1],  # top, right
        3: lambda a: a[::-1, ::-1],  # bottom, right
        4: lambda a: a[::-1],  # bottom, left
        5: lambda a: a.transpose(1, 0, 2),  # left, top
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],  # right, top
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: lambda a: a.transpose(1, 0, 2)[::-1],  # left, bottom
    }
    return operations[orientation](pixels)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def smooth() -> np.ndarray:
    """Colours that lossy formats keep nearly as they are, [48, 64, 3]."""
    y, x = np.mgrid[:48, :64] / 64
    return np.stack([255 * x, 255 * y, 128 + 64 * np.sin(3 * x)], axis=2)
