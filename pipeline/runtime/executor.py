"""Run jobs in processes: in this one, in one per core or GPU of this machine, or in the workers of a dask scheduler.

The result of a job does not depend on the process that runs it. If a worker dies, its job is given to another worker. The
processes of this machine end when the process that started them ends for any reason. Only this module imports
dask.distributed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import dask.config as dask_config
from dask.distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    Nanny,
    Scheduler,
    SpecCluster,
    WorkerPlugin,
    as_completed,
)
from dask.system import CPU_COUNT

from pipeline.runtime import plugins
from pipeline.runtime.device import default_device, num_visible_gpus, total_bytes
from pipeline.runtime.environment import set_environment
from pipeline.runtime.errors import UserError
from pipeline.runtime.logs import set_up_logging

logger = logging.getLogger(__name__)

EXECUTOR_MEMORY_SHARE = 0.8  # share of the memory that all processes together may use
START_SECONDS = 8.0  # until processes of this machine have started and imported what a job needs, roughly
PROCESS_BYTES = 2**30  # memory of a process without data, roughly
CONNECT_SECONDS = 15  # time that a scheduler has to answer
FIRST_WORKER_SECONDS = 600.0  # time that a cluster has to start its first worker: a batch system lets jobs wait
SCHEDULER_LOST = (CancelledError, asyncio.CancelledError, OSError)  # OSError: a closed connection or a timeout
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


class MapJobs(Protocol):
    """Call `task(job)` for every job. As each job ends, yield its position and a function that returns its result.

    That function raises the `UserError` that the task raised. The iterator itself raises any other error at once.
    """

    def __call__(
        self, task: Callable[[JobT], ResultT], jobs: Sequence[JobT]
    ) -> Iterator[tuple[int, Callable[[], ResultT]]]: ...


@dataclass(frozen=True, slots=True)
class Executor:
    """Processes that run jobs."""

    map: MapJobs
    num_workers: int  # jobs that run at the same time
    on_gpu: bool  # every worker has a GPU; several workers may share one


def run_here(task: Callable[[JobT], ResultT], jobs: Sequence[JobT]) -> Iterator[tuple[int, Callable[[], ResultT]]]:
    """Run jobs in this process, as `MapJobs`; a job runs when the function that returns its result is called."""
    for number, job in enumerate(jobs):
        yield number, partial(task, job)


def num_processes(workers: int, num_jobs: int, num_bytes: int = 0) -> int:
    """Return the number of processes to start; 0 means that this process runs the jobs itself.

    Args:
        workers: the user's choice; -1: one per core, but none if there is a GPU, which this process then uses alone.
        num_jobs: number of jobs; there are never more processes than jobs.
        num_bytes: bytes of data that each process holds; if `workers` is -1, only as many processes as fit into memory are
            started.
    """
    if workers >= 0:
        return min(workers, num_jobs)
    device = default_device()
    cores = 1 if device.type == "cuda" else CPU_COUNT
    num_fitting = int(EXECUTOR_MEMORY_SHARE * total_bytes(device)) // (PROCESS_BYTES + num_bytes)
    number = min(cores, num_jobs, num_fitting)
    return number if number > 1 else 0


@contextmanager
def open_executor(scheduler: str, number: int, starts_late: bool = False) -> Iterator[Executor]:
    """Start the processes that run jobs, or connect to them; those that were started end with the block.

    Args:
        scheduler: "local" for this machine, or the address of a dask scheduler, tcp://host:port.
        number: processes to start on this machine, with one thread each; 0: only this process.
        starts_late: Whether this process runs the first jobs itself, and starts the others when that saves time. For jobs of
            which one takes no more than seconds.

    Raises:
        UserError: no scheduler answers, or the scheduler gets no workers.
    """
    if scheduler == "local" and number == 0:
        yield Executor(run_here, 1, _has_gpu())
        return
    if scheduler == "local" and starts_late:
        with ExitStack() as stack:
            yield Executor(partial(_run_here_first, stack, [], number), number, False)
        return
    with (
        dask_config.set({"logging.distributed": "critical"}),  # messages of the processes
        local_cluster([{"OMP_NUM_THREADS": "1"}] * number)
        if scheduler == "local"
        else connect_to_scheduler(scheduler) as client,
    ):
        # address of a worker -> whether it has a GPU; those of a cluster that adapts may have left, and come again for jobs
        gpus: Any = client.run(_has_gpu, on_error="ignore")
        yield Executor(partial(run_on_cluster, client), max(1, len(gpus)), bool(gpus) and all(gpus.values()))


def _run_here_first(
    stack: ExitStack, started: list[Executor], number: int, task: Callable[[JobT], ResultT], jobs: Sequence[JobT]
) -> Iterator[tuple[int, Callable[[], ResultT]]]:
    """Run jobs in this process, as `MapJobs`, until it saves time to start processes: they run the others, and later jobs.

    Args:
        stack: What ends the processes.
        started: Holds the executor of the processes as soon as they are started.
        number: Processes to start.
        task: The function to call.
        jobs: Its arguments.
    """
    done, fastest = 0, math.inf
    while done < len(jobs) and not started:
        begun = time.process_time()
        yield done, partial(task, jobs[done])
        done, seconds = done + 1, time.process_time() - begun
        fastest = min(fastest, seconds)  # of this processor, whatever else it does; the first may also read features
        is_timed = done > 1 or seconds > START_SECONDS
        if is_timed and fastest * (len(jobs) - done) * (1 - 1 / number) > START_SECONDS:
            started.append(stack.enter_context(open_executor("local", number)))
    for position, get_result in started[0].map(task, jobs[done:]) if started else ():
        yield done + position, get_result


def _has_gpu() -> bool:
    return default_device().type == "cuda"


def _set_up_workers(client: Client) -> None:
    """Let the workers, also later ones, say as much as this process, and set their environment before they compute."""
    client.register_plugin(WorkerSetup(logging.getLogger("pipeline").getEffectiveLevel()))


@dataclass(frozen=True)
class WorkerSetup(WorkerPlugin):
    """Sets up a worker process: messages from a level upwards, and the environment variables of libraries."""

    level: int
    name = "diffalign"  # of two with this name the later one counts

    def setup(self, worker: object) -> None:
        set_environment()
        set_up_logging(self.level)


def run_on_cluster(
    client: Client, task: Callable[[JobT], ResultT], jobs: Sequence[JobT], name_of: Callable[[JobT], str] | None = None
) -> Iterator[tuple[int, Callable[[], ResultT]]]:
    """Run jobs in the workers of a cluster, as `MapJobs`. Closing the iterator cancels the jobs that have not started.

    Args:
        client: client of the cluster.
        task: the function to call.
        jobs: its arguments.
        name_of: returns the name of a job that reads files, for the message that workers died while they ran it.

    Raises:
        UserError: the connection to the scheduler is lost.
    """
    key = f"job-{time.time_ns()}"
    call, packed = _with_plugins(task, jobs)
    futures = {client.submit(call, job, key=f"{key}-{number}", pure=False): number for number, job in enumerate(packed)}
    try:
        for future in as_completed(list(futures), loop=client.loop):
            number = futures[future]
            yield number, _result(future, name_of(jobs[number]) if name_of else "")
    finally:
        if client.status == "running":
            with suppress(*SCHEDULER_LOST):
                client.cancel(list(futures))


def _with_plugins(task: Callable[[JobT], Any], jobs: Sequence[JobT]) -> tuple[Callable[..., Any], Sequence[Any]]:
    """Return what workers call, and the jobs for it: where files of plug-ins are loaded, workers load them first.

    Then a job is sent as bytes, because its classes can be unpickled only after that, also by a worker that starts later.
    """
    files = plugins.loaded_files()
    return (partial(_run_packed, files), [pickle.dumps((task, job)) for job in jobs]) if files else (task, jobs)


def _run_packed(files: Sequence[Path], packed: bytes) -> Any:
    for path in files:
        plugins.load_file(path)
    task, job = pickle.loads(packed)
    return task(job)


def _result(future: Future, name: str) -> Callable[[], Any]:
    """Return a function that returns the result of a finished job or raises its `UserError`; raise other errors now."""
    try:
        return partial(_return, future.result())
    except KilledWorker as error:
        died = f"{error.allowed_failures + 1} workers died of {name or 'it'}: is"
        remedy = "a file damaged there, or memory short? with fewer of them the same command goes on from here"
        return partial(_raise, UserError(f"{died} {remedy if name else 'memory short?'}"))
    except SCHEDULER_LOST as error:
        if future.status == "error":  # the worker's own error, such as a full disk
            raise
        raise UserError("the scheduler was lost; the same command goes on from here") from error
    except UserError as error:
        return partial(_raise, error)


def _return(result: ResultT) -> ResultT:
    return result


def _raise(error: UserError) -> NoReturn:
    raise error


def num_threads(client: Client) -> int:
    """Return the number of jobs that the workers of a cluster run at the same time."""
    threads: Any = client.nthreads()  # address of a worker -> its threads
    return sum(threads.values())


@contextmanager
def connect_to_scheduler(address: str) -> Iterator[Client]:
    """Connect to a running dask scheduler, and yield a client of it.

    Args:
        address: tcp://host:port, or tls://host:port of an encrypted cluster.

    Raises:
        UserError: no scheduler answers at the address, it gets no workers, or it is lost before it has one.
    """
    _silence_dask()
    if dask_config.get("distributed.comm.require-encryption") and not address.startswith("tls:"):
        raise UserError(
            f"dask's settings ask for encryption (DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION), but {address} has none: "
            f"give tls://{address.partition('://')[2]}"
        )
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TypeError, ValueError) as error:  # TypeError: dask has found no certificates
        raise _not_connected(address, error) from error
    with client:
        try:
            _set_up_workers(client)  # before there are any: a cluster that adapts may take an idle worker away at any time
            _wait_for_worker(client, address)
        except SCHEDULER_LOST as error:
            raise UserError(f"the scheduler at {address} was lost; the same command goes on from here") from error
        yield client


def _not_connected(address: str, error: Exception) -> UserError:
    if address.startswith("tls:"):
        names = "CA_FILE, CLIENT__CERT and CLIENT__KEY"
        what = "no encrypted dask scheduler of these certificates answers"
        remedy = f"name them in the environment, DASK_DISTRIBUTED__COMM__TLS__ followed by {names}"
    else:
        what, remedy = (
            "no dask scheduler answers",
            "start one with: dask scheduler (if it is encrypted, its address begins with tls:)",
        )
    return UserError(f"{what} at {address!r} ({error}); {remedy}")


def _wait_for_worker(client: Client, address: str) -> None:
    """Wait until the scheduler has a worker. A cluster that adapts starts one only when there is something to do."""
    if client.scheduler_info()["workers"]:
        return
    remedy = f"start some with: dask worker {address}"
    logger.warning("the scheduler at %s has no workers yet; waiting for the first one (%s)", address, remedy)
    wanted = client.submit(int, pure=False)
    try:
        wanted.result(FIRST_WORKER_SECONDS)
    except TimeoutError:
        minutes = FIRST_WORKER_SECONDS / 60
        raise UserError(f"the scheduler at {address} got no workers in {minutes:g} minutes; {remedy}") from None
    finally:
        wanted.release()


@contextmanager
def gpu_cluster(gpus: Sequence[int]) -> Iterator[Client]:
    """Start a cluster of one process for each of these GPUs of this machine, and yield a client of it.

    Raises:
        UserError: a GPU does not exist.
    """
    names = cuda_visible_devices(gpus, num_visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    with local_cluster([{"CUDA_VISIBLE_DEVICES": name} for name in names]) as client:
        yield client


def cuda_visible_devices(gpus: Sequence[int], num_gpus: int, visible: str) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for the process of each of these GPUs.

    Args:
        gpus: GPUs counted from 0 among those that torch sees.
        num_gpus: number of GPUs that torch sees.
        visible: CUDA_VISIBLE_DEVICES of this process: with "2,3", GPUs 0 and 1 are the devices 2 and 3.

    Raises:
        UserError: a GPU does not exist.
    """
    for gpu in gpus:
        if gpu not in range(num_gpus):
            raise UserError(f"--workers-gpu names GPU {gpu}, but torch sees {num_gpus}")
    devices = visible.split(",") if visible else [str(gpu) for gpu in range(num_gpus)]
    return [devices[gpu].strip() for gpu in gpus]


@contextmanager
def local_cluster(environments: Sequence[Mapping[str, str]]) -> Iterator[Client]:
    """Start a cluster on this machine, and yield a client of it.

    Args:
        environments: for each process, environment variables to set. The processes may start children, which decode media.
    """
    _silence_dask()
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "silence_logs": logging.ERROR}
    workers: dict[int, Any] = {
        number: {"cls": Nanny, "options": {**options, "env": dict(environment)}}
        for number, environment in enumerate(environments)
    }
    scheduler = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}}
    with (
        dask_config.set(
            {
                "distributed.worker.daemon": False,
                "distributed.comm.require-encryption": False,  # nothing leaves this machine
                # None unsets it: with dask's value freed tensors go back to the system, and their pages are made anew each time
                "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
            }
        ),
        SpecCluster(workers=workers, scheduler=scheduler) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        _set_up_workers(client)
        yield client


def _silence_dask() -> None:
    """Switch off the log of dask: what users must know arrives as an exception."""
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
