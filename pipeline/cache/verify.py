"""Check every byte of a cache, and the media that it was made of, against the records that were written with it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from pipeline.cache import layout
from pipeline.cache.layout import Commit
from pipeline.cache.reader import open_cache, read_attributes, read_commits
from pipeline.cache.samples import read_cache_manifest
from pipeline.cache.shard_media import ShardMedia
from pipeline.cache.shards import StoredFeatures
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Place
from pipeline.runtime.stores import object_sha256


def verify(path: Place) -> list[str]:
    """Return the problems of a cache, one line each; an empty list when it is complete and undamaged.

    Media files that are here are compared with those that the cache was made of. One that has the size and times that it had
    when it was last read is not read again.
    """
    try:
        read_attributes(path)
    except UserError as error:
        return [str(error)]
    commits, problems = read_commits(path)
    stored = StoredFeatures.open(path)
    for commit in commits:
        problems += _check_shard(stored, commit)
    return problems or layout.file_problems(path, "failures") or _media_problems(path, commits)


def _media_problems(path: Place, commits: Sequence[Commit]) -> list[str]:
    """Return one line for each shard of a complete cache whose media have changed; none without the manifest of the cache."""
    if not any(commit.media_digests or commit.media_sizes for commit in commits):
        return []
    try:
        manifest, samples = read_cache_manifest(open_cache(path))
    except UserError:  # a copy of the cache elsewhere, or another manifest now
        return []
    starts = itertools.accumulate((commit.rows for commit in commits), initial=0)
    problems = [
        ShardMedia.of_rows(path, manifest, samples[start : start + commit.rows], start, commit.failures).problem(commit)
        for commit, start in zip(commits, starts, strict=False)
    ]
    return [problem for problem in problems if problem]


def _check_shard(stored: StoredFeatures, commit: Commit) -> list[str]:
    """Compare a shard with its SHA-256, and its rows that are not finite with the failures of its record."""
    file = layout.shard_path(stored.path, commit.shard, len(stored.shape))
    name = str(file).removeprefix(f"{stored.path}/")
    if object_sha256(file) != commit.sha256:
        return [f"{name} is damaged (its sha256 does not fit)"]
    start = commit.shard * stored.shard_rows
    try:
        features = stored.read_float32(np.arange(start, start + commit.rows)).reshape(commit.rows, -1)
    except UserError as error:  # it was damaged before its SHA-256 was taken
        return [str(error)]
    empty_rows = (start + np.flatnonzero(~np.isfinite(features).all(axis=1))).tolist()
    failed_rows = sorted(failure.row for failure in commit.failures)
    if empty_rows != failed_rows or commit.finite != commit.rows - len(empty_rows):
        return [f"{name} has {len(empty_rows)} rows that are not finite, its record {len(failed_rows)} failures"]
    return []
