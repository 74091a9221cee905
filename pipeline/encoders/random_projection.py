"""A fixed random projection of pixels or character trigrams: an encoder without weights to download, for tests and dry runs."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.encoders._encoder import Encoder
from pipeline.runtime.device import default_device
from pipeline.runtime.environment import set_environment
from pipeline.runtime.settings import Range, Settings

THUMBNAIL_SIDE = 16  # pixels
NUM_BUCKETS = 512  # trigrams are counted by their hash modulo this number


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which modality to read, and how wide the features are."""

    modality: Annotated[Literal["image", "text"], "what to read"] = "image"
    width: Annotated[int, Range(1, 16_384), "number of features"] = 32
    seed: Annotated[int, Range(0), "of the projection"] = 0


class RandomProjection(Encoder):
    """tanh(4 W x), where x is a thumbnail's pixels or trigram counts, and W is drawn once from a seed."""

    Config = Config
    config: Config
    drawing_side = THUMBNAIL_SIDE

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        set_environment()
        self.modality, self.feature_shape = config.modality, (config.width,)
        num_inputs = 3 * THUMBNAIL_SIDE * THUMBNAIL_SIDE if config.modality == "image" else NUM_BUCKETS
        weights = np.random.default_rng(config.seed).standard_normal((num_inputs, config.width)) / np.sqrt(num_inputs)
        self.projection = nn.Parameter(torch.from_numpy(weights.astype(np.float32)).to(default_device()))

    def identity(self) -> dict[str, Any]:
        """Return modality, inputs, width and seed; nothing else changes the features."""
        inputs = f"rgb{THUMBNAIL_SIDE}-bilinear" if self.modality == "image" else f"trigram-crc32-{NUM_BUCKETS}"
        config = self.config
        return {"modality": config.modality, "inputs": inputs, "width": config.width, "seed": config.seed}

    def prepare(self, raw: Path | str) -> Tensor:
        """Return pixels [3 * 16 * 16] in -1..1, or log(1 + count) of character trigrams [512]; float32."""
        if self.modality == "image":
            return super().prepare(raw)
        text = f"  {str(raw).lower()}  "
        buckets = [zlib.crc32(text[i : i + 3].encode()) % NUM_BUCKETS for i in range(len(text) - 2)]
        return torch.from_numpy(np.log1p(np.bincount(buckets, minlength=NUM_BUCKETS)).astype(np.float32))

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return the pixels [3 * 16 * 16] of an opened image, float32 in -1..1."""
        thumbnail = image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        return torch.from_numpy(np.asarray(thumbnail, dtype=np.float32).ravel() / 127.5 - 1.0)

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features [B, width] of prepared items [B, ...]."""
        return torch.tanh(prepared.to(self.projection.device) @ self.projection * 4.0)
