"""Classification metrics of logits [N,C], in percent.

Labels are class numbers [N] (one label per sample), or 0 and 1 [N,C] (several labels per sample). The classes of a sample are
ranked by logit; equal logits are ranked by class number, so that the result depends on nothing but the input. A k above C
counts as C. What compares samples with each other (average precision, calibration) reads `scores.log_scores`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.scores import NUM_CALIBRATION_BINS, log_scores
from pipeline.runtime.errors import UserError


def top_classes(logits: Tensor, k: int) -> Tensor:
    """Return the k classes with the largest logits of each row, best first, int64 [N, min(k,C)].

    Raises:
        UserError: a logit is not finite.
    """
    bad_rows = (~logits.isfinite().all(dim=1)).nonzero()
    if len(bad_rows):
        raise UserError(f"logits of row {int(bad_rows[0])} are not finite ({len(bad_rows)} such rows); nothing can be ranked")
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]


def topk_correct(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Return whether the single label [N] is among the k best classes, bool [N]."""
    return (top_classes(logits, k) == label.unsqueeze(1)).any(dim=1)


def _predicted_indicator(top: Tensor, label: Tensor) -> Tensor:
    """Return 1 for the classes in each row of `top` and 0 for the others, float64 [N,C]."""
    return torch.zeros(label.shape, dtype=torch.float64).scatter(1, top.cpu(), 1.0)


def _label_indicator(label: Tensor) -> Tensor:
    """Return the labels as float64 [N,C]; `UserError` for a row without label, because its recall is not defined."""
    empty = (label.sum(1) == 0).nonzero()
    if len(empty):
        raise UserError(f"row {int(empty[0])} has no label ({len(empty)} such rows); leave unlabelled samples out")
    return label.to("cpu", torch.float64)


