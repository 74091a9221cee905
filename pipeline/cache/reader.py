"""Read a cache by sample id: only the right one, only a whole one, and never a damaged byte."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import zarr

from pipeline.cache import layout
from pipeline.cache.layout import Commit
from pipeline.data.manifest import Manifest
from pipeline.runtime.files import fingerprint

AT_ONCE = 8192  # samples whose rows are joined at a time


@dataclass(frozen=True)
class Cache:
    """A complete feature cache; rows are found by sample id, never by position."""

    path: Path
    kind: Literal["dense", "ragged"]  # one row per sample, or any number of rows
    identity: Mapping[str, Any]
    fingerprint: str  # SHA-256 of the identity
    provenance: Mapping[str, Any]
    ids: list[str]
    feature_shape: tuple[int, ...]
    failed_ids: frozenset[str]
    offsets: np.ndarray  # rows of sample i: offsets[i] .. offsets[i+1]

    def read(self, ids: Sequence[str], aggregate: Literal["mean", "first"] = "mean") -> np.ndarray:
        """Features float32 [len(ids), *shape] of these samples, in this order.

        NaN where a sample has no features: it failed, or has no text. `aggregate` joins the rows of a sample that has
        several. `ValueError` when ids are unknown or a shard is damaged.
        """
        if self.kind == "dense":
            return self.read_each(ids)[0]
        result = np.full((len(ids), *self.feature_shape), np.nan, dtype=np.float32)
        for start in range(0, len(ids), AT_ONCE):  # memory holds the rows of so many samples
            features, counts = self.read_each(ids[start : start + AT_ONCE], first_only=aggregate == "first")
            filled = counts > 0
            if filled.any():
                sums = np.add.reduceat(features, (np.cumsum(counts) - counts)[filled], axis=0)
                result[start : start + AT_ONCE][filled] = sums / counts[filled].reshape(-1, *(1 for _ in self.feature_shape))
        return result

    def read_each(self, ids: Sequence[str], first_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Every row of these samples, float32 [M, *shape], and how many each sample has [len(ids)]; errors as in `read`."""
        unknown = [sample_id for sample_id in ids if sample_id not in self._row_of]
        if unknown:
            raise ValueError(f"{len(unknown)} ids are not in {self.path}, the first: {', '.join(map(repr, unknown[:3]))}")
        samples = np.fromiter((self._row_of[sample_id] for sample_id in ids), dtype=np.int64, count=len(ids))
        starts, counts = self.offsets[samples], np.diff(self.offsets)[samples]
        if first_only:
            counts = np.minimum(counts, 1)
        rows = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return self._read_rows(rows), counts

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {sample_id: row for row, sample_id in enumerate(self.ids)}

    def _read_rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of features, float32 [len(rows), *shape]; each shard that is touched is read once, in one piece."""
        array = zarr.open_array(self.path / "features", mode="r")
        assert array.shards is not None
        store_dtype = self.identity["store_dtype"]
        result = np.empty((len(rows), *self.feature_shape), dtype=np.float32)
        shards = rows // array.shards[0]
        for shard in np.unique(shards):
            picked = np.flatnonzero(shards == shard)
            low, high = int(rows[picked].min()), int(rows[picked].max()) + 1
            file = layout.shard_path(self.path, int(shard), array.ndim)
            if not file.is_file():  # Zarr would read it as fill values
                raise self._damaged(file, "there is no such file")
            try:
                block = np.asarray(array[low:high])
            except (ValueError, OSError) as error:
                raise self._damaged(file, error) from error
            result[picked] = layout.from_stored(block[rows[picked] - low], store_dtype)
        return result

    def _damaged(self, file: Path, reason: object) -> ValueError:
        return ValueError(f"{file} is damaged or missing ({reason}); to redo it, run: {self.provenance['command']}")


def open_cache(path: Path, expect: Mapping[str, Any] | None = None) -> Cache:
    """Open a complete cache.

    `expect` are fields of the identity, nested as there, that must have these values.
    `ValueError` when it is no cache, another one than expected (names the field), incomplete or visibly damaged.
    """
    attributes = read_attributes(path)
    identity, command = attributes["identity"], attributes["provenance"]["command"]
    for field, wanted, found in identity_differences(expect or {}, identity):
        raise ValueError(f"{path} was made with {field} = {found!r}, but {wanted!r} is needed; extract a cache with it")
    array = zarr.open_array(path / "features", mode="r")
    commits, problems = read_commits(path)
    unfinished = problems or layout.file_problems(path, "failures")
    if unfinished:
        state = f"{len(commits)} of {len(commits) + len(problems)} shards are complete ({unfinished[0]})"
        raise ValueError(f"{path} is incomplete: {state}; to complete it, run: {command}")
    ids = [str(sample_id) for sample_id in np.asarray(zarr.open_array(path / "ids", mode="r")[:])]
    ragged = attributes["kind"] == "ragged"
    offsets = np.asarray(zarr.open_array(path / "offsets", mode="r")[:]) if ragged else np.arange(len(ids) + 1)
    return Cache(
        path=path,
        kind=attributes["kind"],
        identity=identity,
        fingerprint=fingerprint(identity),
        provenance=attributes["provenance"],
        ids=ids,
        feature_shape=tuple(array.shape[1:]),
        failed_ids=frozenset(failure.id for commit in commits for failure in commit.failures),
        offsets=offsets,
    )


def find_caches(home: Path, dataset: str) -> list[Path]:
    """The cache folders of a dataset, complete or not, sorted by name."""
    folders = (file.parent for file in (home / "caches" / dataset).glob("*/zarr.json"))
    return sorted(folder for folder in folders if re.search(r"-[0-9a-f]{12}$", folder.name))


def info(path: Path) -> dict[str, Any]:
    """What a cache holds and how far it is, as JSON values; it may be incomplete."""
    attributes = read_attributes(path)
    array = zarr.open_array(path / "features", mode="r")
    commits, problems = read_commits(path)
    rows, seconds = sum(commit.rows for commit in commits), sum(commit.seconds for commit in commits)
    return {
        "path": str(path),
        "kind": attributes["kind"],
        "fingerprint": fingerprint(attributes["identity"]),
        "samples": zarr.open_array(path / "ids", mode="r").shape[0],
        "rows": array.shape[0],
        "feature_shape": list(array.shape[1:]),
        "store_dtype": attributes["identity"]["store_dtype"],
        "complete": not (problems or layout.file_problems(path, "failures")),
        "shards": {"committed": len(commits), "total": len(commits) + len(problems)},
        "bytes": sum(commit.num_bytes for commit in commits),
        "failed": sum(len(commit.failures) for commit in commits),
        "seconds": round(seconds, 3),
        "rows_per_second": round(rows / seconds, 1) if seconds else 0.0,
        "identity": attributes["identity"],
        "provenance": attributes["provenance"],
    }


def read_attributes(path: Path) -> dict[str, Any]:
    """The group's attributes; `ValueError` when there is no cache, or anything but the features is not as it was written."""
    attributes = read_group(path)
    for problem in layout.file_problems(path, "arrays"):
        raise ValueError(f"{path}: {problem}; to redo it, run: {attributes['provenance']['command']}")
    return attributes


