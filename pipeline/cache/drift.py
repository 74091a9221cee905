"""How far the features of the same samples lie apart in two caches: what a finetuned encoder has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.reader import Cache, open_cache

BLOCK_SAMPLES = 2048
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def drift(first: Path, second: Path, top: int = 10) -> dict[str, Any]:
    """Cosines between the features of two caches of a dataset, joined by id, as JSON values.

    The features of a sample with several texts are their mean. Samples that one of the caches does not know, or without a
    direction (failed, or all zero), are counted and left out. `moved` are the `top` samples with the lowest cosine.
    `ValueError` when the caches are of different datasets or shapes, or have no sample in common.
    """
    caches = open_cache(first), open_cache(second)
    for what, found in (
        ("dataset", [cache.identity["dataset"] for cache in caches]),
        ("feature shape", [list(cache.feature_shape) for cache in caches]),
    ):
        if found[0] != found[1]:
            raise ValueError(f"{first} and {second} differ in {what}: {found[0]} and {found[1]}; their features do not compare")
    known = set(caches[1].ids)
    ids = [sample_id for sample_id in caches[0].ids if sample_id in known]
    cosines = _cosines(caches, ids)
    usable = np.flatnonzero(np.isfinite(cosines))
    if not len(usable):
        raise ValueError(f"{first} and {second} have no sample in common that has features in both")
    found = cosines[usable]
    order = np.argsort(found, kind="stable")[:top]
    return {
        "first": str(first),
        "second": str(second),
        "samples": len(found),
        "without_direction": len(ids) - len(found),
        "only_in_first": len(caches[0].ids) - len(ids),
        "only_in_second": len(caches[1].ids) - len(ids),
        "mean": float(found.mean()),
        "min": float(found.min()),
        "max": float(found.max()),
        "percentiles": {
            str(each): float(value) for each, value in zip(PERCENTILES, np.percentile(found, PERCENTILES), strict=True)
        },
        "moved": [{"id": ids[usable[row]], "cosine": float(found[row])} for row in order],
    }


def _cosines(caches: tuple[Cache, Cache], ids: list[str]) -> np.ndarray:
    """Cosines float64 [len(ids)], NaN where one of the two features has no direction; block by block."""
    blocks = [np.zeros(0)]
    for start in range(0, len(ids), BLOCK_SAMPLES):
        some = ids[start : start + BLOCK_SAMPLES]
        first, second = (cache.read(some).reshape(len(some), -1).astype(np.float64) for cache in caches)
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        dots = np.einsum("nd,nd->n", first, second)
        blocks.append(np.divide(dots, norms, out=np.full(len(some), np.nan), where=norms > 0))
    return np.clip(np.concatenate(blocks), -1.0, 1.0)
