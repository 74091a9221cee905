"""A file of features, whatever its format: what it holds, and what it must fulfil before it is believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import layout

MAX_COMPRESSION = 1000  # bytes of features that a byte of a file may stand for: more than any codec does
ID_LIMIT = 4096  # characters
BLOCK_BYTES = 2**26  # of features that are read and written at a time; at least a chunk
NO_OFFSETS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class FeatureFile:
    """Features with their ids, of a cache or of a file."""

    ids: list[str]  # of the samples, in row order
    offsets: np.ndarray  # [N+1] int64: rows of sample i are offsets[i] .. offsets[i+1]; [0] when each sample has one row
    shape: tuple[int, ...]  # of all features: [M, *feature_shape]
    dtype: str  # as stored; bfloat16 comes as its bits in uint16
    about: Mapping[str, Any]  # identity, provenance, failures, sha256; {} when the features were computed elsewhere
    blocks: Callable[[Sequence[int]], Iterator[np.ndarray]]  # consecutive blocks, each up to one of these rows

    @property
    def array_dtype(self) -> np.dtype:
        """Little-endian dtype of the blocks."""
        return np.dtype("<u2") if self.dtype == "bfloat16" else np.dtype(self.dtype).newbyteorder("<")

    @property
    def block_ends(self) -> list[int]:
        """Where blocks of whole chunks end that fit into memory."""
        chunk_bytes = layout.CHUNK_ROWS * prod(self.shape[1:]) * self.array_dtype.itemsize
        return ends(self.shape[0], max(1, BLOCK_BYTES // chunk_bytes) * layout.CHUNK_ROWS)


def ends(num_rows: int, step: int) -> list[int]:
    """Where blocks of `step` rows end."""
    return [*range(step, num_rows, step), num_rows]


def spans(block_ends: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of consecutive blocks."""
    return pairwise([0, *block_ends])


@contextmanager
def blame(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn what a library says about a file it cannot read into a `ValueError` that names the file."""
    try:
        yield
    except (*errors, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, EOFError) as error:
        said = str(error)
        raise ValueError(said if str(path) in said else f"{path} cannot be read: {said or type(error).__name__}") from error


def check_declared(path: Path, shape: Sequence[int], itemsize: int) -> None:
    """`ValueError` unless features of this shape [N, ...] can be in the file: memory is asked for before anything is read."""
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"{path}: features must be [rows, width] or [rows, ..., width], not {list(shape)}")
    size = path.stat().st_size
    if shape[0] > size or prod(shape) * itemsize > MAX_COMPRESSION * size:
        raise ValueError(f"{path} declares features of shape {list(shape)}, which its {size} bytes cannot hold")


def stored_dtype(path: Path, raw: np.dtype, about: Mapping[str, Any]) -> str:
    """`FeatureFile.dtype` of an array in a file; `ValueError` when it holds no numbers."""
    if raw.kind not in "fiu" or raw.itemsize > 8:
        raise ValueError(f"{path}: features must be numbers, not {raw}")
    identity = about.get("identity")
    if raw.newbyteorder("=") == np.uint16 and isinstance(identity, dict) and identity.get("store_dtype") == "bfloat16":
        return "bfloat16"
    return raw.newbyteorder("=").name


def as_float32(block: np.ndarray, dtype: str) -> np.ndarray:
    """A block as float32 numbers; what is beyond float32 becomes infinite."""
    if dtype == "bfloat16":
        return layout.from_stored(block, dtype)
    with np.errstate(over="ignore"):
        return block.astype(np.float32)


def check_feature_file(features: FeatureFile, path: Path) -> None:
    """`ValueError` unless there is an id for every sample, no id comes twice, and the offsets cover the rows."""
    seen: dict[str, int] = {}
    for row, sample_id in enumerate(features.ids):
        if not sample_id or len(sample_id) > ID_LIMIT:
            raise ValueError(f"{path}: the id of row {row} must have 1 to {ID_LIMIT} characters")
        if seen.setdefault(sample_id, row) != row:
            raise ValueError(f"{path}: rows {seen[sample_id]} and {row} have the same id {sample_id!r}; keep one of them")
    rows, offsets = features.shape[0], features.offsets
    if not len(offsets) and len(features.ids) != rows:
        raise ValueError(f"{path} has {len(features.ids)} ids for {rows} rows of features")
    if len(offsets) and (
        len(offsets) != len(features.ids) + 1 or offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"{path}: its offsets do not share its {rows} rows among {len(features.ids)} ids")


def id_strings(values: Iterable[Any]) -> list[str]:
    """Ids as strings; `TypeError` for anything but strings and whole numbers."""
    ids = list(values)
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise TypeError(f"an id must be a string or a whole number, not {str(value)[:40]!r}")
    return [str(value) for value in ids]


def document(text: str | bytes) -> dict[str, Any]:
    """A JSON object; `ValueError` or `TypeError` for anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError("its JSON document is no object")
    return value


def offsets_of(values: Any) -> np.ndarray:
    """Offsets [N+1] int64 from whole numbers, [0] from none."""
    offsets = np.asarray(values)
    if offsets.ndim != 1 or (len(offsets) and offsets.dtype.kind not in "iu"):
        raise ValueError("its offsets are no list of whole numbers")
    return offsets.astype(np.int64)


def sidecar(path: Path) -> dict[str, Any]:
    """What lies beside a file without ids: <stem>.json, a list or an object with `ids`, or <stem>.txt, one on each line."""
    beside = path.with_suffix(".json")
    if beside.is_file():
        value = json.loads(beside.read_text(encoding="utf-8"))
        described = {"ids": value} if isinstance(value, list) else value
        if not isinstance(described, dict) or not isinstance(described.get("about", {}), dict):
            raise ValueError(f"{beside} must be a JSON list of ids, or an object with `ids`")
        return described
    lines = path.with_suffix(".txt")
    if lines.is_file():
        return {"ids": lines.read_text(encoding="utf-8").removesuffix("\n").split("\n")}
    raise ValueError(f"{path} has no ids: put them into {beside.name}, a JSON list, or {lines.name}, one on each line")
