"""Summarise a grid over its axes: means by value and by pair of values, the best cell of each value, the ranking of cells."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import mean_of_finite, rank_cells, sample_std
from pipeline.report.grid_results import GridResults

NUM_PAIRED_AXES = 4  # with more axes than these, not every pair of axes is shown


def mean_by_value(grid: GridResults, field: str) -> pd.DataFrame:
    """Summarise the validation metric in percent over each value of one axis.

    Args:
        grid: The grid.
        field: Name of the setting that is the axis.

    Returns:
        One row per value, in the order of the axis; NaN where no run has finished. Columns:
        mean, std: over the finished runs of all cells with the value, whatever their other values and seeds.
        best, best_std: over the seeds of the best of these cells; only cells that have all their seeds are considered.
        runs: number of finished runs.
    """
    scores, cell_positions = grid.by_cell_and_seed("score"), grid.positions_on(field)
    ranked = rank_grid_cells(grid).dropna(subset=["rank"]).sort_values("rank")
    rows = []
    for position in range(len(grid.axes[field])):
        finished = scores[cell_positions == position]
        finished = finished[np.isfinite(finished)]
        best = ranked[cell_positions[ranked["cell"].to_numpy(dtype=int)] == position].head(1)
        best_mean, best_std = (float(best[name].iloc[0]) if len(best) else np.nan for name in ("score", "std"))
        rows.append(
            {
                "mean": mean_of_finite(finished),
                "std": sample_std(finished),
                "best": best_mean,
                "best_std": best_std,
                "runs": len(finished),
            }
        )
    return pd.DataFrame(rows)


def mean_by_pair(grid: GridResults, row_field: str, column_field: str) -> np.ndarray:
    """Return the mean score [R,C] over the finished runs of all cells with both values, NaN where no run has finished.

    R and C are the numbers of values of the two axes.
    """
    scores = grid.by_cell_and_seed("score")
    row_positions, column_positions = grid.positions_on(row_field), grid.positions_on(column_field)
    means = np.full((len(grid.axes[row_field]), len(grid.axes[column_field])), np.nan)
    for row, column in np.ndindex(means.shape):
        means[row, column] = mean_of_finite(scores[(row_positions == row) & (column_positions == column)])
    return means


def mean_range(grid: GridResults, field: str) -> float:
    """Return the points between the largest and the smallest mean of an axis; 0 where there is nothing to compare."""
    means = mean_by_value(grid, field)["mean"].dropna()
    return float(means.max() - means.min()) if len(means) else 0.0


def varied_axes(grid: GridResults) -> list[str]:
    """Return the axes with more than one value, in order."""
    return [field for field, values in grid.axes.items() if len(values) > 1]


def axis_pairs(grid: GridResults) -> list[tuple[str, str]]:
    """Return the pairs of varied axes; with more than four axes, only pairs of the four with the largest `mean_range`."""
    chosen = sorted(varied_axes(grid), key=lambda field: -mean_range(grid, field))[:NUM_PAIRED_AXES]
    return list(combinations([field for field in varied_axes(grid) if field in chosen], 2))


def rank_grid_cells(grid: GridResults) -> pd.DataFrame:
    """Return the cells by rank, with the columns of `rank_cells`; `state` says why a cell has no rank."""
    scores, runs = grid.by_cell_and_seed("score"), grid.runs
    reasons = runs["reason"].where(runs["reason"] != "", runs["state"]).to_numpy().reshape(scores.shape)
    return rank_cells(scores, grid.by_cell_and_seed("loss"), reasons.tolist())
