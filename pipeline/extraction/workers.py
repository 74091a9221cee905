"""Prepare and encode batches in order, with worker processes.

On a CPU every worker decodes and encodes its own batches. On a GPU the workers decode, and this process encodes.

A CPU encodes on one thread per worker. So no core waits for another, and the bits of a feature do not depend on the number of
workers.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.media_copies import MediaCopies, copied_media
from pipeline.extraction.inputs import EncodedBatch, EncoderInputs, MemorySafeEncoder, PreparedBatch
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError

START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # forked workers start at once and share the encoder's memory
BATCHES_PER_WORKER = 2  # batches that a worker has been asked for at the same time
NUM_PROBED_ITEMS = 16  # that are tried to find out how many bytes one takes
GPU_QUEUE_BATCHES = 2  # batches that are queued on the GPU at the same time
PR_SET_PDEATHSIG = 1  # an option of prctl(2): the signal that a process gets when its parent dies


@dataclass(frozen=True)
class BatchJobs:
    """The work on each batch: prepare it, and also encode it when an `encoder` is given."""

    inputs: EncoderInputs
    batches: Sequence[np.ndarray]  # row numbers of each batch
    encoder: MemorySafeEncoder | None

    def run(self, number: int) -> PreparedBatch | EncodedBatch:
        """Prepare, and perhaps encode, the batch of this number."""
        prepared = self.inputs.prepare(self.batches[number])
        return encode_on_cpu(self.inputs, prepared, self.encoder) if self.encoder else prepared


@dataclass(frozen=True)
class LoadedPlugins:
    """Files of plug-ins; unpickling it loads them, before the jobs that follow it name their classes."""

    files: tuple[Path, ...]

    def __reduce__(self) -> Any:
        return _load_plugins, (self.files,)


def _load_plugins(files: tuple[Path, ...]) -> LoadedPlugins:
    for path in files:
        plugins.load_file(path)
    return LoadedPlugins(files)


class WorkerTraceback(NamedTuple):
    """The formatted traceback of a bug that ends a worker process."""

    text: str


class Worker(NamedTuple):
    """A worker process, and our end of the pipe to it."""

    process: Any
    pipe: Connection


class PinnedBatch(NamedTuple):
    """A prepared batch whose items are in pinned memory, from which a GPU copies while it computes."""

    prepared: PreparedBatch
    items: Tensor


class GpuBatch(NamedTuple):
    """A batch that is queued on the GPU."""

    prepared: PreparedBatch
    features: Tensor  # in pinned host memory; complete after `copied`
    begun: torch.cuda.Event  # the GPU begins to copy the items
    copied: torch.cuda.Event  # the features have been copied to the host


def encode_on_cpu(inputs: EncoderInputs, prepared: PreparedBatch, encoder: MemorySafeEncoder) -> EncodedBatch:
    """Return the features of a batch, computed in this process on one CPU thread."""
    started = time.perf_counter()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            features = encoder(torch.from_numpy(prepared.items)) if len(prepared.items) else torch.zeros(0)
    finally:
        torch.set_num_threads(num_threads)
    return inputs.collect_features(prepared, features.numpy(), time.perf_counter() - started)


def allowed_workers(wanted: int) -> int:
    """Return the wanted number of worker processes, or 0 in a daemonic process, such as a dask worker: it may not have any."""
    return 0 if multiprocessing.current_process().daemon else wanted


def choose_workers(wanted: int, num_items: int) -> int:
    """Return the number of worker processes beside this one; -1 of them stands for one per core, if there is work for them."""
    if wanted >= 0:
        return allowed_workers(wanted)
    num_cores = ThroughputMeter(0, "cpu").num_cores
    is_short = num_items < 64 * num_cores  # done before the workers would have started
    return 0 if is_short or num_cores == 1 else allowed_workers(num_cores)


def encode_batches(
    inputs: EncoderInputs, batches: Sequence[np.ndarray], encoder: MemorySafeEncoder, meter: ThroughputMeter
) -> Generator[EncodedBatch, None, None]:
    """Yield the features of the batches, in order. Close the generator to end the workers at once.

    Args:
        inputs: the items.
        batches: row numbers of each batch.
        encoder: the encoder.
        meter: counts the time that this process waits for items. `meter.num_workers` processes work ahead; with 0 this
            process does everything.

    Raises:
        UserError: a worker was killed, by a damaged file that crashed a decoder or because memory ran out.
    """
    on_gpu = default_device().type == "cuda"
    jobs = BatchJobs(inputs, batches, None if on_gpu else encoder)
    num_workers = allowed_workers(meter.num_workers)
    with closing(_pinned_batches(jobs, num_workers) if on_gpu else _run_jobs(jobs, num_workers, [])) as results:
        in_time = _with_waiting_time(results, meter)
        yield from _encode_on_gpu(inputs, in_time, encoder) if on_gpu else in_time


def prepare_batches(inputs: EncoderInputs, batches: Sequence[np.ndarray], num_workers: int) -> Iterator[PreparedBatch]:
    """Yield the batches in order, prepared but not encoded; with 0 workers in this process. Errors as in `encode_batches`."""
    return _run_jobs(BatchJobs(inputs, batches, None), allowed_workers(num_workers), [])


def item_bytes(inputs: EncoderInputs) -> int:
    """Return the size of a prepared item; 1 when none of the first items can be prepared.

    Raises:
        UserError: the media are in an object store, in a tar that is gone or was changed.
        OSError: the store does not answer.
    """
    batches = [np.array([row]) for row in range(min(NUM_PROBED_ITEMS, len(inputs)))]
    with closing(_run_jobs(BatchJobs(inputs, batches, None), 0, [])) as tried:
        return next((batch.items.nbytes for batch in tried if len(batch.items)), 1)


def _run_jobs(jobs: BatchJobs, num_workers: int, workers: list[Worker]) -> Generator[Any, None, None]:
    """Yield the result of each batch in order; media in an object store are copied here by this process.

    Args:
        jobs: the work.
        num_workers: processes that do it; with 0 this process does it.
        workers: gets the processes.
    """
    is_text = jobs.inputs.encoder.modality == "text"

    def media_of(number: int) -> list[Path]:
        first, last = int(jobs.batches[number][0]), int(jobs.batches[number][-1])
        return [sample.media for sample, _ in jobs.inputs.rows[first : last + 1]]

    with copied_media(jobs.inputs.manifest, [0 if is_text else len(rows) for rows in jobs.batches], media_of) as (here, copies):
        jobs = replace(jobs, inputs=replace(jobs.inputs, manifest=here))
        if num_workers:
            yield from _run_on_workers(jobs, copies, num_workers, workers)
            return
        for number in range(len(jobs.batches)):
            copies.wait(number)
            yield jobs.run(number)
            copies.drop(number)


def _with_waiting_time(results: Iterator[Any], meter: ThroughputMeter) -> Iterator[Any]:
    """Yield the results, and count the time until each is there as waiting for items."""
    while True:
        with meter.waiting("items"):
            batch = next(results, None)
        if batch is None:
            return
        yield batch


def _run_on_workers(
    jobs: BatchJobs, copies: MediaCopies, num_workers: int, workers: list[Worker]
) -> Generator[Any, None, None]:
    """Yield the result of each batch in order; the workers, which are added to the list, take turns.

    The workers share nothing, not even a lock: when one is killed, whatever it was doing, the others and this process go on.
    """
    context = multiprocessing.get_context(START_METHOD)
    num_ahead = BATCHES_PER_WORKER * num_workers
    try:
        for _ in range(num_workers):
            our_end, worker_end = context.Pipe()
            process = context.Process(
                target=_worker_main, args=(LoadedPlugins(plugins.loaded_files()), jobs, worker_end), daemon=True
            )
            process.start()
            worker_end.close()  # so that our end reports EOF when the worker ends
            workers.append(Worker(process, our_end))
        num_asked = 0
        for number in range(-1, len(jobs.batches)):  # -1 only sends the first requests
            result = None
            if number >= 0:
                process, pipe = workers[number % num_workers]
                try:
                    result = pipe.recv()
                except (EOFError, OSError) as error:
                    raise _worker_error(process, jobs, number) from error
                copies.drop(number)
            last = min(number + num_ahead, len(jobs.batches) - 1)
            while num_asked <= last and (num_asked <= number + 1 or copies.has_room()):
                copies.wait(num_asked)
                with suppress(OSError):  # of a worker that is lost: its result will be missed
                    workers[num_asked % num_workers].pipe.send(num_asked)
                num_asked += 1
            if isinstance(result, UserError):
                raise result
            if isinstance(result, WorkerTraceback):
                raise _worker_failed(result)
            if result is not None:
                yield result
    finally:
        for process, pipe in workers:
            process.kill()
            process.join()
            pipe.close()


def _worker_main(_: LoadedPlugins, jobs: BatchJobs, pipe: Connection) -> None:
    """Run the requested batches in a worker process; a thread sends each result while the next batch is computed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        # If the parent is killed, the kernel must end this process: it would go on holding the cache's lock.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(1) as sender:
        while True:
            number = pipe.recv()
            try:
                result = jobs.run(number)
            except UserError as error:
                result = error
            except Exception:  # a bug ends the worker; its traceback is shown here, and sent for a parent on another machine
                traceback.print_exc()
                sender.submit(pipe.send_bytes, ForkingPickler.dumps(WorkerTraceback(traceback.format_exc())))
                sys.exit(1)  # the parent may end this process before it could print more
            sender.submit(pipe.send_bytes, ForkingPickler.dumps(result))


