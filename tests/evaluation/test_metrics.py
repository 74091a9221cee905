"""Metrics are compared with scikit-learn, with brute force, and with identities between them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)
from torch import Tensor

from pipeline.evaluation import metrics

ROWS, CLASSES = 300, 9
NEVER_PREDICTED: dict[str, Any] = {"zero_division": 0}


def logits(seed: int = 0, has_equal_logits: bool = False) -> Tensor:
    z = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed))
    return (2 * z).round() / 2 if has_equal_logits else z


def single() -> Tensor:
    return torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(7))


def multi() -> Tensor:
    """Labels with one or more classes per row; class 4 is never true."""
    label = (torch.rand(ROWS, CLASSES, generator=torch.Generator().manual_seed(8)) < 0.3).to(torch.int64)
    label[torch.arange(ROWS), single()] = 1
    label[:, 4] = 0
    label[label.sum(1) == 0, 0] = 1
    return label


def indicator(z: Tensor, k: int) -> np.ndarray:
    """Predictions of the k largest logits, by brute force; of equal logits the smaller class number comes first."""
    predicted = np.zeros(z.shape, dtype=np.int64)
    for i, row in enumerate(z.tolist()):
        for c in sorted(range(len(row)), key=lambda c: (-row[c], c))[:k]:
            predicted[i, c] = 1
    return predicted


@pytest.mark.parametrize("k", [1, 3, 5])
def test_accuracy_is_sklearns(k: int) -> None:
    z, label = logits(), single()
    expected = 100 * top_k_accuracy_score(label.numpy(), z.numpy(), k=k, labels=range(CLASSES))
    result = metrics.summary_metrics(z, label, (k,))
    assert result[f"acc{k}"] == pytest.approx(expected)
    assert list(result) == [f"acc{k}", "macro_acc", "ece"]


def test_macro_accuracy_is_sklearns_balanced_accuracy() -> None:
    z, label = logits(), single()
    label[label == 4] = 3  # a class without a sample, and one that is more frequent than the others
    expected = 100 * balanced_accuracy_score(label.numpy(), z.argmax(dim=1).numpy())
    assert metrics.summary_metrics(z, label)["macro_acc"] == pytest.approx(expected)
    assert metrics.summary_metrics(z, label)["acc1"] != pytest.approx(expected)


def naive_ece(confidences: list[float], right: list[bool]) -> float:
    """The definition, bin by bin: the share of its samples times the distance of mean confidence and accuracy."""
    total = 0.0
    for number in range(15):
        inside = [k for k, confidence in enumerate(confidences) if number / 15 < confidence <= (number + 1) / 15]
        if inside:
            accuracy = sum(right[k] for k in inside) / len(inside)
            total += len(inside) / len(right) * abs(sum(confidences[k] for k in inside) / len(inside) - accuracy)
    return total


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_ece_is_that_of_a_loop_over_bins_of_the_softmax(scale: float) -> None:
    z, label = scale * logits(), single()
    confidences = torch.softmax(z.double(), dim=1).amax(dim=1).tolist()
    right = (z.argmax(dim=1) == label).tolist()
    assert metrics.summary_metrics(z, label)["ece"] == pytest.approx(100 * naive_ece(confidences, right))


def test_ece_of_sure_predictions_is_their_error() -> None:
    z = 1e6 * torch.eye(4)
    assert metrics.summary_metrics(z, torch.tensor([0, 1, 2, 0]))["ece"] == pytest.approx(25.0)
    assert metrics.summary_metrics(torch.zeros(4, 4), torch.tensor([0, 1, 2, 3]))["ece"] == pytest.approx(0.0)


@pytest.mark.parametrize("has_equal_logits", [False, True])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_sklearns(k: int, has_equal_logits: bool) -> None:
    z, label = logits(has_equal_logits=has_equal_logits), multi()
    predicted, truth = indicator(z, k), label.numpy()
    present = [c for c in range(CLASSES) if c != 4]
    expected = {
        f"pre{k}": precision_score(truth, predicted, average="samples"),
        f"rec{k}": recall_score(truth, predicted, average="samples"),
        f"overall_pre{k}": precision_score(truth, predicted, average="micro"),
        f"overall_rec{k}": recall_score(truth, predicted, average="micro"),
        f"per_class_pre{k}": precision_score(truth, predicted, average="macro", **NEVER_PREDICTED),
        f"per_class_rec{k}": recall_score(truth, predicted, average="macro", labels=present),
    }
    result = metrics.summary_metrics(z, label, (k,))
    assert result.pop("map") > 0
    assert result == {name: pytest.approx(100 * float(value)) for name, value in expected.items()}


@pytest.mark.parametrize("has_equal_logits", [False, True])
def test_map_is_sklearns(has_equal_logits: bool) -> None:
    z, label = logits(has_equal_logits=has_equal_logits), multi()
    present = [c for c in range(CLASSES) if c != 4]
    expected = average_precision_score(label.numpy()[:, present], z.numpy()[:, present], average="macro")
    assert metrics.mean_average_precision(z, label) == pytest.approx(float(expected))


@pytest.mark.parametrize("label_loss", ["softmax_kl", "softmax_multihot", "bce"])
def test_map_compares_samples_by_log_softmax_or_by_sigmoid(label_loss: str) -> None:
    own_constants = 3 * torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(2))  # a softmax does not see them
    z, label = logits() + own_constants, multi()
    scores = z.numpy() if label_loss == "bce" else log_softmax(z.numpy().astype(float), axis=1)  # the sigmoid keeps the order
    present = [c for c in range(CLASSES) if c != 4]
    expected = 100 * float(average_precision_score(label.numpy()[:, present], scores[:, present], average="macro"))
    result = metrics.summary_metrics(z, label, label_loss=label_loss)
    assert result["map"] == pytest.approx(expected)
    without = metrics.summary_metrics(logits(), label, label_loss=label_loss)
    assert (result["map"] == pytest.approx(without["map"])) == (label_loss != "bce")
    assert {name: value for name, value in result.items() if name != "map"} == {
        name: value for name, value in without.items() if name != "map"
    }


def test_a_class_that_is_never_predicted_has_precision_0() -> None:
    z = torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]])
    label = torch.tensor([[1, 0, 0], [0, 1, 0]])
    precision, recall = metrics.per_class_precision_recall(metrics.top_classes(z, 1), label)
    assert precision == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert recall == pytest.approx((1 + 0) / 2)


def test_names_of_a_single_label_summary() -> None:
    assert list(metrics.summary_metrics(logits(), single())) == ["acc1", "acc5", "macro_acc", "ece"]


def test_names_of_a_multi_label_summary() -> None:
    words = "pre1 pre5 rec1 rec5 map overall_pre1 overall_rec1 overall_pre5 overall_rec5"
    words += " per_class_pre1 per_class_rec1 per_class_pre5 per_class_rec5"
    assert list(metrics.summary_metrics(logits(), multi())) == words.split()


def test_perfect_logits_score_100() -> None:
    result = metrics.summary_metrics(torch.eye(6), torch.arange(6))
    assert (result["acc1"], result["acc5"], result["macro_acc"]) == (100.0, 100.0, 100.0)
    result = metrics.summary_metrics(torch.eye(6), torch.eye(6))
    assert {result[name] for name in ("pre1", "rec1", "rec5", "map", "overall_pre1", "per_class_pre1")} == {100.0}
    assert result["pre5"] == pytest.approx(20.0)


@pytest.mark.parametrize("label", [single(), multi()], ids=["single", "multi"])
def test_the_mean_over_samples_is_the_summary(label: Tensor) -> None:
    values, result = metrics.per_example(logits(), label), metrics.summary_metrics(logits(), label)
    for name, value in values.items():
        assert value.shape == (ROWS,)
        assert float(value.mean()) == pytest.approx(result[name], rel=1e-12)


@pytest.mark.parametrize("label", [single(), multi()], ids=["single", "multi"])
def test_the_order_of_rows_does_not_matter(label: Tensor) -> None:
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    z = logits(has_equal_logits=True)
    assert metrics.summary_metrics(z[order], label[order]) == pytest.approx(metrics.summary_metrics(z, label), rel=1e-12)


@pytest.mark.parametrize("k", [1, 5])
def test_overall_metrics_obey_their_identities(k: int) -> None:
    z, label = logits(), multi()
    result = metrics.summary_metrics(z, label, (k,))
    assert result[f"overall_pre{k}"] == pytest.approx(result[f"pre{k}"])
    assert result[f"overall_rec{k}"] / result[f"overall_pre{k}"] == pytest.approx(k * ROWS / int(label.sum()))


def test_equal_logits_are_ranked_by_class_number() -> None:
    assert metrics.top_classes(torch.zeros(2, 6), 3).tolist() == [[0, 1, 2]] * 2
    assert metrics.top_classes(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), 4).tolist() == [[1, 3, 0, 2]]


def test_k_beyond_the_classes_is_all_classes() -> None:
    label = torch.eye(3)
    assert metrics.summary_metrics(torch.randn(3, 3), torch.arange(3), (5,))["acc5"] == 100.0
    result = metrics.summary_metrics(torch.randn(3, 3), label, (5,))
    assert (result["pre5"], result["rec5"]) == (pytest.approx(100 / 3), 100.0)


def test_logits_that_are_not_finite_are_refused() -> None:
    z = logits()
    z[3, 2] = math.nan
    with pytest.raises(ValueError, match="logits of row 3 are not finite"):
        metrics.summary_metrics(z, single())


def test_samples_without_label_are_refused() -> None:
    label = multi()
    label[5] = 0
    with pytest.raises(ValueError, match="row 5 has no label"):
        metrics.summary_metrics(logits(), label)


def test_parts_of_the_average_precision_are_its_derivatives_by_the_weights_of_samples() -> None:
    rng = np.random.default_rng(3)
    scores = np.round(rng.normal(size=(40, 5)), 1)  # with ties
    label = (rng.random((40, 5)) < 0.2).astype(np.int64)
    label[:, 4] = 0  # no true sample: the class does not count
    parts = metrics.average_precision_parts(torch.from_numpy(scores), torch.from_numpy(label)).numpy()

    def mean_ap(weight: np.ndarray) -> float:
        return float(np.mean([average_precision_score(label[:, c], scores[:, c], sample_weight=weight) for c in range(4)]))

    value, step = mean_ap(np.ones(40)), 1e-5
    assert parts.mean() == pytest.approx(value, abs=1e-12)
    for sample in range(40):
        change = np.zeros(40)
        change[sample] = step
        slope = (mean_ap(np.ones(40) + change) - mean_ap(np.ones(40) - change)) / (2 * step)
        assert parts[sample] == pytest.approx(value + 40 * slope, abs=1e-6)


def test_the_interval_from_parts_is_that_of_resampled_samples() -> None:
    rng = np.random.default_rng(4)
    label = (rng.random((600, 6)) < 0.15).astype(np.int64)
    scores = rng.normal(size=(600, 6)) + 1.5 * label
    parts = metrics.average_precision_parts(torch.from_numpy(scores), torch.from_numpy(label)).numpy()
    drawn = rng.integers(600, size=(400, 600))
    resampled = [
        metrics.mean_average_precision(torch.from_numpy(scores[rows]), torch.from_numpy(label[rows])) for rows in drawn
    ]
    assert parts[drawn].mean(1).std() == pytest.approx(np.std(resampled), rel=0.05)
