"""Uncertainty of a difference between two methods on the same samples; without torch, for reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

BLOCK = 1 << 22  # drawn indices held at a time: 32 MB


def paired_bootstrap(
    a: NDArray[np.floating], b: NDArray[np.floating], num_resamples: int, seed: int
) -> tuple[float, float, float]:
    """mean(a) - mean(b) and its 95% percentile interval over resampled samples: (difference, low, high).

    a, b [N] are one metric's terms for two methods, sample by sample; `ValueError` when they cannot be paired.
    """
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"terms of shape {a.shape} and {b.shape} cannot be paired; give two equally long vectors")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    rows = max(1, BLOCK // len(difference))
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        means[start:stop] = difference[rng.integers(len(difference), size=(stop - start, len(difference)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def mean_of_finite(values: np.ndarray) -> float:
    """Mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def sample_std(values: np.ndarray) -> float:
    """Sample standard deviation of finite values, NaN of fewer than two."""
    return float(values.std(ddof=1)) if len(values) > 1 else np.nan


def format_mean_std(mean: float, std: float) -> str:
    """Mean ± standard deviation, the latter where there is one."""
    return f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def format_seeds(values: Sequence[float] | np.ndarray) -> str:
    """`format_mean_std` of finite values, one per seed."""
    return format_mean_std(mean_of_finite(np.asarray(values)), sample_std(np.asarray(values)))


def rank_cells(scores: np.ndarray, losses: np.ndarray, reasons: Sequence[Sequence[str]]) -> pd.DataFrame:
    """One row per cell: those with all their seeds by rank, then the others in their order.

    scores, losses: [K,S], NaN where a run has not finished; reasons [K,S]: why it has not. Columns: cell; rank (missing for the
    others): by mean score, then mean loss, then order; score, std (NaN of one seed) and loss over the finished seeds; seeds:
    how many; state: "done", or the first reason.
    """
    done = np.isfinite(scores)
    states = [
        next((why for why, ended in zip(*cell, strict=True) if not ended), "done") for cell in zip(reasons, done, strict=True)
    ]
    lines = [
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
    table = pd.DataFrame(lines)
    whole = table[table["seeds"] == scores.shape[1]].sort_values(["score", "loss", "cell"], ascending=[False, True, True])
    rank = pd.Series(range(1, len(whole) + 1), index=whole.index, dtype="Int64")
    ordered = table.assign(rank=rank.reindex(table.index)).loc[[*whole.index, *table.index.difference(whole.index)]]
    return ordered.reset_index(drop=True)
