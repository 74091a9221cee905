"""Export a cache to a single file, and import files: an exported cache becomes the same cache again.

Features that were computed elsewhere become a new cache.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Literal

import numpy as np

from pipeline.cache import layout
from pipeline.cache.exchange import NO_OFFSETS, FeatureFile, block_ranges, check_feature_file, make_block_ends
from pipeline.cache.import_plan import ImportPlan, feature_digests, plan_external_import, plan_reimport
from pipeline.cache.reader import Cache, open_cache, read_commits
from pipeline.cache.samples import read_cache_manifest
from pipeline.cache.writer import Writer
from pipeline.data.manifest_files import read_manifest
from pipeline.runtime.claims import CLAIMS, hold
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sync_folder
from pipeline.runtime.places import Place
from pipeline.runtime.stores import exists, remove_objects

RowOrder = Literal["cache", "manifest"]
FORMAT_MODULES = {".h5": "hdf5", ".hdf5": "hdf5", ".npy": "npy", ".parquet": "parquet", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class ImportResult:
    """The cache that an import has made, and how many samples of it have features."""

    path: Place
    samples: int
    failed: int  # samples, or texts of samples, without features
    unknown: int  # rows of the file whose id belongs to no sample; they are left out
    first_unknown: str


def export_cache(path: Place, target: Path, order: RowOrder = "cache") -> Path:
    """Write a complete cache into one file, and return the file.

    The file holds the features exactly as stored, with ids, splits, labels and the identity. In the order of the cache,
    `import_features` makes the same cache from it.

    Args:
        path: the place of the cache.
        target: the file to write; its suffix is the format.
        order: of the samples: "cache", or "manifest" for that of the rows of <home>/manifests/<dataset>.csv and .parquet.

    Raises:
        UserError: the format is unknown, the file exists, the cache is not complete, or its manifest is gone or has changed.
    """
    format_module = _format_module(target)
    for file in [target, target.with_suffix(".json")][: 1 + (target.suffix == ".npy")]:
        if file.exists():
            raise UserError(f"{file} is there already; remove it, or export to another name")
    cache = open_cache(path)
    manifest, samples = read_cache_manifest(cache)
    positions = {sample.id: position for position, sample in enumerate(samples)}
    if order == "manifest":
        samples = [sample for _, sample in manifest.in_file_order()]
    features, shard_rows, new_row = _open_stored(cache, [positions[sample.id] for sample in samples])
    commits, _ = read_commits(path)
    failures = [asdict(failure) for commit in commits for failure in commit.failures]
    record = {
        **({"order": order} if order == "manifest" else {}),
        "kind": cache.kind,
        "identity": cache.identity,
        "provenance": cache.provenance,
        "feature_shape": list(cache.feature_shape),
        "shard_rows": shard_rows,
        "class_names": list(manifest.class_names),
        "failures": [{**failure, "row": int(new_row[failure["row"]])} for failure in failures],
        "sha256": feature_digests(features),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        format_module.write(Path(folder) / target.name, replace(features, record=record), samples)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):  # the target last
            with file.open("rb") as written:
                os.fsync(written.fileno())
            os.rename(file, target.parent / file.name)
    sync_folder(target.parent)
    return target


def import_features(
    source: Path,
    home: Path,
    *,
    dataset: str = "",
    name: str = "",
    modality: Literal["media", "text"] = "media",
    store_dtype: Literal["same", "float16", "float32", "bfloat16"] = "same",
    max_failures: float = 0.05,
) -> ImportResult:
    """Make a cache from a file of features.

    Without `name`, the file must come from `export_cache`, and the cache is the one that was exported. With a name, the
    features were computed elsewhere: rows are joined by id to the samples of a prepared dataset, and samples without finite
    features are failures.

    Args:
        source: the file; its suffix is the format.
        home: the folder for caches/.
        dataset: the prepared dataset.
        name: takes the place of the encoder's name.
        modality: what was encoded: the samples' media or their text.
        store_dtype: number format of the cache; "same": that of the file.
        max_failures: the largest share (0..1) of samples that may fail.

    Raises:
        UserError: the file cannot be read or does not fit. Then no new cache is left.
    """
    format_module = _format_module(source)
    if not source.is_file():
        raise UserError(f"{source} is no file")
    if not 0 <= max_failures <= 1:
        raise UserError("max failures must be a share of the samples, from 0 to 1")
    if name and not dataset:
        raise UserError(f"{name!r} needs a dataset whose samples the features are of: give --dataset")
    with format_module.read(source) as features:
        check_feature_file(features, source)
        if name:
            manifest = read_manifest(home, dataset)
            plan = plan_external_import(features, source, manifest, name, modality, store_dtype, max_failures)
        else:
            plan = plan_reimport(features, source)
        if dataset not in ("", plan.identity["dataset"]):
            raise UserError(f"{source} was exported from {plan.identity['dataset']}, not from {dataset}")
        return _write_cache(plan, home)


def _format_module(path: Path) -> ModuleType:
    if path.suffix not in FORMAT_MODULES:
        raise UserError(f"{path} has no suffix of a format; choose one of: {', '.join(FORMAT_MODULES)}")
    return importlib.import_module(f"pipeline.cache.formats.{FORMAT_MODULES[path.suffix]}")


def _open_stored(cache: Cache, order: Sequence[int]) -> tuple[FeatureFile, int, np.ndarray]:
    """Return the features of a cache as they are stored, with the samples in another order.

    Args:
        cache: the cache.
        order: positions of the samples in the cache, in the order that is wanted.

    Returns:
        The features; the rows per shard of the cache; and, for each row of the cache, its row in the wanted order.
    """
    counts = np.diff(cache.offsets)[order]
    ends = np.cumsum(counts)
    rows = np.arange(cache.stored.shape[0]) + np.repeat(cache.offsets[order] - (ends - counts), counts)

    def read_blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
        for start, stop in block_ranges(block_ends):
            yield cache.stored.read(rows[start:stop])

    offsets = np.concatenate([[0], ends]).astype(np.int64) if cache.kind == "ragged" else NO_OFFSETS
    ids = cache.ids.take(order)
    features = FeatureFile(ids, offsets, cache.stored.shape, cache.identity["store_dtype"], {}, read_blocks)
    return features, cache.stored.shard_rows, np.argsort(rows)


def _write_cache(plan: ImportPlan, home: Path) -> ImportResult:
    """Write the shards that the cache does not have yet. If the file is damaged, a cache that was started here is removed."""
    identity = plan.identity
    path = layout.cache_path(home, identity["dataset"], identity["encoder"]["name"], identity)
    with hold(path):
        is_new = not exists(path / "zarr.json")
        writer = Writer.open(
            path,
            plan.ids,
            plan.offsets,
            plan.feature_shape,
            identity,
            plan.provenance,
            plan.shard_rows,
        )
        commits = writer.verified_commits()
        try:
            if len(commits) < writer.num_shards:
                start_time = time.monotonic()
                block_ends = make_block_ends(plan.num_rows, writer.shard_rows)
                with nullcontext(path) if isinstance(path, Path) else TemporaryDirectory() as folder:
                    for shard, (rows, failures) in enumerate(plan.read_shards(Path(folder), block_ends)):
                        if shard not in commits:
                            seconds = time.monotonic() - start_time
                            commits[shard] = writer.commit(
                                shard, rows, failures, seconds=seconds, batch_size=0, device="import"
                            )
                        start_time = time.monotonic()
        except UserError:
            if is_new:
                remove_objects(path, kept=CLAIMS)
            raise
        writer.finish(commits)
    return ImportResult(
        path=path,
        samples=len(plan.ids),
        failed=sum(len(commit.failures) for commit in commits.values()),
        unknown=len(plan.unknown_ids),
        first_unknown=plan.unknown_ids[0] if plan.unknown_ids else "",
    )
