"""Losses that methods share, on tensors: masks instead of data-dependent shapes, so that models can be stacked.

Every `weight` [B] is >= 0 and defaults to ones. Means over the batch are weighted means, 0 when all weights are 0; a row of
weight 0 takes no part, but must be finite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -1e9  # logit of an excluded column: finite, so that a row without any column left has a finite loss


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """sum_i w_i v_i / sum_i w_i of values [B], or 0 when every weight is 0."""
    total = weight.sum()
    return (weight * values).sum() / torch.where(total > 0, total, 1.0)


def _weights(weight: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(like.shape[0]) if weight is None else weight.to(like.dtype)


def classification(
    logits: Tensor,
    label: Tensor,
    kind: Literal["softmax_kl", "bce", "softmax_multihot"],
    weight: Tensor | None = None,
) -> Tensor:
    """Classification loss, mean over the batch (MARNet eq. 12, SeDA eq. 7).

    logits [B,C]. Labels [B] int64 are single and give cross-entropy for every kind; labels [B,C] of 0 and 1 are multiple:
    "softmax_kl" targets Y/|Y|, "softmax_multihot" targets Y, "bce" is a mean over classes. A row without labels adds nothing to
    the two softmax kinds.
    """
    if label.ndim == 1:
        loss = F.cross_entropy(logits, label, reduction="none")
    elif kind == "bce":
        loss = F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none").mean(-1)
    else:
        target = label.to(logits.dtype)
        if kind == "softmax_kl":
            target = target / target.sum(-1, keepdim=True).clamp(min=1.0)
        loss = -(target * F.log_softmax(logits, dim=-1)).sum(-1)
    return weighted_mean(loss, _weights(weight, logits))


def info_nce(a: Tensor, b: Tensor, tau: Tensor | float, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Contrastive losses a to b and b to a of paired rows [B,D] (MARNet eq. 5, 9, 10); L_ITA is their sum (eq. 11).

    Similarity is the cosine over the temperature tau; the other rows of the batch are the negatives; mean over anchors. A row
    of weight 0 is neither anchor nor negative.
    """
    weight = _weights(weight, a)
    a, b = (F.normalize(x, dim=-1) for x in (a, b))
    similarity = a @ b.T / tau
    positive = similarity.diagonal()
    absent = (weight == 0).unsqueeze(0)
    a2b = torch.logsumexp(similarity.masked_fill(absent, MASKED), dim=1) - positive
    b2a = torch.logsumexp(similarity.T.masked_fill(absent, MASKED), dim=1) - positive
    return weighted_mean(a2b, weight), weighted_mean(b2a, weight)


def membership(label: Tensor, num_classes: int) -> Tensor:
    """Labels [B] int64 or [B,C] of 0 and 1 as float32 [B,C]."""
    if label.ndim == 1:
        label = label.unsqueeze(-1) == torch.arange(num_classes, device=label.device)
    return label.to(torch.float32)


def class_centres(x: Tensor, label: Tensor, num_classes: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted means of x [B,D] by class [C,D], 0 for an absent class, and which classes are present [C] bool (SeDA eq. 5).

    A sample with several labels counts in each of its classes.
    """
    member = membership(label, num_classes).to(x.dtype) * _weights(weight, x).unsqueeze(-1)
    count = member.sum(0)
    present = count > 0
    return member.T @ x / torch.where(present, count, 1.0).unsqueeze(-1), present


def structural_consistency(
    pred: Tensor,
    x_v: Tensor,
    label: Tensor,
    num_classes: int,
    centres_v: Tensor | None = None,
    reduction: Literal["mean", "literal"] = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """L_SC: distance of class centres plus L1 distance of samples, between predictions and visual features [B,D] (SeDA eq. 6).

    centres_v [C,D] are visual centres of the whole training split; without them the batch gives them. "mean" is the mean over
    present classes of ||.||_2 / sqrt(D) plus the mean over samples and dimensions of |.|, free of D's scale; "literal" has
    the sums of eq. 6 over classes, samples and dimensions, divided by the (weighted) number of samples as every loss here.
    """
    weight = _weights(weight, pred)
    centres, present = class_centres(pred, label, num_classes, weight)
    if centres_v is None:
        centres_v, _ = class_centres(x_v, label, num_classes, weight)
    # eq. 6 does not square the norm, whose gradient at 0 is NaN without the small term
    distance = torch.sqrt((centres - centres_v).square().sum(-1) + 1e-12)
    share = present.to(pred.dtype)
    absolute = (pred - x_v).abs()
    if reduction == "mean":
        return weighted_mean(distance, share) / math.sqrt(pred.shape[-1]) + weighted_mean(absolute.mean(-1), weight)
    total = weight.sum()
    return (share * distance).sum() / torch.where(total > 0, total, 1.0) + weighted_mean(absolute.sum(-1), weight)


def mse(pred: Tensor, target: Tensor, reduction: Literal["mean", "sum_dim"] = "mean", weight: Tensor | None = None) -> Tensor:
    """Squared error of [B,D] (MARNet eq. 19, SeDA eq. 10), mean over the batch and mean ("mean") or sum ("sum_dim") over D."""
    weight = _weights(weight, pred)
    squared = (pred - target).square()
    return weighted_mean(squared.mean(-1) if reduction == "mean" else squared.sum(-1), weight)
