"""What an extraction reports about its speed, and how batches are cut when memory runs out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.extraction import throughput
from pipeline.extraction.inputs import EncodedBatch, MemorySafeEncoder
from pipeline.extraction.throughput import ThroughputMeter

RAISE = "raise --workers (there are 4 cores)"
ALL_AT_WORK = "all 4 cores are at work; a GPU, or more machines with --scheduler, would help"
ALL_DECODE = "all 4 cores decode; smaller pictures, or more machines with --scheduler, would help"
DISK = (
    "disk-bound: the encoder waited {} for shards to be written: choose a faster disk with --home, or for "
    "--caches a store that is nearer and does not pause"
)
GPUS = "raise --batch-size, or spread over several GPUs with --workers-gpu"


def make_meter(num_workers: int, device: str, prepare: float, encode: float, **waited: float) -> ThroughputMeter:
    """Return the meter of an extraction of 100 seconds on four cores; all other seconds are sums over processes."""
    meter = ThroughputMeter(num_workers, device, 4, started_at=time.monotonic() - 100)
    meter.add(EncodedBatch(np.arange(1), np.zeros((1, 1)), [], prepare, encode))
    meter.waited_seconds = {"items": waited.get("items", 0.0), "disk": waited.get("disk", 0.0)}
    return meter


@pytest.mark.parametrize(
    ("workers", "device", "prepare", "encode", "waited", "verdict"),
    [
        (2, "cpu", 150, 40, {}, f"decode-bound: 2 processes busy 95% (decode 75%, forward 20%): {RAISE}"),
        (4, "cpu", 300, 80, {}, f"decode-bound: 4 processes busy 95% (decode 75%, forward 20%): {ALL_AT_WORK}"),
        (0, "cpu", 10, 80, {}, f"encoder-bound: 1 process busy 90% (decode 10%, forward 80%): {RAISE}"),
        (4, "cpu", 40, 340, {}, f"encoder-bound: 4 processes busy 95% (decode 10%, forward 85%): {ALL_AT_WORK}"),
        (4, "cpu", 100, 200, {"disk": 30}, DISK.format("30%")),
        (2, "cuda", 194, 50, {"items": 41}, f"decode-bound: 2 workers busy 97%, encoder waited 41%: {RAISE}"),
        (4, "cuda", 396, 20, {"items": 80}, f"decode-bound: 4 workers busy 99%, encoder waited 80%: {ALL_DECODE}"),
        (4, "cuda", 80, 95, {"items": 3}, f"encoder-bound: 4 workers busy 20%, encoder waited 3%: {GPUS}"),
        (4, "cuda", 80, 95, {"disk": 60}, DISK.format("60%")),
    ],
)
def test_the_verdict_names_the_bottleneck_and_the_remedy(
    workers: int, device: str, prepare: float, encode: float, waited: dict[str, float], verdict: str
) -> None:
    assert make_meter(workers, device, prepare, encode, **waited).verdict() == verdict


@pytest.mark.parametrize(
    ("workers", "device", "prepare", "encode", "rates"),
    [
        (4, "cuda", 200, 25, "decoding alone 20 items/s, the encoder alone 40: decoding bounds by 2.0 times"),
        (
            0,
            "cuda",
            0.1,
            0.25,
            "decoding alone 10,000 items/s, the encoder alone 4,000: the encoder bounds by 2.5 times",
        ),
        (4, "cpu", 200, 25, ""),
        (4, "cuda", 0, 25, ""),
    ],
)
def test_on_a_gpu_the_rates_of_both_sides_are_told(
    workers: int, device: str, prepare: float, encode: float, rates: str
) -> None:
    meter = ThroughputMeter(workers, device)
    for _ in range(10):
        meter.add(EncodedBatch(np.arange(100), np.zeros((100, 1)), [], prepare / 10, encode / 10))
    assert meter.rates() == rates


@pytest.mark.parametrize("waited", [0, 20, 24, 26, 60])
@pytest.mark.parametrize(("prepare", "encode"), [(100, 30), (100, 24), (40, 60), (0, 60)])
def test_both_lines_about_a_gpu_name_the_same_bottleneck(prepare: float, encode: float, waited: float) -> None:
    """Where there are no rates, the encoder's waiting decides."""
    meter = make_meter(4, "cuda", prepare, encode, items=waited)
    decodes = "decoding bounds" in meter.rates() if meter.rates() else waited > 25
    assert meter.verdict().startswith("decode-bound" if decodes else "encoder-bound")


