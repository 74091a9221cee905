"""Metrics of logits [N,C] against labels [N] (single) or [N,C] of 0 and 1 (multiple), in percent.

Classes are ranked by logit, equal logits by class number, so that a result is a function of its input. k beyond C is C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_classes(logits: Tensor, k: int) -> Tensor:
    """The k best classes of each row, best first, int64 [N, min(k,C)]; `ValueError` for a logit that is not finite."""
    broken = (~logits.isfinite().all(dim=1)).nonzero()
    if len(broken):
        raise ValueError(f"logits of row {int(broken[0])} are not finite ({len(broken)} such rows); nothing can be ranked")
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]


def topk_correct(logits: Tensor, label: Tensor, k: int) -> Tensor:
    """Whether the one label [N] is among the k best classes, bool [N]."""
    return (top_classes(logits, k) == label.unsqueeze(1)).any(dim=1)


def _predicted(logits: Tensor, k: int) -> Tensor:
    """The k best classes of each row as 0 and 1, float64 [N,C]."""
    return torch.zeros(logits.shape, dtype=torch.float64).scatter(1, top_classes(logits, k).cpu(), 1.0)


def _truth(label: Tensor) -> Tensor:
    """Labels [N,C] as float64; `ValueError` when a row has none, for its recall does not exist."""
    empty = (label.sum(1) == 0).nonzero()
    if len(empty):
        raise ValueError(f"row {int(empty[0])} has no label ({len(empty)} such rows); leave unlabelled samples out")
    return label.to("cpu", torch.float64)


def precision_recall(logits: Tensor, label: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Per sample |top_k & Y| / k and |top_k & Y| / |Y|, each float64 [N]; their means are SeDA's Pre@k and Rec@k."""
    predicted, truth = _predicted(logits, k), _truth(label)
    hits = (predicted * truth).sum(1)
    return hits / predicted.sum(1), hits / truth.sum(1)


def overall_precision_recall(logits: Tensor, label: Tensor, k: int) -> tuple[float, float]:
    """Hits of all samples over all predictions, and over all labels (Gong et al. 2013)."""
    predicted, truth = _predicted(logits, k), _truth(label)
    hits = (predicted * truth).sum()
    return float(hits / predicted.sum()), float(hits / truth.sum())


def per_class_precision_recall(logits: Tensor, label: Tensor, k: int) -> tuple[float, float]:
    """Mean over classes of hits over predictions and of hits over labels.

    A class that is never predicted has precision 0; a class without a true sample has no recall and is left out of that mean.
    """
    predicted, truth = _predicted(logits, k), _truth(label)
    hits, labelled = (predicted * truth).sum(0), truth.sum(0)
    precision = hits / predicted.sum(0).clamp(min=1.0)
    return float(precision.mean()), float((hits / labelled)[labelled > 0].mean())


def mean_average_precision(logits: Tensor, label: Tensor) -> float:
    """Mean over classes with a true sample of the average precision: the mean, over its samples, of precision at their score.

    Samples of equal score enter together, so the order of rows does not matter.
    """
    truth, score = label.T.to("cpu", torch.float64), logits.T.cpu().contiguous()
    ascending, order = score.sort(dim=1)
    at_least = score.shape[1] - torch.searchsorted(ascending, score)  # samples of at least this score [C,N]
    hits = truth.gather(1, order.flip(1)).cumsum(1).gather(1, at_least - 1)
    labelled = truth.sum(1)
    average = (truth * hits / at_least).sum(1) / labelled
    return float(average[labelled > 0].mean())


def per_example(logits: Tensor, label: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, Tensor]:
    """Each metric that is a mean over samples, as its terms in percent, float64 [N]: acc<k>, or pre<k> and rec<k>."""
    if label.ndim == 1:
        return {f"acc{k}": 100.0 * topk_correct(logits, label, k).to("cpu", torch.float64) for k in ks}
    pairs = {k: precision_recall(logits, label, k) for k in ks}
    return {f"{name}{k}": 100.0 * pairs[k][i] for i, name in enumerate(("pre", "rec")) for k in ks}


def summary_metrics(logits: Tensor, label: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """All metrics in percent.

    One label: acc<k>. Several: pre<k> and rec<k> per sample, map, overall_pre<k>, overall_rec<k>, per_class_pre<k> and
    per_class_rec<k>. `ValueError` for a logit that is not finite or a sample without label.
    """
    result = {name: float(terms.mean()) for name, terms in per_example(logits, label, ks).items()}
    if label.ndim == 1:
        return result
    result["map"] = 100.0 * mean_average_precision(logits, label)
    for prefix, measure in (("overall", overall_precision_recall), ("per_class", per_class_precision_recall)):
        for k in ks:
            precision, recall = measure(logits, label, k)
            result |= {f"{prefix}_pre{k}": 100.0 * precision, f"{prefix}_rec{k}": 100.0 * recall}
    return result
