"""Stage 1: run an encoder over a manifest and keep what it says in a feature cache."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache.layout import CHUNK_ROWS, STORE_DTYPES, Commit, Failure, StoreDtype, cache_path
from pipeline.cache.provenance import check_libraries, make_provenance
from pipeline.cache.writer import Writer
from pipeline.data.manifest import Manifest
from pipeline.encoders._factory import build_encoder
from pipeline.extraction.inputs import Encoded, Forward, InputRows, Items, make_rows
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import allowed_workers, encoded_batches
from pipeline.runtime.device import default_device
from pipeline.runtime.files import canonical_json, label_os_errors, lock
from pipeline.runtime.logs import ProgressBar
from pipeline.types import Encoder

logger = logging.getLogger(__name__)

BATCH_SIZE = {"cpu": 16, "cuda": 256}  # items
GPU_BATCH_BYTES = 2**29  # of items, of which every worker holds some batches: those of clips have fewer
NO_FAILURES: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How an extraction is carried out, and which failures it puts up with.

    `max_failures` and `retry_failed` decide which items have features; no field changes a feature that there is beyond the
    rounding of its last bits, and within one cache not even that.
    """

    batch_size: int = 0  # items per batch of a new cache, on a GPU halved when memory runs out; 0: as the device likes it
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
class Target:
    """A cache to fill, as far as no encoder is needed to know it."""

    path: Path
    rows: InputRows
    feature_shape: tuple[int, ...]
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    effort: ExtractOptions

    @staticmethod
    def of(
        home: Path,
        manifest: Manifest,
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        feature_shape: tuple[int, ...],
        effort: ExtractOptions,
    ) -> Target:
        """The cache of an identity in a home."""
        encoder = identity["encoder"]
        path = cache_path(home, manifest.dataset, encoder["name"], identity)
        return Target(path, make_rows(manifest, encoder["modality"]), feature_shape, identity, provenance, effort)


@dataclass(frozen=True)
class Task:
    """A cache to fill and what fills it."""

    target: Target
    items: Items
    forward: Forward

    def batches(self, rows: range) -> list[np.ndarray]:
        """The rows of a shard of a new cache as the batches that they are encoded in."""
        return self.items.batches(rows, self.target.provenance["batch_size"])


def extract(
    manifest: Manifest,
    encoder_name: str,
    settings: Mapping[str, Any],
    home: Path,
    *,
    store_dtype: StoreDtype = "float16",
    compiled: bool = False,
    effort: ExtractOptions = ExtractOptions(),
) -> Path:
    """Fill the cache of a manifest and an encoder, from where it stands, and return its folder.

    What is committed and undamaged stays and the rest is done, so one command starts, resumes and repairs: in the batches that
    the cache was begun with, whatever the effort says, so that it ends in the same bits. `compiled` runs the encoder through
    torch.compile, which rounds otherwise and so makes another cache.
    `ValueError` for settings, media or files that do not fit, and for more failures than the effort allows; for a cache that
    was begun with other libraries (`provenance.check_libraries`) or of other media: a file that has another size by now is
    another file, one that was replaced by an equally large one goes unnoticed.
    """
    return carry_out(plan_extraction(manifest, encoder_name, settings, home, store_dtype, compiled, effort))


def carry_out(task: Task, known_failures: frozenset[str] = NO_FAILURES) -> Path:
    """Do what is left of a task, and return its folder; failures of these samples do not count."""
    target = task.target
    with label_os_errors(target.path), lock(target.path):
        writer, commits = begin(target)
        if len(commits) < writer.num_shards:
            for warning in check_libraries(target.path, writer.provenance.get("versions", {}), target.rows.modality):
                logger.warning(warning)
        if len(commits) < writer.num_shards or not writer.is_finished:
            ledger = FailureBudget(len(target.rows), target.effort.max_failures, known_failures)
            for commit in commits.values():
                ledger.add(commit.failures)
            fill(task, writer, commits, ledger)
            writer.finish(commits)
    return target.path


def plan_extraction(
    manifest: Manifest,
    encoder_name: str,
    settings: Mapping[str, Any],
    home: Path,
    store_dtype: StoreDtype,
    compiled: bool,
    effort: ExtractOptions,
) -> Task:
    """What `extract` will do; nothing is written."""
    if store_dtype not in STORE_DTYPES:
        raise ValueError(f"unknown store dtype {store_dtype!r}; choose one of: {', '.join(STORE_DTYPES)}")
    config, encoder = build_encoder(encoder_name, settings)
    rows = make_rows(manifest, encoder.modality)
    items = Items(manifest, encoder, rows.items, store_dtype)
    values = asdict(config)
    origin = make_provenance(
        dataset=manifest.dataset,
        encoder=encoder_name,
        settings={field.name: str(values[field.name]) for field in fields(config) if values[field.name] != field.default},
        store_dtype=store_dtype,
        compiled=compiled,
        shard_rows=effort.shard_rows or (CHUNK_ROWS if encoder.modality == "video" else 0),
        batch_size=effort.batch_size or _usual_batch_size(items),
    )
    identity = _identity(manifest, encoder_name, encoder, store_dtype, compiled)
    path = cache_path(home, manifest.dataset, encoder_name, identity)
    forward: Any = torch.compile(encoder) if compiled else encoder
    return Task(Target(path, rows, encoder.feature_shape, identity, origin, effort), items, Forward(forward))


