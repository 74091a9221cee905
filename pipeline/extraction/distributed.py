"""Extraction over many processes or machines with dask: a shard is a task, and one worker writes it.

The workers see the same home folder, and build the encoder themselves; this process builds none. A lost worker's shards are
done by another; a shard that is written twice is written with the same bytes. Whoever writes holds the cache: what goes on
after an error, because dask cannot stop it, keeps others out until it has ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from dask.distributed import Client, Future, KilledWorker, as_completed
from dask.system import CPU_COUNT
from tqdm import tqdm

from pipeline.cache.layout import Commit, StoreDtype
from pipeline.cache.provenance import check_libraries
from pipeline.cache.writer import Writer
from pipeline.data import manifest as manifests
from pipeline.encoders._factory import located
from pipeline.extraction.extract import Effort, Ledger, Target, Task, begin, commit_shard, encoded_shards, extract, plan
from pipeline.extraction.inputs import Encoded
from pipeline.extraction.throughput import Pace
from pipeline.extraction.workers import allowed_workers
from pipeline.runtime.device import default_device
from pipeline.runtime.executor import LOST, connect, one_process_per_gpu
from pipeline.runtime.files import lock, naming, together

_BUILDING = Lock()  # seeded weights are drawn from the generator of the process


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker needs to know to do its part: names and numbers only."""

    home: Path
    dataset: str
    encoder: str
    settings: tuple[tuple[str, str], ...]
    store_dtype: StoreDtype
    compiled: bool
    effort: Effort  # its workers are those of each worker, 0 or more


def extract_with(
    scheduler: str,
    gpus: Sequence[int],
    home: Path,
    dataset: str,
    encoder: str,
    settings: Mapping[str, str],
    store_dtype: StoreDtype,
    compiled: bool,
    effort: Effort,
) -> Path:
    """`extract` by this process ("local"), by one process per GPU, or by the workers of a scheduler, tcp://host:port.

    A distributed worker does everything by itself, unless the effort gives it workers; one with a GPU has its share of cores.
    """
    if scheduler == "local" and not gpus:
        manifest = manifests.read(home, dataset)
        return extract(manifest, encoder, settings, home, store_dtype=store_dtype, compiled=compiled, effort=effort)
    if gpus and scheduler != "local":
        raise ValueError("--workers-gpu are processes of this machine, --scheduler has its own: give one of them")
    share = max(1, CPU_COUNT // len(gpus)) if gpus else 0
    order = Order(
        home=home.absolute(),
        dataset=dataset,
        encoder=encoder,
        settings=tuple(sorted(located(settings).items())),
        store_dtype=store_dtype,
        compiled=compiled,
        effort=replace(effort, workers=effort.workers if effort.workers >= 0 else share),
    )
    with one_process_per_gpu(gpus) if gpus else connect(scheduler) as client:
        return extract_on(client, order)


class Described(NamedTuple):
    """What a worker says of the cache that it would fill; see `extract.Target`."""

    identity: Mapping[str, Any]
    provenance: Mapping[str, Any]
    feature_shape: tuple[int, ...]


class Done(NamedTuple):
    """A shard that a worker has committed, and where its time went."""

    commit: Commit
    pace: Pace


def extract_on(client: Client, order: Order) -> Path:
    """What `extract` does, by the workers of a cluster: the same folder, the same bytes."""
    run = f"{time.time_ns()}"
    manifest = manifests.read(order.home, order.dataset)
    answer: Described = _answer(client.submit(describe, order, run, key=f"{run}-describe", pure=False), "the encoder")
    target = Target.of(order.home, manifest, answer.identity, answer.provenance, answer.feature_shape, order.effort)
    with naming(target.path):
        with lock(target.path):
            writer, commits = begin(target)
        if len(commits) < writer.num_shards or not writer.is_finished:
            with together(target.path):
                _fill(client, order, run, target, writer, commits)
                writer.finish(commits)
    return target.path


def _fill(client: Client, order: Order, run: str, target: Target, writer: Writer, commits: dict[int, Commit]) -> None:
    """Have every shard that is not in `commits` encoded and committed."""
    ledger = Ledger(len(target.rows), order.effort.max_failures)
    for commit in commits.values():
        ledger.add(commit.failures)
    shards = [shard for shard in range(writer.num_shards) if shard not in commits]
    if not shards:
        return
    threads: Any = client.nthreads()
    pace = Pace(order.effort.workers, "cpu", spread=min(len(shards), sum(threads.values())))
    done = sum(commit.rows for commit in commits.values())
    bar = tqdm(total=len(target.rows), initial=done, unit=" items", disable=not order.effort.progress, file=sys.stderr)
    with bar:
        for commit, spent in _commits(client, order, run, target.path.name, shards):
            commits[commit.shard] = commit
            ledger.add(commit.failures)
            pace.join(spent)
            bar.update(commit.rows)
    if order.effort.progress:
        pace.tell()


def _commits(client: Client, order: Order, run: str, name: str, shards: Sequence[int]) -> Iterator[Done]:
    """The commits of the shards, as they are made; what has not begun is cancelled when one of them fails."""
    futures = {
        client.submit(encode_shard, order, run, name, shard, key=f"{run}-{shard}", pure=False): shard for shard in shards
    }
    try:
        for future in as_completed(list(futures), loop=client.loop):
            yield _answer(future, f"shard {futures[future]} of {name}")
    finally:
        if client.status == "running":
            with suppress(*LOST):
                client.cancel(list(futures))


def _answer(future: Future, what: str) -> Any:
    """What a worker answers, or raises; `ValueError` when the scheduler is lost, or every worker that begins it dies."""
    try:
        return future.result()
    except KilledWorker as error:
        raise ValueError(
            f"{error.allowed_failures + 1} workers died of {what}: is a file damaged there, or memory short? "
            "with fewer of them the same command goes on from here"
        ) from error
    except LOST as error:
        if future.status == "error":  # the worker's own: its disk is full
            raise
        raise ValueError("the scheduler was lost; the same command goes on from here") from error


def describe(order: Order, run: str) -> Described:
    """Which cache this worker would fill."""
    target = _task(order, run).target
    return Described(target.identity, target.provenance, target.feature_shape)


def encode_shard(order: Order, run: str, name: str, shard: int) -> Done:
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
    pace = Pace(allowed_workers(effort.workers), default_device().type)
    with together(target.path):
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


def _ledger(target: Target, writer: Writer, shard: int) -> Ledger:
    """The failures of all other shards; when failures are tried again, those that were are not told from those that will be."""
    others = {} if target.effort.retry_failed else writer.records()
    failed = sum(len(commit.failures) for other, commit in others.items() if other != shard)
    return Ledger(len(target.rows), target.effort.max_failures, failed=failed)


def _check_worker(target: Target, writer: Writer) -> None:
    try:
        check_libraries(target.path, writer.provenance.get("versions", {}), target.rows.modality)
    except ValueError as error:
        raise ValueError(f"a worker cannot take part: {error}") from error


def _task(order: Order, run: str) -> Task:
    """The task of an order, built once for all threads of a worker; a later `run` may find other media or weights."""
    with _BUILDING:
        return _build(order, run)


@lru_cache(maxsize=1)
def _build(order: Order, run: str) -> Task:
    manifest = manifests.read(order.home, order.dataset)
    settings = dict(order.settings)
    return plan(manifest, order.encoder, settings, order.home, order.store_dtype, order.compiled, order.effort)
