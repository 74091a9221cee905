"""The preprocessing of an exported run as Hugging Face's preprocessor_config.json says it, and the same read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from pipeline.data.media import open_frames, open_image
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._weights import image_to_uint8
from pipeline.runtime.errors import UserError

PREPROCESSING = "preprocessor_config.json"
RESAMPLING = {
    InterpolationMode.NEAREST: 0,
    InterpolationMode.LANCZOS: 1,
    InterpolationMode.BILINEAR: 2,
    InterpolationMode.BICUBIC: 3,
}
Prepare = Callable[[Path], Tensor]


def write_preprocessing(encoder: Encoder, folder: Path) -> None:
    """Write how an encoder prepares its pictures; scaling and normalisation are in the graph, where the encoder does them.

    Raises:
        UserError: it prepares them in a way that such a file cannot say.
    """
    image = getattr(encoder, "image", encoder)  # of `frames`, the encoder of each frame
    processor = getattr(image, "processor", None)
    facts = json.loads(processor.to_json_string()) if processor else _describe(image)
    frames = {"num_frames": encoder.config.num_frames} if encoder.modality == "video" else {}
    (folder / PREPROCESSING).write_text(
        json.dumps({**facts, "drawing_side": image.drawing_side, **frames}, indent=1), encoding="utf-8"
    )
    prepare = _image_preparation(folder)
    rng = np.random.default_rng(0)
    for shape in ((61, 43, 3), (300, 517, 3)):
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        try:
            is_same = torch.equal(prepare(picture), image.prepare_image(picture))
        except (NotImplementedError, RuntimeError, TypeError):
            is_same = False
        if not is_same:
            raise _own_way(image)


def read_preprocessing(folder: Path) -> Prepare:
    """Return the function that prepares a picture, or the frames of a clip, for the graph of an exported run."""
    facts = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))
    prepare, num_frames = _image_preparation(folder), facts.get("num_frames", 0)
    if num_frames:
        return lambda path: torch.stack([prepare(frame) for frame in open_frames(path, num_frames)])
    return lambda path: prepare(open_image(path, facts["drawing_side"]))


def _own_way(encoder: Encoder) -> UserError:
    name = type(encoder).__name__
    return UserError(
        f"{name} prepares {encoder.modality}s in a way of its own, which {PREPROCESSING} cannot say: it cannot be exported"
    )


def _describe(encoder: Encoder) -> dict[str, Any]:
    """Return the resizing and the crop of an encoder that does both with torchvision."""
    transform = getattr(encoder, "resize", None) or getattr(encoder, "transform", None)
    facts: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False}
    facts |= {"do_rescale": False, "do_normalize": False, "do_convert_rgb": True}
    for step in getattr(transform, "transforms", ()):
        kind = type(step).__name__
        if kind == "Resize" and not facts["do_center_crop"] and step.interpolation in RESAMPLING:
            facts |= {"do_resize": True, "size": _size(step.size), "resample": RESAMPLING[step.interpolation]}
        elif kind == "CenterCrop":
            facts |= {"do_center_crop": True, "crop_size": _size([*_sides(step.size), *_sides(step.size)][:2])}
        elif kind != "MaybeConvertMode":  # OpenCLIP's step to RGB, which pictures are when they are opened
            raise _own_way(encoder)
    if not (facts["do_resize"] or facts["do_center_crop"]):
        raise _own_way(encoder)
    return facts


def _sides(size: int | Sequence[int]) -> list[int]:
    return [size] if isinstance(size, int) else list(size)


def _size(size: int | Sequence[int]) -> dict[str, int]:
    sides = _sides(size)
    return {"shortest_edge": sides[0]} if len(sides) == 1 else {"height": sides[0], "width": sides[1]}


def _image_preparation(folder: Path) -> Callable[[Image.Image], Tensor]:
    facts: Mapping[str, Any] = json.loads((folder / PREPROCESSING).read_text(encoding="utf-8"))
    if facts.get("do_rescale") or facts.get("do_normalize"):
        from transformers import AutoImageProcessor

        processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]
    modes = {number: mode for mode, number in RESAMPLING.items()}

    def prepare(image: Image.Image) -> Tensor:
        changed: Any = image
        if facts["do_resize"]:
            changed = resize(changed, list(facts["size"].values()), modes[facts["resample"]])
        if facts["do_center_crop"]:
            changed = center_crop(changed, list(facts["crop_size"].values()))
        return image_to_uint8(changed)

    return prepare