def _usual_batch_size(items: Items) -> int:
    device = default_device().type
    return gpu_batch_size(items.item_bytes()) if device == "cuda" else BATCH_SIZE[device]


def gpu_batch_size(item_bytes: int) -> int:
    """Items of this size per batch as a GPU likes it."""
    return max(1, min(BATCH_SIZE["cuda"], GPU_BATCH_BYTES // item_bytes))


def begin(target: Target) -> tuple[Writer, dict[int, Commit]]:
    """Start the cache or take it up, while it is locked: its writer, and the shards that need not be done again.

    `ValueError` when what is there and what would be added were not made of the same media. Whoever encodes has to see to the
    libraries: they are this process's own only when it encodes itself.
    """
    ids, effort = [sample.id for sample in target.rows.manifest.samples], target.effort
    shape, origin = target.feature_shape, target.provenance
    writer = Writer.open(target.path, ids, target.rows.offsets, shape, target.identity, origin, origin["shard_rows"])
    _check_media(target, writer)
    commits = writer.committed()
    if effort.retry_failed:
        commits = {shard: commit for shard, commit in commits.items() if not commit.failures}
    if len(commits) < writer.num_shards:
        recorded = batch_size(target, writer)
        if effort.batch_size not in (0, recorded):
            logger.warning("%s was begun with --batch-size %d, and goes on with it", target.path, recorded)
    return writer, commits


def batch_size(target: Target, writer: Writer) -> int:
    """Items per batch of a cache; other batches would round otherwise."""
    return writer.provenance.get("batch_size") or target.provenance["batch_size"]


def _check_media(target: Target, writer: Writer) -> None:
    for shard, commit in writer.records().items():
        rows = writer.rows(shard)
        sizes = target.rows.media_sizes(rows, {failure.row for failure in commit.failures})
        if sizes and commit.media_sizes not in ("", sizes):
            first, last = (target.rows[row][0].id for row in (rows.start, rows.stop - 1))
            raise ValueError(
                f"the media of samples {first!r} to {last!r} are not those that {target.path} was made of: files have other "
                f"sizes now; bring those back, or remove it (diffalign cache rm {target.path}) and extract it anew"
            )


def fill(task: Task, writer: Writer, commits: dict[int, Commit], ledger: FailureBudget) -> None:
    """Encode and commit every shard that is not in `commits`; the last one is written while the next is encoded."""
    shards = [shard for shard in range(writer.num_shards) if shard not in commits]
    if not shards:
        return
    effort = task.target.effort
    pace = ThroughputMeter(allowed_workers(_workers(task)), default_device().type)
    done = sum(commit.rows for commit in commits.values())
    writing: Future[Commit] | None = None
    label = task.target.path.name
    bar = ProgressBar(total=len(task.items), initial=done, unit=" items", label=label, show=effort.progress)

    def watch(batch: Encoded) -> None:
        pace.add(batch)
        ledger.add(batch.failures)
        bar.update(len(batch.rows))
        if writing and writing.done():
            writing.result()  # of a full disk is told before the next shard is encoded

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
    if effort.progress:
        pace.tell()


def encoded_shards(
    task: Task, writer: Writer, shards: Sequence[int], pace: ThroughputMeter, watch: Callable[[Encoded], None]
) -> Iterator[tuple[int, np.ndarray, list[Failure], float]]:
    """(shard, features float32 [rows, *shape], failures in row order, seconds) of every shard, in order."""
    size = batch_size(task.target, writer)
    batches = [task.items.batches(writer.rows(shard), size) for shard in shards]
    encoded = encoded_batches(task.items, [rows for own in batches for rows in own], task.forward, pace)
    for shard, own in zip(shards, batches, strict=True):
        started = time.monotonic()
        first = writer.rows(shard).start
        features = np.full((len(writer.rows(shard)), *writer.feature_shape), np.nan, dtype=np.float32)
        assert sum(map(len, own)) == len(features)
        failures: list[Failure] = []
        for _ in own:
            batch = next(encoded)
            features[batch.rows - first] = batch.features
            failures += batch.failures
            watch(batch)
        yield shard, features, sorted(failures, key=lambda failure: failure.row), time.monotonic() - started


@dataclass
class FailureBudget:
    """Counts failures; `ValueError` when there are more than are allowed."""

    total: int  # items
    allowed: float  # share of them
    known: frozenset[str] = NO_FAILURES  # ids of samples whose failures do not count
    failed: int = 0

    def add(self, failures: Iterable[Failure]) -> None:
        """Count these, too."""
        for failure in failures:
            self.failed += failure.id not in self.known
            if self.failed > self.allowed * self.total:
                raise ValueError(
                    f"{self.failed} of {self.total} items failed, more than --max-failures {self.allowed:g} allows; "
                    f"the last one: sample {failure.id!r}: {failure.error}"
                )


def commit_shard(
    task: Task, writer: Writer, shard: int, features: np.ndarray, failures: Sequence[Failure], seconds: float
) -> Commit:
    """Write a shard and its record."""
    return writer.commit(
        shard,
        features,
        failures,
        seconds=seconds,
        batch_size=batch_size(task.target, writer),
        device=default_device().type,
        media_sizes=task.target.rows.media_sizes(writer.rows(shard), {failure.row for failure in failures}),
    )


def _workers(task: Task) -> int:
    """Processes beside this one."""
    if task.target.effort.workers >= 0:
        return task.target.effort.workers
    cores = ThroughputMeter(0, "cpu").cores
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
