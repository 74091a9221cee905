"""The bootstrap is compared with SciPy's, with closed forms, with all outcomes of tiny cases, and by its coverage."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipeline.evaluation import statistics
from pipeline.evaluation.statistics import (
    Estimate,
    Scores,
    compare_across,
    find_verdict,
    holm,
    interquartile_mean,
    judge_cells,
    paired_bootstrap,
    probability_of_improvement,
    rank_cells,
)


def accuracies(n: int = 400, seeds: int = 5, spread: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two correlated matrices [seeds,n] of 0 and 100; with spread 0, all seeds are equal."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=n)
    skill = rng.normal(size=(2, 1, n)) * 0.5 + np.array([0.3, 0.1])[:, None, None] + spread * rng.normal(size=(2, seeds, n))
    a, b = 100.0 * (np.broadcast_to(skill, (2, seeds, n)) > difficulty)
    return a, b


def scipy_interval(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """SciPy's percentile interval of the mean over clusters with these sums and sizes."""

    def mean(index: np.ndarray, axis: int) -> np.ndarray:
        return sums[index].sum(axis) / sizes[index].sum(axis)

    result = stats.bootstrap((np.arange(len(sums)),), mean, method="percentile", n_resamples=10_000, rng=1, vectorized=True)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


@pytest.mark.parametrize("has_same_seeds", [False, True])
def test_the_interval_over_samples_is_scipys(has_same_seeds: bool) -> None:
    a, b = accuracies()
    found = paired_bootstrap(Scores(a, b, None, has_same_seeds))
    assert found.value == pytest.approx(float(a.mean() - b.mean()))
    assert (found.low, found.high) == pytest.approx(scipy_interval(a[0] - b[0], np.ones(400)), abs=0.25)


def test_the_interval_over_clusters_is_scipys_and_wider() -> None:
    a, b = accuracies(90)
    of_cluster = np.repeat(np.arange(90), 1 + np.arange(90) % 7)
    a, b = a[:, of_cluster], b[:, of_cluster]  # all samples of a cluster are right together
    found = paired_bootstrap(Scores(a, b, np.array([f"series {k}" for k in of_cluster])))
    sums, sizes = np.bincount(of_cluster, weights=a[0] - b[0]), np.bincount(of_cluster).astype(float)
    assert (found.low, found.high) == pytest.approx(scipy_interval(sums, sizes), abs=0.5)
    single = paired_bootstrap(Scores(a, b))
    assert found.high - found.low > 1.5 * (single.high - single.low)


@pytest.mark.parametrize("seeds", [5, 8, 20])
def test_the_interval_over_seeds_is_student_s(seeds: int) -> None:
    level = 3.0 + 2.0 * stats.norm.ppf((np.arange(seeds)[:, None] + 0.5) / seeds)  # without skew, which Student does not see
    a, b = np.repeat(level, 50, axis=1), np.zeros((seeds, 50))
    found = paired_bootstrap(Scores(a, b, None, True))
    expected = stats.ttest_1samp(level[:, 0], 0.0).confidence_interval()
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.06 * width)


@pytest.mark.parametrize("has_same_seeds", [False, True])
def test_tiny_cases_have_the_distribution_of_all_their_outcomes(has_same_seeds: bool) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.8, 1.0, (3, 4)), rng.normal(size=(3, 4))

    def widened(values: np.ndarray) -> np.ndarray:
        """The mean deviation of every draw of three of three seeds."""
        own = values.mean(axis=1) - values.mean()
        draws = np.array([own[list(drawn)].mean() for drawn in product(range(3), repeat=3)])
        return draws * np.sqrt(3 / 2) * stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975)

    samples = np.array([(a - b)[:, list(drawn)].mean() for drawn in product(range(4), repeat=4)])
    seeds = widened(a - b) if has_same_seeds else np.add.outer(widened(a), -widened(b)).ravel()
    outcomes = np.add.outer(samples, seeds).ravel()
    found = paired_bootstrap(Scores(a, b, None, has_same_seeds), num_resamples=200_000)
    assert found.value == pytest.approx((a - b).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(outcomes, [0.025, 0.975])), abs=0.03)
    assert found.p == pytest.approx(2 * min((outcomes <= 0).mean(), (outcomes >= 0).mean()), abs=0.01)


