"""The paired bootstrap is compared with scipy's and with the normal approximation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation import statistics
from pipeline.evaluation.statistics import paired_bootstrap


def accuracies(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Two correlated vectors of 0 and 100."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=n)
    skill = rng.normal(size=(2, n)) * 0.5 + np.array([[0.3], [0.1]])
    a, b = 100.0 * (skill > difficulty)
    return a, b


def test_the_interval_is_scipys() -> None:
    a, b = accuracies()
    difference, low, high = paired_bootstrap(a, b, 10_000, seed=0)
    oracle = stats.bootstrap(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=1,
        vectorized=True,
    ).confidence_interval
    assert difference == pytest.approx(float(a.mean() - b.mean()))
    assert (low, high) == (pytest.approx(oracle.low, abs=0.25), pytest.approx(oracle.high, abs=0.25))


def test_the_interval_is_about_two_standard_errors_of_the_pairs() -> None:
    a, b = accuracies()
    difference, low, high = paired_bootstrap(a, b, 10_000, seed=0)
    error = (a - b).std() / np.sqrt(len(a))
    assert (low, high) == (pytest.approx(difference - 1.96 * error, abs=0.3), pytest.approx(difference + 1.96 * error, abs=0.3))


def test_a_constant_difference_has_no_uncertainty() -> None:
    b = np.arange(10.0)
    assert paired_bootstrap(b + 2.0, b, 100, seed=0) == (2.0, 2.0, 2.0)


def test_the_result_depends_on_the_seed_but_not_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = accuracies()
    result = paired_bootstrap(a, b, 500, seed=3)
    assert paired_bootstrap(a, b, 500, seed=3) == result
    assert paired_bootstrap(a, b, 500, seed=4) != result
    monkeypatch.setattr(statistics, "MAX_DRAWN_INDICES", 1000)
    assert paired_bootstrap(a, b, 500, seed=3) == result


@pytest.mark.parametrize(
    ("a", "b"), [(np.zeros(3), np.zeros(4)), (np.zeros(0), np.zeros(0)), (np.zeros((2, 2)), np.zeros((2, 2)))]
)
def test_vectors_that_cannot_be_paired_are_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_bootstrap(a, b, 10, seed=0)
