"""Rival: contrastive domain discrepancy (CDD) of image and text, class by class (CAN: Kang et al., CVPR 2019, eq. 3-5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from pipeline.nn.common_space import CommonSpaceHead
from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, ClassStream, Shapes

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernels, times the mean squared distance
LEAST, MOST = 1e-5, 1e5  # of a bandwidth, and of a squared distance divided by it


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of CDD; texts are the source domain and images the target, whose classes are known here."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common embedding"] = 768
    w_cdd: Annotated[float, Range(0), "weight of the discrepancy"] = 0.3
    w_ce_text: Annotated[float, Range(0), "weight of the cross-entropy of the texts"] = 1.0
    step_classes: Annotated[int, Range(2, 1024), "classes that a step compares"] = 10
    class_samples: Annotated[int, Range(2, 1024), "samples of each of them"] = 3
    normaliser: Annotated[
        Literal["present", "all"], "classes that the discrepancy is a mean over; all: those of the data, as the published code"
    ] = "present"
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


def class_memberships(label: Tensor, weight: Tensor) -> Tensor:
    """Return which of G = B // 2 classes each row belongs to, 0 or 1 [B,G].

    They are the classes with most rows. A class with a single row is left out: its discrepancy would be constant. Columns that
    stand for no class are 0.

    Args:
        label: class numbers int64 [B].
        weight: 0 or 1 [B]; rows of weight 0 belong to no class.
    """
    same = (label.unsqueeze(1) == label) & (weight > 0)
    first = same.to(torch.int64).argmax(1)  # the first row of its class stands for it
    member = (first.unsqueeze(1) == torch.arange(len(label), device=label.device)).to(torch.float32) * weight.unsqueeze(1)
    count = member.sum(0)
    largest = count.argsort(descending=True, stable=True)[: len(label) // 2]
    return (member * (count > 1)).index_select(1, largest)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_i - b_j|^2 [N,M] of rows a [N,D] and b [M,D]."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2.0 * a @ b.T).clamp(min=0.0)


def gaussian_kernels(distance: Tensor, scale: Tensor) -> Tensor:
    """Return the sum of the Gaussian kernels of squared distances, with bandwidths around a scale, which is broadcast."""
    kernels = [torch.exp(-(distance / (scale * factor).clamp(min=LEAST)).clamp(LEAST, MOST)) for factor in BANDWIDTHS]
    return torch.stack(kernels).sum(0)


def class_discrepancies(source: Tensor, target: Tensor, source_member: Tensor, target_member: Tensor) -> Tensor:
    """Return the maximum mean discrepancy of class g of the source and class h of the target [G,G], each >= 0.

    The scale of the kernels of a pair of classes is the mean squared distance among all its samples; it has no gradient. Means
    include the distance of a sample to itself. Where a class has no samples, the number means nothing.

    Args:
        source: embeddings [N,D].
        target: embeddings [M,D].
        source_member: which class each row belongs to, 0 or 1 [N,G].
        target_member: the same [M,G].
    """
    centre = torch.cat([source, target]).mean(0).detach()  # distances are those of any origin, and rounded least near it
    source, target = source - centre, target - centre
    s, t = source_member.to(source.dtype), target_member.to(source.dtype)
    d_ss, d_tt, d_st = squared_distances(source, source), squared_distances(target, target), squared_distances(source, target)
    n_s, n_t = s.sum(0).unsqueeze(1), t.sum(0)
    within_s, within_t = (s * (d_ss @ s)).sum(0).unsqueeze(1), (t * (d_tt @ t)).sum(0)
    num_pairs = (n_s + n_t).square() - (n_s + n_t)
    scale = ((within_s + within_t + 2.0 * s.T @ d_st @ t) / num_pairs.clamp(min=1.0)).detach()

    def within(distance: Tensor, member: Tensor, scale: Tensor) -> Tensor:
        """The sum of the kernels of pairs of one class g, at the scales [G,H] that it has with each other class h."""
        kernels = gaussian_kernels(distance.unsqueeze(2), (member @ scale).unsqueeze(1))
        return member.T @ (kernels * (member @ member.T).unsqueeze(2)).sum(1)

    between = s.T @ gaussian_kernels(d_st, s @ scale @ t.T) @ t
    k_ss, k_tt = within(d_ss, s, scale) / n_s.square().clamp(min=1.0), within(d_tt, t, scale.T).T / n_t.square().clamp(min=1.0)
    return k_ss + k_tt - 2.0 * between / (n_s * n_t).clamp(min=1.0)


def intra_inter(discrepancy: Tensor, present: Tensor, num_classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the mean discrepancy within classes, and that between different ones; CDD is their difference.

    Args:
        discrepancy: see `class_discrepancies`, [G,G].
        present: 1 for the classes that have samples, else 0 [G].
        num_classes: what the sums are divided by, as for so many classes; None: those present.
    """
    count = present.sum() if num_classes is None else torch.full_like(present[0], num_classes)
    own, both = (discrepancy.diagonal() * present).sum(), (present @ discrepancy * present).sum()
    return own / count.clamp(min=1.0), (both - own) / (count * (count - 1.0)).clamp(min=1.0)