def test_seeds_that_are_drawn_together_keep_what_they_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 5, size=(5, 1))
    a, b = (50 + shared + rng.normal(size=(5, 300)) for _ in range(2))
    together, apart = (paired_bootstrap(Scores(a, b, None, same)) for same in (True, False))
    assert apart.high - apart.low > 3 * (together.high - together.low)


def test_with_a_seed_effect_one_level_covers_too_little_and_two_levels_enough() -> None:
    rng = np.random.default_rng(5)
    covered = {"one level": 0, "two levels": 0}
    trials, seeds, n = 400, 5, 300
    for _ in range(trials):
        difficulty, own = rng.normal(size=n), rng.normal(0, 0.15, size=(2, seeds, 1))
        a, b = 100.0 * (own + 0.3 * rng.normal(size=(2, seeds, n)) > difficulty)
        terms = (a - b).mean(axis=0)  # one level: seeds are averaged first
        covered["one level"] += abs(terms.mean()) <= 1.96 * stats.sem(terms)
        found = paired_bootstrap(Scores(a, b), num_resamples=500)
        covered["two levels"] += found.low <= 0 <= found.high
    share = {name: count / trials for name, count in covered.items()}
    assert share["one level"] < 0.75
    assert 0.93 <= share["two levels"] <= 1.0


def test_many_clusters_are_joined_without_a_change_of_the_interval() -> None:
    a, b = accuracies(5 * statistics.MAX_CLUSTERS)
    found = paired_bootstrap(Scores(a, b))
    error = 1.96 * float(stats.sem(a[0] - b[0]))
    assert (found.low, found.high) == pytest.approx((found.value - error, found.value + error), abs=0.08 * error)


def test_a_constant_difference_has_no_uncertainty() -> None:
    b = np.tile(np.arange(10.0), (3, 1))
    assert paired_bootstrap(Scores(b + 2.0, b, None, True), 99) == (2.0, 2.0, 2.0, pytest.approx(0.02))
    assert paired_bootstrap(Scores(b, b, None, True), 99) == (0.0, 0.0, 0.0, 1.0)


def test_the_result_depends_on_the_seed_but_not_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = Scores(*accuracies(spread=0.3))
    result = paired_bootstrap(scores, 500, seed=3)
    assert paired_bootstrap(scores, 500, seed=3) == result
    assert paired_bootstrap(scores, 500, seed=4) != result
    monkeypatch.setattr(statistics, "MAX_COUNTS", 1000)
    statistics._drawn_counts.cache_clear()
    assert paired_bootstrap(scores, 500, seed=3) == pytest.approx(result, rel=1e-12)


@pytest.mark.parametrize("seeds", [(1, 1), (2, 5), (5, 2)])
def test_fewer_than_three_seeds_have_no_interval(seeds: tuple[int, int]) -> None:
    a, b = accuracies()
    found = paired_bootstrap(Scores(a[: seeds[0]], b[: seeds[1]]))
    assert found.value == pytest.approx(float(a.mean() - b.mean()))
    assert np.isnan(found[1:]).all()
    assert np.isnan([each[1:] for each in compare_across([Scores(a, b), Scores(a[: seeds[0]], b[: seeds[1]])])]).all()


@pytest.mark.parametrize(("a", "b"), [((3, 3), (3, 4)), ((3, 0), (3, 0)), ((0, 3), (3, 3)), ((4,), (4,))])
def test_values_that_cannot_be_paired_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_bootstrap(Scores(np.zeros(a), np.zeros(b)))


