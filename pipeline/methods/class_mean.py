"""Nearest class mean: no weights are trained, only the temperature of the scores, which changes no predicted class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, Standardise, register_hyperparameters
from pipeline.nn.losses import class_sums, classification_loss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes

FAR = 1e3  # distance of a class without training samples


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of the nearest class mean."""

    scale: Annotated[ScaleMode, "standardisation of the image features"] = "per_dim"
    shrinkage: Annotated[float, Range(0), "samples at the origin of the standardised features that each class gets"] = 0.0


class ClassMean(Method):
    """logit_c = -s |x_v - mean_c|^2 / D with the means of the training split; s > 0 is fitted by the cross-entropy."""

    Config = Config
    needs = ("image", "label")
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": ("per_dim", "global", "l2sqrtd"),
        "shrinkage": (0.0, 1.0, 10.0),
    }

    means: Tensor
    is_present: Tensor
    shrinkage: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (width,) = shapes["image"]
        self.num_classes = num_classes_in(shapes)
        self.scale = Standardise(config.scale, width)
        self.log_scale = nn.Parameter(torch.zeros(()))
        register_hyperparameters(self, shrinkage=config.shrinkage)
        self.register_buffer("means", torch.zeros(self.num_classes, width))
        self.register_buffer("is_present", torch.zeros(self.num_classes))

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image features, and the mean of each class; a sample counts in all of its classes."""
        self.scale.fit(batch["image"] for batch in train())
        total, count = torch.zeros_like(self.means), torch.zeros_like(self.is_present)
        for batch in train():
            sums, counts = class_sums(self.scale(batch["image"]), batch["label"], self.num_classes)
            total += sums
            count += counts
        self.means.copy_(total / (count + self.shrinkage).clamp(min=1.0).unsqueeze(1))
        self.is_present.copy_((count > 0).float())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return {"loss"}, the classification loss."""
        return {"loss": classification_loss(self._logits(batch["image"]), batch["label"], "softmax_kl")}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self._logits(image)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the standardised image features [B,Dv]."""
        return self.scale(image)

    def _logits(self, image: Tensor) -> Tensor:
        x = self.scale(image)
        products = x @ self.means.T
        distance = x.square().mean(1, keepdim=True) - 2 / x.shape[1] * products + self.means.square().mean(1)
        return -self.log_scale.exp() * torch.where(self.is_present > 0, distance, FAR)
