"""Logistic regression: the linear classifier at the exact minimum of its loss, the usual test of frozen features.

The loop trains nothing: `begin` finds the minimum with L-BFGS in float64, and the learning rate of the phase is 0. The weight
of the L2 penalty is a setting: `diffalign grid --method logreg` tries 45 of them and chooses on validation, as DINOv3 does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, Standardise, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import POSITIVE, Settings
from pipeline.types import Batch, Phase, Shapes

MAX_ITERATIONS = 1000
GRADIENT_TOLERANCE = 1e-7  # largest entry of the gradient at the minimum


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of logistic regression."""

    inverse_l2: Annotated[float, POSITIVE, "C: the penalty |W|^2 / (2 C N) is added to the mean of the cross-entropy"] = 1.0
    scale: Annotated[ScaleMode, "standardisation of the image features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class LogisticRegression(Method):
    """softmax(W x_v + b) at the minimum of the mean cross-entropy + |W|^2 / (2 C N), over the N training samples."""

    Config = Config
    needs = ("image", "label")
    symbols: ClassVar[Mapping[str, str]] = {"C": "inverse_l2"}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"inverse_l2": tuple(10.0 ** (-6 + number / 4) for number in range(45))}
    phases = (Phase("head", rates=(("", 0.0),)),)

    inverse_l2: Tensor
    num_samples: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (width,) = shapes["image"]
        self.label_loss: LabelLoss = config.label_loss
        self.scale = Standardise(config.scale, width)
        self.classifier = nn.Linear(width, num_classes_in(shapes))
        register_hyperparameters(self, inverse_l2=config.inverse_l2)
        self.register_buffer("num_samples", torch.ones(()))

    @torch.no_grad()
    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image features, and find the minimum; all features are in memory, in float64."""
        self.scale.fit(batch["image"] for batch in train())
        batches = [(self.scale(batch["image"]), batch["label"]) for batch in train()]
        image, label = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.num_samples.fill_(len(image))
        weight, bias = self._minimise(image.double(), label)
        self.classifier.weight.copy_(weight)
        self.classifier.bias.copy_(bias)

    @torch.enable_grad()
    def _minimise(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return W [C,D] and b [C] for standardised image features [N,D], both float64."""
        shape = self.classifier.weight.shape
        weight = image.new_zeros(shape, requires_grad=True)
        bias = image.new_zeros(shape[0], requires_grad=True)
        solver = torch.optim.LBFGS(
            [weight, bias],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=GRADIENT_TOLERANCE,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            solver.zero_grad()
            value = classification_loss(image @ weight.T + bias, label, self.label_loss) + self._penalty(weight)
            value.backward()
            return value

        solver.step(objective)
        return weight.detach(), bias.detach()

    def _penalty(self, weight: Tensor) -> Tensor:
        return weight.square().sum() / (2 * self.inverse_l2 * self.num_samples)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return {"loss", "ce"}: the classification loss with the penalty, and without it."""
        ce = classification_loss(self.classifier(self.scale(batch["image"])), batch["label"], self.label_loss)
        return {"loss": ce + self._penalty(self.classifier.weight), "ce": ce}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.classifier(self.scale(image))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the standardised image features [B,Dv]."""
        return self.scale(image)
