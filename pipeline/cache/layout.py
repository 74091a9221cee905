"""The files of a cache, the number formats of its features, and the records that say which shards are complete.

<home>/caches/<dataset>/<encoder>-<fingerprint12>/
  zarr.json                 attributes: kind, identity, provenance, sha256 of the ids
  features/                 [N, *shape], or [M, *shape] with offsets/ [N+1] when samples have several texts
  ids/                      sample ids in row order
  commits/arrays.json       sha256 of the metadata, ids and offsets
  commits/<shard>.json      sha256 and statistics of one shard of features, digests of its media
  failures.parquet          id, stage, error of every item that has no features

In an object store, whose address takes the place of <home>/caches, the same names are keys.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints, overload

import numpy as np

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, fingerprint, sha256
from pipeline.runtime.places import Place, caches_place
from pipeline.runtime.stores import exists, object_sha256, store_of

StoreDtype = Literal["float16", "float32", "bfloat16"]
STORE_DTYPES: tuple[str, ...] = get_args(StoreDtype)
SHARD_ROWS = 8192
MAX_SHARD_BYTES = 2**28  # a shard is encoded, converted and written in memory
CHUNK_ROWS = 512
BFLOAT16_NAN = 0x7FC0
# Values that are converted, or whose norms are computed, at a time. They stay in the processor's cache, and torch starts no
# threads for so few.
BLOCK_VALUES = 2**15


@dataclass(frozen=True, slots=True)
class Failure:
    """An item that has no features: its row stays NaN."""

    row: int  # row of features
    id: str  # sample
    stage: str  # prepare, encode or import
    error: str


@dataclass(frozen=True, slots=True)
class Commit:
    """The commit record of a shard. `seconds`, `batch_size` and `device` are provenance; the rest follows from the shard."""

    shard: int
    rows: int
    num_bytes: int
    sha256: str
    finite: int  # rows whose features are all finite
    norm_min: float  # over the finite rows; 0 when there are none
    norm_mean: float
    norm_max: float
    seconds: float
    batch_size: int
    device: str
    failures: tuple[Failure, ...]
    media_sizes: str = ""  # of older versions: SHA-256 of the sizes of the media files
    media_digests: str = ""  # base64 of 8 bytes per row: XXH3 of its media file; zeros: failed or unreadable; "": not known


_RecordT = TypeVar("_RecordT", Failure, Commit)


def cache_path(home: Path, dataset: str, encoder: str, identity: Mapping[str, Any]) -> Place:
    """Return the place of a cache. Its name ends with 12 digits of the hash of the cache's identity."""
    return caches_place(home) / dataset / f"{encoder}-{fingerprint(identity)[:12]}"


@overload
def shard_path(path: Path, shard: int, num_dims: int) -> Path: ...
@overload
def shard_path(path: Place, shard: int, num_dims: int) -> Place: ...
def shard_path(path: Place, shard: int, num_dims: int) -> Place:
    """Return the file in which Zarr keeps a shard of features.

    Args:
        path: the place of the cache.
        shard: the number of the shard.
        num_dims: dimensions of the array of features, rows included.
    """
    return path / "features" / "c" / str(shard) / "/".join(["0"] * (num_dims - 1))


