"""Loss functions that methods share.

They use weights per sample instead of data-dependent shapes, so that `torch.func.vmap` can run them for an ensemble of models.
Every `weight` [B] is >= 0; None means ones. A mean over the batch is a weighted mean; it is 0 if all weights are 0. A row
of weight 0 does not change the result, but its values must be finite.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.types import Shapes

LabelLoss = Literal["softmax_kl", "bce", "softmax_multihot"]  # for multi-label data; see `classification_loss`
MSEReduction = Literal["mean", "sum_dim"]  # see `mse_loss`
StructuralReduction = Literal["mean", "literal"]  # see `structural_consistency_loss`

MASKED_LOGIT = -1e9  # logit of a masked column: finite, so that the loss of a row with no column left is finite
TINY = 1e-30  # the least sum or mean of weights that is divided by: with zeros alone, the result stays 0


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return the mean of values [B] or [B,D] over D and, with weights w_i / sum_i w_i, over B; 0 if every weight is 0."""
    if weight is None:
        return values.mean()
    share = weight / weight.mean().clamp(min=TINY)
    return (values * (share if values.ndim == 1 else share.unsqueeze(-1))).mean()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the format of losses, targets and counts of values of a format: float32 for bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def classification_losses(logits: Tensor, label: Tensor, kind: LabelLoss) -> Tensor:
    """Return the classification loss of each sample, [B] (MARNet eq. 12, SeDA eq. 7).

    Args:
        logits: [B,C].
        label: class numbers int64 [B], or a multi-hot matrix of 0 and 1 [B,C]. Class numbers give cross-entropy for every kind.
        kind: loss for multi-hot labels Y. "softmax_kl" has the target distribution Y/|Y|; "softmax_multihot" has the target Y;
            "bce" is binary cross-entropy, mean over classes. For the two softmax kinds, the loss of a row without labels is 0.
    """
    logits = logits.to(_wide(logits.dtype))
    if label.ndim == 1:
        return F.cross_entropy(logits, label, reduction="none")
    target = label.to(logits.dtype)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
    if kind == "softmax_kl":
        target = target / target.sum(-1, keepdim=True).clamp(min=1.0)
    return F.cross_entropy(logits, target, reduction="none")


def uses_sigmoid(shapes: Shapes, kind: LabelLoss) -> bool:
    """Return whether the loss takes logits as those of a sigmoid per class: "bce" on multi-label data; else of a softmax."""
    return kind == "bce" and shapes["label"] != ()


def classification_loss(logits: Tensor, label: Tensor, kind: LabelLoss, weight: Tensor | None = None) -> Tensor:
    """Return the mean of `classification_losses` over the batch; see the module docstring for the weight."""
    return weighted_mean(classification_losses(logits, label, kind), weight)


