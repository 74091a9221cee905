"""Batches of features in order, as fast as the machine: on processors every worker decodes and encodes, a GPU encodes alone.

A processor encodes on one thread per worker: no core waits for another, and the bits of a feature do not depend on how many
workers there are.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.extraction.inputs import Encoded, Forward, Items, Prepared
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.runtime.device import default_device

FORK = "fork" if sys.platform == "linux" else "spawn"  # forked workers start at once and share the encoder's memory
AHEAD = 2  # batches that a worker is asked for at a time
IN_FLIGHT = 2  # batches on their way through the GPU
PR_SET_PDEATHSIG = 1  # of prctl(2)


@dataclass(frozen=True)
class Work:
    """The batches by number: prepared, or with a `forward` encoded too."""

    items: Items
    batches: Sequence[np.ndarray]
    forward: Forward | None

    def do(self, number: int) -> Prepared | Encoded:
        """The batch of a number."""
        prepared = self.items.prepare(self.batches[number])
        return encode(self.items, prepared, self.forward) if self.forward else prepared


class Flight(NamedTuple):
    """A batch on its way through the GPU."""

    prepared: Prepared
    features: Tensor  # in pinned memory of the host; whole once `landed`
    landed: torch.cuda.Event
    launched: float  # when


def encode(items: Items, prepared: Prepared, forward: Forward) -> Encoded:
    """The features of a batch, here and now, on one thread of a processor."""
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            features = forward(torch.from_numpy(prepared.good)) if len(prepared.good) else torch.zeros(0)
    finally:
        torch.set_num_threads(threads)
    return items.settle(prepared, features.numpy(), time.perf_counter() - started)


def allowed_workers(wanted: int) -> int:
    """So many, or 0 where there can be none: a daemonic process, such as a worker of dask, may have no children."""
    return 0 if multiprocessing.current_process().daemon else wanted


def encoded_batches(items: Items, batches: Sequence[np.ndarray], forward: Forward, pace: ThroughputMeter) -> Iterator[Encoded]:
    """The features of the batches, in order; `pace.workers` processes work ahead (0: everything happens here).

    `ValueError` when a worker is killed, by a damaged file that brings a decoder down or for lack of memory.
    """
    on_gpu = default_device().type == "cuda"
    work = Work(items, batches, None if on_gpu else forward)
    ready = _waited_for(_done(work, pace.workers), pace)
    yield from _through_gpu(items, ready, forward) if on_gpu else ready


def prepared_batches(items: Items, batches: Sequence[np.ndarray], workers: int) -> Iterator[Prepared]:
    """The batches in order, prepared but not encoded, by so many processes (0: here); errors as in `encoded_batches`."""
    return _done(Work(items, batches, None), workers)


def _done(work: Work, workers: int) -> Iterator[Any]:
    workers = allowed_workers(workers)
    return _by_workers(work, workers) if workers else map(work.do, range(len(work.batches)))


def _waited_for(ready: Iterator[Any], pace: ThroughputMeter) -> Iterator[Any]:
    """Count the time that it takes to get the next."""
    while True:
        with pace.waiting("items"):
            batch = next(ready, None)
        if batch is None:
            return
        yield batch


def _by_workers(work: Work, num_workers: int) -> Iterator[Any]:
    """The batches in order, each done by the worker whose turn it is.

    Nothing is shared between the workers, not even a lock: whatever one is killed in, the others and this process go on.
    """
    context = multiprocessing.get_context(FORK)
    crew: list[tuple[Any, Connection]] = []
    try:
        for _ in range(num_workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(work, there), daemon=True)
            process.start()
            there.close()  # so that the pipe ends when the worker does
            crew.append((process, here))
        for number in range(-AHEAD * num_workers, len(work.batches)):
            process, pipe = crew[number % num_workers]
            try:
                batch = pipe.recv() if number >= 0 else None
                if number + AHEAD * num_workers < len(work.batches):
                    pipe.send(number + AHEAD * num_workers)
            except (EOFError, OSError) as error:
                raise _lost(process, work, max(number, 0)) from error
            if isinstance(batch, ValueError):
                raise batch
            if batch is not None:
                yield batch
    finally:
        for process, pipe in crew:
            process.kill()
            process.join()
            pipe.close()


def _serve(work: Work, pipe: Connection) -> None:
    """Be a worker: do the batches that are asked for; while one is on its way back, the next is done."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells when to end
    if sys.platform == "linux":  # by the kernel if it is killed: this process would hold the cache's lock
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as sender:
        while True:
            number = pipe.recv()
            try:
                done = work.do(number)
            except ValueError as error:
                done = error
            sender.submit(pipe.send_bytes, ForkingPickler.dumps(done))


def _lost(process: Any, work: Work, number: int) -> Exception:
    """What to say of a worker that is gone: `ValueError` when it was killed, else it has said itself what is wrong."""
    process.join()
    if process.exitcode >= 0:
        return RuntimeError("a worker process failed; what it said is above")
    cause, first = signal.Signals(-process.exitcode).name, work.items.rows[int(work.batches[number][0])][0].id
    return ValueError(
        f"a worker process was killed ({cause}) at sample {first!r} or a little later: is a file damaged there, or memory "
        "short? with fewer --workers the same command goes on from here"
    )


def _through_gpu(items: Items, ready: Iterator[Prepared], forward: Forward) -> Iterator[Encoded]:
    """Encode with some batches in flight: while the GPU computes one, the next is prepared and queued behind it."""
    flying: deque[Flight] = deque()

    def land() -> Encoded:
        flight = flying.popleft()
        flight.landed.synchronize()
        return items.settle(flight.prepared, flight.features.numpy(), time.perf_counter() - flight.launched)

    for prepared in ready:
        flying.append(_launch(prepared, forward))
        if len(flying) == IN_FLIGHT:
            yield land()
    while flying:
        yield land()


def _launch(prepared: Prepared, forward: Forward) -> Flight:
    """Queue a batch's way to the GPU, the computation and the way back, and wait for none of them.

    The way back is queued before the next batch's computation, which it would have to wait for otherwise.
    """
    launched, landed = time.perf_counter(), torch.cuda.Event(blocking=True)
    numbers = torch.zeros(0)
    if len(prepared.good):
        with torch.inference_mode():
            features = forward(torch.from_numpy(prepared.good).pin_memory())
            numbers = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            numbers.copy_(features, non_blocking=True)
    landed.record()
    return Flight(prepared, numbers, landed, launched)
