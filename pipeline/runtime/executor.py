"""Jobs over processes: by this one, by one per core of this machine, or by the workers of a dask scheduler.

Which of them does a job cannot change its result. A job whose worker is lost is done by another; the processes of this machine
end with the one that started them, however it ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

import dask.config as dask_config
from dask.distributed import CancelledError, Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from dask.system import CPU_COUNT

from pipeline.runtime.device import default_device, total_bytes, visible_gpus

MEMORY_SHARE = 0.8  # that processes may take
PROCESS_BYTES = 2**30  # what a process takes without data, more or less
PATIENCE = 15  # seconds to wait for a scheduler
LOST = (CancelledError, asyncio.CancelledError, OSError)  # of a scheduler that is gone: OSError: of a closed comm, of a timeout
Job = TypeVar("Job")
Result = TypeVar("Result")


class Spread(Protocol):
    """Does jobs; see `here`."""

    def __call__(self, task: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Callable[[], Result]]]: ...


@dataclass(frozen=True, slots=True)
class Hands:
    """Who does jobs."""

    do: Spread
    number: int  # of processes that do them at once
    on_gpu: bool  # whether each of these has one, perhaps the same


def here(task: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Callable[[], Result]]]:
    """The number of every job, as they end, and its result, which when asked for raises what the task raised."""
    for number, job in enumerate(jobs):
        yield number, partial(task, job)


def num_processes(workers: int, num_jobs: int, num_bytes: int = 0) -> int:
    """How many processes to start beside this one for `workers`, where -1 is one per core; a GPU is left to this one.

    `num_bytes` is the data that each of them holds: with -1 there are not more than memory has room for.
    """
    if workers >= 0:
        return min(workers, num_jobs)
    device = default_device()
    cores = 1 if device.type == "cuda" else CPU_COUNT
    room = int(MEMORY_SHARE * total_bytes(device)) // (PROCESS_BYTES + num_bytes)
    number = min(cores, num_jobs, room)
    return number if number > 1 else 0


@contextmanager
def hands(scheduler: str, number: int) -> Iterator[Hands]:
    """Who does the jobs: this process ("local" and 0), `number` processes of one thread, or a scheduler's, tcp://host:port."""
    if scheduler == "local" and number == 0:
        yield Hands(here, 1, _has_gpu())
        return
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what must be known comes as an exception
    with (
        dask_config.set({"logging.distributed": "critical"}),  # of the processes
        processes([{"OMP_NUM_THREADS": "1"}] * number) if scheduler == "local" else connect(scheduler) as client,
    ):
        gpus: Any = client.run(_has_gpu)  # by worker
        yield Hands(partial(_by_workers, client), len(gpus), all(gpus.values()))


def _has_gpu() -> bool:
    return default_device().type == "cuda"


def _by_workers(
    client: Client, task: Callable[[Job], Result], jobs: Sequence[Job]
) -> Iterator[tuple[int, Callable[[], Result]]]:
    """`here`, by the workers of a cluster; `ValueError` when its scheduler is lost."""
    key = f"job-{time.time_ns()}"
    futures = {client.submit(task, job, key=f"{key}-{number}", pure=False): number for number, job in enumerate(jobs)}
    for future in as_completed(list(futures), loop=client.loop):
        try:
            finish = _finish(future)
        except LOST as error:
            if future.status == "error":  # the worker's own: its disk is full
                raise
            raise ValueError("the scheduler was lost; the same command goes on from here") from error
        yield futures[future], finish


def _finish(future: Future) -> Callable[[], Any]:
    """What returns the result of a job that has ended, or raises its `ValueError`."""
    try:
        return partial(_return, future.result())
    except KilledWorker as error:
        return partial(_raise, ValueError(f"{error.allowed_failures + 1} workers died of it: is memory short?"))
    except ValueError as error:
        return partial(_raise, error)


def _return(result: Result) -> Result:
    return result


def _raise(error: ValueError) -> NoReturn:
    raise error


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
