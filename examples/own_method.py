"""Imitation: predict the text's features from the image's, and classify both together. An example of a method of your own.

Copy this file, change it, and give it to any command. Its name is the name of the method:

    diffalign train-head --plugin own_method.py --method own_method --dataset openmoji
    diffalign methods own_method --plugin own_method.py
    diffalign grid --plugin own_method.py --method own_method --grid w_text=0.1,1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in, paired_text
from pipeline.nn.layers import Dropout, Standardise, register_hyperparameters
from pipeline.nn.losses import classification_loss, mse_loss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """What users can set, each with its type, range, meaning and default: --set w_text=0.5."""

    hidden: Annotated[int, Range(1, 65_536), "width of the hidden layer"] = 512
    w_text: Annotated[float, Range(0), "gamma, weight of the imitation of the text"] = 1.0
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0


class Imitation(Method):
    """An MLP imitates the text features; a linear layer reads the image features and the imitation."""

    Config = Config
    # Batch keys that training reads. Text comes with "paired", which is 0 for samples without a text.
    needs = ("image", "text", "paired", "label")
    symbols: ClassVar[Mapping[str, str]] = {"gamma": "w_text"}  # so that --set gamma=0.5 works too
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_text": (0.1, 0.3, 1.0, 3.0)}  # for --grid papers

    w_text: Tensor  # registered below; declared here for type checkers

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        self.image_scale, self.text_scale = Standardise("per_dim", image_width), Standardise("per_dim", text_width)
        self.dropout = Dropout(config.dropout)
        self.imitate = nn.Sequential(nn.Linear(image_width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, text_width))
        self.classifier = nn.Linear(image_width + text_width, num_classes_in(shapes))
        # Numbers become tensors: then the heads of a grid that differ in nothing but numbers are trained as one model.
        register_hyperparameters(self, w_text=config.w_text)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head; the tests of the package use them."""
        return {"hidden": 16}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the training split, before its first epoch."""
        self.image_scale.fit(batch["image"] for batch in train())
        self.text_scale.fit(paired_text(batch) for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the cross-entropy plus gamma times the error of the imitation, and both parts, which are logged."""
        # The loop seeds torch before every step: a run that is interrupted goes on with the same masks of dropout.
        image = self.dropout(self.image_scale(batch["image"]))
        imitation = self.imitate(image)
        ce = classification_loss(self.classifier(torch.cat([image, imitation], dim=1)), batch["label"], "softmax_kl")
        mse = mse_loss(imitation, self.text_scale(batch["text"]), "mean", batch["paired"])
        return {"loss": ce + self.w_text * mse, "ce": ce, "mse": mse}

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the image features and the imitation [B,Dv+Ds]; there is no text here."""
        scaled = self.image_scale(image)
        return torch.cat([scaled, self.imitate(scaled)], dim=1)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C]."""
        return self.classifier(self.feature(image, rng))
