"""k nearest neighbours: training samples vote by their cosine with the image. Nothing is trained; k is chosen on validation.

The features of the whole training split are in memory and in the checkpoint, 4 D bytes per sample and again as much while they
are stored. The vote is that of DINO's test of frozen features (Wu et al. 2018; Caron et al. 2021, sec. 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, Standardise, TrainingRows, register_hyperparameters
from pipeline.nn.losses import TINY, LabelLoss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Phase, Shapes

NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)  # candidates of k; a k above the number of training samples counts as that number
UNIFORM_SHARE = 1e-4  # of every vote, so that the logarithm of no class is infinite
COSINE_STEPS, MOST_SAMPLES = 2**24, 2**32
SEARCHED_ROWS = 1024  # training samples that are compared at a time
VOTING_ROWS = 16  # images whose neighbours vote at a time


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of k nearest neighbours."""

    tau: Annotated[float, Range(1e-3), "temperature: a neighbour of cosine s has the weight exp(s / tau)"] = 0.07
    scale: Annotated[ScaleMode, "standardisation of the image features before the cosine; l2sqrtd: none"] = "per_dim"
    label_loss: Annotated[
        LabelLoss, "for multi-label data: bce: each class by itself, else the classes of a sample share its votes"
    ] = "softmax_kl"


class KNearest(Method):
    """p_c = sum_i w_i y_ic / sum_i w_i with w_i = exp(cos(x_v, x_i) / tau), over the k most similar training samples i."""

    Config = Config
    needs = ("image", "label")
    symbols: ClassVar[Mapping[str, str]] = {}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": ("per_dim", "global", "l2sqrtd"),
        "tau": (0.02, 0.07, 0.2, 1.0),
    }
    phases = (Phase("neighbours", trains=(), candidates=len(NEIGHBOURS)),)

    k: Tensor
    tau: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (width,) = shapes["image"]
        self.num_classes = num_classes_in(shapes)
        self.has_own_scores = config.label_loss == "bce" and bool(shapes["label"])
        self.scale = Standardise(config.scale, width)
        label_type = torch.bool if shapes["label"] else torch.int64
        self.rows = TrainingRows(torch.zeros(0, width), torch.zeros(0, *shapes["label"], dtype=label_type))
        self.register_buffer("k", torch.tensor(NEIGHBOURS[0]))
        register_hyperparameters(self, tau=config.tau)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image features, and store features and labels of the training split."""
        self.scale.fit(batch["image"] for batch in train())
        batches = [(self._direction(batch["image"]), batch["label"]) for batch in train()]
        feature, label = (torch.cat(parts) for parts in zip(*batches, strict=True))
        self.rows.store(feature, label)

    def choose(self, candidate: int) -> None:
        """Set k; fewer neighbours come first."""
        self.k.fill_(NEIGHBOURS[candidate])

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the log-probabilities [B,C] of the vote, or its log-odds where each class has a sigmoid of its own (bce)."""
        parts = zip(*(each.split(VOTING_ROWS) for each in self._nearest(self._direction(image))), strict=True)
        p = torch.cat([self._vote(*part) for part in parts])
        if self.has_own_scores:
            p = p + UNIFORM_SHARE * (0.5 - p)
            return p.log() - (1.0 - p).log()
        p = p / p.sum(1, keepdim=True).clamp(min=TINY)
        return (p + UNIFORM_SHARE * (1.0 / self.num_classes - p)).log()

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the standardised image features [B,Dv], of length 1."""
        return self._direction(image)

    def _direction(self, image: Tensor) -> Tensor:
        return F.normalize(self.scale(image), dim=1)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and the numbers of the nearest training samples, most similar first, both [B,K].

        A sample is ranked by one integer, its cosine in steps of 2^-24 followed by its number, so that of equally similar ones
        the first comes first. The products are in float64, whose rounding, which depends on the batch, is far below a step.
        """
        x, num_samples = x.double(), len(self.rows.feature)
        most = min(NEIGHBOURS[-1], num_samples)
        best = torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
        for start in range(0, num_samples, SEARCHED_ROWS):
            some = self.rows.feature[start : start + SEARCHED_ROWS].double()
            number = torch.arange(start, start + len(some), device=x.device)
            steps = (x @ some.T * COSINE_STEPS).round().long()
            best = torch.cat([best, steps * MOST_SAMPLES + (MOST_SAMPLES - 1 - number)], dim=1)
            best = best.topk(min(most, best.shape[1]), dim=1).values
        steps, number = best.div(MOST_SAMPLES, rounding_mode="floor"), MOST_SAMPLES - 1 - best % MOST_SAMPLES
        return steps.float() / COSINE_STEPS, number

    def _vote(self, similarity: Tensor, number: Tensor) -> Tensor:
        """Return the share of the first k neighbours, by weight, that have each class, [B,C]; see `_nearest`."""
        rank = torch.arange(similarity.shape[1], device=similarity.device)
        weight = torch.softmax((similarity / self.tau).masked_fill(rank >= self.k, -torch.inf), dim=1)
        label = self.rows.label[number]
        member = label if label.ndim == 3 else label.unsqueeze(2) == torch.arange(self.num_classes, device=label.device)
        return (weight.unsqueeze(2) * member).sum(1)
