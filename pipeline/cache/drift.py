"""Compare two caches of a dataset: how far finetuning an encoder has moved the features of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.cache.reader import Cache, open_cache
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Place

DRIFT_BLOCK_SAMPLES = 2048
DRIFT_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def drift(first: Place, second: Place, top: int = 10) -> dict[str, Any]:
    """Compare the features of the same samples in two caches of a dataset by their cosine. Samples are joined by id.

    A sample with several texts is compared by their mean. Samples that only one cache has, or whose feature has no direction
    (failed, or all zero), are counted and left out.

    Args:
        first: the place of a cache.
        second: the place of another cache.
        top: how many of the samples with the lowest cosine are named, as `moved`.

    Returns:
        Counts, mean, extremes and percentiles of the cosines, and `moved`, as JSON values.

    Raises:
        UserError: the caches are of different datasets or shapes, or have no sample in common.
    """
    caches = open_cache(first), open_cache(second)
    for property_name, values in (
        ("dataset", [cache.identity["dataset"] for cache in caches]),
        ("feature shape", [list(cache.feature_shape) for cache in caches]),
    ):
        if values[0] != values[1]:
            raise UserError(
                f"{first} and {second} differ in {property_name}: {values[0]} and {values[1]}; their features do not compare"
            )
    ids_in_second = set(caches[1].ids)
    ids = [sample_id for sample_id in caches[0].ids if sample_id in ids_in_second]
    cosines = _cosines(caches, ids)
    usable = np.flatnonzero(np.isfinite(cosines))
    if not len(usable):
        raise UserError(f"{first} and {second} have no sample in common that has features in both")
    usable_cosines = cosines[usable]
    order = np.argsort(usable_cosines, kind="stable")[:top]
    return {
        "first": str(first),
        "second": str(second),
        "samples": len(usable_cosines),
        "without_direction": len(ids) - len(usable_cosines),
        "only_in_first": len(caches[0].ids) - len(ids),
        "only_in_second": len(caches[1].ids) - len(ids),
        "mean": float(usable_cosines.mean()),
        "min": float(usable_cosines.min()),
        "max": float(usable_cosines.max()),
        "percentiles": {
            str(percent): float(value)
            for percent, value in zip(DRIFT_PERCENTILES, np.percentile(usable_cosines, DRIFT_PERCENTILES), strict=True)
        },
        "moved": [{"id": ids[usable[row]], "cosine": float(usable_cosines[row])} for row in order],
    }


def _cosines(caches: tuple[Cache, Cache], ids: list[str]) -> np.ndarray:
    """Return cosines float64 [len(ids)], NaN where one of the two features has no direction. Memory holds one block."""
    blocks = [np.zeros(0)]
    for start in range(0, len(ids), DRIFT_BLOCK_SAMPLES):
        block_ids = ids[start : start + DRIFT_BLOCK_SAMPLES]
        first, second = (cache.read(block_ids).reshape(len(block_ids), -1).astype(np.float64) for cache in caches)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        dots = np.einsum("nd,nd->n", first, second)
        blocks.append(np.divide(dots, norms, out=np.full(len(block_ids), np.nan), where=norms > 0))
    return np.clip(np.concatenate(blocks), -1.0, 1.0)
