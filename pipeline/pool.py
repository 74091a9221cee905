"""Jobs over processes: by this one, by one per core of this machine, or by the workers of a dask scheduler.

Which of them does a job cannot change its result. A job whose worker is lost is done by another; the processes of this machine
end with the one that started them, however it ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

import dask.config as dask_config
from dask.distributed import Client, Future, KilledWorker, as_completed
from dask.system import CPU_COUNT

from pipeline.devices import default_device, total_bytes
from pipeline.distribute import LOST, connect, processes

MEMORY_SHARE = 0.8  # that processes may take
PROCESS_BYTES = 2**30  # what a process takes without data, more or less
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
