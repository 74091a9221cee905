"""Samples of validation and test that look almost like a training sample: found once per cache, and kept beside it."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import dask.config
import numpy as np

from pipeline.cache.neighbours import close_pairs
from pipeline.cache.reader import Cache
from pipeline.cache.samples import read_cache_manifest
from pipeline.cache.stats import STATS_THREADS, dask_features
from pipeline.runtime.files import sha256
from pipeline.runtime.places import Place
from pipeline.runtime.stores import map_objects, store_of

RECORD_NAME = "near_duplicates.json"  # of the cache
WARNING_COSINE = 0.99  # from which two samples are said to look almost alike
MAX_PRODUCTS = 3 * 10**11  # multiplications, seconds on two cores; of larger splits, every n-th sample is looked at


def near_duplicate_warning(cache: Cache) -> str:
    """Return one line about the samples of val and test that look almost like a training sample; "" if there are none.

    Raises:
        UserError: the manifest of the cache has changed.
    """
    found = find_near_duplicates(cache)
    shares = [f"{found['near'][split]} of {found['checked'][split]} {split}" for split in found["near"]]
    if not any(found["near"].values()):
        return ""
    pair = found["closest"]
    return (
        f"{' and '.join(shares)} samples look almost like a training sample (cosine of their features at least "
        f"{WARNING_COSINE}), {pair['other']!r} most of all like {pair['train']!r}; if they show the same thing, scores are "
        "flattered, and they belong in one group. "
        f"To list them: diffalign cache stats {cache.path} --threshold {WARNING_COSINE}"
    )


def find_near_duplicates(cache: Cache) -> dict[str, Any]:
    """Return how many samples of val and test are near duplicates of a training sample.

    The result is kept beside the features, if it can be written, until the features change.

    Returns:
        "checked" and "near": numbers of samples by split; "closest": the closest pair, or None; "features": what the result
        was found in.
    """
    store = store_of(cache.path)
    commits = [found.place for found in store.list(cache.path / "commits") if found.place.name.endswith(".json")]
    features = sha256(cache.fingerprint.encode() + b"".join(map_objects(cache.path, store.get, commits)))
    record = cache.path / RECORD_NAME
    known = _read_record(record)
    if known.get("features") == features and known.get("cosine") == WARNING_COSINE:
        return known
    found = {"features": features, "cosine": WARNING_COSINE, **_search(cache)}
    with contextlib.suppress(OSError):  # a cache that others share may be read-only
        store.put(record, json.dumps(found, indent=1) + "\n")
    return found


def _read_record(place: Place) -> dict[str, Any]:
    try:
        record = json.loads(store_of(place).get(place))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _search(cache: Cache) -> dict[str, Any]:
    _, samples = read_cache_manifest(cache)
    split = np.repeat([sample.split for sample in samples], np.diff(cache.offsets))
    sample_of = np.repeat(np.arange(len(samples)), np.diff(cache.offsets))
    train, other = np.flatnonzero(split == "train"), np.flatnonzero(split != "train")
    products = len(train) * len(other) * math.prod(cache.feature_shape)
    other = other[:: max(1, math.ceil(products / MAX_PRODUCTS))]
    with dask.config.set(scheduler="threads", num_workers=STATS_THREADS):
        _, near, closest = close_pairs(dask_features(cache), train, other, WARNING_COSINE, 1)
    names = [name for name in ("val", "test") if name in split]

    def count(rows: np.ndarray) -> dict[str, int]:
        return {name: len(np.unique(sample_of[rows[split[rows] == name]])) for name in names}

    pair = [
        {"cosine": cosine, "train": samples[sample_of[i]].id, "other": samples[sample_of[j]].id} for cosine, i, j in closest
    ]
    return {"checked": count(other), "near": count(near), "closest": pair[0] if pair else None}
