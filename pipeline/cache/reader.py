"""Find, open and read feature caches. Features are read by sample id; wrong, incomplete or damaged caches are refused."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
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
from pipeline.cache.id_index import IdIndex
from pipeline.cache.layout import Commit
from pipeline.cache.shards import StoredFeatures
from pipeline.data.columns import Strings
from pipeline.data.manifest import Manifest
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import fingerprint
from pipeline.runtime.places import Place, caches_place
from pipeline.runtime.stores import exists, map_objects, store_of, zarr_source

logger = logging.getLogger(__name__)

MAX_SAMPLES_PER_READ = 8192  # samples whose rows are read and aggregated at a time
BYTES_PER_READ = 2**27  # that their features take, if each sample has one row


@dataclass(frozen=True)
class Cache:
    """A complete feature cache. Its rows are found by sample id, never by position."""

    path: Place
    kind: Literal["dense", "ragged"]  # one row per sample, or any number of rows
    identity: Mapping[str, Any]
    fingerprint: str  # SHA-256 of the identity
    provenance: Mapping[str, Any]
    stored: StoredFeatures  # the rows as they are on the disk
    failed_ids: frozenset[str]
    offsets: np.ndarray  # rows of sample i: offsets[i] .. offsets[i+1]

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.stored.shape[1:]

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        return len(self.offsets) - 1

    @property
    def ids(self) -> Strings:
        """The ids of the samples, in row order. They are read when they are first asked for: millions take seconds."""
        return self._ids

    @cached_property
    def _ids(self) -> Strings:
        array = zarr.open_array(zarr_source(self.path / "ids"), mode="r")
        starts = range(0, array.shape[0], array.chunks[0])
        return Strings.collect(np.asarray(array[start : start + array.chunks[0]]).tolist() for start in starts)

    def read(self, ids: Sequence[str], aggregate: Literal["mean", "first"] = "mean") -> np.ndarray:
        """Return one feature per sample.

        Args:
            ids: the samples, in the order of the result; an id may occur several times.
            aggregate: how several rows of a sample become one: their mean, or the first of them.

        Returns:
            float32 [len(ids), *shape]; NaN for a sample that failed, or that has no text.

        Raises:
            UserError: an id is unknown, or a shard is damaged or missing.
        """
        if self.kind == "dense":
            return self.read_rows(ids)[0]
        result = np.full((len(ids), *self.feature_shape), np.nan, dtype=np.float32)
        block_size = samples_per_read(self.feature_shape)
        for start in range(0, len(ids), block_size):  # memory holds only the rows of these samples
            features, counts = self.read_rows(ids[start : start + block_size], first_only=aggregate == "first")
            has_rows = counts > 0
            if has_rows.any():
                sums = np.add.reduceat(features, (np.cumsum(counts) - counts)[has_rows], axis=0)
                divisors = counts[has_rows].reshape(-1, *(1 for _ in self.feature_shape))
                result[start : start + block_size][has_rows] = sums / divisors
        return result

    def read_rows(self, ids: Sequence[str], first_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows of these samples.

        Args:
            ids: the samples, in the order of the result.
            first_only: read only the first row of each sample.

        Returns:
            The rows, float32 [M, *shape], and the number of rows of each sample [len(ids)].

        Raises:
            UserError: as in `read`.
        """
        samples = self._id_index.find(ids)
        unknown = [ids[position] for position in np.flatnonzero(samples < 0).tolist()]
        if unknown:
            raise UserError(f"{len(unknown)} ids are not in {self.path}, the first: {', '.join(map(repr, unknown[:3]))}")
        starts, counts = self.offsets[samples], self.offsets[samples + 1] - self.offsets[samples]
        if first_only:
            counts = np.minimum(counts, 1)
        rows = np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
        return self.stored.read_float32(rows), counts

    @cached_property
    def _id_index(self) -> IdIndex:
        return IdIndex(self.ids)


