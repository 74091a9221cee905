"""Uncertainty of a difference between two methods on the same samples; without torch, for reports."""

from __future__ import annotations

import numpy as np
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
