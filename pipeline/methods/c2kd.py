"""Rival: customised cross-modal knowledge distillation (C2KD: Huo et al., CVPR 2024); its text teacher keeps learning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.common_space import CommonSpaceHead
from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, batch_normalise, register_hyperparameters
from pipeline.nn.losses import MASKED_LOGIT, LabelLoss, classification_loss, distillation, multi_hot, weighted_mean
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Phase, Shapes

CLASSES_AT_A_TIME = 64  # whose pairs with all classes are in memory together


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of C2KD; the published weights are all 1."""

    width: Annotated[int, Range(1, 65_536), "d, width of both embeddings"] = 768
    w_proxy: Annotated[float, Range(0), "weight of the distillation between each branch and its own proxy"] = 1.0
    w_nt: Annotated[float, Range(0), "weight of the distillation between the proxies, on non-target classes"] = 1.0
    min_rank: Annotated[float, Range(-1, 1), "krc: samples whose proxies' rank correlation is not above it are left out"] = 0.0
    target_logit: Annotated[
        Literal["dropped", "zero"],
        "of targets in the distillation of non-target classes; zero: as the published code has it",
    ] = "dropped"
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


@torch.no_grad()
def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Kendall's tau-b of each row of a and b [N,C]: the pairs of classes ordered alike, less
    those ordered otherwise, divided by their number; ties are left out. A row that is constant has 0.
    """
    alike, count_a, count_b = (torch.zeros(len(a), device=a.device) for _ in range(3))
    for part_a, part_b in zip(a.split(CLASSES_AT_A_TIME, 1), b.split(CLASSES_AT_A_TIME, 1), strict=True):
        sign_a, sign_b = ((part.unsqueeze(2) - x.unsqueeze(1)).sign() for part, x in ((part_a, a), (part_b, b)))
        alike = alike + (sign_a * sign_b).sum((1, 2))
        count_a, count_b = count_a + sign_a.square().sum((1, 2)), count_b + sign_b.square().sum((1, 2))
    return alike / (count_a.sqrt() * count_b.sqrt()).clamp(min=1.0)


def without_targets(logits: Tensor, target: Tensor, is_zero: bool) -> Tensor:
    """Return logits [B,C] whose targets (1 in `target` [B,C]) have no probability or, with `is_zero`, the logit 0."""
    return logits * (1.0 - target) if is_zero else logits.masked_fill(target > 0, MASKED_LOGIT)


class Proxy(nn.Module):
    """Logits from an embedding: a linear layer, batch normalisation, a leaky ReLU, and a classifier. Only training uses it."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.layer, self.classifier = nn.Linear(width, width, bias=False), nn.Linear(width, num_classes)
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, h: Tensor, weight: Tensor) -> Tensor:
        """Map [B,d] to [B,C]; rows of weight 0 [B] enter no statistics."""
        normal = batch_normalise(self.layer(h), weight)
        return self.classifier(F.leaky_relu(normal * self.gain + self.shift, 0.1))


class C2KD(CommonSpaceHead):
    """A text teacher is trained by itself. Then it and the image student learn together, each from a proxy of its own, and the
    proxies from each other: on non-target classes, and from samples alone in which both rank the classes alike.

    The published weights and batch size are the defaults. --preset paper has the published 100 epochs, with Adam at the papers'
    learning rate, halved every 20 epochs, in place of SGD with a polynomial decay.
    """

    Config = Config
    phases = (Phase("teacher", ("common.text_projector.", "text_classifier."), share=0.5), Phase("head"))
    symbols: ClassVar[Mapping[str, str]] = {"krc": "min_rank", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_nt": 0.0}
    paper_training: ClassVar[Mapping[str, Any]] = {"lr_step": 20, "epochs": 100}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_nt": (0.1, 0.3, 1.0, 3.0), "w_proxy": (0.3, 1.0)}

    min_rank: Tensor
    w_nt: Tensor
    w_proxy: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        width, self.num_classes = config.width, num_classes_in(shapes)
        self.is_target_zero = config.target_logit == "zero"
        self.text_classifier = nn.Linear(width, self.num_classes)
        self.proxy, self.text_proxy = (Proxy(width, self.num_classes) for _ in range(2))
        register_hyperparameters(self, w_proxy=config.w_proxy, w_nt=config.w_nt, min_rank=config.min_rank)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss of a phase and its parts; samples without text enter no term of the teacher or between the proxies.

        Args:
            batch: see `types.Batch`.
            phase: "teacher" has the teacher's cross-entropy, "head" the sum for both branches.
        """
        label, paired = batch["label"], batch["paired"]
        h_s = self.common.text(batch["text"], paired)
        z_t = self.text_classifier(h_s)
        ce_text = classification_loss(z_t, label, self.label_loss, paired)
        if phase == "teacher":
            return {"loss": ce_text}
        h_v = self.common.image(batch["image"])
        z_s, p_s, p_t = self.classifier(h_v), self.proxy(h_v, torch.ones_like(paired)), self.text_proxy(h_s, paired)
        ce = classification_loss(z_s, label, self.label_loss)
        own = (distillation(p_s, z_s) + distillation(z_s, p_s)).mean()
        own_text = weighted_mean(distillation(p_t, z_t) + distillation(z_t, p_t), paired)
        nt, kept = self.between_proxies(p_s, p_t, label, paired)
        loss = ce + ce_text + self.w_proxy * (own + own_text) + self.w_nt * nt
        return {"loss": loss, "ce": ce, "ce_text": ce_text, "own": own, "own_text": own_text, "nt": nt, "kept": kept}

    def between_proxies(self, p_s: Tensor, p_t: Tensor, label: Tensor, paired: Tensor) -> tuple[Tensor, Tensor]:
        """Return NT(p_t <- p_s) + NT(p_s <- p_t), and the share of samples that are kept; each is a mean over all samples."""
        p_s, p_t = (p.float() for p in (p_s, p_t))
        kept = (rank_correlation(p_t, p_s) > self.min_rank).to(p_s.dtype)
        target = multi_hot(label, self.num_classes)
        a, b = (without_targets(p, target, self.is_target_zero) for p in (p_s, p_t))
        return weighted_mean(kept * (distillation(b, a) + distillation(a, b)), paired), weighted_mean(kept, paired)
