"""Where the time of an extraction went, and what would make it faster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from dask.system import CPU_COUNT

from pipeline.items import Encoded

Activity = Literal["items", "disk"]
NVIDIA = Path("/dev/nvidia0")


@dataclass
class Pace:
    """Seconds by activity, over a whole extraction."""

    workers: int  # processes beside this one; 0: it does everything
    device: str  # cpu: the workers decode and encode; cuda: they decode, this process encodes
    cores: int = CPU_COUNT  # that this process may use
    prepare: float = 0.0  # of all workers together
    encode: float = 0.0
    waited: dict[Activity, float] = field(default_factory=lambda: {"items": 0.0, "disk": 0.0})  # this process
    started: float = field(default_factory=time.monotonic)

    def add(self, batch: Encoded) -> None:
        """Count a batch."""
        self.prepare += batch.prepare_seconds
        self.encode += batch.encode_seconds

    @contextmanager
    def waiting(self, what: Activity) -> Iterator[None]:
        """Count the time inside as waiting."""
        started = time.perf_counter()
        yield
        self.waited[what] += time.perf_counter() - started

    def verdict(self) -> str:
        """One line: what bound the run, how busy everything was, and the option that would help."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        disk, items = self.waited["disk"] / seconds, self.waited["items"] / seconds
        hands = max(self.workers, 1)
        if disk > 0.2:
            return f"disk-bound: the encoder waited {disk:.0%} for shards to be written: choose a faster disk with --home"
        if self.device == "cpu":
            prepare, encode = self.prepare / seconds / hands, self.encode / seconds / hands
            processes = _count(hands, "process", "processes")
            busy = f"{processes} busy {prepare + encode:.0%} (decode {prepare:.0%}, forward {encode:.0%})"
            kind = "decode-bound" if prepare > encode else "encoder-bound"
            return f"{kind}: {busy}: {self._more_hands(hands)}"
        busy = f"{_count(hands, 'worker', 'workers')} busy {self.prepare / seconds / hands:.0%}, encoder waited {items:.0%}"
        if items > 0.25:
            return f"decode-bound: {busy}: {self._more_hands(hands)}"
        return f"encoder-bound: {busy}: raise --batch-size, or spread over several GPUs with --workers-gpu"

    def _more_hands(self, hands: int) -> str:
        if hands < self.cores:
            return f"raise --workers (there are {self.cores} cores)"
        if self.device == "cpu":
            return f"all {self.cores} cores are at work; a GPU, or more machines with --scheduler, would help"
        return f"all {self.cores} cores decode; smaller pictures, or more machines with --scheduler, would help"

    def warnings(self, num_gpus: int) -> list[str]:
        """What a person who pays for GPUs wants to know."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        if self.device == "cpu" and NVIDIA.exists():
            return ["this machine has a GPU, but this torch cannot use it: install a CUDA build of torch"]
        found = []
        if self.device == "cuda" and self.waited["items"] / seconds > 0.5:
            found.append(f"the GPU was idle {self.waited['items'] / seconds:.0%} of the time")
        if self.device == "cuda" and num_gpus > 1:
            found.append(f"1 of {num_gpus} GPUs was used: --workers-gpu {','.join(map(str, range(num_gpus)))} uses all")
        return found


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def visible_gpus() -> int:
    """CUDA devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