class CDD(CommonSpaceHead):
    """CE of the images + w_ce_text CE of the texts, by one classifier, + w_cdd (intra - inter), of embeddings and of
    probabilities: image and text of a class come together, and those of different classes go apart.

    Every step compares samples that are drawn by class, see `ClassStream`, because in a shuffled batch most classes have one.
    Stage 3 draws none: there the classes of the batch that have two samples or more are compared. Multi-label: a sample stands
    for the class that it was drawn for or, in stage 3, for a random one of its labels. The clustering of CAN is left out.

    The published weight, kernels and draws are the defaults, so that --preset paper changes the learning rate alone.
    """

    Config = Config
    symbols: ClassVar[Mapping[str, str]] = {"lam": "w_cdd", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_cdd": 0.0, "w_ce_text": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_cdd": (0.1, 0.3, 1.0, 3.0), "class_samples": (3, 6)}

    w_cdd: Tensor
    w_ce_text: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        num_classes = num_classes_in(shapes)
        self.class_stream = ClassStream(config.step_classes, config.class_samples)
        self.divisor = num_classes if config.normaliser == "all" else None
        register_hyperparameters(self, w_cdd=config.w_cdd, w_ce_text=config.w_ce_text)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16, "step_classes": 3, "class_samples": 2}

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss and its parts."""
        label, paired = batch["label"], batch["paired"]
        h_v, h_s = self.embeddings(batch)
        z_v, z_s = self.classifier(h_v), self.classifier(h_s)
        ce = classification_loss(z_v, label, self.label_loss)
        ce_text = classification_loss(z_s, label, self.label_loss, paired)
        if "class_label" in batch:
            drawn = torch.ones_like(batch["class_image"][:, 0])
            h_v, h_s = self.common.image(batch["class_image"]), self.common.text(batch["class_text"], drawn)
            z_v, z_s = self.classifier(h_v), self.classifier(h_s)
            member = class_memberships(batch["class_label"], drawn)
        else:
            member = class_memberships(*_one_class_each(label, paired))
        cdd = self.discrepancy(((h_s, h_v), (z_s.softmax(1), z_v.softmax(1))), member)
        return {"loss": ce + self.w_ce_text * ce_text + self.w_cdd * cdd, "ce": ce, "ce_text": ce_text, "cdd": cdd}

    def discrepancy(self, layers: tuple[tuple[Tensor, Tensor], ...], member: Tensor) -> Tensor:
        """Return CDD of pairs of text and image embeddings, summed over layers, of samples with these classes [B,G]."""
        with torch.autocast(member.device.type, enabled=False):  # a small distance is a difference of large numbers
            each = [class_discrepancies(source.float(), target.float(), member, member) for source, target in layers]
        intra, inter = intra_inter(torch.stack(each).sum(0), (member.sum(0) > 0).to(torch.float32), self.divisor)
        return intra - inter


def _one_class_each(label: Tensor, paired: Tensor) -> tuple[Tensor, Tensor]:
    """Return one class of each sample [B], a random one of several, and its weight [B]: 0 without a text or a label."""
    if label.ndim == 1:
        return label, paired
    return ((1.0 + torch.rand_like(label)) * label).argmax(1), paired * (label.sum(1) > 0)
