"""Caches to and from single files: what was exported comes back as the same cache, features computed elsewhere as a new one."""

from __future__ import annotations

import importlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Literal

import numpy as np
import zarr

from pipeline.cache import layout
from pipeline.cache.exchange import NO_OFFSETS, FeatureFile, check_feature_file, ends, spans
from pipeline.cache.incoming import Incoming, digests, elsewhere, exported
from pipeline.cache.reader import Cache, open_cache, read_commits
from pipeline.cache.samples import manifest_of
from pipeline.cache.writer import Writer
from pipeline.data import manifest as manifests
from pipeline.runtime.files import lock, sync_folder

FORMATS = {".h5": "hdf5", ".hdf5": "hdf5", ".npy": "npy", ".parquet": "parquet", ".safetensors": "safetensors"}


@dataclass(frozen=True)
class Imported:
    """What an import has done."""

    path: Path  # of the cache
    samples: int
    failed: int  # samples, or texts of samples, without features
    unknown: int  # rows of the file whose id belongs to no sample; they are left out
    first_unknown: str


def export_cache(path: Path, target: Path) -> Path:
    """Write a complete cache into one file whose suffix says the format, and return the file.

    It holds the features exactly as stored, ids, splits, labels and the identity; `import_features` makes the same cache
    of it. `ValueError` when the file is there already, the cache is not complete, or its manifest is gone.
    """
    form = _format(target)
    for made in [target, target.with_suffix(".json")][: 1 + (target.suffix == ".npy")]:
        if made.exists():
            raise ValueError(f"{made} is there already; remove it, or export to another name")
    cache = open_cache(path)
    manifest, samples = manifest_of(cache)
    features, shard_rows = _stored(cache)
    commits, _ = read_commits(path)
    about = {
        "kind": cache.kind,
        "identity": cache.identity,
        "provenance": cache.provenance,
        "feature_shape": list(cache.feature_shape),
        "shard_rows": shard_rows,
        "class_names": list(manifest.class_names),
        "failures": [asdict(failure) for commit in commits for failure in commit.failures],
        "sha256": digests(features),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        form.write(Path(folder) / target.name, replace(features, about=about), samples)
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == target.name):  # what lies beside it first
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
) -> Imported:
    """Make a cache of a file of features.

    Without `name` the file must come from `export_cache`, and the cache is the one that was exported. With it the features were
    computed elsewhere: rows are joined by id to the samples of a prepared `dataset`, and `name` stands for the encoder;
    `modality` says what was encoded, the samples' media or their text, and "same" keeps the file's number format. Samples
    without finite features are failures, of which `max_failures` is the largest share (0..1). `ValueError` when the file
    cannot be read or does not fit; then there is no new cache.
    """
    form = _format(source)
    if not source.is_file():
        raise ValueError(f"{source} is no file")
    if not 0 <= max_failures <= 1:
        raise ValueError("max failures must be a share of the samples, from 0 to 1")
    if name and not dataset:
        raise ValueError(f"{name!r} needs a dataset whose samples the features are of: give --dataset")
    with form.read(source) as features:
        check_feature_file(features, source)
        if name:
            manifest = manifests.read_manifest(home, dataset)
            incoming = elsewhere(features, source, manifest, name, modality, store_dtype, max_failures)
        else:
            incoming = exported(features, source)
        if dataset not in ("", incoming.identity["dataset"]):
            raise ValueError(f"{source} was exported from {incoming.identity['dataset']}, not from {dataset}")
        return _write(incoming, home)


def _format(path: Path) -> ModuleType:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} has no suffix of a format; choose one of: {', '.join(FORMATS)}")
    return importlib.import_module(f"pipeline.cache.formats.{FORMATS[path.suffix]}")


def _stored(cache: Cache) -> tuple[FeatureFile, int]:
    """The features of a cache as they are stored, and its rows per shard."""
    array = zarr.open_array(cache.path / "features", mode="r")
    assert array.shards is not None

    def blocks(block_ends: Sequence[int]) -> Iterator[np.ndarray]:
        for start, stop in spans(block_ends):
            yield np.asarray(array[start:stop])

    offsets = cache.offsets if cache.kind == "ragged" else NO_OFFSETS
    return FeatureFile(cache.ids, offsets, array.shape, cache.identity["store_dtype"], {}, blocks), array.shards[0]


def _write(incoming: Incoming, home: Path) -> Imported:
    """Commit what is not committed yet; a cache that was begun here is taken back when the file turns out to be bad."""
    identity = incoming.identity
    path = layout.cache_path(home, identity["dataset"], identity["encoder"]["name"], identity)
    with lock(path):
        is_new = not (path / "zarr.json").exists()
        writer = Writer.open(
            path,
            incoming.ids,
            incoming.offsets,
            incoming.feature_shape,
            identity,
            incoming.provenance,
            incoming.shard_rows,
        )
        commits = writer.committed()
        try:
            if len(commits) < writer.num_shards:
                started = time.monotonic()
                block_ends = ends(incoming.num_rows, writer.shard_rows)
                for shard, (rows, failures) in enumerate(incoming.shards(path, block_ends)):
                    if shard not in commits:
                        seconds = time.monotonic() - started
                        commits[shard] = writer.commit(shard, rows, failures, seconds=seconds, batch_size=0, device="import")
                    started = time.monotonic()
        except ValueError:
            if is_new:
                shutil.rmtree(path)
            raise
        writer.finish(commits)
    return Imported(
        path=path,
        samples=len(incoming.ids),
        failed=sum(len(commit.failures) for commit in commits.values()),
        unknown=len(incoming.unknown),
        first_unknown=incoming.unknown[0] if incoming.unknown else "",
    )
