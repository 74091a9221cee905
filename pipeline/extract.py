"""Stage 1: run an encoder over a manifest and keep what it says in a feature cache."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.cache.layout import CHUNK_ROWS, STORE_DTYPES, Commit, Failure, StoreDtype, cache_path
from pipeline.cache.writer import Writer
from pipeline.devices import default_device
from pipeline.encoding import build_encoder
from pipeline.items import Encoded, Forward, Items, make_items
from pipeline.loading import encoded_batches
from pipeline.manifest import Manifest
from pipeline.pace import Pace, visible_gpus
from pipeline.runs import canonical_json, lock
from pipeline.types import Encoder

BATCH_SIZE = {"cpu": 16, "cuda": 256}  # on a GPU halved until it fits
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pillow",
    "resvg-py",
    "av",
    "zarr",
)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How an extraction is carried out; no field changes a feature beyond the rounding of its last bits."""

    batch_size: int = 0  # items per forward pass; 0: as the device likes it, halved when memory runs out
    workers: int = -1  # processes; -1: one per core, 0: this process does everything
    shard_rows: int = 0  # rows per shard of a new cache, a multiple of 512; 0: 8,192, of clips 512
    max_failures: float = 0.05  # share of the items that may fail
    retry_failed: bool = False  # do the shards again in which items failed
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 0 or self.workers < -1 or not 0 <= self.max_failures <= 1:
            raise ValueError("batch size must be >= 0, workers >= -1 and max failures a share of the items, from 0 to 1")
        if self.shard_rows < 0 or self.shard_rows % CHUNK_ROWS:
            raise ValueError(f"shard rows must be a multiple of {CHUNK_ROWS}, found {self.shard_rows}")


@dataclass(frozen=True)
class Task:
    """A cache to fill: what to ask the encoder, where the answers go, and who asks."""

    path: Path
    items: Items
    offsets: np.ndarray
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    effort: Effort
    forward: Forward

    def batches(self, rows: range) -> list[np.ndarray]:
        """The rows of a shard as the batches they are encoded in, however far the cache is."""
        return self.items.batches(rows, self.forward.limit)


def extract(
    manifest: Manifest,
    encoder_name: str,
    settings: Mapping[str, Any],
    home: Path,
    *,
    store_dtype: StoreDtype = "float16",
    compiled: bool = False,
    effort: Effort = Effort(),
) -> Path:
    """Fill the cache of a manifest and an encoder, from where it stands, and return its folder.

    What is committed and undamaged stays and the rest is done, so one command starts, resumes and repairs. `compiled` runs the
    encoder through torch.compile, which rounds otherwise and so makes another cache. `ValueError` for settings, media or files
    that do not fit, and for more failures than the effort allows.
    """
    return carry_out(plan(manifest, encoder_name, settings, home, store_dtype, compiled, effort))


def carry_out(task: Task) -> Path:
    """Do what is left of a task, and return its folder."""
    with open_writer(task) as (writer, commits):
        fill(task, writer, commits)
        writer.finish(commits)
    return task.path


def plan(
    manifest: Manifest,
    encoder_name: str,
    settings: Mapping[str, Any],
    home: Path,
    store_dtype: StoreDtype,
    compiled: bool,
    effort: Effort,
) -> Task:
    """What `extract` will do; nothing is written."""
    if store_dtype not in STORE_DTYPES:
        raise ValueError(f"unknown store dtype {store_dtype!r}; choose one of: {', '.join(STORE_DTYPES)}")
    config, encoder = build_encoder(encoder_name, settings)
    items, offsets = make_items(manifest, encoder, store_dtype)
    identity = _identity(manifest, encoder_name, encoder, store_dtype, compiled)
    forward: Any = torch.compile(encoder) if compiled else encoder
    shard_rows = effort.shard_rows or (CHUNK_ROWS if encoder.modality == "video" else 0)
    return Task(
        path=cache_path(home, manifest.dataset, encoder_name, identity),
        items=items,
        offsets=offsets,
        identity=identity,
        provenance=_provenance(manifest.dataset, encoder_name, config, store_dtype, compiled, shard_rows),
        effort=effort,
        forward=Forward(forward, effort.batch_size or BATCH_SIZE[default_device().type]),
    )


@contextlib.contextmanager
def open_writer(task: Task) -> Iterator[tuple[Writer, dict[int, Commit]]]:
    """The task's cache, held for writing, and the shards that need not be done again.

    An `OSError` of what is done with it, such as a full disk, names a file or the cache's folder.
    """
    ids = [sample.id for sample in task.items.manifest.samples]
    shape, shard_rows = task.items.encoder.feature_shape, task.provenance["shard_rows"]
    try:
        with lock(task.path):
            writer = Writer.open(task.path, ids, task.offsets, shape, task.identity, task.provenance, shard_rows)
            commits = writer.committed()
            if task.effort.retry_failed:
                commits = {shard: commit for shard, commit in commits.items() if not commit.failures}
            yield writer, commits
    except OSError as error:
        if error.errno and not error.filename:  # the system does not say which file it could not write
            error.filename = str(task.path)
        raise


