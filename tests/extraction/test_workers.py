"""Batches depend on the cache alone, memory decides only how many items are encoded at once, and errors stop at once."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fault_cases import FORK, SHARD_ROWS, TEXT_SETTINGS, cache_content, extract_texts, wait_for_exit, write_texts
from torch import Tensor

from pipeline.cache import layout
from pipeline.cache.writer import Writer
from pipeline.data.manifest import Manifest
from pipeline.encoders.random_projection import RandomProjection
from pipeline.extraction import workers
from pipeline.extraction.extract import (
    ExtractionTask,
    ExtractOptions,
    encode_shards,
    extract,
    gpu_batch_size,
    plan_extraction,
    start_or_resume,
)
from pipeline.extraction.inputs import EncodedBatch, EncoderInputs, MemorySafeEncoder
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import allowed_workers, encode_batches, item_bytes

NUM_SHARDS = 8


@pytest.fixture
def texts(tmp_path: Path) -> Manifest:
    return write_texts(tmp_path, 170)


def test_memory_that_runs_out_changes_no_batch(texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cache_content(extract_texts(texts, tmp_path / "whole"))
    forward, cut_batches = RandomProjection.forward, EncoderInputs.batches
    sizes: list[int] = []

    def small(self: RandomProjection, items: Tensor) -> Tensor:
        if len(items) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, items)

    def batches(self: EncoderInputs, rows: range, batch_size: int) -> list[np.ndarray]:
        sizes.append(batch_size)
        return cut_batches(self, rows, batch_size)

    monkeypatch.setattr(RandomProjection, "forward", small)
    monkeypatch.setattr(EncoderInputs, "batches", batches)
    assert cache_content(extract_texts(texts, tmp_path)) == expected
    assert sizes == [16] * NUM_SHARDS


def test_the_slice_that_failed_is_halved() -> None:
    """The last slice of a batch may be small: half of the size of the others may still be larger than it."""
    seen: list[int] = []
    rooms = iter([16, 3, 3, 3])

    def encode(items: Tensor) -> Tensor:
        seen.append(len(items))
        if len(items) > next(rooms):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return items

    encoder = MemorySafeEncoder(encode, 16)
    items = torch.arange(20.0)[:, None]
    assert torch.equal(encoder(items), items)
    assert (encoder.max_items, seen) == (2, [16, 4, 2, 2])


def test_the_memory_cache_is_emptied_after_the_failed_tensors_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    activation_refs: list[weakref.ref[Tensor]] = []
    released: list[bool] = []

    def encode(items: Tensor) -> Tensor:
        activations = items * 2
        if len(items) > 4:
            activation_refs.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return activations

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: released.append(activation_refs[-1]() is None))
    assert len(MemorySafeEncoder(encode)(torch.ones(16, 3))) == 16
    assert released == [True, True]


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [((3, 224, 224), 1, 256), ((16, 3, 224, 224), 4, 55), ((77,), 8, 256), ((64, 3, 1024, 1024), 4, 1)],
)
def test_a_batch_of_clips_has_fewer_items(shape: tuple[int, ...], itemsize: int, expected: int) -> None:
    assert gpu_batch_size(int(np.prod(shape)) * itemsize) == expected


def test_an_item_is_measured_when_one_can_be_prepared(tiny_manifest: Manifest, tmp_path: Path) -> None:
    task = plan_extraction(tiny_manifest, "random_projection", {}, tmp_path, "float16", False, ExtractOptions())
    assert item_bytes(task.inputs) == task.inputs.prepare(np.arange(1)).items.nbytes == 3 * 16 * 16 * 4
    assert task.target.provenance["batch_size"] == 16


def extract_as_daemon(texts: Manifest, home: Path) -> None:
    """Extract with two workers in a daemonic process, which may have no children."""
    assert multiprocessing.current_process().daemon
    assert allowed_workers(2) == 0
    extract(
        texts,
        "random_projection",
        TEXT_SETTINGS,
        home,
        options=ExtractOptions(workers=2, shard_rows=SHARD_ROWS, progress=False),
    )


def test_a_daemonic_process_does_everything_itself(texts: Manifest, tmp_path: Path) -> None:
    """A dask worker that was started with defaults is such a process."""
    process = FORK.Process(target=extract_as_daemon, args=(texts, tmp_path), daemon=True)
    process.start()
    assert wait_for_exit(process) == 0
    (path,) = (tmp_path / "caches" / "texts").iterdir()
    assert cache_content(path) == cache_content(extract_texts(texts, tmp_path / "whole"))
    assert allowed_workers(2) == 2


def test_a_full_disk_stops_before_the_next_shard_is_encoded(
    texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RandomProjection.forward
    encoded: list[int] = []

    def slow(self: RandomProjection, items: Tensor) -> Tensor:
        encoded.append(len(items))
        time.sleep(0.002)
        return forward(self, items)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RandomProjection, "forward", slow)
    monkeypatch.setattr(Writer, "commit", full)
    with pytest.raises(OSError, match="No space left on device"):
        extract_texts(texts, tmp_path)
    assert SHARD_ROWS <= sum(encoded) < 2 * SHARD_ROWS


def test_workers_and_this_process_encode_alike(texts: Manifest, tmp_path: Path) -> None:
    task: ExtractionTask = plan_extraction(
        texts, "random_projection", TEXT_SETTINGS, tmp_path, "float16", False, ExtractOptions()
    )
    batches = task.batches(range(100))
    alone, with_workers = (
        [batch.features for batch in encode_batches(task.inputs, batches, task.encoder, ThroughputMeter(num_workers, "cpu"))]
        for num_workers in (0, 3)
    )
    assert len(batches) == 7
    assert all(np.array_equal(one, other) for one, other in zip(alone, with_workers, strict=True))


@pytest.mark.parametrize(
    "change",
    [{"stage": 3}, {"row": True}, {"row": "1"}, {"error": None}, {"more": 1}],
)
def test_a_record_of_other_types_is_damaged(texts: Manifest, tmp_path: Path, change: dict[str, Any]) -> None:
    """Even when its checksum is right."""
    path = extract_texts(texts, tmp_path)
    record = layout.read_record(layout.commit_path(path, 0))
    failure = {"row": 1, "id": "s001", "stage": "prepare", "error": "cut off", **change}
    layout.write_record(layout.commit_path(path, 0), {**record, "failures": [failure]})
    with pytest.raises(ValueError, match=r"00000.json is no record of a shard \(.*"):
        layout.read_commit(path, 0)
    for wrong in ({**record, "rows": "512"}, {**record, "failures": 3}, {"shard": 0}):
        layout.write_record(layout.commit_path(path, 0), wrong)
        with pytest.raises(ValueError, match=r"00000.json is no record of a shard \(.*"):
            layout.read_commit(path, 0)
    assert cache_content(extract_texts(texts, tmp_path))


class Event:
    """Stands for an event of a GPU: both of a batch are 50 ms apart."""

    number = 0

    def __init__(self, **_: bool) -> None:
        self.time = 0

    def record(self) -> None:
        Event.number += 1
        self.time = Event.number

    def synchronize(self) -> None:
        assert self.time

    def elapsed_time(self, later: Event) -> float:
        assert later.time == self.time + 1
        return 50.0


def play_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let this process play a GPU: pinned memory is ordinary memory, and nothing runs in the background.

    Returns:
        How many items were pinned each time.
    """
    make_empty, pinned = torch.empty, list[int]()
    monkeypatch.setattr(workers, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(len(tensor)) or tensor)
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **form: make_empty(*shape, **form))
    return pinned


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_gpu_encodes_is_what_a_processor_does(
    num_workers: int, texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = plan_extraction(texts, "random_projection", TEXT_SETTINGS, tmp_path, "float16", False, ExtractOptions())
    batches = task.batches(range(40))

    def features(meter: ThroughputMeter) -> list[np.ndarray]:
        return [batch.features for batch in encode_batches(task.inputs, batches, task.encoder, meter)]

    expected, pinned = features(ThroughputMeter(0, "cpu")), play_a_gpu(monkeypatch)
    meter = ThroughputMeter(num_workers, "cuda")
    found = []
    for batch in encode_batches(task.inputs, batches, task.encoder, meter):
        meter.add(batch)
        found.append(batch.features)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)
    assert pinned == [len(batch) for batch in batches]
    assert meter.encode_seconds == pytest.approx(0.05 * len(batches))
    assert meter.num_items == 40