def test_idle_and_unused_gpus_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_meter(4, "cuda", 300, 95, items=3).warnings(num_gpus=1) == []
    assert make_meter(4, "cuda", 300, 40, items=60).warnings(num_gpus=1) == ["the GPU was idle 60% of the time"]
    assert make_meter(4, "cuda", 300, 95).warnings(num_gpus=4) == ["1 of 4 GPUs was used: --workers-gpu 0,1,2,3 uses all"]
    assert len(make_meter(4, "cuda", 300, 40, items=60).warnings(num_gpus=2)) == 2
    monkeypatch.setattr(throughput, "NVIDIA_DEVICE", tmp_path / "nvidia0")
    assert make_meter(4, "cpu", 300, 95).warnings(num_gpus=0) == []
    (tmp_path / "nvidia0").touch()
    (warning,) = make_meter(4, "cpu", 300, 95).warnings(num_gpus=0)
    assert warning == "this machine has a GPU, but this torch cannot use it: install a CUDA build of torch"


@pytest.mark.parametrize(("seconds", "is_told"), [(19, False), (21, True)])
def test_a_short_extraction_gets_no_advice(seconds: float, is_told: bool, caplog: pytest.LogCaptureFixture) -> None:
    meter = make_meter(2, "cuda", 30, 1, items=15)
    meter.started_at = time.monotonic() - seconds
    with caplog.at_level("INFO", logger=throughput.__name__):
        meter.log_summary()
    assert (RAISE in caplog.text) == is_told
    assert ("the GPU was idle" in caplog.text) == is_told


@pytest.mark.parametrize("reason", ["items", "disk"])
def test_waiting_is_timed(reason: Literal["items", "disk"]) -> None:
    meter = ThroughputMeter(0, "cpu")
    with meter.waiting(reason):
        time.sleep(0.05)
    assert 0.05 <= meter.waited_seconds.pop(reason) < 1
    assert list(meter.waited_seconds.values()) == [0]


def small_memory(room: int, seen: list[int]) -> MemorySafeEncoder:
    """Return an encoder whose memory holds `room` items; it starts with 16 at once and appends each batch size to `seen`."""

    def encode(batch: Tensor) -> Tensor:
        seen.append(len(batch))
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.stack([batch.sum(dim=1), batch.prod(dim=1)], dim=1)

    return MemorySafeEncoder(encode, 16)


@pytest.mark.parametrize(("room", "max_items"), [(16, 16), (15, 8), (8, 8), (7, 4), (3, 2), (1, 1)])
def test_a_batch_that_does_not_fit_is_halved_and_stays_so(room: int, max_items: int) -> None:
    items = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    encoder = small_memory(room, seen)
    for batch in items.split(16):
        expected = torch.stack([batch.sum(dim=1), batch.prod(dim=1)], dim=1)
        assert torch.equal(encoder(batch), expected)
    assert encoder.max_items == max_items
    too_large = [size for size in seen if size > room]
    assert too_large == seen[: len(too_large)]  # only at the beginning
    assert too_large == [16, 8, 4, 2][: len(too_large)]
    assert set(seen[len(too_large) :]) <= {max_items, 16 % max_items, 8 % max_items} | {min(max_items, 8)}


def test_a_short_batch_halves_from_its_own_size() -> None:
    seen: list[int] = []
    encoder = small_memory(2, seen)
    encoder(torch.ones(5, 3))
    assert (encoder.max_items, seen) == (2, [5, 2, 2, 1])


def test_an_item_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="one item alone does not fit into memory; take --set compute_dtype=bfloat16"):
        small_memory(0, [])(torch.ones(5, 3))