def _worker_failed(sent: WorkerTraceback) -> RuntimeError:
    """Return the error for a worker that a bug has ended, with the traceback of the worker as a note."""
    error = RuntimeError("a worker process failed; what it said is above")
    error.add_note(f"The worker process says:\n{sent.text}")
    return error


def _worker_error(process: Any, jobs: BatchJobs, number: int) -> Exception:
    """Return the error for a lost worker: `UserError` when it was killed, else it has printed its own error already."""
    process.join()
    if process.exitcode >= 0:
        return _worker_failed(WorkerTraceback("it could not send its traceback"))
    signal_name = signal.Signals(-process.exitcode).name
    first = jobs.inputs.rows[int(jobs.batches[number][0])][0].id
    return UserError(
        f"a worker process was killed ({signal_name}) at sample {first!r} or a little later: is a file damaged there, "
        "or memory short? with fewer --workers the same command goes on from here"
    )


def _pinned_batches(jobs: BatchJobs, num_workers: int) -> Generator[PinnedBatch, None, None]:
    """Yield the prepared batches in pinned memory; a thread receives and pins the next one while the current one is used."""
    workers: list[Worker] = []
    if not num_workers:
        yield from map(_pinned, _run_jobs(jobs, 0, workers))
        return
    with closing(_run_jobs(jobs, num_workers, workers)) as batches, ThreadPoolExecutor(1) as thread:

        def take() -> PinnedBatch | None:
            prepared = next(batches, None)
            return prepared and _pinned(prepared)

        try:
            batch = take()  # here, so that the workers are started by this thread: with it they end
            while batch:
                upcoming = thread.submit(take)
                yield batch
                batch = upcoming.result()
        finally:
            for worker in workers:  # the thread may wait for one of them, and is waited for
                worker.process.kill()


