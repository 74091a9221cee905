"""Statistics over seeds, samples and data sets: two-level bootstrap, Holm's correction, verdicts, mean ± deviation, ranking.

A difference between two methods is uncertain because other seeds would train other weights, and because other samples could
have been in the split. `paired_bootstrap` draws both anew. It does not import torch, so that reports can use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

Values = NDArray[np.floating]
NUM_RESAMPLES = 10_000
MIN_SEEDS_FOR_INTERVAL = 3
MIN_SEEDS_FOR_VERDICT = 5
SIGNIFICANCE = 0.05
MAX_CLUSTERS = 4096  # more clusters of samples are joined at random; the variance of their mean stays the same
MAX_COUNTS = 1 << 21  # counts of drawn clusters that are in memory at once: 16 MB


class Estimate(NamedTuple):
    """A number with its 95 % interval, and the two-sided p-value of its difference to nothing; NaN where there is none."""

    value: float
    low: float
    high: float
    p: float


NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan, math.nan)


class Scores(NamedTuple):
    """A metric of two methods a and b on the same N samples."""

    a: Values  # [Sa,N], one row per seed
    b: Values  # [Sb,N]
    clusters: NDArray[Any] | None = None  # [N], equal for samples that are drawn together; None: each by itself
    has_same_seeds: bool = False  # row k of a and row k of b share their seed, so they are drawn together


def paired_bootstrap(scores: Scores, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Estimate:
    """Return mean(a) - mean(b) with its interval from a two-level bootstrap: seeds and clusters of samples are drawn anew.

    Both methods get the same samples in every resample, and the same seeds if `has_same_seeds`. Where only one level varies,
    this is the percentile interval over samples, or the t-interval over seeds: see `_resample`.

    Args:
        scores: the values of both methods.
        num_resamples: how often seeds and samples are drawn.
        seed: seed of these draws.

    Returns:
        The difference; without interval if a method has fewer than three seeds.

    Raises:
        ValueError: a and b are empty, or do not have the same samples.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in scores[:2])
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"values of shape {a.shape} and {b.shape} cannot be paired; give [seeds, samples] on the same samples")
    difference = float(a.mean() - b.mean())
    if min(len(a), len(b)) < MIN_SEEDS_FOR_INTERVAL:
        return Estimate(difference, np.nan, np.nan, np.nan)
    parts = [a - b] if scores.has_same_seeds else [a, -b]
    drawn = _resample(parts, scores.clusters, num_resamples, (seed,))
    return _summarise(difference, np.sum([part.mean(axis=1) for part in drawn], axis=0), 0.0)


def mean_interval(values: Values, clusters: NDArray[Any] | None = None) -> Estimate:
    """Return the mean of a metric of one run over its samples [N], with the percentile interval of a bootstrap of these.

    Args:
        values: the metric of each sample.
        clusters: [N], equal for samples that are drawn together; None: each by itself.
    """
    means = _resampled_means(np.asarray(values, dtype=np.float64)[None], clusters, NUM_RESAMPLES, (0,))
    return _summarise(float(np.mean(values)), means[:, 0], 0.0)


