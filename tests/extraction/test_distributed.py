"""A cache that dask workers write has the same bytes as that of one process, whatever is killed."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dask.distributed import Client, Scheduler, Worker
from helpers.clusters import KillOnText, before_preparing, process_cluster, run_when, texts_spec
from helpers.fault_cases import TEXT_SETTINGS, cache_content, extract_texts, num_commits, write_texts

from pipeline.cache import verify
from pipeline.data.manifest import Manifest
from pipeline.extraction.distributed import ExtractionSpec, dispatch_extraction, extract_on_cluster

NUM_WORKERS = 4
NUM_SHARDS = 16


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with process_cluster(NUM_WORKERS) as client:
        yield client


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_texts(tmp_path_factory.mktemp("texts"), 340)


@pytest.fixture(scope="module")
def whole(texts: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that one process wrote."""
    return extract_texts(texts, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def spec(tmp_path: Path) -> ExtractionSpec:
    """A spec for a home of its own."""
    write_texts(tmp_path, 340)
    return texts_spec(tmp_path)


def pids_of(client: Client) -> list[int]:
    """Return the process ids of a cluster's workers."""
    answers: Any = client.run(os.getpid)
    return list(answers.values())


def test_four_processes_and_two_workers_write_the_bytes_of_one_process(
    client: Client, texts: Manifest, whole: Path, spec: ExtractionSpec, tmp_path: Path
) -> None:
    assert len({*pids_of(client), os.getpid()}) == NUM_WORKERS + 1
    path = extract_on_cluster(client, spec)
    assert cache_content(path) == cache_content(whole)
    assert verify(path) == []
    assert cache_content(extract_texts(texts, tmp_path / "two", workers=2)) == cache_content(whole)


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_a_killed_worker_is_replaced(
    after: int, client: Client, spec: ExtractionSpec, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = spec.home / "caches" / "texts" / whole.name
    pids = pids_of(client)
    committed: list[int] = []

    def kill() -> None:
        committed.append(num_commits(path))
        os.kill(pids[after % len(pids)], signal.SIGKILL)

    thread = run_when(lambda: num_commits(path) >= after and path.is_dir(), kill)
    assert extract_on_cluster(client, spec) == path
    thread.join()
    assert cache_content(path) == cache_content(whole)
    assert committed[0] < NUM_SHARDS
    with capsys.disabled():
        print(f"\na worker of dask was killed when {committed[0]} of {NUM_SHARDS} shards were committed: the same bytes")


@pytest.mark.parametrize(
    ("children", "message"),
    [
        (0, r"4 workers died of shard \d+ of random_projection-"),
        (1, r"a worker process was killed \(SIGKILL\) at sample 's\d{3}'"),
    ],
)
def test_a_text_that_kills_every_worker_is_named(
    children: int, message: str, spec: ExtractionSpec, texts: Manifest, whole: Path
) -> None:
    spec_with_children = dataclasses.replace(spec, options=dataclasses.replace(spec.options, workers=children))
    with process_cluster(2) as client:
        client.register_plugin(KillOnText())
        with pytest.raises(ValueError, match=message) as raised:
            extract_on_cluster(client, spec_with_children)
    assert "\n" not in str(raised.value)
    assert 0 < num_commits(spec.home / "caches" / "texts" / whole.name) < NUM_SHARDS
    assert cache_content(extract_texts(texts, spec.home)) == cache_content(whole)


def serve(address: Any) -> None:
    """Run a scheduler with one worker that never ends a certain text, until killed; send its address through a pipe."""
    forever = threading.Event()

    async def run() -> None:
        before_preparing("200: 07", forever.wait)
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler, Worker(scheduler.address, nthreads=1):
            address.send(scheduler.address)
            await scheduler.finished()

    asyncio.run(run())


def test_a_scheduler_elsewhere_may_be_lost(spec: ExtractionSpec, texts: Manifest, whole: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(sender,), daemon=True)
    server.start()
    address = receiver.recv()
    path = spec.home / "caches" / "texts" / whole.name
    thread = run_when(lambda: num_commits(path) >= 2, server.kill)
    with pytest.raises(ValueError, match="the scheduler was lost; the same command goes on from here"):
        dispatch_extraction(address, [], spec.home, "texts", spec.encoder, TEXT_SETTINGS, "float16", False, spec.options)
    thread.join()
    assert 2 <= num_commits(path) < NUM_SHARDS
    assert cache_content(extract_texts(texts, spec.home)) == cache_content(whole)
