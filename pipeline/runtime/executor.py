"""Jobs spread over processes: this one, one per core or GPU of this machine, or the workers of a dask scheduler.

Which process does a job cannot change its result. A job whose worker dies is given to another. The processes of this machine
end with the one that started them, however it ends. No other module imports dask's cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

import dask.config as dask_config
from dask.distributed import CancelledError, Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, as_completed
from dask.system import CPU_COUNT

from pipeline.runtime.device import default_device, total_bytes, visible_gpus

EXECUTOR_MEMORY_SHARE = 0.8  # of the memory that processes may take together
PROCESS_BYTES = 2**30  # about what a process takes without data
CONNECT_SECONDS = 15  # to wait for a scheduler to answer
SCHEDULER_LOST = (CancelledError, asyncio.CancelledError, OSError)  # OSError: of a closed connection or a timeout
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


class MapJobs(Protocol):
    """Does `task(job)` for every job and yields, as jobs end, (position of the job, function that returns its result).

    That function raises the `ValueError` that the task raised. Any other error is raised by the iterator at once.
    """

    def __call__(
        self, task: Callable[[JobT], ResultT], jobs: Sequence[JobT]
    ) -> Iterator[tuple[int, Callable[[], ResultT]]]: ...


@dataclass(frozen=True, slots=True)
class Executor:
    """Processes that do jobs."""

    map: MapJobs
    num_workers: int  # jobs done at the same time
    on_gpu: bool  # every worker has a GPU, perhaps the same one


def run_here(task: Callable[[JobT], ResultT], jobs: Sequence[JobT]) -> Iterator[tuple[int, Callable[[], ResultT]]]:
    """`MapJobs` in this process: a job is done when its result is asked for."""
    for number, job in enumerate(jobs):
        yield number, partial(task, job)


def num_processes(workers: int, num_jobs: int, num_bytes: int = 0) -> int:
    """How many processes to start beside this one; 0: this process does the jobs itself.

    Args:
        workers: as the user says it; -1 is one per core, but none on a GPU, which this process uses alone.
        num_jobs: more processes than jobs are not started.
        num_bytes: data held by each process; with -1 there are as many processes as memory holds.
    """
    if workers >= 0:
        return min(workers, num_jobs)
    device = default_device()
    cores = 1 if device.type == "cuda" else CPU_COUNT
    room = int(EXECUTOR_MEMORY_SHARE * total_bytes(device)) // (PROCESS_BYTES + num_bytes)
    number = min(cores, num_jobs, room)
    return number if number > 1 else 0


@contextmanager
def open_executor(scheduler: str, number: int) -> Iterator[Executor]:
    """Start or connect to the processes that do jobs, and end them with the block.

    Args:
        scheduler: "local" for this machine, or the address of a dask scheduler, tcp://host:port.
        number: processes of this machine, of one thread each; 0: this process alone.

    Raises:
        ValueError: no scheduler answers, or it has no workers.
    """
    if scheduler == "local" and number == 0:
        yield Executor(run_here, 1, _has_gpu())
        return
    with (
        dask_config.set({"logging.distributed": "critical"}),  # of the processes
        local_cluster([{"OMP_NUM_THREADS": "1"}] * number)
        if scheduler == "local"
        else connect_to_scheduler(scheduler) as client,
    ):
        gpus: Any = client.run(_has_gpu)  # by worker
        yield Executor(partial(run_on_cluster, client), len(gpus), all(gpus.values()))


def _has_gpu() -> bool:
    return default_device().type == "cuda"


def run_on_cluster(
    client: Client, task: Callable[[JobT], ResultT], jobs: Sequence[JobT], name_of: Callable[[JobT], str] = lambda job: "it"
) -> Iterator[tuple[int, Callable[[], ResultT]]]:
    """`MapJobs` by the workers of a cluster; when the iterator is closed, jobs that have not begun are cancelled.

    `name_of` names a job in the error that says that workers died of it.

    Raises:
        ValueError: the scheduler is lost.
    """
    key = f"job-{time.time_ns()}"
    futures = {client.submit(task, job, key=f"{key}-{number}", pure=False): number for number, job in enumerate(jobs)}
    try:
        for future in as_completed(list(futures), loop=client.loop):
            number = futures[future]
            yield number, _result(future, name_of(jobs[number]))
    finally:
        if client.status == "running":
            with suppress(*SCHEDULER_LOST):
                client.cancel(list(futures))


def _result(future: Future, name: str) -> Callable[[], Any]:
    """A function that returns the result of a job that has ended, or raises its `ValueError`; other errors are raised now."""
    try:
        return partial(_return, future.result())
    except KilledWorker as error:
        message = f"{error.allowed_failures + 1} workers died of {name}: is a file damaged there, or memory short? "
        return partial(_raise, ValueError(f"{message}with fewer of them the same command goes on from here"))
    except SCHEDULER_LOST as error:
        if future.status == "error":  # the worker's own error, such as a full disk
            raise
        raise ValueError("the scheduler was lost; the same command goes on from here") from error
    except ValueError as error:
        return partial(_raise, error)


def _return(result: ResultT) -> ResultT:
    return result


def _raise(error: ValueError) -> NoReturn:
    raise error


def num_threads(client: Client) -> int:
    """Jobs that the workers of a cluster do at the same time."""
    threads: Any = client.nthreads()  # by worker
    return sum(threads.values())


@contextmanager
def connect_to_scheduler(address: str) -> Iterator[Client]:
    """A client of a running dask scheduler.

    Raises:
        ValueError: nobody answers at the address, tcp://host:port, or the scheduler has no workers.
    """
    _silence_dask()
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no dask scheduler answers at {address!r} ({error}); start one with: dask scheduler") from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise ValueError(f"the scheduler at {address} has no workers; start some with: dask worker {address}")
        yield client


@contextmanager
def gpu_cluster(gpus: Sequence[int]) -> Iterator[Client]:
    """A cluster of one process per GPU of this machine; `ValueError` for a GPU that is not there."""
    names = cuda_visible_devices(gpus, visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    with local_cluster([{"CUDA_VISIBLE_DEVICES": name} for name in names]) as client:
        yield client


def cuda_visible_devices(gpus: Sequence[int], num_gpus: int, visible: str) -> list[str]:
    """The value of CUDA_VISIBLE_DEVICES for a process on each of these GPUs.

    Args:
        gpus: GPUs counted from 0 among those that torch sees.
        num_gpus: how many torch sees.
        visible: CUDA_VISIBLE_DEVICES of this process: with "2,3", GPUs 0 and 1 are the devices 2 and 3.

    Raises:
        ValueError: a GPU is not there.
    """
    for gpu in gpus:
        if gpu not in range(num_gpus):
            raise ValueError(f"--workers-gpu names GPU {gpu}, but torch sees {num_gpus}")
    devices = visible.split(",") if visible else [str(gpu) for gpu in range(num_gpus)]
    return [devices[gpu].strip() for gpu in gpus]


@contextmanager
def local_cluster(environments: Sequence[Mapping[str, str]]) -> Iterator[Client]:
    """A cluster of one process per environment, on this machine; the processes may have children, which decode media."""
    _silence_dask()
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": logging.ERROR}
    workers: dict[int, Any] = {
        number: {"cls": Nanny, "options": {**options, "env": dict(environment)}}
        for number, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}}
    with (
        # None: with dask's own value every freed tensor is given back to the system, and its pages are made anew each time
        dask_config.set(
            {"distributed.worker.daemon": False, "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}
        ),
        SpecCluster(workers=workers, scheduler=scheduler) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def _silence_dask() -> None:
    """Let dask log nothing: what users must know of it arrives as an exception."""
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
