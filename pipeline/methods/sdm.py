"""Rival: similarity distribution matching (SDM) of image and text embeddings (IRRA: Jiang and Ye, CVPR 2023, eq. 4-6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.nn.common_space import CommonSpaceHead, LinearProjector
from pipeline.nn.layers import ScaleMode, register_hyperparameters
from pipeline.nn.losses import MASKED_LOGIT, LabelLoss, classification_loss, weighted_mean
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes

MATCH_EPSILON = 1e-8  # added to the true distribution: similarity where there is none costs up to log 1e8


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of SDM. Its published code trains persons' identities; here the class is the identity."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common embedding"] = 768
    w_sdm: Annotated[float, Range(0), "weight of the matching loss"] = 1.0
    w_ce_text: Annotated[float, Range(0), "weight of the cross-entropy of the texts"] = 0.5
    tau: Annotated[float, Range(1e-3), "temperature of the cosine"] = 0.02
    identity: Annotated[Literal["class", "instance"], "which pairs match: those of a class, or each image and its own text"] = (
        "class"
    )
    activation: Annotated[Literal["leaky_relu", "none"], "of both projectors; none: nor a bias"] = "leaky_relu"
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


def label_overlap(label: Tensor) -> Tensor:
    """Return how far two samples match [B,B], 1 on the diagonal: whether they have one class, or their labels' Jaccard index.

    Args:
        label: class numbers int64 [B], or a multi-hot matrix [B,C].
    """
    if label.ndim == 1:
        return (label.unsqueeze(1) == label).to(torch.float32)
    member = label.to(torch.float32)
    shared, count = member @ member.T, member.sum(1)
    union = (count.unsqueeze(1) + count - shared).clamp(min=1.0)
    return torch.maximum(shared / union, torch.eye(len(label), device=label.device))


def matching_loss(f: Tensor, g: Tensor, match: Tensor, tau: Tensor | float, weight: Tensor | None = None) -> Tensor:
    """Return KL(p||q) from f to g plus that from g to f: p is the softmax of cosine / tau, and q are the rows of `match`,
    each divided by its sum. Both are means over the batch. Mass of p where q is 0 is what costs most.

    Args:
        f: embeddings [B,D].
        g: embeddings [B,D]; row i belongs to row i of `f`.
        match: how far row i of `f` matches row j of `g`, >= 0, the diagonal > 0, [B,B].
        tau: temperature.
        weight: [B], see `nn.losses`: a row of weight 0 is neither an anchor nor a candidate.
    """
    with torch.autocast(f.device.type, enabled=False):  # a small tau makes logits of up to 1/tau
        f, g = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1) for x in (f, g))
        similarity = f @ g.T / tau
    is_candidate = torch.ones(len(f), device=f.device) if weight is None else (weight > 0).to(torch.float32)

    def direction(logits: Tensor, match: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits.masked_fill(is_candidate == 0, MASKED_LOGIT), dim=1)
        match = match * is_candidate
        q = match / match.sum(1, keepdim=True).clamp(min=MATCH_EPSILON)
        return weighted_mean((log_p.exp() * (log_p - torch.log(q + MATCH_EPSILON))).sum(1), weight)

    return direction(similarity, match) + direction(similarity.T, match.T)


class SDM(CommonSpaceHead):
    """CE of the images + w_ce_text CE of the texts, by one classifier, + w_sdm SDM. Multi-label: samples match by their Jaccard
    index. Masked language modelling, a part of IRRA, is left out: it needs the words' numbers and a text encoder that learns.

    --preset paper has IRRA's weights (twice those of SDM + (CE + CE of the texts) / 2), its 60 epochs, and its learning rate,
    which is one of whole encoders; a head would learn nothing if it fell as well, and so it stays what it is.
    """

    Config = Config
    symbols: ClassVar[Mapping[str, str]] = {"lam": "w_sdm", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_sdm": 0.0, "w_ce_text": 0.0}
    paper: ClassVar[Mapping[str, Any]] = {"w_sdm": 2.0, "w_ce_text": 1.0}
    paper_training: ClassVar[Mapping[str, Any]] = {"lr": 1e-5, "lr_gamma": 1.0, "epochs": 60}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_sdm": (0.1, 0.3, 1.0, 3.0), "tau": (0.02, 0.05, 0.1)}

    tau: Tensor
    w_ce_text: Tensor
    w_sdm: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        is_plain = config.activation == "none"
        super().__init__(config, shapes, partial(LinearProjector, out_width=config.width, is_plain=is_plain))
        self.by_class = config.identity == "class"
        register_hyperparameters(self, tau=config.tau, w_sdm=config.w_sdm, w_ce_text=config.w_ce_text)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss and its parts."""
        label, paired = batch["label"], batch["paired"]
        h_v, h_s = self.embeddings(batch)
        match = label_overlap(label if self.by_class else torch.arange(len(label), device=label.device))
        ce = classification_loss(self.classifier(h_v), label, self.label_loss)
        ce_text = classification_loss(self.classifier(h_s), label, self.label_loss, paired)
        sdm = matching_loss(h_v, h_s, match, self.tau, paired)
        return {"loss": ce + self.w_ce_text * ce_text + self.w_sdm * sdm, "ce": ce, "ce_text": ce_text, "sdm": sdm}