def _summarise(value: float, resampled: Values, null: float) -> Estimate:
    """Return the percentile interval of resampled values, and the p-value of the level at which it would touch `null`."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    tail = min(np.count_nonzero(resampled <= null), np.count_nonzero(resampled >= null))
    return Estimate(value, float(low), float(high), min(1.0, 2.0 * (1 + int(tail)) / (1 + len(resampled))))


def _resample(
    parts: Sequence[Values], clusters: NDArray[Any] | None, num_resamples: int, seed: tuple[int, ...]
) -> list[Values]:
    """Draw samples for all parts [S,N] together, and seeds for each; return the scores [R,S] of the drawn seeds of each part.

    A score is the mean over the drawn samples and all seeds, plus the deviation of the drawn seed. The deviations are those on
    all samples, because a bootstrap of both at once counts the noise of single predictions three times (Owen 2007).
    """
    means = _resampled_means(np.stack([part.mean(axis=0) for part in parts]), clusters, num_resamples, seed)
    rng = np.random.default_rng((*seed, 1))
    return [
        mean[:, None] + _drawn_deviations(part.mean(axis=1), num_resamples, rng)
        for mean, part in zip(means.T, parts, strict=True)
    ]


def _resampled_means(values: Values, clusters: NDArray[Any] | None, num_resamples: int, seed: tuple[int, ...]) -> Values:
    """Return the means [R,K] of values [K,N] over clusters of samples that are drawn with replacement."""
    cluster = np.arange(values.shape[1]) if clusters is None else np.unique(clusters, return_inverse=True)[1].reshape(-1)
    num_clusters = int(cluster.max()) + 1
    if num_clusters > MAX_CLUSTERS:
        cluster = (np.random.default_rng((*seed, 2)).permutation(num_clusters) % MAX_CLUSTERS)[cluster]
        num_clusters = MAX_CLUSTERS
    sums = np.stack([np.bincount(cluster, weights=row) for row in (*values, np.ones(len(cluster)))], axis=1)  # [G,K+1]
    counts = _drawn_counts(num_clusters, num_resamples, seed)
    block = max(1, MAX_COUNTS // num_clusters)
    totals = np.concatenate([counts[start : start + block] @ sums for start in range(0, num_resamples, block)])
    return totals[:, :-1] / totals[:, -1:]


@lru_cache(maxsize=4)  # all rows of a table are compared on the same draws
def _drawn_counts(num_clusters: int, num_resamples: int, seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return how often each cluster is drawn in each resample [R,G]; at most 41 MB for 10,000 resamples."""
    rng = np.random.default_rng(seed)
    counts = np.empty((num_resamples, num_clusters), dtype=np.uint8)
    block = max(1, MAX_COUNTS // num_clusters)
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = rng.integers(num_clusters, size=(rows, num_clusters)) + num_clusters * np.arange(rows)[:, None]
        counts[start : start + rows] = np.bincount(drawn.reshape(-1), minlength=rows * num_clusters).reshape(rows, -1)
    return counts


def _drawn_deviations(means: Values, num_resamples: int, rng: np.random.Generator) -> Values:
    """Return the deviations [R,S] from the mean of S seeds, of seeds that are drawn with replacement.

    The mean of the drawn deviations is widened by sqrt(S/(S-1)) t/z, where t and z are the 97.5 % quantiles of Student's t with
    S - 1 degrees of freedom and of the normal distribution. Few seeds look more alike than they are; widened, their percentile
    interval has the width of the t-interval (Hesterberg 2015, "What teachers should know about the bootstrap").
    """
    num_seeds, tail = len(means), 1 - SIGNIFICANCE / 2
    drawn = (means - means.mean())[rng.integers(num_seeds, size=(num_resamples, num_seeds))]
    widening = np.sqrt(num_seeds / (num_seeds - 1)) * stdtrit(num_seeds - 1, tail) / ndtri(tail)
    return drawn + (widening - 1) * drawn.mean(axis=1, keepdims=True)


def interquartile_mean(values: Values) -> Values:
    """Return the mean of the middle half of the last axis (Agarwal et al. 2021): outliers at both ends do not count."""
    num_cut = values.shape[-1] // 4
    return np.sort(values, axis=-1)[..., num_cut : values.shape[-1] - num_cut].mean(axis=-1)


def probability_of_improvement(a: Values, b: Values) -> Values:
    """Return how often a seed of a [...,Sa] is above a seed of b [...,Sb], 0..1; equal scores count one half."""
    above = a[..., :, None] - b[..., None, :]
    return ((above > 0) + 0.5 * (above == 0)).mean(axis=(-2, -1))


def compare_across(datasets: Sequence[Scores], num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Compare two methods over several data sets, by the bootstrap of `paired_bootstrap` inside each of them.

    Args:
        datasets: the values of both methods on each data set, in one unit.
        num_resamples: how often seeds and samples are drawn.
        seed: seed of these draws.

    Returns:
        The interquartile mean, over all seeds of a and all data sets, of the points above the mean of b; and the mean over data
        sets of the probability of improvement, whose p-value is against one half. Without intervals if a method has fewer than
        three seeds on a data set.
    """
    exact = [[np.asarray(values, dtype=np.float64).mean(axis=1)[None] for values in each[:2]] for each in datasets]
    gain, improvement = (float(value[0]) for value in _aggregate(exact))
    if min(len(values) for each in datasets for values in each[:2]) < MIN_SEEDS_FOR_INTERVAL:
        return Estimate(gain, np.nan, np.nan, np.nan), Estimate(improvement, np.nan, np.nan, np.nan)
    drawn = [_resample(each[:2], each.clusters, num_resamples, (seed, index)) for index, each in enumerate(datasets)]
    resampled = _aggregate(drawn)
    return _summarise(gain, resampled[0], 0.0), _summarise(improvement, resampled[1], 0.5)


def _aggregate(scores: Sequence[Sequence[Values]]) -> tuple[Values, Values]:
    """Return the two figures of `compare_across` [R] from the scores [R,Sa] and [R,Sb] of each data set."""
    gains = np.concatenate([a - b.mean(axis=1, keepdims=True) for a, b in scores], axis=1)
    return interquartile_mean(gains), np.mean([probability_of_improvement(a, b) for a, b in scores], axis=0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number (Holm 1979); NaN stays NaN and does not count.

    Rejecting what is below 0.05 then keeps the chance of any false rejection at 0.05.
    """
    adjusted, largest = [float("nan")] * len(p_values), 0.0
    order = sorted((index for index, p in enumerate(p_values) if not np.isnan(p)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def find_verdict(estimate: Estimate, p_holm: float, num_seeds: int, better: str, worse: str) -> str:
    """Return what an estimate allows to say: `better`, `worse`, "not distinguishable", or how many seeds there are of five.

    Args:
        estimate: a difference.
        p_holm: its p-value, adjusted for all comparisons of its table.
        num_seeds: the number of seeds of the method that has fewer.
        better: the words for a difference above 0.
        worse: the words for a difference below 0.
    """
    if num_seeds < MIN_SEEDS_FOR_VERDICT:
        return f"{num_seeds} of {MIN_SEEDS_FOR_VERDICT} seeds"
    if not p_holm < SIGNIFICANCE:
        return "not distinguishable"
    return better if estimate.value > 0 else worse


def mean_of_finite(values: np.ndarray) -> float:
    """Return the mean of the finite values; NaN when there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def sample_std(values: np.ndarray) -> float:
    """Return the sample standard deviation of finite values; NaN for fewer than two."""
    return float(values.std(ddof=1)) if len(values) > 1 else np.nan


def format_mean_std(mean: float, std: float) -> str:
    """Return "mean ± standard deviation", or the mean alone when the standard deviation is NaN."""
    return f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def describe_spread(seed_counts: Iterable[int]) -> str:
    """Return what the numbers of `format_mean_std` are in a table whose rows have these numbers of seeds."""
    counts = {count for count in seed_counts if count}
    what = "Mean ± standard deviation over seeds" if counts - {1} else "Of one seed"
    return f"{what}; a row with one seed has no spread" if 1 in counts else what


def format_seeds(values: Sequence[float] | np.ndarray) -> str:
    """Return mean ± standard deviation of finite values, one per seed, as `format_mean_std` writes it."""
    return format_mean_std(mean_of_finite(np.asarray(values)), sample_std(np.asarray(values)))


def rank_cells(scores: np.ndarray, losses: np.ndarray, reasons: Sequence[Sequence[str]]) -> pd.DataFrame:
    """Rank the cells of a grid by mean score, then by mean loss, then by cell number.

    Args:
        scores: score of each run [K,S] (K cells, S seeds), NaN where a run has not finished.
        losses: loss of each run [K,S], NaN where a run has not finished.
        reasons: why a run has not finished [K,S].

    Returns:
        One row per cell: first the cells with all seeds, by rank, then the others by cell number. Columns: cell; rank (missing
        for cells without all seeds); score, std (NaN for one seed) and loss over the finished seeds; seeds (number of finished
        seeds); state ("done", or the first reason).
    """
    done = np.isfinite(scores)
    states = [
        next((reason for reason, is_done in zip(*cell, strict=True) if not is_done), "done")
        for cell in zip(reasons, done, strict=True)
    ]
    rows = [
        {
            "cell": cell,
            "score": mean_of_finite(scores[cell]),
            "std": sample_std(scores[cell][done[cell]]),
            "loss": mean_of_finite(losses[cell]),
            "seeds": int(done[cell].sum()),
            "state": states[cell],
        }
        for cell in range(len(scores))
    ]
    table = pd.DataFrame(rows)
    complete = table[table["seeds"] == scores.shape[1]].sort_values(["score", "loss", "cell"], ascending=[False, True, True])
    rank = pd.Series(range(1, len(complete) + 1), index=complete.index, dtype="Int64")
    ordered = table.assign(rank=rank.reindex(table.index)).loc[[*complete.index, *table.index.difference(complete.index)]]
    return ordered.reset_index(drop=True)


def judge_cells(scores: np.ndarray, ranking: pd.DataFrame) -> list[str]:
    """Say of each cell of a grid whether its seeds are below those of the best cell, over seeds alone.

    Args:
        scores: score of each run [K,S] (K cells, S seeds), NaN where a run has not finished.
        ranking: the cells as `rank_cells` orders them.

    Returns:
        In the order of the ranking: "the best", "below the best", "not distinguishable" or how many seeds there are of five; ""
        for cells without all seeds.
    """
    complete = ranking.dropna(subset=["rank"])["cell"].tolist()
    best, *others = (scores[cell][:, None] for cell in complete) if complete else [scores]
    estimates = [paired_bootstrap(Scores(own, best, None, True)) for own in others]
    verdicts = [
        find_verdict(estimate, p_holm, scores.shape[1], "above the best", "below the best")
        for estimate, p_holm in zip(estimates, holm([each.p for each in estimates]), strict=True)
    ]
    return [*(["the best"] if complete else []), *verdicts, *[""] * (len(ranking) - len(complete))]
