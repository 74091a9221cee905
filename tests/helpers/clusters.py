"""Clusters of dask for tests, an order for them, and plug-ins that change what their workers do."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dask.config as dask_config
from dask.distributed import Client, WorkerPlugin
from distributed.utils import get_mp_context
from torch import Tensor

from helpers.fault_cases import SHARD_ROWS, TEXT
from pipeline.encoders.random_projection import RandomProjection
from pipeline.extraction.distributed import ExtractionSpec
from pipeline.extraction.extract import ExtractOptions
from pipeline.runtime.executor import local_cluster


@contextmanager
def cluster(num_workers: int) -> Iterator[Client]:
    """A cluster of processes that share nothing with this one, made by one that has imported torch for all of them."""
    with dask_config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context().set_forkserver_preload(["pipeline.extraction.distributed", "pipeline.encoders.random_projection"])
        with local_cluster([{"OMP_NUM_THREADS": "1"}] * num_workers) as client:
            yield client


def order_for(home: Path, **changes: object) -> ExtractionSpec:
    """An order for the texts of a home, with changes of its effort."""
    effort = ExtractOptions(workers=0, shard_rows=SHARD_ROWS, progress=False)
    return ExtractionSpec(
        home=home,
        dataset="texts",
        encoder="random_projection",
        settings=tuple(sorted(TEXT.items())),
        store_dtype="float16",
        compiled=False,
        effort=dataclasses.replace(effort, **changes),
    )


def when(ready: Callable[[], bool], action: Callable[[], object]) -> threading.Thread:
    """Do something as soon as it is time for it, in the background."""

    def wait() -> None:
        while not ready():
            time.sleep(0.001)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def instead(text: str, action: Callable[[], object]) -> None:
    """From now on this process does something before it prepares a text; "": before every one."""
    prepare = RandomProjection.prepare

    def prepare_otherwise(self: RandomProjection, raw: Path | str) -> Tensor:
        if raw == text or not text:
            action()
        return prepare(self, raw)

    RandomProjection.prepare = prepare_otherwise


class Poison(WorkerPlugin):
    """Lets one text bring down the process that reads it."""

    name = "poison"

    def setup(self, worker: object) -> None:
        instead("200: 07", lambda: os.kill(os.getpid(), signal.SIGKILL))


class Illegible(WorkerPlugin):
    """Lets some of every sample's texts fail."""

    name = "illegible"

    def setup(self, worker: object) -> None:
        prepare = RandomProjection.prepare

        def refuse(self: RandomProjection, raw: Path | str) -> Tensor:
            if str(raw).endswith("3"):
                raise ValueError("illegible")
            return prepare(self, raw)

        RandomProjection.prepare = refuse


@dataclasses.dataclass
class Fault(WorkerPlugin):
    """Lets the shard of one text fail as soon as another worker has come to another text, where it stays for a while."""

    folder: Path  # where the workers tell each other
    name = "fault"

    def setup(self, worker: object) -> None:
        come, go = self.folder / "come", self.folder / "go"
        instead("001: 00", lambda: wait_for(come) or _fail())
        instead("200: 07", lambda: come.touch() or wait_for(go))


def _fail() -> None:
    raise KeyError("a mistake")


def wait_for(file: Path) -> None:
    """Until somebody has made it; a minute at most."""
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