def samples_per_read(*shapes: tuple[int, ...]) -> int:
    """Return how many samples are read at a time, for features of these shapes of each."""
    return max(1, min(MAX_SAMPLES_PER_READ, BYTES_PER_READ // sum(4 * math.prod(shape) for shape in shapes)))


def open_cache(path: Place, expect: Mapping[str, Any] | None = None) -> Cache:
    """Open a complete cache.

    Args:
        path: the place of the cache.
        expect: fields that the identity must have, with these values; nested as in the identity.

    Raises:
        UserError: there is no cache, a field of its identity has another value (the message names it), it is incomplete,
            or a file is missing or has the wrong size.
    """
    attributes = read_attributes(path)
    identity, command = attributes["identity"], attributes["provenance"]["command"]
    for field, wanted, found in identity_differences(expect or {}, identity):
        raise UserError(f"{path} was made with {field} = {found!r}, but {wanted!r} is needed; extract a cache with it")
    commits, problems = read_commits(path, with_media=False)
    unfinished = problems or layout.file_problems(path, "failures")
    if unfinished:
        state = f"{len(commits)} of {len(commits) + len(problems)} shards are complete ({unfinished[0]})"
        raise UserError(f"{path} is incomplete: {state}; to complete it, run: {command}")
    stored = StoredFeatures.open(path, command, [commit.sha256 for commit in commits])
    is_ragged = attributes["kind"] == "ragged"
    offsets = read_array(path / "offsets") if is_ragged else np.arange(stored.shape[0] + 1)
    logger.debug("opened %s: %d samples in %d shards", path, len(offsets) - 1, len(commits))
    return Cache(
        path=path,
        kind=attributes["kind"],
        identity=identity,
        fingerprint=fingerprint(identity),
        provenance=attributes["provenance"],
        stored=stored,
        failed_ids=frozenset(failure.id for commit in commits for failure in commit.failures),
        offsets=offsets,
    )


def read_array(place: Place) -> np.ndarray:
    """Return a whole Zarr array, such as the offsets of a cache."""
    return np.asarray(zarr.open_array(zarr_source(place), mode="r")[:])


def find_caches(home: Path, dataset: str) -> list[Place]:
    """Return the places of the caches of a dataset, complete or not, sorted by name."""
    folder = caches_place(home) / dataset
    named = [folder / name for name in store_of(folder).children(folder) if re.search(r"-[0-9a-f]{12}$", name)]
    has_metadata = map_objects(folder, lambda path: exists(path / "zarr.json"), named)
    return [path for path, is_cache in zip(named, has_metadata, strict=True) if is_cache]


def list_caches(home: Path) -> list[Place]:
    """Return the places of all caches of a home, complete or not."""
    place = caches_place(home)
    return [path for dataset in store_of(place).children(place) for path in find_caches(home, dataset)]


def info(path: Place) -> dict[str, Any]:
    """Return what a cache holds and how much of it is complete, as JSON values. The cache may be incomplete.

    Raises:
        UserError: as in `read_attributes`.
    """
    attributes = read_attributes(path)
    array = zarr.open_array(zarr_source(path / "features"), mode="r")
    commits, problems = read_commits(path, with_media=False)
    rows, seconds = sum(commit.rows for commit in commits), sum(commit.seconds for commit in commits)
    return {
        "path": str(path),
        "kind": attributes["kind"],
        "fingerprint": fingerprint(attributes["identity"]),
        "samples": zarr.open_array(zarr_source(path / "ids"), mode="r").shape[0],
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


def read_attributes(path: Place) -> dict[str, Any]:
    """Return the attributes of a cache, after checking its metadata, ids and offsets against their record.

    Raises:
        UserError: there is no cache, or one of these files is missing or damaged. The shards are not looked at.
    """
    attributes = read_zarr_attributes(path)
    for problem in layout.file_problems(path, "arrays"):
        raise UserError(f"{path}: {problem}; to redo it, run: {attributes['provenance']['command']}")
    return attributes


def read_zarr_attributes(path: Place) -> dict[str, Any]:
    """Return the attributes in zarr.json. No other file is read.

    Raises:
        UserError: there is no cache, zarr.json is damaged, or its identity does not hash to the name of the folder.
    """
    store = store_of(path)  # its errors are of the environment, not of the file
    try:
        attributes = json.loads(store.get(path / "zarr.json"))["attributes"]
        name, command = fingerprint(dict(attributes["identity"]))[:12], dict(attributes["provenance"])["command"]
    except FileNotFoundError as error:
        others = "`diffalign cache ls` shows them, `diffalign extract` makes one"
        raise UserError(f"{path} is not a feature cache; {others}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'zarr.json'} is damaged ({error}); to redo it, run diffalign extract again") from error
    if not (os.path.abspath(path) if isinstance(path, Path) else path.name).endswith(f"-{name}"):  # the path may be "."
        right = f"{path.absolute().name.rpartition('-')[0] or attributes['identity']['encoder']['name']}-{name}"
        raise UserError(
            f"{path} does not fit its identity, which hashes to {name}: if it is a copy in a folder of another name, call that "
            f"{right}; to make a right one, run: {command}"
        )
    return attributes


def is_of_text(identity: Mapping[str, Any]) -> bool:
    """Whether the features of a cache, extracted here or imported, were made from the samples' texts."""
    return "text" in identity or identity["encoder"].get("modality") == "text"


def read_commits(path: Place, with_media: bool = True) -> tuple[list[Commit], list[str]]:
    """Return the commits of all shards whose file has its full size, and one problem for every other shard.

    Args:
        path: the place of the cache.
        with_media: keep the digests of the media, which are nearly all of a record.
    """
    array = zarr.open_array(zarr_source(path / "features"), mode="r")
    assert array.shards is not None

    def read(shard: int) -> Commit | str:
        file = layout.shard_path(path, shard, array.ndim)
        try:
            commit = layout.read_commit(path, shard, with_media)
            size = store_of(file).size(file)
        except FileNotFoundError as error:
            return f"{str(error.filename).removeprefix(f'{path}/')} is missing"
        except UserError as error:
            return str(error)
        name = str(file).removeprefix(f"{path}/")
        return commit if size == commit.num_bytes else f"{name} has {size} bytes instead of {commit.num_bytes}"

    found = map_objects(path, read, range(-(-array.shape[0] // array.shards[0])))
    return [each for each in found if isinstance(each, Commit)], [each for each in found if isinstance(each, str)]


def read_failed_ids(path: Place) -> frozenset[str]:
    """Return the ids of the samples that are recorded as failed. The cache may be damaged.

    They come from failures.parquet and from the commit records, as far as these are undamaged.
    """
    failed_ids: list[str] = []
    if not layout.file_problems(path, "failures"):
        failed_ids += [failure["id"] for failure in read_failures(path)]
    for file in layout.list_commits(path):
        with contextlib.suppress(UserError):
            commit = layout.read_commit(path, int(file.name.removesuffix(".json")))
            failed_ids += [failure.id for failure in commit.failures]
    return frozenset(failed_ids)


def read_failures(path: Place) -> list[dict[str, Any]]:
    """Return the items of a complete cache that failed: id, stage and error of each, in row order."""
    content = io.BytesIO(store_of(path).get(path / "failures.parquet"))
    with pq.ParquetFile(content) as file:  # threads of Arrow that still have Python's bytes when Python ends would abort it
        return file.read(use_threads=False).to_pylist()


def describe_failures(path: Place) -> str:
    """Return one line about the samples of a complete cache that failed, with the file that lists them; "" when none has."""
    failures = read_failures(path)
    if not failures:
        return ""
    num_failed = len({failure["id"] for failure in failures})
    num_samples = zarr.open_array(zarr_source(path / "ids"), mode="r").shape[0]
    first = f"{failures[0]['id']}: {failures[0]['error']}"
    have = "has" if num_failed == 1 else "have"
    return (
        f"{num_failed} of {num_samples} samples failed and {have} no features: {path / 'failures.parquet'}; the first: {first}"
    )


def identity_differences(expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Compare the expected fields of an identity with an identity, which may have more fields.

    Args:
        expected: field -> value, nested as in the identity.
        found: the identity.
        prefix: put before the names of the fields; for the recursion.

    Returns:
        (field, expected value, found value) of every field that differs; a nested field is named "outer.inner".
    """
    result: list[tuple[str, Any, Any]] = []
    for key, expected_value in expected.items():
        found_value = found.get(key, "nothing")
        if isinstance(expected_value, Mapping) and isinstance(found_value, Mapping):
            result += identity_differences(expected_value, found_value, f"{prefix}{key}.")
        elif expected_value != found_value:
            result.append((f"{prefix}{key}", expected_value, found_value))
    return result


def find_cache(home: Path, manifest: Manifest, name: str) -> Cache:
    """Open the cache of a manifest that has this name.

    Args:
        home: the folder that holds caches/.
        manifest: the prepared dataset.
        name: an encoder, the folder name of a cache, or a fingerprint of 12 or 64 digits. If several caches of an encoder
            fit, its name means the one with default settings, unless the caches are of different modalities.

    Raises:
        UserError: no cache or several caches fit (the message names the choices), or the caches of that name were made from
            another manifest.
    """
    dataset, wanted = manifest.features_of
    folders = find_caches(home, dataset)
    named = [path for path in folders if _matches_name(path.name, name)]
    matching = [path for path in named if read_attributes(path)["identity"]["manifest"] == wanted]
    if len(matching) > 1:
        attributes = [read_attributes(path) for path in matching]
        default = [path for path, each in zip(matching, attributes, strict=True) if not each["provenance"].get("settings")]
        is_same_modality = len({each["identity"]["encoder"].get("modality") for each in attributes}) == 1
        matching = default if len(default) == 1 and is_same_modality else matching
    if named and not matching:
        what = f"{named[0]} has features of other samples of {dataset} than are prepared now"
        raise UserError(f"{what}; a head that needs it must be trained again; to extract theirs: diffalign extract {dataset}")
    if len(matching) == 1:
        return open_cache(matching[0], {"manifest": wanted})
    problem = "several caches" if matching else "no cache"
    choices = ", ".join(path.name for path in matching or folders) or "none yet"
    remedy = "give the name of one of them" if matching else f"make one with: diffalign extract {dataset}"
    raise UserError(f"{problem} of {dataset} named {name!r} (there are: {choices}); {remedy}")


def _matches_name(folder: str, name: str) -> bool:
    """Whether a name means a cache's folder: by its encoder, its own name, or its fingerprint of 12 or 64 digits."""
    encoder, _, digits = folder.rpartition("-")
    return name in (folder, encoder, digits) or (len(name) == 64 and name.startswith(digits))