def fail_after_one(encoded: Iterator[EncodedBatch]) -> None:
    next(encoded)
    raise ZeroDivisionError


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A shell starts its background jobs, of which the tests may be one, with SIGINT ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("end", ["closed early", "error of the encoder", "error of the consumer", "Ctrl-C while it waits"])
def test_an_end_does_not_wait_for_stuck_workers(
    end: str, on_gpu: bool, texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch takes a minute in its worker; whatever ends the extraction before, the workers end at once."""
    task = plan_extraction(texts, "random_projection", TEXT_SETTINGS, tmp_path, "float16", False, ExtractOptions())
    prepare = EncoderInputs.prepare

    def slow(self: EncoderInputs, rows: np.ndarray) -> Any:
        if rows[0]:
            time.sleep(60)
        return prepare(self, rows)

    def fail(_: Any) -> Tensor:
        raise ArithmeticError("a bug")

    monkeypatch.setattr(EncoderInputs, "prepare", slow)
    if on_gpu:
        play_a_gpu(monkeypatch)
        monkeypatch.setattr(workers, "GPU_QUEUE_BATCHES", 1)
    encoder = MemorySafeEncoder(fail) if end == "error of the encoder" else task.encoder
    encoded = encode_batches(task.inputs, task.batches(range(80)), encoder, ThroughputMeter(2, "cuda"))
    main_thread, children = threading.main_thread().ident, set(multiprocessing.active_children())
    assert main_thread
    interrupt = threading.Timer(0.3, signal.pthread_kill, (main_thread, signal.SIGINT))
    began = time.monotonic()
    if end == "closed early":
        next(encoded)
        encoded.close()
    elif end == "error of the encoder":
        with pytest.raises((ArithmeticError, RuntimeError)):
            next(encoded)
    elif end == "error of the consumer":
        with pytest.raises(ZeroDivisionError), closing(encoded):
            fail_after_one(encoded)
    else:
        next(encoded)
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            next(encoded)
    assert time.monotonic() - began < 1
    assert set(multiprocessing.active_children()) <= children


def test_an_error_where_batches_are_used_ends_the_workers(
    texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while its traceback, which refers to the generator, is alive."""
    task = plan_extraction(texts, "random_projection", TEXT_SETTINGS, tmp_path, "float16", False, ExtractOptions())
    writer, _ = start_or_resume(task.target)
    children = set(multiprocessing.active_children())

    def fail(_: Any) -> None:
        raise ArithmeticError("a bug")

    with pytest.raises(ArithmeticError):
        next(encode_shards(task, writer, [0], ThroughputMeter(2, "cpu"), fail))
    assert set(multiprocessing.active_children()) <= children
