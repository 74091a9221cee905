"""Stage 1: run an encoder over a manifest and store its features in a feature cache."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cache.layout import CHUNK_ROWS, STORE_DTYPES, Commit, Failure, StoreDtype, cache_path
from pipeline.cache.provenance import check_libraries, make_provenance
from pipeline.cache.shard_media import ShardMedia
from pipeline.cache.writer import Writer
from pipeline.data.manifest import Manifest
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import build_encoder, encoder_identity
from pipeline.extraction.inputs import EncodedBatch, EncoderInputs, InputRows, MemorySafeEncoder, make_input_rows
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import choose_workers, encode_batches, item_bytes
from pipeline.runtime.claims import hold
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, label_os_errors
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.places import Place

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZES = {"cpu": 16, "cuda": 256}  # items per batch by device; on a GPU the most
GPU_BATCH_BYTES = 2**29  # most bytes of a batch on a GPU: every worker holds some batches, and video clips are large
SHARDS_IN_WRITING = 2  # so that one is encoded for the disk while the disk takes the other
CHECKED_RECORDS = 512  # that are in memory with the digests of their media, 90 kB each
NO_SAMPLE_IDS: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """How an extraction runs, and how many failures it accepts.

    `max_failures` and `retry_failed` decide which items have features. No option changes the value of a feature by more than
    the rounding of its last bits; within one cache not even that.
    """

    batch_size: int = 0  # items per batch of a new cache, on a GPU halved when memory runs out; 0: a default for the device
    workers: int = -1  # worker processes; -1: one per core, 0: this process does everything
    shard_rows: int = 0  # rows per shard of a new cache, a multiple of 512; 0: 8,192, and 512 for video clips
    max_failures: float = 0.05  # share of the items that may fail
    retry_failed: bool = False  # redo the shards that have failed items
    progress: bool = True  # show a progress bar and log the throughput

    def __post_init__(self) -> None:
        if self.batch_size < 0 or self.workers < -1 or not 0 <= self.max_failures <= 1:
            raise UserError("batch size must be >= 0, workers >= -1 and max failures a share of the items, from 0 to 1")
        if self.shard_rows < 0 or self.shard_rows % CHUNK_ROWS:
            raise UserError(f"shard rows must be a multiple of {CHUNK_ROWS}, found {self.shard_rows}")


@dataclass(frozen=True)
class ExtractionTarget:
    """The cache that an extraction fills; no encoder is needed to describe it."""

    path: Place
    input_rows: InputRows
    feature_shape: tuple[int, ...]
    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]  # of a new cache; one that holds shards keeps its own
    options: ExtractOptions

    @staticmethod
    def from_identity(
        home: Path,
        manifest: Manifest,
        identity: Mapping[str, Any],
        provenance: Mapping[str, Any],
        feature_shape: tuple[int, ...],
        options: ExtractOptions,
    ) -> ExtractionTarget:
        """Return the cache in `home` that has this identity."""
        encoder = identity["encoder"]
        path = cache_path(home, manifest.dataset, encoder["name"], identity)
        input_rows = make_input_rows(manifest, encoder["modality"])
        return ExtractionTarget(path, input_rows, feature_shape, identity, provenance, options)


@dataclass(frozen=True)
class ExtractionTask:
    """The cache that an extraction fills, with the inputs and the encoder that fill it."""

    target: ExtractionTarget
    inputs: EncoderInputs
    encoder: MemorySafeEncoder
    part: str = ""  # of several extractions: its name on the progress bar; the throughput is not logged for each

    def batches(self, rows: range) -> list[np.ndarray]:
        """Return the rows of a shard as batches of row numbers, as a new cache would encode them."""
        return self.inputs.batches(rows, self.target.provenance["batch_size"])


def extract(
    manifest: Manifest,
    encoder_name: str,
    settings: Mapping[str, Any],
    home: Path,
    *,
    store_dtype: StoreDtype = "float16",
    compiled: bool = False,
    options: ExtractOptions = ExtractOptions(),
) -> Place:
    """Fill the feature cache of a manifest and an encoder, and return its place.

    The same call starts, resumes and repairs a cache: shards that are committed and undamaged stay, all others are encoded.
    They use the batch size of the existing cache, whatever the options say, so that the result has the same bits.

    Args:
        manifest: the samples.
        encoder_name: an encoder of the package or a plug-in.
        settings: the encoder's settings by field name.
        home: folder of all artifacts.
        store_dtype: number format on disk.
        compiled: run the encoder through torch.compile. It rounds differently, so it makes another cache.
        options: how the extraction runs.

    Raises:
        UserError: the settings, media or files do not fit; more items fail than the options allow; the cache was begun with
            other libraries (`provenance.check_libraries`), or from media files with other contents.
    """
    if options.progress:  # the weights say which cache it is; to load them may take a while
        logger.info("%s: loading the encoder", encoder_name)
    return run_extraction(plan_extraction(manifest, encoder_name, settings, home, store_dtype, compiled, options))


def run_extraction(task: ExtractionTask, ignored_failures: frozenset[str] = NO_SAMPLE_IDS) -> Place:
    """Do what is left of an extraction, and return the place of its cache.

    Args:
        task: the extraction.
        ignored_failures: ids of samples whose failures do not count against `max_failures`.
    """
    target = task.target
    with label_os_errors(target.path), hold(target.path):
        writer, commits = start_or_resume(target)
        if len(commits) < writer.num_shards:
            for warning in check_libraries(target.path, writer.provenance.get("versions", {}), target.input_rows.modality):
                logger.warning(warning)
        logger.debug("%s: %d of %d shards are complete", target.path, len(commits), writer.num_shards)
        if len(commits) < writer.num_shards or not writer.is_finished:
            budget = FailureBudget(len(target.input_rows), target.options.max_failures, ignored_failures)
            for commit in commits.values():
                budget.add(commit.failures)
            encode_missing_shards(task, writer, commits, budget)
            writer.finish(commits)
        elif target.options.progress:
            logger.info("%s is complete, there is nothing to do", target.path.name)
    return target.path


def plan_extraction(
    manifest: Manifest,
    encoder_name: str,
    settings: Mapping[str, Any],
    home: Path,
    store_dtype: StoreDtype,
    compiled: bool,
    options: ExtractOptions,
) -> ExtractionTask:
    """Return what `extract` would do with these arguments; nothing is written."""
    if store_dtype not in STORE_DTYPES:
        raise UserError(f"unknown store dtype {store_dtype!r}; choose one of: {', '.join(STORE_DTYPES)}")
    encoder = build_encoder(encoder_name, settings)
    input_rows = make_input_rows(manifest, encoder.modality)
    inputs = EncoderInputs(manifest, encoder, input_rows, store_dtype)
    values, config = asdict(encoder.config), encoder.config
    provenance = make_provenance(
        dataset=manifest.dataset,
        encoder=encoder_name,
        settings={field.name: str(values[field.name]) for field in fields(config) if values[field.name] != field.default},
        store_dtype=store_dtype,
        compiled=compiled,
        shard_rows=options.shard_rows or (CHUNK_ROWS if encoder.modality == "video" else 0),
        batch_size=options.batch_size or default_batch_size(inputs),
    )
    identity = _identity(manifest, encoder_name, encoder, store_dtype, compiled)
    path = cache_path(home, manifest.dataset, encoder_name, identity)
    forward: Any = torch.compile(encoder) if compiled else encoder
    target = ExtractionTarget(path, input_rows, encoder.feature_shape, identity, provenance, options)
    return ExtractionTask(target, inputs, MemorySafeEncoder(forward))


def default_batch_size(inputs: EncoderInputs) -> int:
    """Return the number of items per batch that suits the device."""
    return gpu_batch_size(item_bytes(inputs)) if default_device().type == "cuda" else DEFAULT_BATCH_SIZES["cpu"]


def gpu_batch_size(bytes_per_item: int) -> int:
    """Return the default number of items per batch on a GPU, for items of this size."""
    return max(1, min(DEFAULT_BATCH_SIZES["cuda"], GPU_BATCH_BYTES // bytes_per_item))


def start_or_resume(target: ExtractionTarget) -> tuple[Writer, dict[int, Commit]]:
    """Create the cache, or open the one that was begun; the caller holds it.

    It does not check the versions of the libraries: only the process that encodes can do that.

    Returns:
        The writer, and the commits of the shards that need not be encoded again.

    Raises:
        UserError: the media have changed since the existing shards were written.
    """
    inputs, options, provenance = target.input_rows, target.options, target.provenance
    ids, shape = inputs.manifest.columns.ids, target.feature_shape
    writer = Writer.open(target.path, ids, inputs.offsets, shape, target.identity, provenance, provenance["shard_rows"])
    _check_media(target, writer)
    commits = writer.verified_commits()
    if options.retry_failed:
        commits = {shard: commit for shard, commit in commits.items() if not commit.failures}
    if len(commits) < writer.num_shards:
        recorded = cache_batch_size(target, writer)
        if options.batch_size not in (0, recorded):
            logger.warning("%s was begun with --batch-size %d, and goes on with it", target.path, recorded)
    return writer, commits


def cache_batch_size(target: ExtractionTarget, writer: Writer) -> int:
    """Return the batch size that a cache was begun with; another one would round differently."""
    return writer.provenance.get("batch_size") or target.provenance["batch_size"]


def _check_media(target: ExtractionTarget, writer: Writer) -> None:
    """Refuse media that are not those of the recorded shards, and give records of older versions the digests of theirs."""
    shards = range(0 if target.input_rows.modality == "text" else writer.num_shards)
    for start in range(0, len(shards), CHECKED_RECORDS):
        for shard, commit in writer.read_records(shards[start : start + CHECKED_RECORDS], with_media=True).items():
            if media := _shard_media(target, writer.rows(shard), commit.failures):
                if problem := media.problem(commit):
                    raise UserError(problem)
                media.renew(commit)


def _shard_media(target: ExtractionTarget, rows: range, failures: Sequence[Failure]) -> ShardMedia | None:
    """Return the media of a shard; None for texts, which are in the manifest."""
    if target.input_rows.modality == "text":
        return None
    samples = [sample for sample, _ in target.input_rows[rows.start : rows.stop]]
    return ShardMedia.of_rows(target.path, target.input_rows.manifest, samples, rows.start, failures)


def encode_missing_shards(task: ExtractionTask, writer: Writer, commits: dict[int, Commit], budget: FailureBudget) -> None:
    """Encode every shard that has no commit, and add its commit. Two shards may be written while the next is encoded."""
    shards = [shard for shard in range(writer.num_shards) if shard not in commits]
    if not shards:
        return
    show, label = task.target.options.progress, task.part or f"extracting {task.target.path.name}"
    meter = ThroughputMeter(choose_workers(task.target.options.workers, len(task.inputs)), default_device().type)
    num_done = sum(commit.rows for commit in commits.values())
    writing: list[Future[Commit]] = []
    stamps = {shard: media_stamp(task.target, writer.rows(shard)) for shard in shards}
    bar = ProgressBar(total=len(task.inputs), initial=num_done, unit=" items", label=label, show=show)

    def on_batch(batch: EncodedBatch) -> None:
        meter.add(batch)
        budget.add(batch.failures)
        bar.update(len(batch.rows))
        if writing and writing[0].done():
            writing[0].result()  # raises at once, e.g. for a full disk, instead of after the next shard

    def add_commit() -> None:
        with meter.waiting("disk"):
            commit = writing.pop(0).result()
        commits[commit.shard] = commit

    with bar, ThreadPoolExecutor(SHARDS_IN_WRITING) as threads:
        for shard, features, failures, seconds in encode_shards(task, writer, shards, meter, on_batch):
            if len(writing) == SHARDS_IN_WRITING:
                add_commit()
            writing.append(threads.submit(commit_shard, task, writer, shard, features, failures, seconds, stamps[shard]))
            del features  # frees the memory once the shard is written, while the next one is computed
        while writing:
            add_commit()
    if show and not task.part:
        meter.log_summary()


def encode_shards(
    task: ExtractionTask,
    writer: Writer,
    shards: Sequence[int],
    meter: ThroughputMeter,
    on_batch: Callable[[EncodedBatch], None],
) -> Iterator[tuple[int, np.ndarray, list[Failure], float]]:
    """Encode shards, in order; nothing is written.

    Args:
        task: the extraction.
        writer: knows the rows of each shard.
        shards: shard numbers.
        meter: gives the number of workers, and counts the time spent waiting for items.
        on_batch: called with each batch, as it is encoded.

    Yields:
        (shard, features float32 [rows, *feature_shape], failures in row order, seconds).
    """
    batch_size = cache_batch_size(task.target, writer)
    batches = [task.inputs.batches(writer.rows(shard), batch_size) for shard in shards]
    with closing(encode_batches(task.inputs, [rows for own in batches for rows in own], task.encoder, meter)) as encoded:
        for shard, own in zip(shards, batches, strict=True):
            started = time.monotonic()
            first_row = writer.rows(shard).start
            features = np.full((len(writer.rows(shard)), *writer.feature_shape), np.nan, dtype=np.float32)
            assert sum(map(len, own)) == len(features)
            failures: list[Failure] = []
            for _ in own:
                batch = next(encoded)
                features[batch.rows - first_row] = batch.features
                failures += batch.failures
                on_batch(batch)
            yield shard, features, sorted(failures, key=lambda failure: failure.row), time.monotonic() - started


@dataclass
class FailureBudget:
    """Counts the failed items, and stops the extraction when there are too many."""

    num_items: int
    max_share: float  # share of the items that may fail
    ignored_ids: frozenset[str] = NO_SAMPLE_IDS  # samples whose failures do not count
    num_failed: int = 0

    def add(self, failures: Iterable[Failure]) -> None:
        """Count these failures.

        Raises:
            UserError: more items have failed than may fail.
        """
        for failure in failures:
            self.num_failed += failure.id not in self.ignored_ids
            if self.num_failed > self.max_share * self.num_items:
                raise UserError(
                    f"{self.num_failed} of {self.num_items} items failed, more than --max-failures {self.max_share:g} allows; "
                    f"the last one: sample {failure.id!r}: {failure.error}"
                )


def media_stamp(target: ExtractionTarget, rows: range) -> str:
    """Return what shows whether the media of these rows change while they are read; "" for texts."""
    media = _shard_media(target, rows, ())
    return media.stamp() if media else ""


def commit_shard(
    task: ExtractionTask,
    writer: Writer,
    shard: int,
    features: np.ndarray,
    failures: Sequence[Failure],
    seconds: float,
    stamp: str,
) -> Commit:
    """Write a shard and its commit record, and return that without digests; `stamp` is what `media_stamp` was before.

    Raises:
        UserError: media were changed since then, so that nobody knows of which contents the features are; nothing is written.
    """
    rows = writer.rows(shard)
    media = _shard_media(task.target, rows, failures)
    media_digests = media.digests() if media else ""
    if media and media.stamp() != stamp:
        first, last = (task.target.input_rows[row][0].id for row in (rows.start, rows.stop - 1))
        raise UserError(f"media of samples {first!r} to {last!r} were changed while they were read; run the same command again")
    batch_size, device = cache_batch_size(task.target, writer), default_device().type
    commit = writer.commit(
        shard, features, failures, seconds=seconds, batch_size=batch_size, device=device, media_digests=media_digests
    )
    return replace(commit, media_digests="")


def _identity(manifest: Manifest, encoder_name: str, encoder: Encoder, store_dtype: str, compiled: bool) -> dict[str, Any]:
    """Return everything that can change the features, as plain JSON values.

    The digest of the media is part of it only when the manifest has one.
    """
    source = {"text": manifest.meta["text"]} if encoder.modality == "text" else {}
    digest = {"media_sha256": manifest.meta["media_sha256"]} if "media_sha256" in manifest.meta else {}
    identity = {
        "dataset": manifest.dataset,
        "manifest": manifest.fingerprint(),
        "encoder": encoder_identity(encoder_name, encoder),
        "store_dtype": store_dtype,
        **({"compiled": True} if compiled else {}),
        **(source or digest),
    }
    return json.loads(canonical_json(identity))  # one spelling, so that equal caches have equal bytes
