"""Any image encoder over uniformly sampled frames of a clip: the mean of its features over the frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data.media import SAMPLING, open_frames
from pipeline.types import Encoder


class ImageEncoder(Encoder, Protocol):
    """An encoder of images that also takes an image that is open already."""

    def prepare_image(self, image: Image.Image) -> Tensor:
        """What `prepare` gives for a file with this image in it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which image encoder looks at how many frames; whoever builds `frames` builds that encoder too (pipeline/encoding.py)."""

    encoder: str = "efficientnet_lite"  # the name of an image encoder
    settings: str = ""  # of that encoder: KEY=VALUE,KEY=VALUE
    weights: str = ""  # of that encoder; empty: its own default
    num_frames: int = 8  # 1..256

    def __post_init__(self) -> None:
        if not 1 <= self.num_frames <= 256:
            raise ValueError(f"num_frames must be in 1..256, found {self.num_frames}")


class Frames(nn.Module):
    """An image encoder applied to every sampled frame; gradients reach it."""

    modality: Literal["image", "video", "text"] = "video"

    def __init__(self, config: Config, image: ImageEncoder) -> None:
        super().__init__()
        self.config = config
        self.image = image
        self.feature_shape: tuple[int, ...] = image.feature_shape

    def identity(self) -> dict[str, Any]:
        """The image encoder's name and identity, the number of frames and which ones they are."""
        config = self.config
        image = {"name": config.encoder, **self.image.identity()}
        return {"image": image, "num_frames": config.num_frames, "sampling": SAMPLING, "pooling": "mean"}

    def prepare(self, raw: Path | str) -> Tensor:
        """The prepared frames [F, …], stacked."""
        return torch.stack([self.image.prepare_image(frame) for frame in open_frames(Path(raw), self.config.num_frames)])

    def forward(self, prepared: Tensor) -> Tensor:
        """Features float32 [B, *shape] of frames [B, F, …]; one frame of every clip at a time, as much as a batch of images."""
        return torch.stack([self.image(frames_B) for frames_B in prepared.unbind(dim=1)]).mean(dim=0)


def build(config: Config, image: ImageEncoder) -> Frames:
    """The encoder of a config around an image encoder; `ValueError` when that encoder reads something else."""
    if image.modality != "image":
        raise ValueError(f"frames takes an image encoder; {config.encoder} reads {image.modality}")
    return Frames(config, image)
