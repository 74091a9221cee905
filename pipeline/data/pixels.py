"""What holds for the pixels of all media: how large a picture may be, and that transparent parts become white."""

from __future__ import annotations

import math

from PIL import Image

from pipeline.runtime.errors import UserError

# Longer side over shorter side. Encoders scale the shorter side to some hundred pixels, however long the other one is.
MAX_ASPECT_RATIO = 100
MAX_CLIP_PIXELS = 2**34  # of all frames of an animation: some minutes of work, and 50,000 frames of 640 x 480
WHITE = (255, 255, 255)


def check_size(width: int, height: int) -> None:
    """Raise `UserError` if a picture of `width` x `height` pixels is too large or too narrow."""
    check_area(width, height)
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UserError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def check_area(width: int, height: int) -> None:
    """Raise `UserError` if a picture of `width` x `height` pixels has more pixels than Pillow allows, or none."""
    if width < 1 or height < 1:
        raise UserError(f"{width} x {height} pixels: there is no picture in it")
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise UserError(f"{width} x {height} pixels exceed Pillow's limit, could be a bomb")


def on_white(image: Image.Image) -> Image.Image:
    """Return a picture as RGB; transparent parts become white."""
    if image.mode.startswith("I;16"):
        image = upper_bytes(image)
    if image.mode in ("I", "F"):  # it would clip, too; no reader of a format gives one
        raise UserError(f"samples of a kind that is not supported: {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*WHITE, 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def upper_bytes(image: Image.Image) -> Image.Image:
    """Return a grey picture of 16 bits as one of 8: its upper bytes, as Pillow does with colours."""
    return image.point(lambda value: value / 256).convert("L")


def check_clip(num_pixels: int) -> None:
    """Raise `UserError` if the frames of an animation have too many pixels together: a small file may hold thousands."""
    if num_pixels > MAX_CLIP_PIXELS:
        raise UserError(f"its frames have more than {MAX_CLIP_PIXELS} pixels together, could be a bomb")
