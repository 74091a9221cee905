"""Extraction over many processes or machines with dask: a shard is a task, and one worker writes it.

The workers see the same home folder, and build the encoder themselves; this process builds none. A lost worker's shards are
done by another; a shard that is written twice is written with the same bytes. Whoever writes holds the cache: what goes on
after an error, because dask cannot stop it, keeps others out until it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from dask.system import CPU_COUNT

from pipeline.cache.layout import Commit, StoreDtype
from pipeline.cache.provenance import check_libraries
from pipeline.cache.writer import Writer
from pipeline.data import manifest as manifests
from pipeline.encoders._factory import located
from pipeline.extraction.extract import (
    ExtractOptions,
    FailureBudget,
    Target,
    Task,
    begin,
    commit_shard,
    encoded_shards,
    extract,
    plan_extraction,
)
from pipeline.extraction.inputs import Encoded
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import allowed_workers
from pipeline.runtime.device import default_device
from pipeline.runtime.executor import connect_to_scheduler, gpu_cluster, num_threads, run_on_cluster
from pipeline.runtime.files import label_os_errors, lock, lock_shared
from pipeline.runtime.logs import ProgressBar

if TYPE_CHECKING:
    from dask.distributed import Client

_BUILDING = Lock()  # seeded weights are drawn from the generator of the process


@dataclass(frozen=True, kw_only=True)
class ExtractionSpec:
    """What a worker needs to know to do its part: names and numbers only."""

    home: Path
    dataset: str
    encoder: str
    settings: tuple[tuple[str, str], ...]
    store_dtype: StoreDtype
    compiled: bool
    effort: ExtractOptions  # its workers are those of each worker, 0 or more


def extract_with(
    scheduler: str,
    gpus: Sequence[int],
    home: Path,
    dataset: str,
    encoder: str,
    settings: Mapping[str, str],
    store_dtype: StoreDtype,
    compiled: bool,
    effort: ExtractOptions,
) -> Path:
    """`extract` by this process ("local"), by one process per GPU, or by the workers of a scheduler, tcp://host:port.

    A distributed worker does everything by itself, unless the effort gives it workers; one with a GPU has its share of cores.
    """
    if scheduler == "local" and not gpus:
        manifest = manifests.read_manifest(home, dataset)
        return extract(manifest, encoder, settings, home, store_dtype=store_dtype, compiled=compiled, effort=effort)
    if gpus and scheduler != "local":
        raise ValueError("--workers-gpu are processes of this machine, --scheduler has its own: give one of them")
    share = max(1, CPU_COUNT // len(gpus)) if gpus else 0
    order = ExtractionSpec(
        home=home.absolute(),
        dataset=dataset,
        encoder=encoder,
        settings=tuple(sorted(located(settings).items())),
        store_dtype=store_dtype,
        compiled=compiled,
        effort=replace(effort, workers=effort.workers if effort.workers >= 0 else share),
    )
    with gpu_cluster(gpus) if gpus else connect_to_scheduler(scheduler) as client:
        return extract_on(client, order)


class Described(NamedTuple):
    """What a worker says of the cache that it would fill; see `extract.Target`."""

    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    feature_shape: tuple[int, ...]


class Done(NamedTuple):
    """A shard that a worker has committed, and where its time went."""

    commit: Commit
    pace: ThroughputMeter


def extract_on(client: Client, order: ExtractionSpec) -> Path:
    """What `extract` does, by the workers of a cluster: the same folder, the same bytes."""
    run = f"{time.time_ns()}"
    manifest = manifests.read_manifest(order.home, order.dataset)
    answer = _describe(client, order, run)
    target = Target.of(order.home, manifest, answer.identity, answer.provenance, answer.feature_shape, order.effort)
    with label_os_errors(target.path):
        with lock(target.path):
            writer, commits = begin(target)
        if len(commits) < writer.num_shards or not writer.is_finished:
            with lock_shared(target.path):
                _fill(client, order, run, target, writer, commits)
                writer.finish(commits)
    return target.path


def _fill(client: Client, order: ExtractionSpec, run: str, target: Target, writer: Writer, commits: dict[int, Commit]) -> None:
    """Have every shard that is not in `commits` encoded and committed."""
    ledger = FailureBudget(len(target.rows), order.effort.max_failures)
    for commit in commits.values():
        ledger.add(commit.failures)
    shards = [shard for shard in range(writer.num_shards) if shard not in commits]
    if not shards:
        return
    pace = ThroughputMeter(order.effort.workers, "cpu", spread=min(len(shards), num_threads(client)))
    done = sum(commit.rows for commit in commits.values())
    task = partial(encode_shard, order, run, target.path.name)
    results: Any = run_on_cluster(client, task, shards, lambda shard: f"shard {shard} of {target.path.name}")
    label, show = target.path.name, order.effort.progress
    with ProgressBar(total=len(target.rows), initial=done, unit=" items", label=label, show=show) as bar, closing(results):
        for _, result in results:
            commit, spent = result()
            commits[commit.shard] = commit
            ledger.add(commit.failures)
            pace.join(spent)
            bar.update(commit.rows)
    if order.effort.progress:
        pace.tell()


def _describe(client: Client, order: ExtractionSpec, run: str) -> Described:
    """What a worker says of the cache to fill."""
    ((_, result),) = run_on_cluster(client, partial(describe_cache, order), [run], lambda _: "the encoder")
    return result()


def describe_cache(order: ExtractionSpec, run: str) -> Described:
    """Which cache this worker would fill."""
    target = _task(order, run).target
    return Described(target.identity, target.provenance, target.feature_shape)


def encode_shard(order: ExtractionSpec, run: str, name: str, shard: int) -> Done:
    """Encode and write one shard, on a worker.

    `ValueError` when this machine would fill another cache than the one named, or with other libraries, or when with the shards
    that are committed by then too many items have failed; nothing is written then.
    """
    task = _task(order, run)
    target, effort = task.target, order.effort
    if target.path.name != name:
        raise ValueError(
            f"a worker would fill {target.path.name} instead of {name}: its files or weights are not the same, or its "
            "processor takes another number format (--set compute_dtype=float32 is one that all have)"
        )
    pace = ThroughputMeter(allowed_workers(effort.workers), default_device().type)
    with lock_shared(target.path):
        writer = Writer.join(target.path)
        _check_worker(target, writer)
        ledger = _ledger(target, writer, shard)

        def watch(batch: Encoded) -> None:
            pace.add(batch)
            ledger.add(batch.failures)

        ((_, features, failures, seconds),) = encoded_shards(task, writer, [shard], pace, watch)
        _ledger(target, writer, shard).add(failures)  # with those of shards that were committed meanwhile
        with pace.waiting("disk"):
            commit = commit_shard(task, writer, shard, features, failures, seconds)
    return Done(commit, pace)


def _ledger(target: Target, writer: Writer, shard: int) -> FailureBudget:
    """The failures of all other shards; when failures are tried again, those that were are not told from those that will be."""
    others = {} if target.effort.retry_failed else writer.records()
    failed = sum(len(commit.failures) for other, commit in others.items() if other != shard)
    return FailureBudget(len(target.rows), target.effort.max_failures, failed=failed)


def _check_worker(target: Target, writer: Writer) -> None:
    try:
        check_libraries(target.path, writer.provenance.get("versions", {}), target.rows.modality)
    except ValueError as error:
        raise ValueError(f"a worker cannot take part: {error}") from error


def _task(order: ExtractionSpec, run: str) -> Task:
    """The task of an order, built once for all threads of a worker; a later `run` may find other media or weights."""
    with _BUILDING:
        return _build(order, run)


@lru_cache(maxsize=1)
def _build(order: ExtractionSpec, run: str) -> Task:
    manifest = manifests.read_manifest(order.home, order.dataset)
    settings = dict(order.settings)
    return plan_extraction(manifest, order.encoder, settings, order.home, order.store_dtype, order.compiled, order.effort)
