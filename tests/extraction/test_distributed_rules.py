"""Rules of an extraction with dask: failures, locks, fresh plans, no encoder in the client, and clear messages."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import re
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dask.distributed import Client, Worker
from distributed.comm.core import CommClosedError
from helpers.clusters import FailSomeTexts, FailWhileOtherWorks, process_cluster, run_when, texts_spec
from helpers.fault_cases import cache_content, extract_texts, num_commits, write_texts

from pipeline.cache import open_cache, verify
from pipeline.extraction import extract as extraction
from pipeline.extraction import throughput
from pipeline.extraction.distributed import extract_on_cluster
from pipeline.runtime.executor import _result, cuda_visible_devices
from pipeline.runtime.files import lock, lock_shared

NUM_SHARDS = 8


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with process_cluster(2) as client:
        yield client


def test_the_client_builds_no_encoder_and_logs_the_bottleneck(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU an encoder in the client would take memory that the workers need."""
    expected = cache_content(extract_texts(write_texts(tmp_path, 170), tmp_path / "whole"))
    monkeypatch.setattr(extraction, "build_encoder", None)
    monkeypatch.setattr(throughput, "MIN_SECONDS", 0)
    assert cache_content(extract_on_cluster(client, texts_spec(tmp_path, progress=True))) == expected
    assert re.search(
        r"\n(\w+-bound: 2 processes busy \d.*: more workers of dask would help|disk-bound: .*)\n$", capsys.readouterr().err
    )


def test_workers_plan_every_run_afresh(client: Client, tmp_path: Path) -> None:
    """Workers live on when the manifest is written anew."""
    first = extract_on_cluster(client, texts_spec(tmp_path)) if write_texts(tmp_path, 40) else None
    texts = write_texts(tmp_path, 45)
    second = extract_on_cluster(client, texts_spec(tmp_path))
    assert second != first
    assert cache_content(second) == cache_content(extract_texts(texts, tmp_path / "whole"))


def test_a_shard_with_too_many_failures_is_not_committed(tmp_path: Path) -> None:
    texts = write_texts(tmp_path, 60)
    with process_cluster(2) as client:
        client.register_plugin(FailSomeTexts())
        for _ in range(2):
            with pytest.raises(ValueError, match=r"\d+ of 1440 items failed, more than --max-failures 0\.05 allows"):
                extract_on_cluster(client, texts_spec(tmp_path))
            wait_until_idle(client)
        (path,) = (tmp_path / "caches" / "texts").iterdir()
        assert num_commits(path) < 3
        with pytest.raises(ValueError, match="is incomplete"):
            open_cache(path)
        assert extract_on_cluster(client, texts_spec(tmp_path, max_failures=0.12)) == path
    assert verify(path) == []
    assert open_cache(path).failed_ids == {sample.id for sample in texts.samples if sample.texts}


def test_workers_that_go_on_after_an_error_keep_the_cache_locked(tmp_path: Path) -> None:
    """Dask cannot stop a worker that has begun a shard."""
    write_texts(tmp_path, 340)
    with process_cluster(2) as client:
        client.register_plugin(FailWhileOtherWorks(tmp_path))
        with pytest.raises(KeyError, match="a mistake") as raised:
            extract_on_cluster(client, texts_spec(tmp_path))
        assert "_fail" in {frame.name for frame in raised.traceback}  # the worker's part of the traceback
        (path,) = (tmp_path / "caches" / "texts").iterdir()
        before = num_commits(path)
        with pytest.raises(ValueError, match="another process is writing"), lock(path):
            pass
        (tmp_path / "go").touch()
        wait_until_free(path)
        after = num_commits(path)
        assert before < after < 2 * NUM_SHARDS
    assert len(list((path / "features").glob("c/*/0"))) == num_commits(path) == after


def wait_until_idle(client: Client) -> None:
    """Wait: the workers may begin another shard before they hear that the extraction has failed."""

    def is_idle() -> bool:
        tasks: Any = client.run(num_tasks)  # by worker
        return not any(tasks.values())

    run_when(is_idle, lambda: None).join(60)


def num_tasks(dask_worker: Worker) -> int:
    return len(dask_worker.state.tasks)


def wait_until_free(path: Path) -> None:
    """Wait: after a failure the workers go on to the end of their shard."""
    run_when(lambda: is_free(path), lambda: None).join(60)


def is_free(path: Path) -> bool:
    try:
        with lock(path):
            return True
    except ValueError:
        return False


def test_shared_locks_keep_an_exclusive_lock_out(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(ValueError, match="another process is writing"), lock_shared(tmp_path):
        pass
    with lock_shared(tmp_path), lock_shared(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        CancelledError(),
        asyncio.CancelledError(),
        CommClosedError("in <TCP (closed)>"),
        ConnectionRefusedError(),
        TimeoutError("Timed out trying to connect"),
    ],
)
def test_a_lost_scheduler_is_one_line_however_it_is_noticed(error: BaseException) -> None:
    def result() -> None:
        raise error

    future: Any = SimpleNamespace(result=result, status="cancelled")
    with pytest.raises(ValueError, match=r"^the scheduler was lost; the same command goes on from here$"):
        _result(future, "shard 0")


def test_a_full_disk_of_a_worker_is_no_lost_scheduler() -> None:
    def result() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/home/x")

    future: Any = SimpleNamespace(result=result, status="error")
    with pytest.raises(OSError, match="No space left") as raised:
        _result(future, "shard 0")
    assert raised.value.filename == "/home/x"


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "visible", "expected"),
    [
        ([0, 1], 4, "", ["0", "1"]),
        ([3], 4, "", ["3"]),
        ([0, 1], 2, "2,3", ["2", "3"]),
        ([1], 2, "GPU-5f, GPU-77", ["GPU-77"]),
        ([0], 1, "1,-1,2", ["1"]),
    ],
)
def test_gpus_are_counted_among_those_that_may_be_seen(
    gpus: list[int], num_gpus: int, visible: str, expected: list[str]
) -> None:
    assert cuda_visible_devices(gpus, num_gpus, visible) == expected


@pytest.mark.parametrize(("gpu", "num_gpus"), [(0, 0), (2, 2), (-1, 2)])
def test_a_gpu_that_is_not_there_is_named(gpu: int, num_gpus: int) -> None:
    with pytest.raises(ValueError, match=f"--workers-gpu names GPU {gpu}, but torch sees {num_gpus}"):
        cuda_visible_devices([gpu], num_gpus, "4,5")


def test_seconds_of_all_workers_make_one_verdict() -> None:
    """Two dask tasks of two workers each ran for 100 seconds."""
    meter = extraction.ThroughputMeter(2, "cpu", num_cores=4, num_dask_tasks=2)
    meter.started_at -= 100
    for _ in range(2):
        worker_meter = extraction.ThroughputMeter(2, "cuda")
        worker_meter.prepare_seconds, worker_meter.encode_seconds = 150.0, 60.0
        worker_meter.waited_seconds = {"items": 60.0, "disk": 5.0}
        meter.merge(worker_meter)
    assert meter.verdict() == (
        "decode-bound: 4 workers busy 75%, encoder waited 60%: raise --workers, or take smaller pictures"
    )
    assert meter.warnings(num_gpus=2) == ["the GPU was idle 60% of the time"]
    assert dataclasses.replace(meter, waited_seconds={"items": 0.0, "disk": 0.0}).verdict() == (
        "encoder-bound: 4 workers busy 75%, encoder waited 0%: raise --batch-size, or take more GPUs"
    )