def fill(task: Task, writer: Writer, commits: dict[int, Commit]) -> None:
    """Encode and commit every shard that is not in `commits`; the last one is written while the next is encoded."""
    shards = [shard for shard in range(writer.num_shards) if shard not in commits]
    if not shards:
        return
    pace = Pace(_workers(task), default_device().type)
    ledger = Ledger(task, sum(len(commit.failures) for commit in commits.values()))
    done = sum(commit.rows for commit in commits.values())
    writing: Future[Commit] | None = None
    bar = tqdm(total=len(task.items), initial=done, unit=" items", disable=not task.effort.progress, file=sys.stderr)

    def watch(batch: Encoded) -> None:
        pace.add(batch)
        ledger.add(batch.failures)
        bar.update(len(batch.rows))

    with bar, ThreadPoolExecutor(1) as thread:
        for shard, features, failures, seconds in encoded_shards(task, writer, shards, pace, watch):
            if writing:
                with pace.waiting("disk"):
                    commit = writing.result()
                commits[commit.shard] = commit
            writing = thread.submit(commit_shard, task, writer, shard, features, failures, seconds)
            del features  # of the shard before, while the next is computed
        if writing:
            commits[shards[-1]] = writing.result()
    if task.effort.progress:
        for line in [pace.verdict(), *(f"warning: {warning}" for warning in pace.warnings(visible_gpus()))]:
            print(line, file=sys.stderr)


def encoded_shards(
    task: Task, writer: Writer, shards: Sequence[int], pace: Pace, watch: Callable[[Encoded], None]
) -> Iterator[tuple[int, np.ndarray, list[Failure], float]]:
    """(shard, features float32 [rows, *shape], failures in row order, seconds) of every shard, in order."""
    batches = [task.batches(writer.rows(shard)) for shard in shards]
    encoded = encoded_batches(task.items, [rows for own in batches for rows in own], task.forward, pace)
    for shard, own in zip(shards, batches, strict=True):
        started = time.monotonic()
        first = writer.rows(shard).start
        features = np.empty((len(writer.rows(shard)), *writer.feature_shape), dtype=np.float32)
        failures: list[Failure] = []
        for _ in own:
            batch = next(encoded)
            features[batch.rows - first] = batch.features
            failures += batch.failures
            watch(batch)
        yield shard, features, sorted(failures, key=lambda failure: failure.row), time.monotonic() - started


@dataclass
class Ledger:
    """Counts failures; `ValueError` when there are more than the effort allows."""

    task: Task
    failed: int

    def add(self, failures: Iterable[Failure]) -> None:
        """Count these, too."""
        for failure in failures:
            self.failed += 1
            total, share = len(self.task.items), self.task.effort.max_failures
            if self.failed > share * total:
                raise ValueError(
                    f"{self.failed} of {total} items failed, more than --max-failures {share:g} allows; "
                    f"the last one: sample {failure.id!r}: {failure.error}"
                )


def commit_shard(
    task: Task, writer: Writer, shard: int, features: np.ndarray, failures: Sequence[Failure], seconds: float
) -> Commit:
    """Write a shard and its record."""
    return writer.commit(
        shard, features, failures, seconds=seconds, batch_size=task.forward.limit, device=default_device().type
    )


def _workers(task: Task) -> int:
    """Processes beside this one."""
    if task.effort.workers >= 0:
        return task.effort.workers
    cores = Pace(0, "cpu").cores
    few = len(task.items) < 64 * cores  # done before the workers have started
    return 0 if few or cores == 1 else cores


def _identity(manifest: Manifest, encoder_name: str, encoder: Encoder, store_dtype: str, compiled: bool) -> dict[str, Any]:
    """Everything that can change the features, as far as it is known: a manifest need not know its media's digest."""
    source = {"text": manifest.meta["text"]} if encoder.modality == "text" else {}
    digest = {"media_sha256": manifest.meta["media_sha256"]} if "media_sha256" in manifest.meta else {}
    identity = {
        "dataset": manifest.dataset,
        "manifest": manifest.fingerprint(),
        "encoder": {"name": encoder_name, "modality": encoder.modality, **encoder.identity()},
        "store_dtype": store_dtype,
        **({"compiled": True} if compiled else {}),
        **(source or digest),
    }
    return json.loads(canonical_json(identity))  # one spelling, so that equal caches have equal bytes


def _provenance(
    dataset: str, encoder_name: str, config: Any, store_dtype: str, compiled: bool, shard_rows: int
) -> dict[str, Any]:
    """Where the cache comes from: the command that completes it, the same as values, the libraries."""
    values = asdict(config)
    settings = {field.name: str(values[field.name]) for field in fields(config) if values[field.name] != field.default}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    options += ["--store-dtype", store_dtype] if store_dtype != "float16" else []
    options += ["--compile"] if compiled else []
    command = shlex.join(["diffalign", "extract", dataset, "--encoder", encoder_name, *options])
    return {"command": command, "settings": settings, "shard_rows": shard_rows, "versions": _versions()}


@cache
def _versions() -> Mapping[str, str]:
    """Versions of the installed libraries that turn bytes into features; they are looked up once, which takes its time."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # drawings have a renderer of their own
            versions[name] = importlib.metadata.version(name)
    return versions