def info_nce(
    a: Tensor, b: Tensor, tau: Tensor | float, weight: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the contrastive losses from a to b and from b to a (MARNet eq. 5, 9, 10); their sum is L_ITA (eq. 11).

    The similarity is cosine / tau. The other rows of the batch are the negatives. Each loss is a mean over anchors. A row of
    weight 0 is neither an anchor nor a negative.

    Args:
        a: embeddings [B,D].
        b: embeddings [B,D]; row i belongs to row i of `a`.
        tau: temperature.
        weight: see the module docstring.
        excluded: pairs of rows that are no negatives of each other, bool [B,B], symmetric; its diagonal does not count.
    """
    with torch.autocast(a.device.type, enabled=False):  # a rounded similarity, divided by a small tau, is mostly noise
        a, b = (F.normalize(x.to(_wide(x.dtype)), dim=-1) for x in (a, b))
        similarity = a @ b.T / tau
    return contrastive_losses(similarity, weight, excluded)


def contrastive_losses(
    similarity: Tensor, weight: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the contrastive losses along the rows and along the columns of any similarity [B,B], divided by its temperature.

    See `info_nce` for the other arguments.
    """
    own = torch.arange(len(similarity), device=similarity.device)
    if excluded is not None:
        similarity = similarity.masked_fill(excluded & (own.unsqueeze(1) != own), MASKED_LOGIT)

    def contrast(logits: Tensor) -> Tensor:
        masked = logits if weight is None else logits.masked_fill(weight == 0, MASKED_LOGIT)
        return weighted_mean(F.cross_entropy(masked, own, reduction="none"), weight)

    return contrast(similarity), contrast(similarity.T)


def distillation(pupil: Tensor, source: Tensor) -> Tensor:
    """Return KL(softmax(source) || softmax(pupil)) of each row of logits [B,C]; the source has no gradient."""
    log_p, log_q = torch.log_softmax(pupil, dim=1), torch.log_softmax(source.detach(), dim=1)
    return (log_q.exp() * (log_q - log_p)).sum(1)  # not F.kl_div, which torch.func cannot batch


def multi_hot(label: Tensor, num_classes: int) -> Tensor:
    """Return class numbers int64 [B], or labels that are multi-hot already [B,C], as a float32 matrix of 0 and 1 [B,C]."""
    if label.ndim == 1:
        return torch.zeros(len(label), num_classes, device=label.device).scatter(1, label.unsqueeze(-1), 1.0)
    return label.to(torch.float32)


def same_labels(label: Tensor) -> Tensor:
    """Return which rows have the same label or, if multi-hot, the same set of labels: bool [B,B] from [B] or [B,C]."""
    if label.ndim == 1:
        return label.unsqueeze(1) == label
    member = label.to(torch.float32)
    shared, size = member @ member.T, member.sum(-1)
    return (shared == size) & (shared == size.unsqueeze(1))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the sliced Wasserstein distance (squared) of two sets of B points: it does not depend on their orders (Lee 2019).

    On each direction the points are numbers, and the distance of two sets of numbers is the mean squared difference of their
    sorted values. The result is the mean over directions.

    Args:
        a: points [B,D].
        b: points [B,D]; where row i of one has weight 0, so has row i of the other.
        directions: [D,P], of any length but 0.
        weight: 0 or 1 for each row, [B]; None means ones.
    """
    with torch.autocast(a.device.type, enabled=False):  # rounding would change the order of values that are nearly equal
        units = F.normalize(directions.to(_wide(a.dtype)), dim=0)
        projected = [x.to(units.dtype) @ units for x in (a, b)]
    if weight is not None:  # rows of weight 0 are equal in both sets, and stand at the end
        projected = [torch.where(weight.unsqueeze(-1) > 0, x, -MASKED_LOGIT) for x in projected]
    first, second = (x.sort(dim=0).values for x in projected)
    num_rows = len(a) if weight is None else weight.sum().clamp(min=1.0)
    return (first - second).square().mean(1).sum() / num_rows


def class_sums(x: Tensor, label: Tensor, num_classes: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weighted sums of x [B,D] over the samples of each class [C,D], and the sums of their weights [C].

    Their quotients are the class centres (SeDA eq. 5). A sample with several labels counts in each class.
    """
    member = multi_hot(label, num_classes).to(_wide(x.dtype))
    if weight is not None:
        member = member * weight.unsqueeze(-1)
    return member.T @ x, member.sum(0)


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
    difference = pred - x_v
    if centres_v is None:  # centres are linear: the difference of two of them is the centre of the differences
        between, count = class_sums(difference, label, num_classes, weight)
        distances = torch.linalg.vector_norm(between, dim=-1) / count.clamp(min=TINY)
    else:
        sums, count = class_sums(pred, label, num_classes, weight)
        between = sums / count.clamp(min=TINY).unsqueeze(-1) - centres_v
        distances = torch.linalg.vector_norm(between, dim=-1) * (count > 0)
    # Eq. 6 does not square the norm; its gradient at 0 is 0.
    distance, absolute, width = distances.sum(), weighted_mean(difference.abs(), weight), pred.shape[-1]
    if reduction == "mean":
        return distance / ((count > 0).sum().clamp(min=1) * math.sqrt(width)) + absolute
    num_samples = len(pred) if weight is None else weight.sum().clamp(min=TINY)
    return distance / num_samples + width * absolute


def mse_loss(pred: Tensor, target: Tensor, reduction: MSEReduction = "mean", weight: Tensor | None = None) -> Tensor:
    """Return the squared error of features [B,D], mean over the batch (MARNet eq. 19, SeDA eq. 10).

    Args:
        pred: predicted features [B,D].
        target: true features [B,D].
        reduction: over the D dimensions, "mean", or "sum_dim" for the sum.
        weight: see the module docstring.
    """
    error = weighted_mean(F.mse_loss(pred, target, reduction="none"), weight)
    return error if reduction == "mean" else pred.shape[-1] * error
