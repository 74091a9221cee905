"""Check every byte of a cache against the records that were written with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from pipeline.cache import layout
from pipeline.cache.layout import Commit
from pipeline.cache.reader import read_attributes, read_commits


def verify(path: Path) -> list[str]:
    """Everything that is wrong with a cache, one line each; empty when it is complete and undamaged."""
    try:
        read_attributes(path)
    except ValueError as error:
        return [str(error)]
    commits, problems = read_commits(path)
    array = zarr.open_array(path / "features", mode="r")
    for commit in commits:
        problems += _check_shard(path, commit, array)
    return problems or layout.file_problems(path, "failures")


def _check_shard(path: Path, commit: Commit, array: zarr.Array) -> list[str]:
    """A shard against its sha256; its rows against the failures."""
    file = layout.shard_path(path, commit.shard, array.ndim)
    name = file.relative_to(path)
    if layout.file_sha256(file) != commit.sha256:
        return [f"{name} is damaged (its sha256 does not fit)"]
    assert array.shards is not None
    start = commit.shard * array.shards[0]
    stored = np.asarray(array[start : start + commit.rows])
    features = layout.from_stored(stored, str(array.attrs["store_dtype"])).reshape(len(stored), -1)
    empty = (start + np.flatnonzero(~np.isfinite(features).all(axis=1))).tolist()
    failed = sorted(failure.row for failure in commit.failures)
    if empty != failed or commit.finite != commit.rows - len(empty):
        return [f"{name} has {len(empty)} rows that are not finite, its record {len(failed)} failures"]
    return []
