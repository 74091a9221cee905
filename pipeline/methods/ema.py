"""MARNet's embedding-matching alignment (EMA): it pulls image and text embeddings of a sample together (MARNet sec. 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in, paired_text
from pipeline.nn.layers import Dropout, ScaleMode, Standardise, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss, info_nce
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes

MAX_INVERSE_TAU = 100.0  # upper limit of 1/tau if it is learned


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of MARNet eq. 6-13. Defaults that the paper does not give are ours."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common embedding"] = 768
    w_ce: Annotated[float, Range(0), "alpha_1, weight of the cross-entropy"] = 1.0
    w_ita: Annotated[float, Range(0), "beta, weight of the alignment loss L_ITA"] = 1.0
    tau: Annotated[float, Range(1e-3), "temperature of the cosine; if learned, its initial value, at least 0.01"] = 0.07
    learn_tau: Annotated[bool, "learn log(1/tau), with 1/tau at most 100"] = False
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_tau:
            Range(1 / MAX_INVERSE_TAU).check("tau", self.tau)


class EMA(Method):
    """x_v' and x_s', each from one linear layer and LeakyReLU (eq. 6-8). Text is used only by the alignment loss."""

    Config = Config
    needs = ("image", "text", "paired", "label")
    symbols: ClassVar[Mapping[str, str]] = {"alpha1": "w_ce", "beta": "w_ita", "tau": "tau", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_ita": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_ita": (0.1, 0.3, 1.0, 3.0), "tau": (0.03, 0.07, 0.2)}

    tau: Tensor
    w_ce: Tensor
    w_ita: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        self.label_loss: LabelLoss = config.label_loss
        self.image_scale, self.text_scale = Standardise(config.scale, image_width), Standardise(config.scale, text_width)
        self.dropout = Dropout(config.dropout)
        self.image_projector = nn.Linear(image_width, config.width)
        self.text_projector = nn.Linear(text_width, config.width)
        self.classifier = nn.Linear(config.width, num_classes_in(shapes))
        self.learn_tau = config.learn_tau
        if config.learn_tau:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(config.tau)))
        register_hyperparameters(self, tau=config.tau, w_ce=config.w_ce, w_ita=config.w_ita)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.image_scale.fit(batch["image"] for batch in train())
        self.text_scale.fit(paired_text(batch) for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return L_EMA = alpha_1 L_CE + beta L_ITA (eq. 13) with L_ITA = L_v2s + L_s2v (eq. 9-11), and its parts.

        A batch of `MARNet` may have the weights of samples in L_CE, "weight" [B].
        """
        x_v = self.embed(batch["image"])
        x_s = F.leaky_relu(self.text_projector(self.text_scale(batch["text"])))
        v2s, s2v = info_nce(x_v, x_s, self.temperature(), batch["paired"])
        ce = classification_loss(self.classifier(x_v), batch["label"], self.label_loss, batch.get("weight"))
        ita = v2s + s2v
        return {"loss": self.w_ce * ce + self.w_ita * ita, "ce": ce, "ita": ita}

    def temperature(self) -> Tensor:
        """Return the temperature tau, a tensor []."""
        return torch.exp(-self.log_scale.clamp(max=math.log(MAX_INVERSE_TAU))) if self.learn_tau else self.tau

    def embed(self, image: Tensor) -> Tensor:
        """Return x_v' [B,d] from image features [B,Dv] (eq. 6-8)."""
        return F.leaky_relu(self.image_projector(self.dropout(self.image_scale(image))))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return x_v' [B,d] from image features [B,Dv]."""
        return self.embed(image)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv], with the image projector and the classifier only."""
        return self.classifier(self.feature(image, rng))
