"""What a grid says about its axes: means by value and by pair of values, the best that is left, and the ranking of cells."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import mean_of_finite, rank_cells, sample_std
from pipeline.report.studies import Study

NUM_PAIRED = 4  # axes of which every pair is shown


def by_value(study: Study, field: str) -> pd.DataFrame:
    """The validation metric in percent against one axis, a row per value in the axis' order, NaN where nothing has finished.

    mean, std: over the finished runs of all cells with the value, whatever their other values and seeds; best, best_std: over
    the seeds of the best of these cells, of those that have all seeds; runs: how many have finished.
    """
    scores, column = study.of_cells("score"), study.column(field)
    best = ranking(study).dropna(subset=["rank"]).sort_values("rank")
    lines = []
    for place in range(len(study.axes[field])):
        found = scores[column == place]
        found = found[np.isfinite(found)]
        first = best[column[best["cell"].to_numpy(dtype=int)] == place].head(1)
        mean, std = (float(first[name].iloc[0]) if len(first) else np.nan for name in ("score", "std"))
        lines.append(
            {"mean": mean_of_finite(found), "std": sample_std(found), "best": mean, "best_std": std, "runs": len(found)}
        )
    return pd.DataFrame(lines)


def by_pair(study: Study, row: str, column: str) -> np.ndarray:
    """Mean over the finished runs of all cells with both values [R,C], NaN where nothing has finished."""
    scores, rows, columns = study.of_cells("score"), study.column(row), study.column(column)
    means = np.full((len(study.axes[row]), len(study.axes[column])), np.nan)
    for place in np.ndindex(means.shape):
        means[place] = mean_of_finite(scores[(rows == place[0]) & (columns == place[1])])
    return means


def reach(study: Study, field: str) -> float:
    """Points between the largest and the smallest mean of an axis; 0 where there is nothing to compare."""
    means = by_value(study, field)["mean"].dropna()
    return float(means.max() - means.min()) if len(means) else 0.0


def varied(study: Study) -> list[str]:
    """The axes with more than one value, in order."""
    return [field for field, values in study.axes.items() if len(values) > 1]


def pairs(study: Study) -> list[tuple[str, str]]:
    """All pairs of varied axes; of more than four axes, those of the four that reach furthest."""
    furthest = sorted(varied(study), key=lambda field: -reach(study, field))[:NUM_PAIRED]
    return list(combinations([field for field in varied(study) if field in furthest], 2))


def ranking(study: Study) -> pd.DataFrame:
    """The cells by rank, see `rank_cells`; those that are not ranked have a state."""
    scores, runs = study.of_cells("score"), study.runs
    reasons = runs["reason"].where(runs["reason"] != "", runs["state"]).to_numpy().reshape(scores.shape)
    return rank_cells(scores, study.of_cells("loss"), reasons.tolist())
