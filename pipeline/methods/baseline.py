"""Baseline: one linear layer on image features, the classifier that every method has to beat (MARNet Table 2, SeDA Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import Dropout, ScaleMode, Standardise
from pipeline.nn.losses import LabelLoss, classification_loss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of the baseline."""

    scale: Annotated[ScaleMode, "standardisation of the image features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0


class Baseline(Method):
    """softmax(W x_v + b) with cross-entropy (MARNet eq. 12, SeDA eq. 7)."""

    Config = Config
    needs = ("image", "label")
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dropout": (0.0, 0.2, 0.5)}

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (width,) = shapes["image"]
        self.label_loss: LabelLoss = config.label_loss
        self.scale = Standardise(config.scale, width)
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(width, num_classes_in(shapes))

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image features."""
        self.scale.fit(batch["image"] for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return {"loss"}, the classification loss."""
        logits = self.classifier(self.dropout(self.scale(batch["image"])))
        return {"loss": classification_loss(logits, batch["label"], self.label_loss)}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.classifier(self.scale(image))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the standardised image features [B,Dv]."""
        return self.scale(image)