def _pinned(prepared: PreparedBatch) -> PinnedBatch:
    items = torch.from_numpy(prepared.items)
    return PinnedBatch(prepared, items.pin_memory() if len(items) else items)


def _encode_on_gpu(
    inputs: EncoderInputs, pinned_batches: Iterator[PinnedBatch], encoder: MemorySafeEncoder
) -> Iterator[EncodedBatch]:
    """Yield encoded batches, with several in the GPU's queue: while it computes one, the next is prepared and queued."""
    queue: deque[GpuBatch] = deque()

    def finish_oldest() -> EncodedBatch:
        batch = queue.popleft()
        batch.copied.synchronize()
        seconds = batch.begun.elapsed_time(batch.copied) / 1e3
        return inputs.collect_features(batch.prepared, batch.features.numpy(), seconds)

    for batch in pinned_batches:
        queue.append(_queue_on_gpu(batch, encoder))
        if len(queue) == GPU_QUEUE_BATCHES:
            yield finish_oldest()
    while queue:
        yield finish_oldest()


def _queue_on_gpu(batch: PinnedBatch, encoder: MemorySafeEncoder) -> GpuBatch:
    """Queue the copy to the GPU, the computation and the copy back, without waiting for any of them.

    The copy back is queued before the computation of the next batch; otherwise it would have to wait for that computation.
    """
    begun, copied = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
    host_features = torch.zeros(0)
    begun.record()
    if len(batch.items):
        with torch.inference_mode():
            features = encoder(batch.items)
            host_features = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            host_features.copy_(features, non_blocking=True)
    copied.record()
    return GpuBatch(batch.prepared, host_features, begun, copied)
