"""Measure how an extraction spends its time, and name the bottleneck and the option that would help."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from dask.system import CPU_COUNT

from pipeline.extraction.inputs import EncodedBatch
from pipeline.runtime.device import num_visible_gpus

logger = logging.getLogger(__name__)

WaitReason = Literal["items", "disk"]
NVIDIA_DEVICE = Path("/dev/nvidia0")
MIN_SECONDS = 20.0  # a shorter extraction mostly starts and stops: its shares of time say nothing, and it needs no advice


class Rates(NamedTuple):
    """Items per second."""

    decode: float
    encode: float


@dataclass
class ThroughputMeter:
    """Add up the seconds that a whole extraction spends on decoding, on encoding and on waiting.

    A "main process" below is one that commits shards: this process, or with dask each task that runs at the same time.
    """

    num_workers: int  # worker processes of each main process; 0: it does everything itself
    device: str  # "cpu": the workers decode and encode; "cuda": they decode, and the main process encodes
    num_cores: int = CPU_COUNT  # cores that this process may use
    num_dask_tasks: int = 0  # shards that dask encodes at the same time; 0: this process encodes, without dask
    num_items: int = 0  # items whose seconds are added up below
    prepare_seconds: float = 0.0  # decoding and tokenizing, summed over all workers
    encode_seconds: float = 0.0  # summed over all processes that run the encoder; on a GPU, the time of the GPU
    waited_seconds: dict[WaitReason, float] = field(  # summed over all main processes
        default_factory=lambda: {"items": 0.0, "disk": 0.0}
    )
    started_at: float = field(default_factory=time.monotonic)

    def add(self, batch: EncodedBatch) -> None:
        """Add the seconds of a batch."""
        self.num_items += len(batch.rows)
        self.prepare_seconds += batch.prepare_seconds
        self.encode_seconds += batch.encode_seconds

    def merge(self, other: ThroughputMeter) -> None:
        """Add the seconds that another process measured, and take over its device and the number of its workers."""
        self.device, self.num_workers = other.device, other.num_workers
        self.num_items += other.num_items
        self.prepare_seconds += other.prepare_seconds
        self.encode_seconds += other.encode_seconds
        for reason, seconds in other.waited_seconds.items():
            self.waited_seconds[reason] += seconds

    @contextmanager
    def waiting(self, reason: WaitReason) -> Iterator[None]:
        """Count the time inside the block as waiting for prepared items or for the disk."""
        started = time.perf_counter()
        yield
        self.waited_seconds[reason] += time.perf_counter() - started

    def _busy_share(self, seconds: float, num_processes: int) -> float:
        """Return `seconds`, summed over processes, as a share of the time that these processes had since the start."""
        return seconds / num_processes / max(time.monotonic() - self.started_at, 1e-9)

    @property
    def _is_long(self) -> bool:
        return time.monotonic() - self.started_at >= MIN_SECONDS

    def verdict(self) -> str:
        """Return one line: the bottleneck, how busy each part was, and the option that would help."""
        num_tasks = max(self.num_dask_tasks, 1)
        num_processes = num_tasks * max(self.num_workers, 1)
        disk = self._busy_share(self.waited_seconds["disk"], num_tasks)
        items = self._busy_share(self.waited_seconds["items"], num_tasks)
        prepare = self._busy_share(self.prepare_seconds, num_processes)
        encode = self._busy_share(self.encode_seconds, num_processes)
        if disk > 0.2:
            faster = "choose a faster disk with --home, or for --caches a store that is nearer and does not pause"
            return f"disk-bound: the encoder waited {disk:.0%} for shards to be written: {faster}"
        if self.device == "cpu":
            processes = _count(num_processes, "process", "processes")
            busy = f"{processes} busy {prepare + encode:.0%} (decode {prepare:.0%}, forward {encode:.0%})"
            bound = "decode-bound" if prepare > encode else "encoder-bound"
            return f"{bound}: {busy}: {self._worker_advice(num_processes)}"
        busy = f"{_count(num_processes, 'worker', 'workers')} busy {prepare:.0%}, encoder waited {items:.0%}"
        rates = self._rates_alone()
        if rates.decode < rates.encode if rates else items > 0.25:
            return f"decode-bound: {busy}: {self._worker_advice(num_processes)}"
        more = "take more GPUs" if self.num_dask_tasks else "spread over several GPUs with --workers-gpu"
        return f"encoder-bound: {busy}: raise --batch-size, or {more}"

    def rates(self) -> str:
        """Return one line for a GPU: how fast the workers and the GPU would be, each alone, and by how much the slower bounds.

        "" on processors, where the same processes do both, and when nothing was measured.
        """
        rates = self._rates_alone()
        if self.device == "cpu" or not rates:
            return ""
        slower = "decoding" if rates.decode < rates.encode else "the encoder"
        both = f"decoding alone {rates.decode:,.0f} items/s, the encoder alone {rates.encode:,.0f}"
        return f"{both}: {slower} bounds by {max(rates) / min(rates):.1f} times"

    def _rates_alone(self) -> Rates | None:
        """Return the items per second of the workers and of the GPU, each alone; None if nothing was measured."""
        if not (self.num_items and self.prepare_seconds and self.encode_seconds):
            return None
        num_tasks = max(self.num_dask_tasks, 1)
        decode = self.num_items * num_tasks * max(self.num_workers, 1) / self.prepare_seconds
        return Rates(decode, self.num_items * num_tasks / self.encode_seconds)

    def _worker_advice(self, num_processes: int) -> str:
        """Return how to decode faster: more workers, smaller pictures or more machines."""
        if self.num_dask_tasks:
            return "more workers of dask would help" if self.device == "cpu" else "raise --workers, or take smaller pictures"
        if num_processes < self.num_cores:
            return f"raise --workers (there are {self.num_cores} cores)"
        if self.device == "cpu":
            return f"all {self.num_cores} cores are at work; a GPU, or more machines with --scheduler, would help"
        return f"all {self.num_cores} cores decode; smaller pictures, or more machines with --scheduler, would help"

    def warnings(self, num_gpus: int) -> list[str]:
        """Return warnings about GPUs that were idle or not used.

        Args:
            num_gpus: GPUs of this machine that torch can use.
        """
        if self.device == "cpu" and not self.num_dask_tasks and NVIDIA_DEVICE.exists():
            return ["this machine has a GPU, but this torch cannot use it: install a CUDA build of torch"]
        idle = self._busy_share(self.waited_seconds["items"], max(self.num_dask_tasks, 1))
        found = []
        if self.device == "cuda" and idle > 0.5 and self._is_long:
            found.append(f"the GPU was idle {idle:.0%} of the time")
        if self.device == "cuda" and not self.num_dask_tasks and num_gpus > 1:
            found.append(f"1 of {num_gpus} GPUs was used: --workers-gpu {','.join(map(str, range(num_gpus)))} uses all")
        return found

    def log_summary(self) -> None:
        """Log the verdict and the rates, unless the extraction was short, and the warnings."""
        for line in filter(None, (self.verdict(), self.rates()) if self._is_long else ()):
            logger.info(line)
        for warning in self.warnings(num_visible_gpus()):
            logger.warning(warning)


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"
