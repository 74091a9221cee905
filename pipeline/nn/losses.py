"""Loss functions that methods share.

They use weights per sample instead of data-dependent shapes, so that `torch.func.vmap` can run them for an ensemble of models.
Every `weight` [B] is >= 0 and defaults to ones. A mean over the batch is a weighted mean; it is 0 if all weights are 0. A row
of weight 0 does not change the result, but its values must be finite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LabelLoss = Literal["softmax_kl", "bce", "softmax_multihot"]  # for multi-label data; see `classification_loss`
MSEReduction = Literal["mean", "sum_dim"]  # see `mse_loss`
StructuralReduction = Literal["mean", "literal"]  # see `structural_consistency_loss`

MASKED_LOGIT = -1e9  # logit of a masked column: finite, so that the loss of a row with no column left is finite


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Return sum_i w_i v_i / sum_i w_i of values [B], or 0 if every weight is 0."""
    total = weight.sum()
    return (weight * values).sum() / torch.where(total > 0, total, 1.0)


def _weight_or_ones(weight: Tensor | None, like: Tensor) -> Tensor:
    return like.new_ones(like.shape[0]) if weight is None else weight.to(like.dtype)


def classification_loss(logits: Tensor, label: Tensor, kind: LabelLoss, weight: Tensor | None = None) -> Tensor:
    """Return the classification loss, mean over the batch (MARNet eq. 12, SeDA eq. 7).

    Args:
        logits: [B,C].
        label: class numbers int64 [B], or a multi-hot matrix of 0 and 1 [B,C]. Class numbers give cross-entropy for every kind.
        kind: loss for multi-hot labels Y. "softmax_kl" has the target distribution Y/|Y|; "softmax_multihot" has the target Y;
            "bce" is binary cross-entropy, mean over classes. For the two softmax kinds, the loss of a row without labels is 0.
        weight: see the module docstring.
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
    return weighted_mean(loss, _weight_or_ones(weight, logits))


def info_nce(a: Tensor, b: Tensor, tau: Tensor | float, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the contrastive losses from a to b and from b to a (MARNet eq. 5, 9, 10); their sum is L_ITA (eq. 11).

    The similarity is cosine / tau. The other rows of the batch are the negatives. Each loss is a mean over anchors. A row of
    weight 0 is neither an anchor nor a negative.

    Args:
        a: embeddings [B,D].
        b: embeddings [B,D]; row i belongs to row i of `a`.
        tau: temperature.
        weight: see the module docstring.
    """
    weight = _weight_or_ones(weight, a)
    a, b = (F.normalize(x, dim=-1) for x in (a, b))
    similarity = a @ b.T / tau
    positive = similarity.diagonal()
    is_masked = (weight == 0).unsqueeze(0)
    a2b = torch.logsumexp(similarity.masked_fill(is_masked, MASKED_LOGIT), dim=1) - positive
    b2a = torch.logsumexp(similarity.T.masked_fill(is_masked, MASKED_LOGIT), dim=1) - positive
    return weighted_mean(a2b, weight), weighted_mean(b2a, weight)


def multi_hot(label: Tensor, num_classes: int) -> Tensor:
    """Return class numbers int64 [B], or labels that are multi-hot already [B,C], as a float32 matrix of 0 and 1 [B,C]."""
    if label.ndim == 1:
        label = label.unsqueeze(-1) == torch.arange(num_classes, device=label.device)
    return label.to(torch.float32)


def class_centres(x: Tensor, label: Tensor, num_classes: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the weighted mean of x [B,D] for each class (SeDA eq. 5). A sample with several labels counts in each class.

    Returns:
        The centres [C,D], 0 for a class without samples, and whether each class has a sample, bool [C].
    """
    member = multi_hot(label, num_classes).to(x.dtype) * _weight_or_ones(weight, x).unsqueeze(-1)
    count = member.sum(0)
    is_present = count > 0
    return member.T @ x / torch.where(is_present, count, 1.0).unsqueeze(-1), is_present


def structural_consistency_loss(
    pred: Tensor,
    x_v: Tensor,
    label: Tensor,
    num_classes: int,
    centres_v: Tensor | None = None,
    reduction: StructuralReduction = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Return L_SC: the distance of class centres plus the L1 distance of samples (SeDA eq. 6).

    Args:
        pred: predicted features [B,D].
        x_v: visual features [B,D], the target.
        label: see `classification_loss`.
        num_classes: C.
        centres_v: visual class centres of the whole training split [C,D]; None computes them from the batch.
        reduction: "mean" is the mean over present classes of ||.||_2 / sqrt(D), plus the mean over samples and dimensions of
            |.|; its scale does not depend on D. "literal" has the sums of eq. 6 over classes, samples and dimensions, divided
            by the sum of the weights (the number of samples), like every loss here.
        weight: see the module docstring.
    """
    weight = _weight_or_ones(weight, pred)
    centres, is_present = class_centres(pred, label, num_classes, weight)
    if centres_v is None:
        centres_v, _ = class_centres(x_v, label, num_classes, weight)
    # Eq. 6 does not square the norm. Without the small constant, the gradient of the norm at 0 is NaN.
    distance = torch.sqrt((centres - centres_v).square().sum(-1) + 1e-12)
    class_weight = is_present.to(pred.dtype)
    absolute = (pred - x_v).abs()
    if reduction == "mean":
        return weighted_mean(distance, class_weight) / math.sqrt(pred.shape[-1]) + weighted_mean(absolute.mean(-1), weight)
    total = weight.sum()
    return (class_weight * distance).sum() / torch.where(total > 0, total, 1.0) + weighted_mean(absolute.sum(-1), weight)


def mse_loss(pred: Tensor, target: Tensor, reduction: MSEReduction = "mean", weight: Tensor | None = None) -> Tensor:
    """Return the squared error of features [B,D], mean over the batch (MARNet eq. 19, SeDA eq. 10).

    Args:
        pred: predicted features [B,D].
        target: true features [B,D].
        reduction: over the D dimensions, "mean", or "sum_dim" for the sum.
        weight: see the module docstring.
    """
    weight = _weight_or_ones(weight, pred)
    squared = (pred - target).square()
    return weighted_mean(squared.mean(-1) if reduction == "mean" else squared.sum(-1), weight)
