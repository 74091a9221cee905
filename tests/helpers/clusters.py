"""Dask clusters for tests, a spec for them, and worker plug-ins that cause faults."""

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

from helpers.fault_cases import SHARD_ROWS, TEXT_SETTINGS
from pipeline.encoders.random_projection import RandomProjection
from pipeline.extraction.distributed import ExtractionSpec
from pipeline.extraction.extract import ExtractOptions
from pipeline.runtime.executor import local_cluster


@contextmanager
def process_cluster(num_workers: int) -> Iterator[Client]:
    """A cluster of processes that share no memory with this one; a fork server that has imported torch starts them.

    The user has settings for an encrypted network, which do not concern the processes of this machine.
    """
    settings = {"distributed.worker.multiprocessing-method": "forkserver", "distributed.comm.require-encryption": True}
    with dask_config.set(settings):
        get_mp_context().set_forkserver_preload(["pipeline.extraction.distributed", "pipeline.encoders.random_projection"])
        with local_cluster([{"OMP_NUM_THREADS": "1"}] * num_workers) as client:
            yield client


def texts_spec(home: Path, **changes: object) -> ExtractionSpec:
    """The spec that extracts the texts of a home, with changed options."""
    options = ExtractOptions(workers=0, shard_rows=SHARD_ROWS, progress=False)
    return ExtractionSpec(
        home=home,
        dataset="texts",
        encoder="random_projection",
        settings=tuple(sorted(TEXT_SETTINGS.items())),
        store_dtype="float16",
        compiled=False,
        options=dataclasses.replace(options, **changes),
    )


def run_when(is_ready: Callable[[], bool], action: Callable[[], object]) -> threading.Thread:
    """Wait in a background thread until `is_ready` returns true, then run the action."""

    def wait() -> None:
        while not is_ready():
            time.sleep(0.001)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def before_preparing(text: str, action: Callable[[], object]) -> None:
    """Make this process run an action before it prepares this text; with "" before every text."""
    prepare = RandomProjection.prepare

    def prepare_after_action(self: RandomProjection, raw: Path | str) -> Tensor:
        if raw == text or not text:
            action()
        return prepare(self, raw)

    RandomProjection.prepare = prepare_after_action


class KillOnText(WorkerPlugin):
    """Kills the process that prepares one certain text."""

    name = "kill-on-text"

    def setup(self, worker: object) -> None:
        before_preparing("200: 07", lambda: os.kill(os.getpid(), signal.SIGKILL))


class FailSomeTexts(WorkerPlugin):
    """Makes every text that ends in 3 fail."""

    name = "fail-some-texts"

    def setup(self, worker: object) -> None:
        prepare = RandomProjection.prepare

        def refuse(self: RandomProjection, raw: Path | str) -> Tensor:
            if str(raw).endswith("3"):
                raise ValueError("illegible")
            return prepare(self, raw)

        RandomProjection.prepare = refuse


@dataclasses.dataclass
class FailWhileOtherWorks(WorkerPlugin):
    """Makes one worker's shard fail while another worker is in the middle of its shard, and waits there for the file `go`."""

    folder: Path  # holds the files by which the workers wait for each other
    name = "fail-while-other-works"

    def setup(self, worker: object) -> None:
        is_waiting, go = self.folder / "is_waiting", self.folder / "go"
        before_preparing("001: 00", lambda: wait_for_file(is_waiting) or _fail())
        before_preparing("200: 07", lambda: is_waiting.touch() or wait_for_file(go))


def _fail() -> None:
    raise KeyError("a mistake")


def wait_for_file(file: Path) -> None:
    """Wait until the file exists, at most a minute."""
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
