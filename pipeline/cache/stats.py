"""Statistics of a cache in bounded memory: a dask array reads the store in blocks of rows."""

from __future__ import annotations

from typing import Any

import dask.array as da
import dask.config
import numpy as np
import zarr
from dask.base import compute

from pipeline.cache import layout
from pipeline.cache.neighbours import close_pairs
from pipeline.cache.reader import Cache, open_cache
from pipeline.cache.samples import read_cache_manifest
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Place
from pipeline.runtime.stores import zarr_source

STATS_BLOCK_BYTES = 2**22  # of a block of features as float32; a block is at least a chunk of the store
STATS_THREADS = 4  # blocks in memory at a time; the number of cores does not change it
HISTOGRAM_BINS = 10


def stats(path: Place, threshold: float = 0.95, top: int = 10) -> dict[str, Any]:
    """Return statistics of the features of a complete cache, as JSON values.

    Rows that are not finite are counted and left out. Class centres are those of the training split. `within_between` is the
    mean squared distance of rows to their class centre, divided by the mean squared distance of class centres to their mean;
    each class is weighted by its rows. Near duplicates are pairs of a training row and a row of another split.

    Args:
        path: the place of the cache.
        threshold: the cosine (-1..1, to 1e-6) from which two rows are near duplicates.
        top: how many of the closest pairs are named.

    Returns:
        Mean, standard deviation and norms of the features, class centres, and near duplicates.

    Raises:
        UserError: as in `open_cache`, or the cache has no finite row, or its manifest has changed.
    """
    if not -1 <= threshold <= 1 or top < 1:
        raise UserError(f"the threshold is a cosine, from -1 to 1, and top at least 1, not {threshold} and {top}")
    cache = open_cache(path)
    manifest, samples = read_cache_manifest(cache)
    sample_of = np.repeat(np.arange(len(samples)), np.diff(cache.offsets))
    with dask.config.set(scheduler="threads", num_workers=STATS_THREADS):
        features = dask_features(cache)
        moments, norms = _moments(features)
        is_train = np.array([sample.split == "train" for sample in samples])[sample_of]
        train_rows, other_rows = np.flatnonzero(is_train & np.isfinite(norms)), np.flatnonzero(~is_train & np.isfinite(norms))
        pairs = [(row, label) for row in train_rows.tolist() for label in samples[sample_of[row]].labels]
        classes = _class_statistics(features, norms, np.array(pairs, dtype=np.int64).reshape(-1, 2), manifest.class_names)
        count, _, closest = close_pairs(features, train_rows, other_rows, threshold, top)
    near = [(cosine, samples[sample_of[row]], samples[sample_of[other_row]]) for cosine, row, other_row in closest]
    return {
        "path": str(path),
        "rows": len(norms),
        "failed_rows": int(np.isnan(norms).sum()),
        **moments,
        "classes": classes,
        "near_duplicates": {
            "threshold": threshold,
            "pairs": count,
            "closest": [
                {"cosine": cosine, "train": train.id, "other": other.id, "split": other.split} for cosine, train, other in near
            ],
        },
    }


def dask_features(cache: Cache) -> da.Array:
    """Return the rows of a cache as float32 [M, width], in blocks. A row with any value that is not finite is all NaN."""
    array = zarr.open_array(zarr_source(cache.path / "features"), mode="r")
    width, dtype = int(np.prod(cache.feature_shape)), str(cache.identity["store_dtype"])
    chunks = max(1, STATS_BLOCK_BYTES // (4 * width * layout.CHUNK_ROWS))
    stored = da.from_zarr(array, chunks=(min(chunks * layout.CHUNK_ROWS, array.shape[0]), *cache.feature_shape))

    def decode(block: np.ndarray) -> np.ndarray:
        rows = layout.from_stored(block, dtype).reshape(len(block), width)
        rows[~np.isfinite(rows).all(axis=1)] = np.nan
        return rows

    dropped_axes = list(range(2, array.ndim))
    return stored.map_blocks(decode, dtype=np.float32, chunks=(stored.chunks[0], (width,)), drop_axis=dropped_axes)


def _moments(features: da.Array) -> tuple[dict[str, Any], np.ndarray]:
    """Return statistics of mean, standard deviation and norms, and the norm of each row [M], NaN where it is left out."""
    lazy_norms = features.map_blocks(_block_norms, dtype=np.float64, drop_axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):  # for blocks without a finite row
        mean, deviation, norms = compute(
            da.nanmean(features, axis=0, dtype=np.float64), da.nanstd(features, axis=0, dtype=np.float64), lazy_norms
        )
    finite = norms[np.isfinite(norms)]
    if not len(finite):
        raise UserError("the cache has no row whose features are finite")
    counts, edges = np.histogram(finite, HISTOGRAM_BINS)
    return {
        "mean": _summarise(mean),
        "std": {**_summarise(deviation), "constant_dimensions": int((deviation == 0).sum())},
        "norms": {**_summarise(finite), "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}},
    }, norms


def _block_norms(block: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))


def _summarise(values: np.ndarray) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def _class_statistics(features: da.Array, norms: np.ndarray, pairs: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Return statistics of the class centres.

    Args:
        features: all rows [M, width].
        norms: the norm of each row [M].
        pairs: [P, 2]: a row of the training split and one of its labels, in row order.
        names: the class names.
    """
    rows, labels = pairs.T
    counts = np.bincount(labels, minlength=len(names))
    present = np.flatnonzero(counts)
    statistics: dict[str, Any] = {"present": len(present), "nearest": [], "nearest_cosine": None, "within_between": None}
    if len(present) < 2:
        return statistics

    def class_sums(block: np.ndarray, block_info: Any) -> np.ndarray:
        """Return the sums of the rows of each class in a block, [1, C, width]."""
        start, stop = block_info[0]["array-location"][0]
        in_block = slice(*np.searchsorted(rows, [start, stop]))
        sums = np.zeros((1, len(names), block.shape[1]))
        np.add.at(sums[0], labels[in_block], block[rows[in_block] - start])
        return sums

    chunks = ((1,) * features.numblocks[0], (len(names),), features.chunks[1])
    sums = features.map_blocks(class_sums, new_axis=1, chunks=chunks, meta=np.zeros((0, 0, 0)))
    centres = sums.sum(axis=0, split_every=4).compute()[present] / counts[present, None]
    weights = counts[present] / counts.sum()
    between = weights @ np.square(centres - weights @ centres).sum(axis=1)
    within = np.square(norms[rows]).mean() - weights @ np.square(centres).sum(axis=1)
    cosine, first, second = _nearest_centres(centres)
    statistics |= {"nearest": [names[present[first]], names[present[second]]], "nearest_cosine": cosine}
    return statistics | {"within_between": float(max(within, 0.0) / between) if between > 0 else None}


def _nearest_centres(centres: np.ndarray) -> tuple[float, int, int]:
    """Return the largest cosine of two centres, and the indices of both. A centre of zeros has cosine 0 to every other."""
    lengths = np.linalg.norm(centres, axis=1, keepdims=True)
    unit = np.divide(centres, lengths, out=np.zeros_like(centres), where=lengths > 0)
    best, pair = -2.0, (0, 0)
    for first in range(len(unit) - 1):
        cosines = unit[first + 1 :] @ unit[first]
        nearest = int(cosines.argmax())
        if cosines[nearest] > best:
            best, pair = float(cosines[nearest]), (first, first + 1 + nearest)
    return min(best, 1.0), *pair
