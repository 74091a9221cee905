"""Where everything in a cache folder lies, and the records that make it real.

<home>/caches/<dataset>/<encoder>-<fingerprint12>/
  zarr.json                 attributes: kind, identity, provenance, sha256 of the ids
  features/                 [N, *shape], or [M, *shape] beside offsets/ [N+1] when samples have several texts
  ids/                      sample ids in row order
  commits/arrays.json       sha256 of the metadata, ids and offsets
  commits/<shard>.json      sha256 and statistics of one shard of features
  failures.parquet          id, stage, error of every item that has no features
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from pipeline.runtime.files import canonical_json, file_sha256, fingerprint, sha256, write_atomic

StoreDtype = Literal["float16", "float32", "bfloat16"]
STORE_DTYPES: tuple[str, ...] = get_args(StoreDtype)
SHARD_ROWS = 8192
SHARD_BYTES = 2**28  # a shard is encoded, converted and written in memory
CHUNK_ROWS = 512
BFLOAT16_NAN = 0x7FC0
NORM_NUMBERS = 2**15  # at a time: they stay in the processor's cache, and torch starts no threads for so few


@dataclass(frozen=True, slots=True)
class Failure:
    """An item without features: the row stays NaN."""

    row: int  # row of features
    id: str  # sample
    stage: str  # prepare or encode
    error: str


@dataclass(frozen=True, slots=True)
class Commit:
    """What makes a shard real; `seconds`, `batch_size` and `device` are provenance, the rest follows from the shard."""

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
    media_sizes: str = ""  # `items.Rows.media_sizes` when they were encoded


Record = TypeVar("Record", Failure, Commit)


def cache_path(home: Path, dataset: str, encoder: str, identity: Mapping[str, Any]) -> Path:
    """The folder of a cache: its name holds the hash of its identity."""
    return home / "caches" / dataset / f"{encoder}-{fingerprint(identity)[:12]}"


def shard_path(path: Path, shard: int, num_dims: int) -> Path:
    """The file Zarr keeps a shard of features in."""
    return path / "features" / "c" / str(shard) / "/".join(["0"] * (num_dims - 1))


def shard_rows(num_rows: int, row_bytes: int, wanted: int) -> int:
    """Rows per shard, whole chunks: `wanted` (0: 8,192), fewer where a shard would pass 256 MiB or the cache is smaller."""
    chunks = max(1, -(-num_rows // CHUNK_ROWS))
    affordable = max(1, SHARD_BYTES // (row_bytes * CHUNK_ROWS))
    return min((wanted or SHARD_ROWS), affordable * CHUNK_ROWS, chunks * CHUNK_ROWS)


def ids_sha256(ids: Sequence[str]) -> str:
    """SHA-256 of the ids in row order."""
    return sha256(canonical_json(list(ids)))


def to_stored(features: np.ndarray, dtype: str) -> np.ndarray:
    """Features float32 as they are stored; values beyond the range of float16 become infinite."""
    if dtype == "bfloat16":  # round to nearest, ties to even
        bits = np.ascontiguousarray(features, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(features), np.uint16(BFLOAT16_NAN), rounded)
    with np.errstate(over="ignore"):
        return features.astype(dtype)


def from_stored(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored features as float32."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def norms(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Euclidean length of every row of stored features, float64 [rows]; not finite where a feature is not."""
    import torch  # several times as fast as NumPy here; whoever only lists caches need not wait for it

    rows = torch.from_numpy(stored.reshape(len(stored), -1))
    rows = rows.view(torch.bfloat16) if dtype == "bfloat16" else rows
    blocks = rows.split(max(1, NORM_NUMBERS // max(1, rows.shape[1])))
    return torch.cat([torch.linalg.vector_norm(block.float(), dim=1, dtype=torch.float64) for block in blocks]).numpy()


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record with a checksum of itself."""
    write_atomic(path, _spelled(record))


def _spelled(record: Mapping[str, Any]) -> bytes:
    """The one spelling of a record: no byte of it can change unnoticed."""
    checked = {**record, "check": fingerprint(record)}
    return (json.dumps(checked, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_record(path: Path) -> dict[str, Any]:
    """A record of `write_record`; `ValueError` when it is damaged, `FileNotFoundError` when there is none."""
    data = path.read_bytes()
    try:
        record = json.loads(data)
        del record["check"]
        intact = _spelled(record) == data
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not intact:
        raise ValueError(f"{path} is damaged (its checksum does not fit)")
    return record


def write_digests(path: Path, name: str, files: Sequence[str]) -> None:
    """Record commits/<name>.json: the sha256 of these files of the cache."""
    write_record(path / "commits" / f"{name}.json", {file: file_sha256(path / file) for file in files})


def file_problems(path: Path, name: str) -> list[str]:
    """What is wrong with the files of the record commits/<name>.json, one line each."""
    try:
        record = read_record(path / "commits" / f"{name}.json")
    except FileNotFoundError:
        return [f"commits/{name}.json is missing"]
    except ValueError as error:
        return [str(error)]
    missing = [file for file in record if not (path / file).is_file()]
    changed = [file for file in record if file not in missing and file_sha256(path / file) != record[file]]
    return [f"{file} is missing" for file in missing] + [f"{file} is damaged (its sha256 does not fit)" for file in changed]


def commit_path(path: Path, shard: int) -> Path:
    """The commit record of a shard."""
    return path / "commits" / f"{shard:05d}.json"


def write_commit(path: Path, commit: Commit) -> None:
    """Make a shard real."""
    write_record(commit_path(path, commit.shard), asdict(commit))


def read_commit(path: Path, shard: int) -> Commit:
    """The commit of a shard; `ValueError` when it is damaged, `FileNotFoundError` when the shard is not committed."""
    record = read_record(commit_path(path, shard))
    try:
        commit = typed(Commit, {**record, "failures": tuple(typed(Failure, failure) for failure in record["failures"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{commit_path(path, shard)} is no record of a shard ({error})") from error
    if commit.shard != shard:
        raise ValueError(f"{commit_path(path, shard)} is the record of shard {commit.shard}")
    return commit


def typed(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """A dataclass of these values; `TypeError` for a field that is missing, unknown, or not of its type."""
    record = kind(**values)
    for name, hint in get_type_hints(kind).items():
        value, wanted = getattr(record, name), get_origin(hint) or hint
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
            raise TypeError(f"{name} is {str(value)[:40]!r}")
    return record
