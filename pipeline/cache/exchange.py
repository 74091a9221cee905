"""A single file of features, in any format: what it holds, and the checks that it must pass before it is used."""

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
from pipeline.runtime.errors import UserError

# Largest number of feature bytes per byte of a file. No codec compresses more, so a file that declares more is forged.
MAX_FEATURE_COMPRESSION = 1000
MAX_ID_CHARACTERS = 4096
EXCHANGE_BLOCK_BYTES = 2**26  # of features that are read and written at a time; at least one chunk
NO_OFFSETS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class FeatureFile:
    """Features with their ids, of a cache or of a file. The features are read only when `read_blocks` is called."""

    ids: list[str]  # of the samples, in row order
    offsets: np.ndarray  # [N+1] int64: rows of sample i are offsets[i] .. offsets[i+1]; [0] when each sample has one row
    shape: tuple[int, ...]  # of all features: [M, *feature_shape]
    dtype: str  # as stored; bfloat16 comes as its bits in uint16
    record: Mapping[str, Any]  # identity, provenance, failures, sha256 of an exported cache; {} for other features
    read_blocks: Callable[[Sequence[int]], Iterator[np.ndarray]]  # ends of blocks -> consecutive blocks [rows, *feature_shape]

    @property
    def array_dtype(self) -> np.dtype:
        """The little-endian dtype of the blocks."""
        return np.dtype("<u2") if self.dtype == "bfloat16" else np.dtype(self.dtype).newbyteorder("<")

    @property
    def block_ends(self) -> list[int]:
        """The ends of blocks that consist of whole chunks and fit into memory."""
        chunk_bytes = layout.CHUNK_ROWS * prod(self.shape[1:]) * self.array_dtype.itemsize
        return make_block_ends(self.shape[0], max(1, EXCHANGE_BLOCK_BYTES // chunk_bytes) * layout.CHUNK_ROWS)


def make_block_ends(num_rows: int, block_rows: int) -> list[int]:
    """Return the row after the last of each block, when `num_rows` rows are read in blocks of `block_rows`."""
    return [*range(block_rows, num_rows, block_rows), num_rows]


def block_ranges(block_ends: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first row, row after the last) of consecutive blocks that end at `block_ends`."""
    return pairwise([0, *block_ends])


@contextmanager
def label_read_errors(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn the error of a library that cannot read a file into a `UserError` that names the file.

    Args:
        path: the file.
        errors: classes of errors that the library raises, besides those of Python itself.
    """
    try:
        yield
    except (*errors, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, EOFError) as error:
        message = str(error)
        if str(path) not in message:
            message = f"{path} cannot be read: {message or type(error).__name__}"
        raise UserError(message) from error


def check_declared_shape(path: Path, shape: Sequence[int], itemsize: int) -> None:
    """Check that a file can hold the features that it declares. This is done before memory is allocated for them.

    Args:
        path: the file.
        shape: [rows, ...] as declared.
        itemsize: bytes of a number.

    Raises:
        UserError: the shape is not one of features, or too large for the size of the file.
    """
    if len(shape) < 2 or min(shape) < 1:
        raise UserError(f"{path}: features must be [rows, width] or [rows, ..., width], not {list(shape)}")
    size = path.stat().st_size
    if shape[0] > size or prod(shape) * itemsize > MAX_FEATURE_COMPRESSION * size:
        raise UserError(f"{path} declares features of shape {list(shape)}, which its {size} bytes cannot hold")


def stored_dtype(path: Path, raw: np.dtype, record: Mapping[str, Any]) -> str:
    """Return the `FeatureFile.dtype` of an array in a file.

    Args:
        path: the file.
        raw: the dtype of the array.
        record: the `FeatureFile.record`; it says whether uint16 is really bfloat16.

    Raises:
        UserError: the array does not hold numbers of at most 8 bytes, or numbers that may be the bits of others.
    """
    identity = record.get("identity")
    if raw.newbyteorder("=") == np.uint16 and isinstance(identity, dict) and identity.get("store_dtype") == "bfloat16":
        return "bfloat16"
    if raw.itemsize == 2 and raw.kind in "iuV" and not raw.names:  # NumPy has no bfloat16
        raise UserError(
            f"{path}: features of type {raw} look like the bits of bfloat16; save the numbers themselves as float32, in torch: "
            "tensor.float().numpy(), of bits torch.from_numpy(bits).view(torch.bfloat16).float().numpy(); save true whole "
            "numbers as int32"
        )
    if raw.kind not in "fiu" or raw.itemsize > 8:
        raise UserError(f"{path}: features must be numbers, not {raw}")
    return raw.newbyteorder("=").name


def as_float32(block: np.ndarray, dtype: str) -> np.ndarray:
    """Convert a block of features to float32; numbers beyond its range become infinite."""
    if dtype == "bfloat16":
        return layout.from_stored(block, dtype)
    with np.errstate(over="ignore"):
        return block.astype(np.float32)


def check_feature_file(features: FeatureFile, path: Path) -> None:
    """Check the ids and offsets of a file of features.

    Raises:
        UserError: a sample has no id, an id is too long or occurs twice, or the offsets do not cover the rows.
    """
    seen: dict[str, int] = {}
    for row, sample_id in enumerate(features.ids):
        if not sample_id or len(sample_id) > MAX_ID_CHARACTERS:
            raise UserError(f"{path}: the id of row {row} must have 1 to {MAX_ID_CHARACTERS} characters")
        if seen.setdefault(sample_id, row) != row:
            raise UserError(f"{path}: rows {seen[sample_id]} and {row} have the same id {sample_id!r}; keep one of them")
    rows, offsets = features.shape[0], features.offsets
    if not len(offsets) and len(features.ids) != rows:
        raise UserError(f"{path} has {len(features.ids)} ids for {rows} rows of features")
    if len(offsets) and (
        len(offsets) != len(features.ids) + 1 or offsets[0] != 0 or offsets[-1] != rows or (np.diff(offsets) < 0).any()
    ):
        raise UserError(f"{path}: its offsets do not share its {rows} rows among {len(features.ids)} ids")


def id_strings(values: Iterable[Any]) -> list[str]:
    """Return ids as strings.

    Raises:
        TypeError: an id is neither a string nor a whole number.
    """
    ids = list(values)
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise TypeError(f"an id must be a string or a whole number, not {str(value)[:40]!r}")
    return [str(value) for value in ids]


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a text.

    Raises:
        UserError: the text is not JSON.
        TypeError: it is JSON, but not an object.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError("its JSON document is no object")
    return value


def parse_offsets(values: Any) -> np.ndarray:
    """Return offsets as an array, [N+1] int64; an empty list gives [0].

    Raises:
        UserError: the values are not a list of whole numbers.
    """
    offsets = np.asarray(values)
    if offsets.ndim != 1 or (len(offsets) and offsets.dtype.kind not in "iu"):
        raise UserError("its offsets are no list of whole numbers")
    return offsets.astype(np.int64)


def read_sidecar(path: Path) -> dict[str, Any]:
    """Return the ids, and what else is known, from the file beside a file of features that has no ids itself.

    The sidecar is <stem>.json, a list of ids or an object with `ids`, or <stem>.txt with one id on each line.

    Raises:
        UserError: there is no sidecar, or it is not of this form.
    """
    json_file = path.with_suffix(".json")
    if json_file.is_file():
        value = json.loads(json_file.read_text(encoding="utf-8-sig"))  # Windows programs begin a file with a mark
        described = {"ids": value} if isinstance(value, list) else value
        if not isinstance(described, dict) or not isinstance(described.get("about", {}), dict):
            raise UserError(f"{json_file} must be a JSON list of ids, or an object with `ids`")
        return described
    text_file = path.with_suffix(".txt")
    if text_file.is_file():
        return {"ids": text_file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")}
    raise UserError(f"{path} has no ids: put them into {json_file.name}, a JSON list, or {text_file.name}, one on each line")