def test_holm_by_hand_and_by_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, float("nan"), 0.04]) == pytest.approx([0.02, float("nan"), 0.04], nan_ok=True)
    assert holm([]) == []
    p_values = np.random.default_rng(0).random(12) ** 3
    rejected: list[int] = []  # step down: the smallest at level/12, the next at level/11 …, until one is not rejected
    for rank, index in enumerate(np.argsort(p_values)):
        if p_values[index] > 0.05 / (12 - rank):
            break
        rejected.append(int(index))
    assert rejected
    assert sorted(rejected) == [index for index, p in enumerate(holm(p_values.tolist())) if p <= 0.05]


@pytest.mark.parametrize(
    ("value", "p", "seeds", "verdict"),
    [
        (2.0, 0.01, 5, "better"),
        (-2.0, 0.01, 7, "worse"),
        (2.0, 0.05, 5, "not distinguishable"),
        (2.0, 0.001, 3, "3 of 5 seeds"),
        (2.0, float("nan"), 1, "1 of 5 seeds"),
    ],
)
def test_a_verdict_takes_five_seeds_and_a_small_p(value: float, p: float, seeds: int, verdict: str) -> None:
    assert find_verdict(Estimate(value, 0.0, 0.0, p), p, seeds, "better", "worse") == verdict


@pytest.mark.parametrize("size", [3, 8, 15, 22])
def test_the_interquartile_mean_is_scipys_trimmed_mean(size: int) -> None:
    values = np.random.default_rng(0).standard_cauchy((7, size))
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=1))


def test_the_probability_of_improvement_is_mann_and_whitney_s() -> None:
    a, b = np.random.default_rng(0).integers(0, 6, size=(2, 9)).astype(float)
    expected = stats.mannwhitneyu(a, b[:7]).statistic / (9 * 7)
    assert float(probability_of_improvement(a, b[:7])) == pytest.approx(expected)


def simulated(rng: np.random.Generator, gain: float, level: float) -> Scores:
    """Five seeds of two methods on 200 samples; a gains some points."""
    effect: Any = rng.normal(0, 1.0, size=(2, 5, 1))
    a, b = level + effect + rng.normal(0, 20, size=(2, 1, 200)) + rng.normal(0, 5, size=(2, 5, 200))
    return Scores(a + gain, b)


def test_over_data_sets_the_figures_are_those_of_their_definitions_and_the_interval_covers_the_gain() -> None:
    rng = np.random.default_rng(6)
    covered = above = 0
    for _ in range(100):
        datasets = [simulated(rng, 3.0, level) for level in (40.0, 60.0, 80.0)]
        gain, improvement = compare_across(datasets, num_resamples=400)
        gains = [each.a.mean(axis=1) - each.b.mean() for each in datasets]
        assert gain.value == pytest.approx(stats.trim_mean(np.concatenate(gains), 0.25))
        pairs = [stats.mannwhitneyu(each.a.mean(axis=1), each.b.mean(axis=1)).statistic / 25 for each in datasets]
        assert improvement.value == pytest.approx(np.mean(pairs))
        covered += gain.low <= 3.0 <= gain.high
        above += gain.p < 0.05
        assert improvement.low <= improvement.value <= improvement.high <= 1.0
    assert covered >= 92
    assert above > 50
    same = compare_across([simulated(rng, 0.0, 50.0) for _ in range(3)])
    assert same[0].low < 0 < same[0].high
    assert same[1].low < 0.5 < same[1].high


def test_cells_of_a_grid_are_compared_with_the_best_over_their_seeds() -> None:
    noise = np.array([-0.4, -0.2, 0.0, 0.2, 0.4])
    scores = 60.0 + np.array([[0.0], [-0.1], [-5.0], [9.0]]) + np.stack([noise, noise[::-1], np.roll(noise, 2), noise])
    scores[3, 1] = np.nan  # this cell is not complete
    for shown, expected in (
        (scores, ["the best", "not distinguishable", "below the best", ""]),
        (scores[:3, [0, 2, 4]], ["the best", "3 of 5 seeds", "3 of 5 seeds"]),
        (np.full((2, 5), np.nan), ["", ""]),
    ):
        ranking = rank_cells(shown, shown, [["missing"] * shown.shape[1]] * len(shown))
        assert judge_cells(shown, ranking) == expected
