"""The common space of methods that align images with texts: both features, projected to vectors of one width."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in, paired_text
from pipeline.nn.layers import Dropout, ScaleMode, Standardise
from pipeline.nn.losses import LabelLoss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, Phase, Shapes

LOG_SCALE_LIMIT = math.log(100.0)  # of `LearnedScale.log`


class Projector(Protocol):
    """Maps standardised features to the common space; an implementation is always an `nn.Module`."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map [B,D] to [B,d]; rows of weight 0 [B] enter no statistics of the batch."""
        ...


class LinearProjector(nn.Module):
    """A linear layer and a leaky ReLU, as MARNet has (eq. 6-8); CLIP has neither bias nor activation."""

    def __init__(self, in_width: int, out_width: int, is_plain: bool = False) -> None:
        super().__init__()
        self.is_plain = is_plain
        self.layer = nn.Linear(in_width, out_width, bias=not is_plain)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `Projector`."""
        return self.layer(x) if self.is_plain else F.leaky_relu(self.layer(x))


class CommonSpace(nn.Module):
    """Standardises image and text features and projects each with a projector of its own."""

    def __init__(
        self, shapes: Shapes, projector: Callable[[int], Projector], scale: ScaleMode = "per_dim", dropout: float = 0.0
    ) -> None:
        """Make the projectors.

        Args:
            shapes: shapes of the batch, see `types.Shapes`.
            projector: makes the projector of features of a width.
            scale: see `layers.Standardise`.
            dropout: its probability, on the image features.
        """
        super().__init__()
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        self.image_scale, self.text_scale = Standardise(scale, image_width), Standardise(scale, text_width)
        self.dropout = Dropout(dropout)
        self.image_projector, self.text_projector = projector(image_width), projector(text_width)

    def fit(self, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of image and text features; `train` starts a pass over the training split."""
        self.image_scale.fit(batch["image"] for batch in train())
        self.text_scale.fit(paired_text(batch) for batch in train())

    def image(self, x: Tensor) -> Tensor:
        """Return h_v [B,d] from image features [B,Dv]."""
        return self.image_projector(self.dropout(self.image_scale(x)), torch.ones_like(x[:, 0]))

    def text(self, x: Tensor, paired: Tensor) -> Tensor:
        """Return h_s [B,d] from text features [B,Ds]; where `paired` [B] is 0, there is no text."""
        return self.text_projector(self.text_scale(x), paired)


class CommonSpaceHead(Method):
    """The base of heads that project image and text to a common space, and classify the projected image; each adds its loss."""

    needs = ("image", "text", "paired", "label")

    def __init__(
        self, config: Any, shapes: Shapes, projector: Callable[[int], Projector] | None = None, width: int | None = None
    ) -> None:
        """Make the common space and the classifier.

        Args:
            config: has the settings `scale`, `dropout` and `label_loss`, and `width` unless that is given.
            shapes: see `types.Shapes`.
            projector: see `CommonSpace`; None: `LinearProjector`.
            width: d, what the projectors return.
        """
        super().__init__(config, shapes)
        out_width: int = config.width if width is None else width
        self.label_loss: LabelLoss = config.label_loss
        self.common = CommonSpace(
            shapes, projector or partial(LinearProjector, out_width=out_width), config.scale, config.dropout
        )
        self.classifier = nn.Linear(out_width, num_classes_in(shapes))

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.common.fit(train)

    def embeddings(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return h_v and h_s, [B,d] each; where `paired` is 0, h_s stands for no text."""
        return self.common.image(batch["image"]), self.common.text(batch["text"], batch["paired"])

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return h_v [B,d] from image features [B,Dv]."""
        return self.common.image(image)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.classifier(self.feature(image, rng))


class LearnedScale(nn.Module):
    """The scale exp(s) of similarities, learned; 1/exp(s) is a temperature.

    The phase of a method that uses it is `scaled_phase`.
    """

    def __init__(self, tau: float) -> None:
        """Start with the scale 1/tau."""
        super().__init__()
        self.log = nn.Parameter(torch.tensor(-math.log(tau)))

    def forward(self) -> Tensor:
        """Return the scale [] from 0 to 100."""
        return self.log.exp()


def scaled_phase(*scales: str) -> Phase:
    """Return the phase "head", which trains all and keeps the `LearnedScale`s of these names at 100 at most, undecayed."""
    return Phase("head", limits=tuple((name, LOG_SCALE_LIMIT) for name in scales), undecayed=scales)
