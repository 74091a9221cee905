"""Plan the import of a file of features: a cache that was exported, or features that were computed elsewhere."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.exchange import NO_OFFSETS, FeatureFile, as_float32, block_ranges
from pipeline.cache.label_numbers import LabelNumbers
from pipeline.cache.layout import Failure
from pipeline.data.manifest import DATASET_NAME, Manifest
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256, fingerprint, sha256

logger = logging.getLogger(__name__)

ImportedShard = tuple[np.ndarray, list[Failure]]  # features float32 [rows, *shape], NaN where an item failed; the failures
# Largest number of id bytes per byte of a file. Ids are distinct, and features lie beside them, so no honest file has more.
MAX_ID_COMPRESSION = 16
ID_BYTES_ALLOWANCE = 2**20  # added to that limit, for small files


@dataclass(frozen=True)
class ImportPlan:
    """Everything that is needed to write a cache from a file of features."""

    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    ids: list[str]
    offsets: np.ndarray
    num_rows: int
    feature_shape: tuple[int, ...]
    shard_rows: int  # of a new cache; 0: the default
    unknown_ids: list[str]  # ids of the file that belong to no sample
    read_shards: Callable[[Path, Sequence[int]], Iterator[ImportedShard]]  # (folder for temporary files, ends of the shards)


def check_id_bytes(source: Path, num_bytes: int) -> None:
    """Check that the ids of a file do not need far more memory than the file is large. All ids are in memory at once.

    Args:
        source: the file.
        num_bytes: bytes of its ids, as far as they are known.

    Raises:
        UserError: they need too much.
    """
    size = source.stat().st_size
    if num_bytes > MAX_ID_COMPRESSION * size + ID_BYTES_ALLOWANCE:
        raise UserError(f"{source} has {size} bytes, and its ids would take more than {num_bytes - 1}")


def feature_digests(features: FeatureFile) -> dict[str, Any]:
    """Return the SHA-256 of the ids, of the offsets, and of every chunk of features as stored. All features are read once."""
    blocks = features.read_blocks(features.block_ends)
    return {
        "ids": layout.ids_sha256(features.ids),
        "offsets": sha256(features.offsets.astype("<i8").data),
        "chunks": [digest for block in blocks for digest in _chunk_sha256(features, block)],
    }


def _chunk_sha256(features: FeatureFile, block: np.ndarray) -> list[str]:
    """Return the SHA-256 of every chunk of a block. Blocks and shards are whole chunks, so their size does not matter."""
    stored = np.ascontiguousarray(block, features.array_dtype)
    chunks = (stored[start : start + layout.CHUNK_ROWS] for start in range(0, len(stored), layout.CHUNK_ROWS))
    return [sha256(chunk.data) for chunk in chunks]


def plan_reimport(features: FeatureFile, source: Path) -> ImportPlan:
    """Return the plan that makes the exported cache again.

    Args:
        features: the features of the file.
        source: the file, for messages.

    Raises:
        UserError: the file was not exported from a cache, or its record is damaged or does not fit its features. Damaged
            features are found when the shards are read.
    """
    if features.record.get("order") == "manifest":
        raise UserError(
            f"{source} has the order of the manifest, and makes no cache again: export without --order, or import it as "
            "features computed elsewhere with --dataset and --name"
        )
    if not features.record:
        raise UserError(
            f"{source} does not say which cache it was exported from; "
            "features computed elsewhere need a dataset and a name: give --dataset and --name"
        )
    try:
        identity, provenance, chunk_digests, shard_rows, failures = _read_export_record(features)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"the record in {source} is damaged or does not fit ({error}); export the cache again") from error

    def read_shards(_: Path, block_ends: Sequence[int]) -> Iterator[ImportedShard]:
        for (start, stop), block in zip(block_ranges(block_ends), features.read_blocks(block_ends), strict=True):
            rows = as_float32(block, features.dtype)
            shard_failures = [failure for failure in failures if start <= failure.row < stop]
            empty_rows = start + np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
            chunks = slice(start // layout.CHUNK_ROWS, -(-stop // layout.CHUNK_ROWS))
            is_same = _chunk_sha256(features, block) == chunk_digests[chunks]
            if not is_same or empty_rows.tolist() != sorted(failure.row for failure in shard_failures):
                raise UserError(f"{source} is damaged: rows {start} to {stop - 1} are not those that were exported")
            yield rows, shard_failures

    shape = features.shape
    return ImportPlan(identity, provenance, features.ids, features.offsets, shape[0], shape[1:], shard_rows, [], read_shards)


def _read_export_record(features: FeatureFile) -> tuple[dict[str, Any], dict[str, Any], list[str], int, list[Failure]]:
    """Check the record of an exported cache.

    Returns:
        (identity, provenance, SHA-256 of every chunk, rows per shard, failures).

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the record is damaged or does not fit the features.
    """
    identity, provenance, recorded, shard_rows = (
        features.record[key] for key in ("identity", "provenance", "sha256", "shard_rows")
    )
    fingerprint([identity, provenance])
    command, numbers = provenance["command"], [provenance.get(key, 0) for key in ("shard_rows", "batch_size")]
    words = [word for key in ("settings", "versions") for pair in provenance.get(key, {}).items() for word in pair]
    failures = [layout.dataclass_from_json(Failure, failure) for failure in features.record["failures"]]
    offsets_sha256 = sha256(features.offsets.astype("<i8").data)
    checks = {
        "dataset": DATASET_NAME.fullmatch(identity["dataset"]),
        "encoder": DATASET_NAME.fullmatch(identity["encoder"]["name"]),
        "store dtype": identity["store_dtype"] == features.dtype in layout.STORE_DTYPES,
        "rows per shard": type(shard_rows) is int and shard_rows > 0 and shard_rows % layout.CHUNK_ROWS == 0,
        "command": type(command) is str and command.startswith("diffalign ") and _is_single_command(command),
        "numbers": all(type(number) is int and 0 <= number < 2**31 for number in numbers),
        "words": all(type(word) is str for word in words),
        "failures": all(0 <= failure.row < features.shape[0] for failure in failures),
        "failed samples": {failure.id for failure in failures} <= set(features.ids),
        "ids": recorded["ids"] == layout.ids_sha256(features.ids),
        "offsets": recorded["offsets"] == offsets_sha256,
    }
    wrong = [name for name, is_right in checks.items() if not is_right]
    if wrong:
        raise UserError(", ".join(wrong))
    return identity, provenance, list(recorded["chunks"]), shard_rows, failures


def _is_single_command(command: str) -> bool:
    """Whether a shell would run this command as one program with plain arguments, and nothing else."""
    try:
        return command.isprintable() and shlex.join(shlex.split(command)) == command
    except ValueError:
        return False


def plan_external_import(
    features: FeatureFile, source: Path, manifest: Manifest, name: str, modality: str, store_dtype: str, max_failures: float
) -> ImportPlan:
    """Return the plan of a new cache of features that were computed elsewhere. They are joined by id to a manifest's samples.

    A sample is a failure when the file does not have its id, or when one of its features is not finite.

    Args:
        features: the features of the file.
        source: the file, for messages and for the identity.
        manifest: the prepared dataset.
        name: takes the place of the encoder's name.
        modality: "media" or "text": what the features were computed from.
        store_dtype: number format of the cache; "same": that of the file, or float32 if a cache cannot have it.
        max_failures: the largest share (0..1) of samples that may fail.

    Raises:
        UserError: the name is not allowed, the file has several rows per sample, or none of its ids is known. Too many
            failures are found when the shards are read.
    """
    _check_external(features, source, name)
    ids = [sample.id for sample in manifest.samples]
    row_of = {sample_id: row for row, sample_id in enumerate(ids)}
    features = _without_mark(features, row_of)
    target_rows = np.array([row_of.get(sample_id, -1) for sample_id in features.ids])
    has_row = np.zeros(len(ids), dtype=bool)
    has_row[target_rows[target_rows >= 0]] = True
    if not has_row.any():
        raise UserError(f"no id of {source} is in {manifest.dataset}: it has {features.ids[0]!r}, the dataset {ids[0]!r}")
    same_dtype = features.dtype if features.dtype in layout.STORE_DTYPES else "float32"
    target_dtype = same_dtype if store_dtype == "same" else store_dtype

    def read_shards(folder: Path, block_ends: Sequence[int]) -> Iterator[ImportedShard]:
        num_failed, num_missing = 0, int((~has_row).sum())
        is_single = manifest.label_kind == "single"
        numbers = LabelNumbers(np.array([sample.labels[0] for sample in manifest.samples])) if is_single else None
        blocks = _blocks_in_sample_order(features, target_rows, block_ends, folder)
        for (start, stop), rows in zip(block_ranges(block_ends), blocks, strict=True):
            failures = _mark_failures(rows, ids[start:stop], has_row[start:stop], start, target_dtype, source.name)
            num_failed += len(failures)
            if failures and max(num_failed, num_missing) > max_failures * len(ids):
                raise UserError(
                    f"{max(num_failed, num_missing)} of {len(ids)} samples have no features in {source}, more than "
                    f"--max-failures {max_failures:g} allows; one of them: {failures[-1].id!r}: {failures[-1].error}"
                )
            if numbers:
                numbers.add(rows, start)
            yield rows, failures
        if numbers and (found := numbers.found()):
            logger.warning("number %d of each row in %s is the label itself: save the features without it", found[0], source)

    command = _import_command(source, manifest.dataset, name, modality, store_dtype, max_failures)
    return ImportPlan(
        identity=_external_identity(features, source, manifest, name, modality, target_dtype),
        provenance={"command": command, "versions": {}},
        ids=ids,
        offsets=NO_OFFSETS,
        num_rows=len(ids),
        feature_shape=features.shape[1:],
        shard_rows=0,
        unknown_ids=[sample_id for sample_id in features.ids if sample_id not in row_of],
        read_shards=read_shards,
    )


def _without_mark(features: FeatureFile, known: Container[str]) -> FeatureFile:
    """Remove the byte order mark, with which Windows programs begin a list, from the first id, if that makes it a known one."""
    first = features.ids[0].removeprefix("\ufeff")
    if features.ids[0] in known or first not in known or first in features.ids:
        return features
    return replace(features, ids=[first, *features.ids[1:]])


def _external_identity(
    features: FeatureFile, source: Path, manifest: Manifest, name: str, modality: str, store_dtype: str
) -> dict[str, Any]:
    encoder = {
        "name": name,
        "modality": "text" if modality == "text" else manifest.meta["media_type"],
        "source_sha256": file_sha256(source),
        "ids_sha256": layout.ids_sha256(features.ids),  # the ids may be in another file than the features
    }
    return {"dataset": manifest.dataset, "manifest": manifest.fingerprint(), "encoder": encoder, "store_dtype": store_dtype}


def _check_external(features: FeatureFile, source: Path, name: str) -> None:
    if not DATASET_NAME.fullmatch(name) or name in plugins.names("encoders"):
        raise UserError(f"{name!r} cannot name imported features: letters, digits, '_', '-', '.', and no encoder of diffalign")
    if len(features.offsets):
        raise UserError(f"{source} has several rows per sample: they can only come back as the cache that they were")


def _import_command(source: Path, *values: str | float) -> str:
    """Return the command that imports the file again, in the folder of the file."""
    options = ("--dataset", "--name", "--modality", "--store-dtype", "--max-failures")
    words = [str(word) for pair in zip(options, values, strict=True) for word in pair]
    return shlex.join(["diffalign", "cache", "import", source.name, *words])


def _mark_failures(
    rows: np.ndarray, ids: Sequence[str], has_row: np.ndarray, start: int, store_dtype: str, source: str
) -> list[Failure]:
    """Set the rows of samples without usable features to NaN, in place.

    Args:
        rows: rows of a shard, float32 [rows, *shape].
        ids: their samples.
        has_row: whether the file has a row of each sample, [rows].
        start: number of the first row.
        store_dtype: the number format in which a row must be finite.
        source: name of the file.

    Returns:
        The failures, one per row that was set to NaN.
    """
    stored = layout.from_stored(layout.to_stored(rows, store_dtype), store_dtype)
    failed = np.flatnonzero(~(np.isfinite(stored).reshape(len(rows), -1).all(axis=1) & has_row))
    rows[failed] = np.nan
    reasons = {True: f"a feature is not finite as {store_dtype}", False: f"{source} has no row of it"}
    return [Failure(start + row, ids[row], "import", reasons[bool(has_row[row])]) for row in failed.tolist()]


def _blocks_in_sample_order(
    features: FeatureFile, target_rows: np.ndarray, block_ends: Sequence[int], folder: Path
) -> Iterator[np.ndarray]:
    """Yield the features of a file as float32 blocks, in the order of the samples. Rows that the file lacks hold any numbers.

    Rows in another order go through a temporary file, so memory holds only one block.

    Args:
        features: the features of the file.
        target_rows: [rows of the file]: the sample of each row; -1: none.
        block_ends: where the blocks end.
        folder: the folder for the temporary file.
    """
    num_rows = block_ends[-1]
    if np.array_equal(target_rows, np.arange(num_rows)):
        yield from (as_float32(block, features.dtype) for block in features.read_blocks(block_ends))
        return
    row_shape = features.shape[1:]
    row_bytes = 4 * int(np.prod(row_shape))
    with TemporaryFile(dir=folder) as file:
        file.truncate(num_rows * row_bytes)
        file_blocks = zip(block_ranges(features.block_ends), features.read_blocks(features.block_ends), strict=True)
        for (start, stop), block in file_blocks:
            for target_row, row in zip(target_rows[start:stop].tolist(), as_float32(block, features.dtype), strict=True):
                if target_row >= 0:
                    file.seek(target_row * row_bytes)
                    file.write(np.ascontiguousarray(row).data)
        file.seek(0)
        for start, stop in block_ranges(block_ends):
            data = bytearray(file.read((stop - start) * row_bytes))
            yield np.frombuffer(data, np.float32).reshape(-1, *row_shape)
