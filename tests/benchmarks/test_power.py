"""The power calculation agrees with simulation: standard errors, and how often a detectable difference is found."""

from __future__ import annotations

import numpy as np
import power
import pytest
from scipy.stats import norm

VARIANCES = power.Variances(seed=0.2, group=30.0, rest=60.0, num_groups=200)


def simulate(rng: np.random.Generator, num_seeds: int, num_groups: int) -> np.ndarray:
    """Draw differences x_sg with the variances above and the mean 0."""
    seed, group, rest = (np.sqrt(part) for part in VARIANCES[:3])
    sizes = ((num_seeds, 1), (1, num_groups), (num_seeds, num_groups))
    return sum((scale * rng.normal(size=size) for scale, size in zip((seed, group, rest), sizes, strict=True)), np.zeros(1))


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_the_standard_error_is_the_deviation_of_simulated_means(num_seeds: int) -> None:
    rng = np.random.default_rng(num_seeds)
    means = [simulate(rng, num_seeds, VARIANCES.num_groups).mean() for _ in range(2000)]
    assert np.std(means) == pytest.approx(VARIANCES.standard_error(num_seeds), rel=0.05)


def test_the_variances_of_simulated_differences_are_found() -> None:
    rng = np.random.default_rng(0)
    found = [power.estimate_variances(simulate(rng, 40, 400)) for _ in range(40)]
    for name in ("seed", "group", "rest"):
        assert np.mean([getattr(each, name) for each in found]) == pytest.approx(getattr(VARIANCES, name), rel=0.1)


@pytest.mark.parametrize("num_compared", [1, 5])
def test_a_detectable_difference_is_found_in_80_percent_of_all_cases(num_compared: int) -> None:
    error = 0.7
    true = power.detectable_difference(error, num_compared)
    estimates = np.random.default_rng(num_compared).normal(true, error, 100_000)
    p_values = 2 * norm.sf(np.abs(estimates) / error)
    assert (p_values < 0.05 / num_compared).mean() == pytest.approx(0.8, abs=0.01)


def test_the_mean_of_the_differences_is_the_difference_in_accuracy() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 3, 50)) < 0.5
    found = power.differences(first, second, [f"group{number % 7}" for number in range(50)])
    assert found.shape == (3, 7)
    np.testing.assert_allclose(found.mean(axis=1), 100 * (second.mean(axis=1) - first.mean(axis=1)))
