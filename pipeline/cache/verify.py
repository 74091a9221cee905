"""Check every byte of a cache against the records that were written with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from pipeline.cache import layout
from pipeline.cache.layout import Commit
from pipeline.cache.reader import read_attributes, read_commits
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256


def verify(path: Path) -> list[str]:
    """Return the problems of a cache, one line each; an empty list when it is complete and undamaged."""
    try:
        read_attributes(path)
    except UserError as error:
        return [str(error)]
    commits, problems = read_commits(path)
    array = zarr.open_array(path / "features", mode="r")
    for commit in commits:
        problems += _check_shard(path, commit, array)
    return problems or layout.file_problems(path, "failures")


def _check_shard(path: Path, commit: Commit, array: zarr.Array) -> list[str]:
    """Compare a shard with its SHA-256, and its rows that are not finite with the failures of its record."""
    file = layout.shard_path(path, commit.shard, array.ndim)
    name = file.relative_to(path)
    if file_sha256(file) != commit.sha256:
        return [f"{name} is damaged (its sha256 does not fit)"]
    assert array.shards is not None
    start = commit.shard * array.shards[0]
    stored = np.asarray(array[start : start + commit.rows])
    features = layout.from_stored(stored, str(array.attrs["store_dtype"])).reshape(len(stored), -1)
    empty_rows = (start + np.flatnonzero(~np.isfinite(features).all(axis=1))).tolist()
    failed_rows = sorted(failure.row for failure in commit.failures)
    if empty_rows != failed_rows or commit.finite != commit.rows - len(empty_rows):
        return [f"{name} has {len(empty_rows)} rows that are not finite, its record {len(failed_rows)} failures"]
    return []
