"""Where texts come again among millions: by hashes, in a few bytes a text; texts whose hashes are the same are compared."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.columns import BATCH_ROWS, Strings, compute, numpy_array


def hash_keys(keys: Strings) -> NDArray[np.int64]:
    """Return the hash of each text, which only this process knows."""
    return np.concatenate([np.zeros(0, np.int64), *(np.fromiter(map(hash, part), np.int64) for part in keys.parts())])


def contains(numbers: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the wanted numbers are among others."""
    ordered, searched = np.sort(numbers), np.sort(wanted)  # in order, millions are found in the cache of the processor
    common = searched[np.searchsorted(ordered, searched, side="right") > np.searchsorted(ordered, searched)]
    if not len(common):
        return np.zeros(len(wanted), np.bool_)
    return common[np.minimum(np.searchsorted(common, wanted), len(common) - 1)] == wanted


def first_positions(keys: Strings) -> NDArray[np.int64]:
    """Return for each text the position where it stands first: its own one, unless it has come before."""
    hashes = hash_keys(keys)
    first = np.arange(len(hashes))
    ordered = np.sort(hashes)
    is_new = np.append(True, ordered[1:] != ordered[:-1])[: len(hashes)]
    if is_new.all():
        return first
    order = np.argsort(hashes)
    starts = np.flatnonzero(is_new)
    first[order] = np.repeat(np.minimum.reduceat(order, starts), np.diff(np.append(starts, len(order))))
    others: dict[str, int] = {}  # the first positions of texts whose hash is that of another one
    again = np.flatnonzero(first < np.arange(len(first)))
    for position in again[~same_texts(keys, again, keys, first[again])].tolist():
        first[position] = others.setdefault(keys[position], position)
    return first


def same_texts(texts: Strings, positions: NDArray[np.int64], others: Strings, places: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether the texts at some positions are, each, the same as those of another column at some places."""
    starts = range(0, len(positions), BATCH_ROWS)
    pairs = (
        (texts.take(positions[start : start + BATCH_ROWS]), others.take(places[start : start + BATCH_ROWS])) for start in starts
    )
    return np.fromiter((one == other for part in pairs for one, other in zip(*part, strict=True)), np.bool_, len(positions))


def run_starts(blocks: Iterable[pa.Array]) -> NDArray[np.int64]:
    """Return the ascending positions of the texts, which come in blocks, that are another one than the text before them."""
    found, last, start = [np.zeros(0, np.int64)], None, 0
    for block in blocks:
        differs = numpy_array(compute.not_equal(block[1:], block[:-1])).astype(np.bool_)
        found.append(start + np.flatnonzero(np.append(block[0].as_py() != last, differs)))
        last, start = block[-1].as_py(), start + len(block)
    return np.concatenate(found)