def precision_recall(top: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Return the precision |top_k & Y| / k and the recall |top_k & Y| / |Y| of each sample, each float64 [N].

    Their means are SeDA's Pre@k and Rec@k. `top` are the `top_classes`, [N,k].
    """
    predicted, truth = _predicted_indicator(top, label), _label_indicator(label)
    hits = (predicted * truth).sum(1)
    return hits / predicted.sum(1), hits / truth.sum(1)


def overall_precision_recall(top: Tensor, label: Tensor) -> tuple[float, float]:
    """Return the hits of all samples divided by all predictions, and divided by all labels (Gong et al. 2013)."""
    predicted, truth = _predicted_indicator(top, label), _label_indicator(label)
    hits = (predicted * truth).sum()
    return float(hits / predicted.sum()), float(hits / truth.sum())


def per_class_precision_recall(top: Tensor, label: Tensor) -> tuple[float, float]:
    """Return the means over classes of precision (hits / predictions) and recall (hits / labels).

    A class that is never predicted has precision 0. A class without a true sample has no recall; the mean recall leaves it out.
    """
    predicted, truth = _predicted_indicator(top, label), _label_indicator(label)
    hits, labelled = (predicted * truth).sum(0), truth.sum(0)
    precision = hits / predicted.sum(0).clamp(min=1.0)
    return float(precision.mean()), float((hits / labelled)[labelled > 0].mean())


def macro_accuracy(is_right: np.ndarray, label: np.ndarray) -> float:
    """Return the mean over classes of the share of their samples that are right [N], for single labels [N].

    Classes without a sample are left out.
    """
    counts = np.bincount(label)
    return float((np.bincount(label, weights=is_right)[counts > 0] / counts[counts > 0]).mean())


def expected_calibration_error(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """Return ECE: the mean distance between confidence and accuracy in 15 equal-width bins, weighted by their samples.

    Args:
        confidence: of the predicted class, 0..1, [N]. A bin holds its upper edge.
        is_right: whether the prediction is right, [N].
    """
    bins = np.ceil(confidence * NUM_CALIBRATION_BINS).astype(np.int64)  # 0 (for a confidence of 0) .. 15
    return float(np.abs(np.bincount(bins, weights=confidence - is_right)).sum() / len(confidence))


def mean_average_precision(scores: Tensor, label: Tensor) -> float:
    """Return the mean of the average precision over all classes that have a true sample.

    The average precision of a class is the mean, over its true samples, of the precision among all samples of at least their
    score. Samples of equal score are counted together, so the order of rows does not matter.

    Args:
        scores: [N,C], comparable across samples.
        label: indicators [N,C].
    """
    truth, precision, _, _, _ = _precisions(scores, label)
    labelled = truth.sum(1)
    return float(((truth * precision).sum(1) / labelled)[labelled > 0].mean())


def _precisions(scores: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sort the samples by their score for each class, and return five tensors [C,N] in that ascending order.

    Returns:
        The labels; the precision among all samples of at least this score; how many samples these are; how many have at most
        this score; and the row of each sample.
    """
    ascending, order = scores.T.cpu().contiguous().sort(dim=1)
    truth = label.T.to("cpu", torch.float64).gather(1, order)
    number = torch.arange(truth.shape[1]).expand_as(truth)
    is_new = torch.ones(truth.shape, dtype=torch.bool)  # the first of a run of equal scores
    is_new[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    first = torch.where(is_new, number, 0).cummax(1).values
    is_last = is_new.roll(-1, 1)  # every row begins with a new score
    not_above = torch.where(is_last, number + 1, truth.shape[1]).flip(1).cummin(1).values.flip(1)
    at_least = truth.shape[1] - first
    hits = truth.flip(1).cumsum(1).flip(1).gather(1, first)
    return truth, hits / at_least, at_least, not_above, order


def average_precision_parts(scores: Tensor, label: Tensor) -> Tensor:
    """Return what each sample contributes to the mean average precision, float64 [N]; their mean is that metric.

    The average precision is no mean over samples. These are its pseudo-values of the infinitesimal jackknife (Efron 1982): the
    metric plus N times its derivative by the weight of the sample, at equal weights. To first order, the metric of resampled
    samples is the mean of their parts, so intervals may be computed from these as from any metric that is a mean.

    Args:
        scores: See `mean_average_precision`.
        label: See `mean_average_precision`.
    """
    truth, precision, at_least, not_above, order = _precisions(scores, label)
    # A weight changes the precision at every true sample of at most its own score.
    slope, offset = (
        (truth * each / at_least).cumsum(1).gather(1, not_above - 1) for each in (torch.ones_like(truth), precision)
    )
    labelled = truth.sum(1, keepdim=True)
    average = (truth * precision).sum(1, keepdim=True) / labelled
    parts = average + len(label) * (truth * (precision - average + slope) - offset) / labelled
    return torch.empty_like(parts).scatter(1, order, parts)[labelled[:, 0] > 0].mean(0)


def per_example(logits: Tensor, label: Tensor, ks: Sequence[int] = (1, 5), label_loss: str = "softmax_kl") -> dict[str, Tensor]:
    """Return the value of each sample, in percent, for the metrics that are means over samples.

    Returns:
        float64 [N] by name: acc<k> for one label per sample; for several pre<k>, rec<k> and map (`average_precision_parts`).
    """
    if label.ndim == 1:
        return {f"acc{k}": 100.0 * topk_correct(logits, label, k).to("cpu", torch.float64) for k in ks}
    top = top_classes(logits, max(ks))
    pairs = {k: precision_recall(top[:, :k], label) for k in ks}
    values = {f"{name}{k}": 100.0 * pairs[k][i] for i, name in enumerate(("pre", "rec")) for k in ks}
    scores = torch.from_numpy(log_scores(logits.cpu().numpy(), label.cpu().numpy(), label_loss))
    return {**values, "map": 100.0 * average_precision_parts(scores, label)}


def summary_metrics(
    logits: Tensor, label: Tensor, ks: Sequence[int] = (1, 5), label_loss: str = "softmax_kl"
) -> dict[str, float]:
    """Return all metrics in percent, by name.

    Args:
        logits: [N,C].
        label: classes [N], or indicators [N,C].
        ks: the k of the metrics of the k best classes.
        label_loss: the method's loss for multi-label data, see `log_scores`.

    Returns:
        For one label per sample: acc<k>, macro_acc (mean over classes), ece (expected calibration error; lower is better).
        For several labels: pre<k> and rec<k> (means over samples), map, overall_pre<k>, overall_rec<k>, per_class_pre<k> and
        per_class_rec<k>.

    Raises:
        UserError: a logit is not finite, or a sample has no label.
    """
    result = {name: float(terms.mean()) for name, terms in per_example(logits, label, ks, label_loss).items()}
    if label.ndim == 1:
        scores = log_scores(logits.cpu().numpy(), label.cpu().numpy(), label_loss)
        is_right = topk_correct(logits, label, 1).cpu().numpy()
        result["macro_acc"] = 100.0 * macro_accuracy(is_right, label.cpu().numpy())
        result["ece"] = 100.0 * expected_calibration_error(np.exp(scores.max(axis=1)), is_right)
        return result
    top = top_classes(logits, max(ks))
    for prefix, measure in (("overall", overall_precision_recall), ("per_class", per_class_precision_recall)):
        for k in ks:
            precision, recall = measure(top[:, :k], label)
            result |= {f"{prefix}_pre{k}": 100.0 * precision, f"{prefix}_rec{k}": 100.0 * recall}
    return result
