"""The branch of a modality, which the rivals share: standardised features, and one linear layer with an activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.feature_space import paired_text
from pipeline.nn.layers import Dropout, ScaleMode, Standardise
from pipeline.nn.losses import LabelLoss
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch

Activation = Literal["leaky_relu", "none"]


@dataclass(frozen=True, kw_only=True)
class BranchConfig(Settings):
    """The settings of a method whose classifier reads a branch: its `Config` inherits them."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common embedding"] = 768
    activation: Annotated[Activation, "after the linear layers; none: cosines may be far below 0"] = "leaky_relu"
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class Branch(nn.Module):
    """h = g(x): standardisation, dropout, a linear layer to the width of the config, and its activation.

    Args:
        in_width: width of the features.
        config: the settings.
        dropout: probability, on the standardised features.
    """

    def __init__(self, in_width: int, config: BranchConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale, self.dropout = Standardise(config.scale, in_width), Dropout(dropout)
        self.project = nn.Linear(in_width, config.width)
        self.activation: Activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """Map features [B, in_width] to [B,d]."""
        projected = self.project(self.dropout(self.scale(x)))
        return F.leaky_relu(projected) if self.activation == "leaky_relu" else projected


def fit_scales(image: Standardise, text: Standardise, train: Callable[[], Iterator[Batch]]) -> None:
    """Compute the statistics of both features on the training split; those of texts are of the samples that have one."""
    image.fit(batch["image"] for batch in train())
    text.fit(paired_text(batch) for batch in train())
