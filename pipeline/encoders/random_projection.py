"""A fixed random projection of pixels or of character trigrams: an encoder with no weights to fetch, for tests and dry runs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data.media import open_image
from pipeline.runtime.device import default_device

PIXELS = 16  # side of the thumbnail
BUCKETS = 512  # trigrams are hashed into so many counts


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which modality to read and how wide the features are."""

    modality: Literal["image", "text"] = "image"
    width: int = 32  # features, 1..16384
    seed: int = 0  # of the projection, >= 0

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 16_384 or self.seed < 0:
            raise ValueError(f"random_projection needs width in 1..16384 and seed >= 0, found {self.width} and {self.seed}")


class RandomProjection(nn.Module):
    """tanh(W x) of a thumbnail's pixels or of trigram counts, with W drawn once from a seed."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.modality: Literal["image", "video", "text"] = config.modality
        self.feature_shape: tuple[int, ...] = (config.width,)
        num_inputs = 3 * PIXELS * PIXELS if config.modality == "image" else BUCKETS
        weights = np.random.default_rng(config.seed).standard_normal((num_inputs, config.width)) / np.sqrt(num_inputs)
        self.projection = nn.Parameter(torch.from_numpy(weights.astype(np.float32)))

    def identity(self) -> dict[str, Any]:
        """Modality, width and seed: they decide everything."""
        inputs = f"rgb{PIXELS}-bilinear" if self.modality == "image" else f"trigram-crc32-{BUCKETS}"
        config = self.config
        return {"modality": config.modality, "inputs": inputs, "width": config.width, "seed": config.seed}

    def prepare(self, raw: Path | str) -> Tensor:
        """Pixels [3 * 16 * 16] in -1..1, or log counts of character trigrams [512]; float32."""
        if isinstance(raw, Path):
            return self.prepare_image(open_image(raw, PIXELS))
        text = f"  {raw.lower()}  "
        buckets = [zlib.crc32(text[i : i + 3].encode()) % BUCKETS for i in range(len(text) - 2)]
        return torch.from_numpy(np.log1p(np.bincount(buckets, minlength=BUCKETS)).astype(np.float32))

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Pixels [3 * 16 * 16] of an opened image, in -1..1, float32."""
        thumbnail = image.resize((PIXELS, PIXELS))
        return torch.from_numpy(np.asarray(thumbnail, dtype=np.float32).ravel() / 127.5 - 1.0)

    def forward(self, prepared: Tensor) -> Tensor:
        """Features [B, width] of stacked items."""
        return torch.tanh(prepared.to(self.projection.device) @ self.projection * 4.0)


def build(config: Config) -> RandomProjection:
    """The encoder of a config."""
    return RandomProjection(config).to(default_device())
