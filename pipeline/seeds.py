"""Numbers over several seeds: means, deviations, and the cells of a grid by rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd


def average(values: np.ndarray) -> float:
    """Mean of the finite values, NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan


def deviation(values: np.ndarray) -> float:
    """Sample standard deviation of finite values, NaN of fewer than two."""
    return float(values.std(ddof=1)) if len(values) > 1 else np.nan


def spread(mean: float, std: float) -> str:
    """Mean ± standard deviation, the latter where there is one."""
    return f"{mean:.2f}" if np.isnan(std) else f"{mean:.2f} ± {std:.2f}"


def summary(values: Sequence[float] | np.ndarray) -> str:
    """`spread` of finite values, one per seed."""
    return spread(average(np.asarray(values)), deviation(np.asarray(values)))


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
            "score": average(scores[cell]),
            "std": deviation(scores[cell][done[cell]]),
            "loss": average(losses[cell]),
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
