"""MARNet's embedding-matching alignment (EMA): it pulls image and text embeddings of a sample together (MARNet sec. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in, paired_text, require_in_range
from pipeline.nn.layers import ScaleMode, Standardise, dropout, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss, info_nce
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import SINGLE_PHASE, Batch, Shapes

NEEDS = ("image", "text", "paired", "label")
PREDICTION: tuple[str, ...] = ()
SYMBOLS = {"alpha1": "w_ce", "beta": "w_ita", "tau": "tau", "d": "width"}
GRID = {"w_ita": (0.1, 0.3, 1.0, 3.0), "tau": (0.03, 0.07, 0.2)}
MAX_INVERSE_TAU = 100.0  # upper limit of 1/tau if it is learned


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MARNet eq. 6-13. Defaults that the paper does not give are ours."""

    width: int = 768  # d, width of the common embedding, 1..65536
    w_ce: float = 1.0  # alpha_1, weight of the cross-entropy
    w_ita: float = 1.0  # beta, weight of the alignment loss L_ITA
    tau: float = 0.07  # temperature of the cosine, at least 0.001; if learned, its initial value, at least 0.01
    learn_tau: bool = False  # learn log(1/tau), with 1/tau at most 100
    dropout: float = 0.0  # probability, on the image features, 0..0.99
    scale: ScaleMode = "per_dim"  # standardisation of both features
    label_loss: LabelLoss = "softmax_kl"  # for multi-label data

    def __post_init__(self) -> None:
        require_in_range(self, 0, math.inf, "w_ce", "w_ita")
        require_in_range(self, 0, 0.99, "dropout")
        require_in_range(self, 1, 65_536, "width")
        require_in_range(self, 1 / MAX_INVERSE_TAU if self.learn_tau else 1e-3, math.inf, "tau")


class EMA(nn.Module):
    """x_v' and x_s', each from one linear layer and LeakyReLU (eq. 6-8). Text is used only by the alignment loss."""

    p_dropout: Tensor
    tau: Tensor
    w_ce: Tensor
    w_ita: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__()
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        self.needs, self.phases = NEEDS, SINGLE_PHASE
        self.label_loss: LabelLoss = config.label_loss
        self.image_scale, self.text_scale = Standardise(config.scale, image_width), Standardise(config.scale, text_width)
        self.image_projector = nn.Linear(image_width, config.width)
        self.text_projector = nn.Linear(text_width, config.width)
        self.classifier = nn.Linear(config.width, num_classes_in(shapes))
        self.learn_tau = config.learn_tau
        if config.learn_tau:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(config.tau)))
        register_hyperparameters(self, p_dropout=config.dropout, tau=config.tau, w_ce=config.w_ce, w_ita=config.w_ita)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.image_scale.fit(batch["image"] for batch in train())
        self.text_scale.fit(paired_text(batch) for batch in train())

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """Return L_EMA = alpha_1 L_CE + beta L_ITA (eq. 13) with L_ITA = L_v2s + L_s2v (eq. 9-11), and its parts."""
        image = dropout(self.image_scale(batch["image"]), self.p_dropout, rng.at("dropout"), self.training)
        x_v = F.leaky_relu(self.image_projector(image))  # eq. 6-8
        x_s = F.leaky_relu(self.text_projector(self.text_scale(batch["text"])))
        v2s, s2v = info_nce(x_v, x_s, self.temperature(), batch["paired"])
        ce = classification_loss(self.classifier(x_v), batch["label"], self.label_loss)
        return {"loss": self.w_ce * ce + self.w_ita * (v2s + s2v), "ce": ce, "ita": v2s + s2v}

    def temperature(self) -> Tensor:
        """Return the temperature tau, a tensor []."""
        return torch.exp(-self.log_scale.clamp(max=math.log(MAX_INVERSE_TAU))) if self.learn_tau else self.tau

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return x_v' [B,d] from image features [B,Dv]."""
        return F.leaky_relu(self.image_projector(self.image_scale(image)))

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv], with the image projector and the classifier only."""
        return self.classifier(self.feature(image, rng))


def build(config: Config, shapes: Shapes) -> EMA:
    """Return an EMA head for features of these shapes."""
    return EMA(config, shapes)
