"""Extract features on many processes or machines with dask: each shard is one task, encoded and written by one worker.

All workers see the same home folder, or have nothing but an object store in common with this process (see `delivery`). They
build the encoder themselves; this process builds none. The shards of a lost worker are given to another worker. A shard that is
written twice is written with the same bytes. Every worker holds its part of the cache while it writes. Dask cannot stop a task
that has begun, so a worker may go on after the extraction has failed; what it holds keeps other extractions out until it has
ended.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from dask.system import CPU_COUNT

from pipeline.cache.layout import Commit, StoreDtype
from pipeline.cache.provenance import check_libraries
from pipeline.cache.reader import describe_failures
from pipeline.cache.writer import Writer, part_of
from pipeline.data.manifest_files import read_manifest
from pipeline.encoders._factory import with_absolute_paths
from pipeline.extraction.delivery import Delivery, replace_paths
from pipeline.extraction.extract import (
    ExtractionTarget,
    ExtractionTask,
    ExtractOptions,
    FailureBudget,
    commit_shard,
    encode_shards,
    extract,
    media_stamp,
    plan_extraction,
    start_or_resume,
)
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import allowed_workers
from pipeline.runtime.claims import DRIVER, hold
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.executor import connect_to_scheduler, gpu_cluster, num_threads, run_on_cluster
from pipeline.runtime.files import label_os_errors
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.places import Address, Place, caches_at, caches_place

if TYPE_CHECKING:
    from dask.distributed import Client

logger = logging.getLogger(__name__)

# One thread at a time builds an encoder: seeded weights are drawn from the random generator that the whole process shares.
_BUILD_LOCK = Lock()
SHARD_WAIT_SECONDS = 3600.0  # for a worker that is still at a shard that was given to another one


@dataclass(frozen=True, kw_only=True)
class ExtractionSpec:
    """What a worker must know to encode shards: names and numbers only."""

    home: Path
    dataset: str
    encoder: str
    settings: tuple[tuple[str, str], ...]
    store_dtype: StoreDtype
    compiled: bool
    options: ExtractOptions  # its `workers`, 0 or more, are the child processes of each dask worker
    delivery: Delivery | None = None  # what workers fetch from the object store that has the caches; None: they see the home


def dispatch_extraction(
    scheduler: str,
    gpus: Sequence[int],
    home: Path,
    dataset: str,
    encoder: str,
    settings: Mapping[str, str],
    store_dtype: StoreDtype,
    compiled: bool,
    options: ExtractOptions,
) -> Place:
    """Extract in this process, with one process per GPU, or on the workers of a dask scheduler; return the cache's place.

    A warning names the samples that failed, now or in an earlier call.

    Args:
        scheduler: "local", or the address of a scheduler, tcp://host:port.
        gpus: GPUs of this machine to use together; empty: as `scheduler` says.
        home: folder of all artifacts.
        dataset: name of a prepared dataset.
        encoder: name of an encoder.
        settings: the encoder's settings by field name.
        store_dtype: number format on disk.
        compiled: run the encoder through torch.compile.
        options: how the extraction runs. With `workers` -1 a dask worker does everything itself; with a GPU it has its share
            of the cores as child processes.

    Raises:
        UserError: both a scheduler and GPUs are given, or as in `extract`.
    """
    if gpus and scheduler != "local":
        raise UserError("--workers-gpu are processes of this machine, --scheduler has its own: give one of them")
    if scheduler == "local" and not gpus:
        manifest = read_manifest(home, dataset)
        path = extract(manifest, encoder, settings, home, store_dtype=store_dtype, compiled=compiled, options=options)
    else:
        default_workers = max(1, CPU_COUNT // len(gpus)) if gpus else 0
        spec = ExtractionSpec(
            home=home.absolute(),
            dataset=dataset,
            encoder=encoder,
            settings=tuple(sorted(with_absolute_paths(settings).items())),
            store_dtype=store_dtype,
            compiled=compiled,
            options=replace(options, workers=options.workers if options.workers >= 0 else default_workers),
        )
        with gpu_cluster(gpus) if gpus else connect_to_scheduler(scheduler) as client:
            path = extract_on_cluster(client, replace(spec, delivery=_send(home, dataset, settings)))
    if warning := describe_failures(path):
        logger.warning(warning)
    return path


def _send(home: Path, dataset: str, settings: Mapping[str, str]) -> Delivery | None:
    """Put what workers need beside the caches, if these are in an object store."""
    caches = caches_place(home)
    return Delivery.send(caches, home, dataset, settings) if isinstance(caches, Address) else None


class CacheDescription(NamedTuple):
    """The cache that a worker would fill; fields as in `extract.ExtractionTarget`."""

    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    feature_shape: tuple[int, ...]


class ShardResult(NamedTuple):
    """The commit of a shard that a worker has written, and how the worker spent its time."""

    commit: Commit
    meter: ThroughputMeter


def extract_on_cluster(client: Client, spec: ExtractionSpec) -> Place:
    """Do what `extract` does on the workers of a cluster: the same cache with the same bytes."""
    call_id = f"{time.time_ns()}"
    manifest = read_manifest(spec.home, spec.dataset)
    cache = _request_description(client, spec, call_id)
    target = ExtractionTarget.from_identity(
        spec.home, manifest, cache.identity, cache.provenance, cache.feature_shape, spec.options
    )
    with label_os_errors(target.path):
        with hold(target.path):
            writer, commits = start_or_resume(target)
        if len(commits) < writer.num_shards or not writer.is_finished:
            with hold(target.path, DRIVER):
                _encode_missing_on_cluster(client, spec, call_id, target, writer, commits)
                writer.finish(commits)
    return target.path


def _encode_missing_on_cluster(
    client: Client,
    spec: ExtractionSpec,
    call_id: str,
    target: ExtractionTarget,
    writer: Writer,
    commits: dict[int, Commit],
) -> None:
    """Let the workers encode every shard that has no commit, and add its commit."""
    budget = FailureBudget(len(target.input_rows), spec.options.max_failures)
    for commit in commits.values():
        budget.add(commit.failures)
    shards = [shard for shard in range(writer.num_shards) if shard not in commits]
    if not shards:
        return
    meter = ThroughputMeter(spec.options.workers, "cpu", num_dask_tasks=min(len(shards), num_threads(client)))
    num_done = sum(commit.rows for commit in commits.values())
    task = partial(encode_and_commit_shard, spec, call_id, target.path.name)
    results: Any = run_on_cluster(client, task, shards, lambda shard: f"shard {shard} of {target.path.name}")
    label, show = f"extracting {target.path.name}", spec.options.progress
    with (
        ProgressBar(total=len(target.input_rows), initial=num_done, unit=" items", label=label, show=show) as bar,
        closing(results),
    ):
        for _, get_result in results:
            commit, worker_meter = get_result()
            commits[commit.shard] = commit
            budget.add(commit.failures)
            if worker_meter.num_workers < spec.options.workers:
                _warn_about_daemons()
            meter.merge(worker_meter)
            meter.num_dask_tasks = max(meter.num_dask_tasks, min(len(shards), num_threads(client)))  # the cluster may grow
            bar.update(commit.rows)
    if spec.options.progress:
        meter.log_summary()


@cache
def _warn_about_daemons() -> None:
    logger.warning(
        "the dask workers may not start processes, so --workers does nothing; set DASK_DISTRIBUTED__WORKER__DAEMON=false where "
        "they are started"
    )


def _request_description(client: Client, spec: ExtractionSpec, call_id: str) -> CacheDescription:
    """Ask one worker which cache it would fill."""
    ((_, get_result),) = run_on_cluster(client, partial(describe_cache, spec), [call_id], lambda _: "the encoder")
    return get_result()


def describe_cache(spec: ExtractionSpec, call_id: str) -> CacheDescription:
    """Return which cache this worker would fill; runs on a worker."""
    target = _task_of(spec, call_id).target
    received = spec.delivery.receive()[1] if spec.delivery else {}
    provenance = replace_paths(target.provenance, {here: there for there, here in received.items()})
    return CacheDescription(target.identity, provenance, target.feature_shape)


def encode_and_commit_shard(spec: ExtractionSpec, call_id: str, cache_name: str, shard: int) -> ShardResult:
    """Encode and write one shard; runs on a worker.

    Args:
        spec: the extraction.
        call_id: identifies the call of `extract_on_cluster`.
        cache_name: name of the cache's folder.
        shard: number of the shard.

    Raises:
        UserError: nothing was written, because this machine would fill another cache or has other libraries, or because
            too many items have failed in this shard and in those that are committed by now. A shard with few failures does
            not read the records of the others; the client counts them all.
    """
    task = _task_of(spec, call_id)
    target, options = task.target, task.target.options
    if target.path.name != cache_name:
        raise UserError(
            f"a worker would fill {target.path.name} instead of {cache_name}: its files or weights are not the same, or its "
            "processor takes another number format (--set compute_dtype=float32 is one that all have)"
        )
    meter = ThroughputMeter(allowed_workers(options.workers), default_device().type)
    with hold(target.path, part_of(shard), SHARD_WAIT_SECONDS):
        writer = Writer.attach(target.path)
        _check_worker_libraries(target, writer)
        stamp = media_stamp(target, writer.rows(shard))
        ((_, features, failures, seconds),) = encode_shards(task, writer, [shard], meter, meter.add)
        if len(failures) > options.max_failures * len(writer.rows(shard)):  # only such shards bring the whole above its limit
            _budget_without(shard, target, writer).add(failures)
        with meter.waiting("disk"):
            commit = commit_shard(task, writer, shard, features, failures, seconds, stamp)
    return ShardResult(commit, meter)


def _budget_without(shard: int, target: ExtractionTarget, writer: Writer) -> FailureBudget:
    """Return a budget that has counted the failures of all other committed shards.

    With `retry_failed` it counts none: the records do not show which failures are old and will be tried again.
    """
    commits = {} if target.options.retry_failed else writer.read_records()
    num_failed = sum(len(commit.failures) for other, commit in commits.items() if other != shard)
    return FailureBudget(len(target.input_rows), target.options.max_failures, num_failed=num_failed)


def _check_worker_libraries(target: ExtractionTarget, writer: Writer) -> None:
    try:
        check_libraries(target.path, writer.provenance.get("versions", {}), target.input_rows.modality)
    except UserError as error:
        raise UserError(f"a worker cannot take part: {error}") from error


def _task_of(spec: ExtractionSpec, call_id: str) -> ExtractionTask:
    """Return the task of a spec; all threads of a worker share it."""
    with _BUILD_LOCK:
        return _build_task(spec, call_id)


@lru_cache(maxsize=1)
def _build_task(spec: ExtractionSpec, call_id: str) -> ExtractionTask:
    """Build the task; `call_id` is part of the cache's key, because media or weights may have changed by the next call."""
    home, paths = spec.delivery.receive() if spec.delivery else (spec.home, {})
    manifest, settings = read_manifest(home, spec.dataset), replace_paths(dict(spec.settings), paths)
    with caches_at(str(spec.delivery.caches) if spec.delivery else ""):
        return plan_extraction(manifest, spec.encoder, settings, home, spec.store_dtype, spec.compiled, spec.options)