def rows_per_shard(num_rows: int, row_bytes: int, wanted: int) -> int:
    """Return the number of rows per shard, a multiple of 512 (the rows of a chunk).

    Args:
        num_rows: rows of the whole cache; a shard is not larger than these need.
        row_bytes: bytes of a row of features; a shard has at most 256 MiB, but at least one chunk.
        wanted: the number that the user asked for; 0: 8,192.
    """
    chunks = max(1, -(-num_rows // CHUNK_ROWS))
    affordable = max(1, MAX_SHARD_BYTES // (row_bytes * CHUNK_ROWS))
    return min((wanted or SHARD_ROWS), affordable * CHUNK_ROWS, chunks * CHUNK_ROWS)


def ids_sha256(ids: Sequence[str]) -> str:
    """Return the SHA-256 of the ids in row order."""
    return sha256(canonical_json(list(ids)))


def to_stored(features: np.ndarray, dtype: str) -> np.ndarray:
    """Convert float32 features to the number format of the store: bfloat16 as its bits in uint16.

    Values beyond the range of float16 become infinite.
    """
    stored = np.empty(features.shape, "uint16" if dtype == "bfloat16" else dtype)
    copy_values(features, stored)
    return stored


def from_stored(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Convert stored features, of the number format `dtype`, to float32."""
    features = np.empty(stored.shape, np.float32)
    copy_values(stored, features)
    return features


def copy_values(source: np.ndarray, target: np.ndarray) -> None:
    """Copy features in row order, and convert them to the number format of the target. An array of uint16 has bfloat16.

    Args:
        source: of any shape.
        target: as many numbers, contiguous in memory.
    """
    if "torch" not in sys.modules and target.dtype == np.float32:  # a report reads features and never waits for torch
        is_bits = source.dtype == np.uint16
        target.reshape(-1)[:] = ((source.astype(np.uint32) << 16).view(np.float32) if is_bits else source).reshape(-1)
        return
    import torch  # several times as fast as NumPy here

    if target.dtype == np.uint16 and source.dtype != np.uint16:
        target.reshape(-1)[:] = _round_to_bfloat16(source).reshape(-1)
        return
    numbers = torch.from_numpy(np.require(source, requirements=["C", "W"]).reshape(-1))
    if source.dtype == np.uint16 and target.dtype != np.uint16:
        numbers = numbers.view(torch.bfloat16)
    for part, copied in zip(torch.from_numpy(target.reshape(-1)).split(BLOCK_VALUES), numbers.split(BLOCK_VALUES), strict=True):
        part.copy_(copied)


def _round_to_bfloat16(features: np.ndarray) -> np.ndarray:
    """Return float32 numbers as the bits of bfloat16: rounded to nearest, ties to even; every NaN has the same bits."""
    bits = np.ascontiguousarray(features, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(features), np.uint16(BFLOAT16_NAN), rounded)


def row_norms(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Return the Euclidean norm of every row of stored features, float64 [rows].

    A norm is not finite where a feature of the row is not finite.
    """
    import torch

    rows = torch.from_numpy(stored.reshape(len(stored), -1))
    rows = rows.view(torch.bfloat16) if dtype == "bfloat16" else rows
    blocks = rows.split(max(1, BLOCK_VALUES // max(1, rows.shape[1])))
    return torch.cat([torch.linalg.vector_norm(block.float(), dim=1, dtype=torch.float64) for block in blocks]).numpy()


def write_record(path: Place, record: Mapping[str, Any]) -> None:
    """Write a JSON record together with its own checksum."""
    store_of(path).put(path, _encode_record(record))


def _encode_record(record: Mapping[str, Any]) -> bytes:
    """Return the only valid bytes of a record. `read_record` compares with them, so it notices any changed byte."""
    checked = {**record, "check": fingerprint(record)}
    return (json.dumps(checked, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_record(path: Place) -> dict[str, Any]:
    """Return a record that `write_record` has written, without its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the record is damaged.
    """
    data = store_of(path).get(path)
    try:
        record = json.loads(data)
        del record["check"]
        is_intact = _encode_record(record) == data
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not is_intact:
        raise UserError(f"{path} is damaged (its checksum does not fit)")
    return record


def write_digests(path: Place, name: str, files: Sequence[str]) -> None:
    """Write the record commits/<name>.json: the SHA-256 of each of these files of the cache."""
    write_record(path / "commits" / f"{name}.json", {file: object_sha256(path / file) for file in files})


def file_problems(path: Place, name: str) -> list[str]:
    """Compare files of a cache with their record commits/<name>.json.

    Returns:
        One line per file, or record, that is missing or damaged; empty if all are as recorded.
    """
    try:
        record = read_record(path / "commits" / f"{name}.json")
    except FileNotFoundError:
        return [f"commits/{name}.json is missing"]
    except UserError as error:
        return [str(error)]
    missing = [file for file in record if not exists(path / file)]
    changed = [file for file in record if file not in missing and object_sha256(path / file) != record[file]]
    return [f"{file} is missing" for file in missing] + [f"{file} is damaged (its sha256 does not fit)" for file in changed]


@overload
def commit_path(path: Path, shard: int) -> Path: ...
@overload
def commit_path(path: Place, shard: int) -> Place: ...
def commit_path(path: Place, shard: int) -> Place:
    """Return the file of the commit record of a shard."""
    return path / "commits" / f"{shard:05d}.json"


def write_commit(path: Place, commit: Commit) -> None:
    """Write the commit record of a shard. From then on the shard counts as complete."""
    write_record(commit_path(path, commit.shard), asdict(commit))


def read_commit(path: Place, shard: int, with_media: bool = True) -> Commit:
    """Return the commit record of a shard.

    Args:
        path: the place of the cache.
        shard: the number of the shard.
        with_media: keep the digests of the media; without them a hundred thousand records are not ten gigabytes.

    Raises:
        FileNotFoundError: the shard is not committed.
        UserError: the record is damaged, or belongs to another shard.
    """
    record = read_record(commit_path(path, shard))
    try:
        failures = tuple(dataclass_from_json(Failure, failure) for failure in record["failures"])
        commit = dataclass_from_json(Commit, {**record, "failures": failures})
    except (KeyError, TypeError) as error:
        raise UserError(f"{commit_path(path, shard)} is no record of a shard ({error})") from error
    if commit.shard != shard:
        raise UserError(f"{commit_path(path, shard)} is the record of shard {commit.shard}")
    return commit if with_media else replace(commit, media_digests="")


def list_commits(path: Place) -> list[Place]:
    """Return the commit records of the shards of a cache, damaged or not."""
    found = [each.place for each in store_of(path).list(path / "commits")]
    return [place for place in found if re.fullmatch(r"[0-9].*[.]json", place.name)]


def dataclass_from_json(kind: type[_RecordT], values: Mapping[str, Any]) -> _RecordT:
    """Return a `Failure` or `Commit` with these values.

    Raises:
        TypeError: a field is missing, unknown, or not of its type.
    """
    record = kind(**values)
    for name, expected_type in _field_types(kind).items():
        value = getattr(record, name)
        is_right_type = isinstance(value, (int, float) if expected_type is float else expected_type)
        if not is_right_type or isinstance(value, bool):
            raise TypeError(f"{name} is {str(value)[:40]!r}")
    return record


@cache
def _field_types(kind: type) -> dict[str, type]:
    """Return the type of each field; they are looked up once, because a large cache has a thousand records."""
    return {name: get_origin(hint) or hint for name, hint in get_type_hints(kind).items()}
