"""Control of size: an MLP on image features with about as many weights as SeDA's head, and without text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import MLP, Dropout, ScaleMode, Standardise
from pipeline.nn.losses import LabelLoss, classification_loss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of the MLP. Its defaults have about as many weights as SeDA's: 2.5 million for 1280 features, 150 classes."""

    hidden: Annotated[int, Range(1, 65_536), "width of the hidden layers"] = 1024
    num_hidden: Annotated[int, Range(1, 16), "number of hidden layers"] = 2
    dropout: Annotated[float, Range(0, 0.99), "probability, after every hidden layer"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of the image features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class MLPHead(Method):
    """Linear layers with GELU, then a linear classifier with cross-entropy."""

    Config = Config
    needs = ("image", "label")
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dropout": (0.0, 0.2, 0.5), "num_hidden": (1, 2, 3)}

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (width,) = shapes["image"]
        self.label_loss: LabelLoss = config.label_loss
        self.scale = Standardise(config.scale, width)
        self.layers = MLP([width, *[config.hidden] * config.num_hidden], config.dropout)
        self.dropout = Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden, num_classes_in(shapes))

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"hidden": 16}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image features."""
        self.scale.fit(batch["image"] for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return {"loss"}, the classification loss."""
        logits = self.classifier(self.dropout(self._hidden(batch["image"])))
        return {"loss": classification_loss(logits, batch["label"], self.label_loss)}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.classifier(self._hidden(image))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the last hidden layer [B,hidden]."""
        return self._hidden(image)

    def _hidden(self, image: Tensor) -> Tensor:
        return F.gelu(self.layers(self.scale(image)))
