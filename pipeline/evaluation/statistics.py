"""Statistics over samples, seeds and grid cells: paired bootstrap, mean ± standard deviation, ranking.

It does not import torch, so that reports can use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MAX_DRAWN_INDICES = 1 << 22  # indices that the bootstrap draws at once: 32 MB


def paired_bootstrap(
    a: NDArray[np.floating], b: NDArray[np.floating], num_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Return the difference of two methods' means and its 95% bootstrap interval (percentile method).

    Args:
        a: one metric of the first method, one value per sample [N].
        b: the same metric of the second method on the same samples [N].
        num_resamples: how many times the samples are drawn with replacement.
        seed: seed of these draws.

    Returns:
        (mean(a) - mean(b), lower bound, upper bound).

    Raises:
        ValueError: a and b are empty, or do not have the same length.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"terms of shape {a.shape} and {b.shape} cannot be paired; give two equally long vectors")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    block = max(1, MAX_DRAWN_INDICES // len(difference))
    for start in range(0, num_resamples, block):
        stop = min(start + block, num_resamples)
        means[start:stop] = difference[rng.integers(len(difference), size=(stop - start, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


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
