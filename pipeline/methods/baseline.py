"""Image features and one linear layer: the classifier that every method has to beat (MARNet Table 2, SeDA Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.nn.feature_space import LabelLoss, Scale, label_count, require
from pipeline.nn.layers import Standardise, dropout, register_hyperparameters
from pipeline.nn.losses import classification
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import WHOLE, Batch, Shapes

NEEDS = ("image", "label")
PREDICTION: tuple[str, ...] = ()
SYMBOLS: dict[str, str] = {}
GRID: dict[str, tuple[float, ...]] = {"dropout": (0.0, 0.2, 0.5)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A single fully connected layer has little to choose."""

    scale: Scale = "per_dim"  # standardisation of the image features
    label_loss: LabelLoss = "softmax_kl"  # for multi-label data
    dropout: float = 0.0  # probability, on the features, 0..0.99

    def __post_init__(self) -> None:
        require(self, 0, 0.99, "dropout")


class Baseline(nn.Module):
    """softmax(W x_v + b) with cross-entropy (MARNet eq. 12, SeDA eq. 7)."""

    p_dropout: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__()
        (width,) = shapes["image"]
        self.needs, self.phases = NEEDS, WHOLE
        self.label_loss: LabelLoss = config.label_loss
        self.scale = Standardise(config.scale, width)
        self.classifier = nn.Linear(width, label_count(shapes))
        register_hyperparameters(self, p_dropout=config.dropout)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Statistics of the image features."""
        self.scale.fit(batch["image"] for batch in train())

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """{"loss"}: cross-entropy."""
        x = dropout(self.scale(batch["image"]), self.p_dropout, rng.at("dropout"), self.training)
        return {"loss": classification(self.classifier(x), batch["label"], self.label_loss)}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [B,C] of image features [B,Dv]."""
        return self.classifier(self.scale(image))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """The standardised image features [B,Dv]."""
        return self.scale(image)


def build(config: Config, shapes: Shapes) -> Baseline:
    """A baseline for features of these shapes."""
    return Baseline(config, shapes)
