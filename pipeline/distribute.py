"""Extraction over many processes or machines with dask: a shard is a task, and one worker writes it.

The workers see the same home folder, and build the encoder themselves; this process builds none. A lost worker's shards are
done by another; a shard that is written twice is written with the same bytes. Whoever writes holds the cache: what goes on
after an error, because dask cannot stop it, keeps others out until it has ended.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import dask.config as dask_config
from dask.distributed import CancelledError, Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from dask.system import CPU_COUNT
from tqdm import tqdm

from pipeline import manifest as manifests
from pipeline.cache.layout import Commit, StoreDtype
from pipeline.cache.provenance import check_libraries
from pipeline.cache.writer import Writer
from pipeline.devices import default_device
from pipeline.encoding import located
from pipeline.extract import Effort, Ledger, Target, Task, begin, commit_shard, encoded_shards, extract, naming, plan
from pipeline.items import Encoded
from pipeline.loading import allowed_workers
from pipeline.pace import Pace, visible_gpus
from pipeline.runs import lock

_BUILDING = Lock()  # seeded weights are drawn from the generator of the process
PATIENCE = 15  # seconds to wait for a scheduler
LOST = (CancelledError, asyncio.CancelledError, OSError)  # of a scheduler that is gone: OSError: of a closed comm, of a timeout


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


@contextmanager
def together(folder: Path) -> Iterator[None]:
    """Hold a folder for writing, like others that do at the same time; `ValueError` while a process has it `runs.lock`ed."""
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {folder}; wait until it has ended") from error
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def connect(address: str) -> Iterator[Client]:
    """A client of a running scheduler, tcp://host:port; `ValueError` when nobody answers there, or it has no workers."""
    _hush()
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no dask scheduler answers at {address!r} ({error}); start one with: dask scheduler") from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise ValueError(f"the scheduler at {address} has no workers; start some with: dask worker {address}")
        yield client


@contextmanager
def one_process_per_gpu(gpus: Sequence[int]) -> Iterator[Client]:
    """A cluster on this machine that lives as long as the context; `ValueError` for a GPU that is not there."""
    names = device_names(gpus, visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    with processes([{"CUDA_VISIBLE_DEVICES": name} for name in names]) as client:
        yield client


def device_names(gpus: Sequence[int], num_gpus: int, visible: str) -> list[str]:
    """CUDA_VISIBLE_DEVICES of a process for each GPU, counted from 0 among the `num_gpus` that torch sees.

    `visible` is this process's own: its "2,3" makes of 0 and 1 the devices 2 and 3. `ValueError` for a GPU that is not there.
    """
    for gpu in gpus:
        if gpu not in range(num_gpus):
            raise ValueError(f"--workers-gpu names GPU {gpu}, but torch sees {num_gpus}")
    devices = visible.split(",") if visible else [str(gpu) for gpu in range(num_gpus)]
    return [devices[gpu].strip() for gpu in gpus]


@contextmanager
def processes(environments: Sequence[Mapping[str, str]]) -> Iterator[Client]:
    """A cluster of one process per environment, on this machine; its processes may have children that decode."""
    _hush()
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": logging.ERROR}
    workers: dict[int, Any] = {
        number: {"cls": Nanny, "options": {**options, "env": dict(environment)}}
        for number, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}}
    with (
        # None: dask would have every freed tensor given back to the system, and its pages made anew for the next one
        dask_config.set(
            {"distributed.worker.daemon": False, "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}
        ),
        SpecCluster(workers=workers, scheduler=scheduler) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _hush() -> None:
    """Have dask log nothing: what must be known of it comes as an exception."""
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
