"""A histogram of colours. An example of an encoder of your own.

Copy this file, change it, and give it to any command. Its name is the name of the encoder:

    diffalign extract openmoji --plugin own_encoder.py --encoder own_encoder --set bins=6
    diffalign encoders own_encoder --plugin own_encoder.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.encoders._encoder import Encoder
from pipeline.runtime.settings import Range, Settings


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """What users can set, each with its type, range, meaning and default: --set bins=6."""

    bins: Annotated[int, Range(2, 32), "bins of each colour channel"] = 4
    side: Annotated[int, Range(8, 1024), "pixels of the square that is counted"] = 64


class ColourHistogram(Encoder):
    """Counts how many pixels have which colour, and takes the square root; a network of yours would stand here."""

    Config = Config
    config: Config
    modality = "image"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.drawing_side = config.side  # SVG files are rendered to a square of so many pixels
        self.feature_shape = (config.bins**3,)
        # What is trained in joint training, and what `identity` would name by its sha256, if it came from a file.
        self.scale = nn.Parameter(torch.ones(config.bins**3))

    def identity(self) -> dict[str, Any]:
        """Return everything that can change the features; the cache is named by it, and by the sha256 of this file."""
        return {"bins": self.config.bins, "side": self.config.side}

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return the shares of the colours [bins^3] of an opened image; worker processes do this."""
        pixels = np.asarray(image.resize((self.config.side, self.config.side)), dtype=np.int64).reshape(-1, 3)
        red, green, blue = (pixels * self.config.bins // 256).T
        colour = (red * self.config.bins + green) * self.config.bins + blue
        counts = np.bincount(colour, minlength=self.config.bins**3)
        return torch.from_numpy((counts / len(pixels)).astype(np.float32))

    def forward(self, prepared: Tensor) -> Tensor:
        """Return the features [B,D] of a batch of prepared images; this runs on the GPU, if there is one."""
        return (prepared.to(self.scale) * self.scale.abs() + 1e-12).sqrt()