def read_group(path: Path) -> dict[str, Any]:
    """The group's attributes, if they are those that named the folder; nothing else is looked at."""
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        name, command = fingerprint(dict(attributes["identity"]))[:12], dict(attributes["provenance"])["command"]
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a feature cache; make one with: diffalign extract") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'zarr.json'} is damaged ({error}); to redo it, run diffalign extract again") from error
    if not os.path.abspath(path).endswith(f"-{name}"):  # the path itself may be "."
        raise ValueError(f"{path} does not fit its identity, which hashes to {name}; to make a right one, run: {command}")
    return attributes


def read_commits(path: Path) -> tuple[list[Commit], list[str]]:
    """The commits whose shard is there at its full size, and one problem for every other shard."""
    array = zarr.open_array(path / "features", mode="r")
    assert array.shards is not None
    commits, problems = [], []
    for shard in range(-(-array.shape[0] // array.shards[0])):
        file = layout.shard_path(path, shard, array.ndim)
        try:
            commit = layout.read_commit(path, shard)
            size = file.stat().st_size
        except FileNotFoundError as error:
            problems.append(f"{Path(error.filename).relative_to(path)} is missing")
        except ValueError as error:
            problems.append(str(error))
        else:
            if size == commit.num_bytes:
                commits.append(commit)
            else:
                problems.append(f"{file.relative_to(path)} has {size} bytes instead of {commit.num_bytes}")
    return commits, problems


def known_failures(path: Path) -> frozenset[str]:
    """The samples that are known to have failed, by what is left of failures.parquet and of the shards' records."""
    listed: list[str] = []
    if not layout.file_problems(path, "failures"):
        listed += pq.read_table(path / "failures.parquet", columns=["id"]).column("id").to_pylist()
    for file in (path / "commits").glob("[0-9]*.json"):
        with contextlib.suppress(ValueError):
            listed += [failure.id for failure in layout.read_commit(path, int(file.stem)).failures]
    return frozenset(listed)


def identity_differences(expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(field, expected, found) of every expected field that an identity has otherwise; what it has beside them is allowed."""
    result: list[tuple[str, Any, Any]] = []
    for key, wanted in expected.items():
        have = found.get(key, "nothing")
        if isinstance(wanted, Mapping) and isinstance(have, Mapping):
            result += identity_differences(wanted, have, f"{prefix}{key}.")
        elif wanted != have:
            result.append((f"{prefix}{key}", wanted, have))
    return result


def find_cache(home: Path, manifest: Manifest, name: str) -> Cache:
    """The manifest's cache of that encoder, folder name or fingerprint; `ValueError` names the choices, or what has changed.

    Of several caches of an encoder its name means the one made with its default settings, unless some are of another modality.
    """
    folders = find_caches(home, manifest.dataset)
    named = [path for path in folders if _is_named(path.name, name)]
    wanted = manifest.fingerprint()
    fitting = [path for path in named if read_attributes(path)["identity"]["manifest"] == wanted]
    if len(fitting) > 1:
        about = [read_attributes(path) for path in fitting]
        default = [path for path, each in zip(fitting, about, strict=True) if not each["provenance"].get("settings")]
        alike = len({each["identity"]["encoder"].get("modality") for each in about}) == 1
        fitting = default if len(default) == 1 and alike else fitting
    if len(fitting) == 1 or (named and not fitting):
        return open_cache((fitting or named)[0], {"manifest": wanted})
    problem = "several caches" if fitting else "no cache"
    choices = ", ".join(path.name for path in fitting or folders) or "none yet"
    command = f"diffalign extract {manifest.dataset}"
    raise ValueError(f"{problem} of {manifest.dataset} named {name!r} (there are: {choices}); make one with: {command}")


def _is_named(folder: str, name: str) -> bool:
    """Whether a cache's folder is meant by an encoder, by its own name, or by a fingerprint of 12 or 64 digits."""
    encoder, _, digits = folder.rpartition("-")
    return name in (folder, encoder, digits) or (len(name) == 64 and name.startswith(digits))
