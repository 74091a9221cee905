"""Any image encoder applied to uniformly sampled frames of a clip; the feature is the mean over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.data.media import FRAME_SAMPLING, open_frames
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import build_encoder, parse_settings
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import Range, Settings


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which image encoder is applied to how many frames."""

    encoder: Annotated[str, "the name of an image encoder"] = "efficientnet_lite"
    settings: Annotated[str, "settings of the image encoder: KEY=VALUE,KEY=VALUE"] = ""
    weights: Annotated[str, "weights of the image encoder; empty: its own default"] = ""
    num_frames: Annotated[int, Range(1, 256), "sampled frames per clip"] = 8


class Frames(Encoder):
    """An image encoder applied to every sampled frame; gradients flow into the image encoder."""

    Config = Config
    config: Config
    modality = "video"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        weights = {"weights": config.weights} if config.weights else {}
        self.image = build_encoder(config.encoder, parse_settings(config.settings) | weights)
        if self.image.modality != "image":
            raise UserError(f"frames takes an image encoder; {config.encoder} reads {self.image.modality}")
        self.feature_shape = self.image.feature_shape
        self.drawing_side = getattr(self.image, "drawing_side", 0)  # of no use to a clip but for its corrupted copies

    def identity(self) -> dict[str, Any]:
        """Return the name and identity of the image encoder, the number of frames, and how they are sampled."""
        config = self.config
        image = {"name": config.encoder, **self.image.identity()}
        return {"image": image, "num_frames": config.num_frames, "sampling": FRAME_SAMPLING, "pooling": "mean"}

    def open_pictures(self, path: Path) -> list[Image.Image]:
        """Return the sampled frames of a clip."""
        return open_frames(path, self.config.num_frames)

    def prepare_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the prepared frames [F, ...], stacked."""
        return torch.stack([self.image.prepare_image(frame) for frame in pictures])

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B, *shape] of frames [B, F, ...].

        The image encoder gets one frame of every clip at a time, so memory is that of a batch of images.
        """
        return torch.stack([self.image(frames_B) for frames_B in prepared.unbind(dim=1)]).mean(dim=0)
