"""Statistics of a cache in bounded memory: a dask array over the store, a block of rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import dask.config
import numpy as np
import zarr
from dask.base import compute

from pipeline.cache import layout
from pipeline.cache.neighbours import close_pairs
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.samples import manifest_of

BLOCK_BYTES = 2**22  # of features as float32 in a block; at least a chunk of the store
THREADS = 4  # blocks that are in memory at a time, whatever the number of cores
HISTOGRAM_BINS = 10


def stats(path: Path, threshold: float = 0.95, top: int = 10) -> dict[str, Any]:
    """Mean, deviation, norms, class centres and near duplicates across splits of a complete cache, as JSON values.

    Rows without finite features are counted and left out. Class centres are those of the training split: `within_between`
    is the mean squared distance of rows to their class centre over that of class centres to their mean, each class weighted
    by its rows. Near duplicates are pairs of a training row and a row of another split with a cosine of at least
    `threshold` (-1..1, to 1e-6): how many there are, and the `top` closest. `ValueError` as `open_cache`, and when the cache
    has no finite row or its manifest has changed.
    """
    if not -1 <= threshold <= 1 or top < 1:
        raise ValueError(f"the threshold is a cosine, from -1 to 1, and top at least 1, not {threshold} and {top}")
    cache = open_cache(path)
    manifest, samples = manifest_of(cache)
    sample_of = np.repeat(np.arange(len(samples)), np.diff(cache.offsets))
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        features = dask_features(cache)
        described, norms = _moments(features)
        is_train = np.array([sample.split == "train" for sample in samples])[sample_of]
        train, others = np.flatnonzero(is_train & np.isfinite(norms)), np.flatnonzero(~is_train & np.isfinite(norms))
        pairs = [(row, label) for row in train.tolist() for label in samples[sample_of[row]].labels]
        classes = _classes(features, norms, np.array(pairs, dtype=np.int64).reshape(-1, 2), manifest.class_names)
        count, closest = close_pairs(features, train, others, threshold, top)
    near = [(cosine, samples[sample_of[one]], samples[sample_of[other]]) for cosine, one, other in closest]
    return {
        "path": str(path),
        "rows": len(norms),
        "failed_rows": int(np.isnan(norms).sum()),
        **described,
        "classes": classes,
        "near_duplicates": {
            "threshold": threshold,
            "pairs": count,
            "closest": [{"cosine": cos, "train": one.id, "other": other.id, "split": other.split} for cos, one, other in near],
        },
    }


def dask_features(cache: Cache) -> da.Array:
    """The rows of a cache as float32 [M, width], in blocks; rows with anything that is not finite are NaN throughout."""
    array = zarr.open_array(cache.path / "features", mode="r")
    width, dtype = int(np.prod(cache.feature_shape)), str(cache.identity["store_dtype"])
    chunks = max(1, BLOCK_BYTES // (4 * width * layout.CHUNK_ROWS))
    stored = da.from_zarr(array, chunks=(min(chunks * layout.CHUNK_ROWS, array.shape[0]), *cache.feature_shape))

    def decode(block: np.ndarray) -> np.ndarray:
        rows = layout.from_stored(block, dtype).reshape(len(block), width)
        rows[~np.isfinite(rows).all(axis=1)] = np.nan
        return rows

    dropped = list(range(2, array.ndim))
    return stored.map_blocks(decode, dtype=np.float32, chunks=(stored.chunks[0], (width,)), drop_axis=dropped)


def _moments(features: da.Array) -> tuple[dict[str, Any], np.ndarray]:
    """Mean, deviation and norms of the features, and each row's norm [M], NaN where a row is left out."""
    norms_of = features.map_blocks(_norms, dtype=np.float64, drop_axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # blocks without a finite row
        mean, deviation, norms = compute(
            da.nanmean(features, axis=0, dtype=np.float64), da.nanstd(features, axis=0, dtype=np.float64), norms_of
        )
    finite = norms[np.isfinite(norms)]
    if not len(finite):
        raise ValueError("the cache has no row whose features are finite")
    counts, edges = np.histogram(finite, HISTOGRAM_BINS)
    return {
        "mean": _spread(mean),
        "std": {**_spread(deviation), "constant_dimensions": int((deviation == 0).sum())},
        "norms": {**_spread(finite), "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}},
    }, norms


def _norms(block: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def _classes(features: da.Array, norms: np.ndarray, pairs: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Class centres, from pairs [P, 2] of a row and one of its labels in row order."""
    rows, labels = pairs.T
    counts = np.bincount(labels, minlength=len(names))
    present = np.flatnonzero(counts)
    facts: dict[str, Any] = {"present": len(present), "nearest": [], "nearest_cosine": None, "within_between": None}
    if len(present) < 2:
        return facts

    def class_sums(block: np.ndarray, block_info: Any) -> np.ndarray:
        """[1, C, width]"""
        start, stop = block_info[0]["array-location"][0]
        some = slice(*np.searchsorted(rows, [start, stop]))
        sums = np.zeros((1, len(names), block.shape[1]))
        np.add.at(sums[0], labels[some], block[rows[some] - start])
        return sums

    chunks = ((1,) * features.numblocks[0], (len(names),), features.chunks[1])
    sums = features.map_blocks(class_sums, new_axis=1, chunks=chunks, meta=np.zeros((0, 0, 0)))
    centres = sums.sum(axis=0, split_every=4).compute()[present] / counts[present, None]
    weights = counts[present] / counts.sum()
    between = weights @ np.square(centres - weights @ centres).sum(axis=1)
    within = np.square(norms[rows]).mean() - weights @ np.square(centres).sum(axis=1)
    cosine, one, other = _nearest_centres(centres)
    facts |= {"nearest": [names[present[one]], names[present[other]]], "nearest_cosine": cosine}
    return facts | {"within_between": float(max(within, 0.0) / between) if between > 0 else None}


def _nearest_centres(centres: np.ndarray) -> tuple[float, int, int]:
    """The largest cosine between two of the centres, and which they are; a centre of zeros has cosine 0 to every other."""
    lengths = np.linalg.norm(centres, axis=1, keepdims=True)
    unit = np.divide(centres, lengths, out=np.zeros_like(centres), where=lengths > 0)
    best, pair = -2.0, (0, 0)
    for one in range(len(unit) - 1):
        cosines = unit[one + 1 :] @ unit[one]
        other = int(cosines.argmax())
        if cosines[other] > best:
            best, pair = float(cosines[other]), (one, one + 1 + other)
    return min(best, 1.0), *pair
