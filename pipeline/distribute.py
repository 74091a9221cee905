"""Extraction over many processes or machines with dask: a shard is a task, and one worker writes it.

The workers see the same home folder, and build the encoder themselves. A lost worker's shards are done by another; a shard that
is written twice is written with the same bytes.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import dask.config as dask_config
from dask.distributed import CancelledError, Client, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from dask.system import CPU_COUNT
from distributed.comm.core import CommClosedError
from tqdm import tqdm

from pipeline import manifest as manifests
from pipeline.cache.layout import Commit, StoreDtype
from pipeline.cache.writer import Writer
from pipeline.extract import Effort, Ledger, Task, commit_shard, encoded_shards, extract, open_writer, plan
from pipeline.pace import Pace, visible_gpus

PATIENCE = 15  # seconds to wait for a scheduler


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
        settings=tuple(sorted(settings.items())),
        store_dtype=store_dtype,
        compiled=compiled,
        effort=replace(effort, workers=effort.workers if effort.workers >= 0 else share),
    )
    with one_process_per_gpu(gpus) if gpus else connect(scheduler) as client:
        return extract_on(client, order)


def extract_on(client: Client, order: Order) -> Path:
    """What `extract` does, by the workers of a cluster: the same folder, the same bytes."""
    task = _task(order)
    with open_writer(task) as (writer, commits):
        ledger = Ledger(task, sum(len(commit.failures) for commit in commits.values()))
        shards = [shard for shard in range(writer.num_shards) if shard not in commits]
        done = sum(commit.rows for commit in commits.values())
        bar = tqdm(total=len(task.items), initial=done, unit=" items", disable=not order.effort.progress, file=sys.stderr)
        with bar:
            for commit in _commits(client, order, task.path.name, shards):
                commits[commit.shard] = commit
                ledger.add(commit.failures)
                bar.update(commit.rows)
        writer.finish(commits)
    return task.path


def _commits(client: Client, order: Order, name: str, shards: Sequence[int]) -> Iterator[Commit]:
    """The commits of the shards, as they are made; what is left is cancelled when one of them fails.

    `ValueError` when the scheduler is lost, or a shard takes down every worker that begins it.
    """
    key = f"{name}-{time.time_ns()}"
    futures = [client.submit(encode_shard, order, name, shard, key=f"{key}-{shard}", pure=False) for shard in shards]
    try:
        for future in as_completed(futures, loop=client.loop):
            yield future.result()
    except KilledWorker as error:
        shard = str(error.task).rpartition("-")[2]
        raise ValueError(
            f"{error.allowed_failures + 1} workers died of shard {shard} of {name}: is a file damaged there, or memory short? "
            "with fewer of them the same command goes on from here"
        ) from error
    except (CancelledError, CommClosedError) as error:
        raise ValueError("the scheduler was lost; the same command goes on from here") from error
    finally:
        client.cancel(futures)


def encode_shard(order: Order, name: str, shard: int) -> Commit:
    """Encode and write one shard, on a worker; `ValueError` when this machine would fill another cache than the one named."""
    task = _task(order)
    if task.path.name != name:
        raise ValueError(
            f"a worker would fill {task.path.name} instead of {name}: its files or weights are not the same, or its processor "
            "takes another number format (--set compute_dtype=float32 is one that all have)"
        )
    writer = Writer.join(task.path)
    pace = Pace(order.effort.workers, "")
    ((_, features, failures, seconds),) = encoded_shards(task, writer, [shard], pace, pace.add)
    return commit_shard(task, writer, shard, features, failures, seconds)


@lru_cache(maxsize=1)
def _task(order: Order) -> Task:
    manifest = manifests.read(order.home, order.dataset)
    settings = dict(order.settings)
    return plan(manifest, order.encoder, settings, order.home, order.store_dtype, order.compiled, order.effort)


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
    for gpu in gpus:
        if gpu >= visible_gpus():
            raise ValueError(f"--workers-gpu names GPU {gpu}, but torch sees {visible_gpus()}")
    with processes([{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in gpus]) as client:
        yield client


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
        dask_config.set({"distributed.worker.daemon": False}),
        SpecCluster(workers=workers, scheduler=scheduler) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _hush() -> None:
    """Have dask log nothing: what must be known of it comes as an exception."""
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
