"""Find the closest rows of two groups by cosine. Memory holds only blocks of rows and their cosines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
from dask.base import compute
from dask.delayed import delayed

COSINE_ROUNDING = 1e-6  # error of a cosine in float32
PAIR_BLOCK_ROWS = 2048  # rows of a block; two blocks have 16 MiB of cosines

ClosePair = tuple[float, int, int]  # cosine, row of the first group, row of the second


def close_pairs(
    features: da.Array, first: np.ndarray, second: np.ndarray, threshold: float, top: int
) -> tuple[int, np.ndarray, list[ClosePair]]:
    """Find the pairs of a row of `first` and a row of `second` that have at least a given cosine.

    A row of zeros, or one that is not finite, has cosine 0 to every other row.

    Args:
        features: all rows [M, width].
        first: row numbers of the first group, ascending.
        second: row numbers of the second group, ascending.
        threshold: the cosine.
        top: how many pairs are returned.

    Returns:
        The number of pairs; the rows of `second` that are in a pair, ascending; and the `top` closest pairs, sorted by
        cosine, then by row.
    """
    total, best = 0, [(0.0, 0, 0)][:0]
    is_paired = np.zeros(len(second), dtype=bool)
    if not (len(first) and len(second)):
        return total, second[is_paired], best
    search: Any = delayed(_search_block_pair)
    first_blocks = list(_blocks(features, first))
    start = 0
    for block, second_rows in _blocks(features, second):
        second_unit = _normalised(block.compute())
        found = compute(*(search(first_block, second_unit, threshold, top) for first_block, _ in first_blocks))
        for (count, columns, pairs), (_, first_rows) in zip(found, first_blocks, strict=True):
            total += count
            is_paired[start + columns] = True
            best += [(cosine, int(first_rows[i]), int(second_rows[j])) for cosine, i, j in pairs]
        best = sorted(best, key=lambda pair: (-pair[0], *pair[1:]))[:top]
        start += len(second_rows)
    return total, second[is_paired], best


def _blocks(features: da.Array, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield these rows as delayed blocks, each with its row numbers."""
    block_rows = min(PAIR_BLOCK_ROWS, int(features.chunks[0][0]))
    for start in range(0, len(rows), block_rows):
        in_block = rows[start : start + block_rows]
        yield delayed(features[in_block]), in_block


def _normalised(rows: np.ndarray) -> np.ndarray:
    """Scale each row to length 1; a row of zeros stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _search_block_pair(
    rows: np.ndarray, second_unit: np.ndarray, threshold: float, top: int
) -> tuple[int, np.ndarray, list[ClosePair]]:
    """Return the close pairs of two blocks as `close_pairs` does, with the positions in the blocks.

    The second block is normalised already.
    """
    cosines = _normalised(rows) @ second_unit.T
    close = np.flatnonzero(cosines >= threshold - COSINE_ROUNDING)
    values = np.minimum(cosines.ravel()[close], 1.0)
    order = np.argsort(-values, kind="stable")[:top]
    first, second = np.divmod(close[order], cosines.shape[1])
    columns = np.unique(close % cosines.shape[1])
    return len(close), columns, list(zip(values[order].tolist(), first.tolist(), second.tolist(), strict=True))
