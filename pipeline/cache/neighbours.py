"""The closest rows of two groups by cosine, block by block: memory holds a block of each and their cosines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
from dask.base import compute
from dask.delayed import delayed

ROUNDING = 1e-6  # of cosines in float32
PAIR_ROWS = 2048  # rows of a block; a pair of blocks has 16 MiB of cosines

Pair = tuple[float, int, int]  # cosine, row of the first group, row of the second


def close_pairs(
    features: da.Array, first: np.ndarray, second: np.ndarray, threshold: float, top: int
) -> tuple[int, list[Pair]]:
    """How many pairs of rows of `first` and `second`, ascending, have a cosine of at least `threshold`, and the `top` closest.

    A row of zeros has cosine 0 to every other. Pairs are sorted by cosine, then by row.
    """
    total, best = 0, [(0.0, 0, 0)][:0]
    if not (len(first) and len(second)):
        return total, best
    search: Any = delayed(_search)
    ones = list(_blocks(features, first))
    for others, held_rows in _blocks(features, second):
        held = _unit(others.compute())
        found = compute(*(search(block, held, threshold, top) for block, _ in ones))
        for (count, pairs), (_, rows) in zip(found, ones, strict=True):
            total += count
            best += [(cosine, int(rows[one]), int(held_rows[other])) for cosine, one, other in pairs]
        best = sorted(best, key=lambda pair: (-pair[0], *pair[1:]))[:top]
    return total, best


def _blocks(features: da.Array, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """These rows as delayed blocks, with the rows that are in each."""
    size = min(PAIR_ROWS, int(features.chunks[0][0]))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield delayed(features[some]), some


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _search(rows: np.ndarray, held: np.ndarray, threshold: float, top: int) -> tuple[int, list[Pair]]:
    """The pairs of one block with another, by their places in the blocks."""
    cosines = _unit(rows) @ held.T
    close = np.flatnonzero(cosines >= threshold - ROUNDING)
    values = np.minimum(cosines.ravel()[close], 1.0)
    order = np.argsort(-values, kind="stable")[:top]
    one, other = np.divmod(close[order], cosines.shape[1])
    return len(close), list(zip(values[order].tolist(), one.tolist(), other.tolist(), strict=True))
