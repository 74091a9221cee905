"""Where the time of an extraction went, and what would make it faster."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dask.system import CPU_COUNT

from pipeline.extraction.inputs import Encoded
from pipeline.runtime.device import visible_gpus

logger = logging.getLogger(__name__)

Activity = Literal["items", "disk"]
NVIDIA = Path("/dev/nvidia0")


@dataclass
class ThroughputMeter:
    """Seconds by activity, over a whole extraction."""

    workers: int  # processes beside each one that encodes; 0: it does everything
    device: str  # cpu: the workers decode and encode; cuda: they decode, the other one encodes
    cores: int = CPU_COUNT  # that this process may use
    spread: int = 0  # tasks that dask carries out at a time; 0: this process encodes
    prepare: float = 0.0  # of all workers together
    encode: float = 0.0
    waited: dict[Activity, float] = field(default_factory=lambda: {"items": 0.0, "disk": 0.0})  # of all that encode
    started: float = field(default_factory=time.monotonic)

    def add(self, batch: Encoded) -> None:
        """Count a batch."""
        self.prepare += batch.prepare_seconds
        self.encode += batch.encode_seconds

    def join(self, other: ThroughputMeter) -> None:
        """Count what another process has done."""
        self.device = other.device
        self.prepare += other.prepare
        self.encode += other.encode
        for activity, seconds in other.waited.items():
            self.waited[activity] += seconds

    @contextmanager
    def waiting(self, what: Activity) -> Iterator[None]:
        """Count the time inside as waiting."""
        started = time.perf_counter()
        yield
        self.waited[what] += time.perf_counter() - started

    def _share(self, seconds: float, hands: int) -> float:
        """Of the time that so many had."""
        return seconds / hands / max(time.monotonic() - self.started, 1e-9)

    def verdict(self) -> str:
        """One line: what bound the run, how busy everything was, and the option that would help."""
        tasks = max(self.spread, 1)
        hands = tasks * max(self.workers, 1)
        disk, items = self._share(self.waited["disk"], tasks), self._share(self.waited["items"], tasks)
        prepare, encode = self._share(self.prepare, hands), self._share(self.encode, hands)
        if disk > 0.2:
            return f"disk-bound: the encoder waited {disk:.0%} for shards to be written: choose a faster disk with --home"
        if self.device == "cpu":
            processes = _count(hands, "process", "processes")
            busy = f"{processes} busy {prepare + encode:.0%} (decode {prepare:.0%}, forward {encode:.0%})"
            kind = "decode-bound" if prepare > encode else "encoder-bound"
            return f"{kind}: {busy}: {self._more_hands(hands)}"
        busy = f"{_count(hands, 'worker', 'workers')} busy {prepare:.0%}, encoder waited {items:.0%}"
        if items > 0.25:
            return f"decode-bound: {busy}: {self._more_hands(hands)}"
        more = "take more GPUs" if self.spread else "spread over several GPUs with --workers-gpu"
        return f"encoder-bound: {busy}: raise --batch-size, or {more}"

    def _more_hands(self, hands: int) -> str:
        if self.spread:
            return "more workers of dask would help" if self.device == "cpu" else "raise --workers, or take smaller pictures"
        if hands < self.cores:
            return f"raise --workers (there are {self.cores} cores)"
        if self.device == "cpu":
            return f"all {self.cores} cores are at work; a GPU, or more machines with --scheduler, would help"
        return f"all {self.cores} cores decode; smaller pictures, or more machines with --scheduler, would help"

    def warnings(self, num_gpus: int) -> list[str]:
        """What a person who pays for GPUs wants to know; `num_gpus` are those that torch can use here."""
        if self.device == "cpu" and not self.spread and NVIDIA.exists():
            return ["this machine has a GPU, but this torch cannot use it: install a CUDA build of torch"]
        idle = self._share(self.waited["items"], max(self.spread, 1))
        found = []
        if self.device == "cuda" and idle > 0.5:
            found.append(f"the GPU was idle {idle:.0%} of the time")
        if self.device == "cuda" and not self.spread and num_gpus > 1:
            found.append(f"1 of {num_gpus} GPUs was used: --workers-gpu {','.join(map(str, range(num_gpus)))} uses all")
        return found

    def tell(self) -> None:
        """Log the verdict and the warnings."""
        logger.info(self.verdict())
        for warning in self.warnings(visible_gpus()):
            logger.warning(warning)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
