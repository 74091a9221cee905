"""Features on their way into a cache: those of a cache that was exported, or those that were computed elsewhere."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from pipeline.cache import layout
from pipeline.cache.exchange import NO_OFFSETS, FeatureFile, as_float32, spans
from pipeline.cache.layout import Failure
from pipeline.data.manifest import DATASET_NAME, Manifest
from pipeline.runtime import plugins
from pipeline.runtime.files import fingerprint, sha256

Shard = tuple[np.ndarray, list[Failure]]  # features float32, NaN where there are none, and why
ID_COMPRESSION = 16  # bytes of ids that a byte of a file may stand for: ids are distinct, and features lie beside them
ID_SLACK = 2**20  # bytes


@dataclass(frozen=True)
class Incoming:
    """What a cache is made of."""

    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    ids: list[str]
    offsets: np.ndarray
    num_rows: int
    feature_shape: tuple[int, ...]
    shard_rows: int  # of a new cache; 0: as many as usual
    unknown: list[str]  # ids of the file that belong to no sample
    shards: Callable[[Path, Sequence[int]], Iterator[Shard]]  # (folder for temporary files, where shards end)


def check_id_bytes(source: Path, num_bytes: int) -> None:
    """`ValueError` when the ids of a file would take far more memory than the file is large: all of them are held at once."""
    size = source.stat().st_size
    if num_bytes > ID_COMPRESSION * size + ID_SLACK:
        raise ValueError(f"{source} has {size} bytes, and its ids would take more than {num_bytes - 1}")


def digests(features: FeatureFile) -> dict[str, Any]:
    """SHA-256 of ids, of offsets, and of every chunk of features as stored; all features are read once."""
    blocks = features.blocks(features.block_ends)
    return {
        "ids": layout.ids_sha256(features.ids),
        "offsets": sha256(features.offsets.astype("<i8").data),
        "chunks": [digest for block in blocks for digest in _chunk_sha256(features, block)],
    }


def _chunk_sha256(features: FeatureFile, block: np.ndarray) -> list[str]:
    """SHA-256 of every chunk of rows: shards and blocks are whole chunks, whatever their size."""
    stored = np.ascontiguousarray(block, features.array_dtype)
    chunks = (stored[start : start + layout.CHUNK_ROWS] for start in range(0, len(stored), layout.CHUNK_ROWS))
    return [sha256(chunk.data) for chunk in chunks]


def exported(features: FeatureFile, source: Path) -> Incoming:
    """The cache that `source` was exported from; `ValueError` when its record is damaged or does not fit its features."""
    if not features.about:
        raise ValueError(
            f"{source} does not say which cache it was exported from; "
            "features computed elsewhere need a dataset and a name: give --dataset and --name"
        )
    try:
        identity, provenance, expected, shard_rows, failures = _record(features)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the record in {source} is damaged or does not fit ({error}); export the cache again") from error

    def shards(_: Path, block_ends: Sequence[int]) -> Iterator[Shard]:
        for (start, stop), block in zip(spans(block_ends), features.blocks(block_ends), strict=True):
            rows = as_float32(block, features.dtype)
            own = [failure for failure in failures if start <= failure.row < stop]
            empty = start + np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
            chunks = slice(start // layout.CHUNK_ROWS, -(-stop // layout.CHUNK_ROWS))
            is_same = _chunk_sha256(features, block) == expected[chunks]
            if not is_same or empty.tolist() != sorted(failure.row for failure in own):
                raise ValueError(f"{source} is damaged: rows {start} to {stop - 1} are not those that were exported")
            yield rows, own

    shape = features.shape
    return Incoming(identity, provenance, features.ids, features.offsets, shape[0], shape[1:], shard_rows, [], shards)


def _record(features: FeatureFile) -> tuple[dict[str, Any], dict[str, Any], list[str], int, list[Failure]]:
    """(identity, provenance, SHA-256 of chunks, rows per shard, failures) as they were exported; errors when they are not."""
    identity, provenance, recorded, shard_rows = (
        features.about[key] for key in ("identity", "provenance", "sha256", "shard_rows")
    )
    fingerprint([identity, provenance])
    command, numbers = provenance["command"], [provenance.get(key, 0) for key in ("shard_rows", "batch_size")]
    words = [word for key in ("settings", "versions") for pair in provenance.get(key, {}).items() for word in pair]
    failures = [layout.typed(Failure, failure) for failure in features.about["failures"]]
    offsets_sha256 = sha256(features.offsets.astype("<i8").data)
    fits = {
        "dataset": DATASET_NAME.fullmatch(identity["dataset"]),
        "encoder": DATASET_NAME.fullmatch(identity["encoder"]["name"]),
        "store dtype": identity["store_dtype"] == features.dtype in layout.STORE_DTYPES,
        "rows per shard": type(shard_rows) is int and shard_rows > 0 and shard_rows % layout.CHUNK_ROWS == 0,
        "command": type(command) is str and command.startswith("diffalign ") and _is_plain(command),
        "numbers": all(type(number) is int and 0 <= number < 2**31 for number in numbers),
        "words": all(type(word) is str for word in words),
        "failures": all(0 <= failure.row < features.shape[0] for failure in failures),
        "failed samples": {failure.id for failure in failures} <= set(features.ids),
        "ids": recorded["ids"] == layout.ids_sha256(features.ids),
        "offsets": recorded["offsets"] == offsets_sha256,
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise ValueError(", ".join(wrong))
    return identity, provenance, list(recorded["chunks"]), shard_rows, failures


def _is_plain(command: str) -> bool:
    """Whether a shell that is given the command runs one program with these words, and nothing besides."""
    try:
        return command.isprintable() and shlex.join(shlex.split(command)) == command
    except ValueError:
        return False


def elsewhere(
    features: FeatureFile, source: Path, manifest: Manifest, name: str, modality: str, store_dtype: str, max_failures: float
) -> Incoming:
    """Features computed elsewhere, joined by id to the samples of a manifest, as those of an encoder called `name`.

    A sample that the file does not know, or whose features are not finite, is a failure; more than the share `max_failures`
    of them is a `ValueError`, and so is a file without a single known id.
    """
    _check_foreign(features, source, name)
    ids = [sample.id for sample in manifest.samples]
    row_of = {sample_id: row for row, sample_id in enumerate(ids)}
    targets = np.array([row_of.get(sample_id, -1) for sample_id in features.ids])
    present = np.zeros(len(ids), dtype=bool)
    present[targets[targets >= 0]] = True
    if not present.any():
        raise ValueError(f"no id of {source} is in {manifest.dataset}: it has {features.ids[0]!r}, the dataset {ids[0]!r}")
    kept = {"same": features.dtype if features.dtype in layout.STORE_DTYPES else "float32"}.get(store_dtype, store_dtype)

    def shards(folder: Path, block_ends: Sequence[int]) -> Iterator[Shard]:
        num_failed, num_missing = 0, int((~present).sum())
        for (start, stop), rows in zip(spans(block_ends), _in_order(features, targets, block_ends, folder), strict=True):
            failures = _failures(rows, ids[start:stop], present[start:stop], start, kept, source.name)
            num_failed += len(failures)
            if failures and max(num_failed, num_missing) > max_failures * len(ids):
                raise ValueError(
                    f"{max(num_failed, num_missing)} of {len(ids)} samples have no features in {source}, more than "
                    f"--max-failures {max_failures:g} allows; one of them: {failures[-1].id!r}: {failures[-1].error}"
                )
            yield rows, failures

    encoder = {
        "name": name,
        "modality": "text" if modality == "text" else manifest.meta["media_type"],
        "source_sha256": layout.file_sha256(source),
        "ids_sha256": layout.ids_sha256(features.ids),  # they may lie in a file of their own
    }
    identity = {"dataset": manifest.dataset, "manifest": manifest.fingerprint(), "encoder": encoder, "store_dtype": kept}
    unknown = [sample_id for sample_id in features.ids if sample_id not in row_of]
    provenance = {"command": _command(source, manifest.dataset, name, modality, store_dtype, max_failures), "versions": {}}
    return Incoming(identity, provenance, ids, NO_OFFSETS, len(ids), features.shape[1:], 0, unknown, shards)


def _check_foreign(features: FeatureFile, source: Path, name: str) -> None:
    if not DATASET_NAME.fullmatch(name) or name in plugins.names("encoders"):
        raise ValueError(f"{name!r} cannot name imported features: letters, digits, '_', '-', '.', and no encoder of diffalign")
    if len(features.offsets):
        raise ValueError(f"{source} has several rows per sample: they can only come back as the cache that they were")


def _command(source: Path, *values: str | float) -> str:
    """The command that makes the cache again, where the file lies."""
    options = ("--dataset", "--name", "--modality", "--store-dtype", "--max-failures")
    words = [str(word) for pair in zip(options, values, strict=True) for word in pair]
    return shlex.join(["diffalign", "cache", "import", source.name, *words])


def _failures(
    rows: np.ndarray, ids: Sequence[str], present: np.ndarray, start: int, store_dtype: str, source: str
) -> list[Failure]:
    """Why samples of a shard have no features; their rows become NaN."""
    stored = layout.from_stored(layout.to_stored(rows, store_dtype), store_dtype)
    bad = np.flatnonzero(~(np.isfinite(stored).reshape(len(rows), -1).all(axis=1) & present))
    rows[bad] = np.nan
    reasons = {True: f"a feature is not finite as {store_dtype}", False: f"{source} has no row of it"}
    return [Failure(start + row, ids[row], "import", reasons[bool(present[row])]) for row in bad.tolist()]


def _in_order(features: FeatureFile, targets: np.ndarray, block_ends: Sequence[int], folder: Path) -> Iterator[np.ndarray]:
    """The rows of a file as float32 blocks in the order of the samples; rows that the file does not have hold anything.

    Rows that come in another order go through a temporary file: memory holds one block, whatever the order.
    """
    num_rows = block_ends[-1]
    if np.array_equal(targets, np.arange(num_rows)):
        yield from (as_float32(block, features.dtype) for block in features.blocks(block_ends))
        return
    row_shape = features.shape[1:]
    row_bytes = 4 * int(np.prod(row_shape))
    with TemporaryFile(dir=folder) as file:
        file.truncate(num_rows * row_bytes)
        own_blocks = zip(spans(features.block_ends), features.blocks(features.block_ends), strict=True)
        for (start, stop), block in own_blocks:
            for target, row in zip(targets[start:stop].tolist(), as_float32(block, features.dtype), strict=True):
                if target >= 0:
                    file.seek(target * row_bytes)
                    file.write(np.ascontiguousarray(row).data)
        file.seek(0)
        for start, stop in spans(block_ends):
            data = bytearray(file.read((stop - start) * row_bytes))
            yield np.frombuffer(data, np.float32).reshape(-1, *row_shape)
