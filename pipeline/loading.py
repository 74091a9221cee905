"""Batches of features in order, as fast as the machine: on processors every worker decodes and encodes, a GPU encodes alone.

A processor encodes on one thread per worker: no core waits for another, and the bits of a feature do not depend on how many
workers there are.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.devices import default_device
from pipeline.items import Encoded, Forward, Items, Prepared
from pipeline.pace import Pace

FORK = "fork" if sys.platform == "linux" else "spawn"  # forked workers start at once and share the encoder's memory
IN_FLIGHT = 2  # batches on their way through the GPU


@dataclass(frozen=True)
class Work:
    """The batches as a dataset of torch: an item is a batch, prepared, or with a `forward` encoded too."""

    items: Items
    batches: Sequence[np.ndarray]
    forward: Forward | None

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Prepared | Encoded:
        prepared = self.items.prepare(self.batches[number])
        return encode(self.items, prepared, self.forward) if self.forward else prepared


def encode(items: Items, prepared: Prepared, forward: Forward) -> Encoded:
    """The features of a batch, here and now, on one thread."""
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        encoded = _numbers(_launch(prepared, forward))
    finally:
        torch.set_num_threads(threads)
    return items.settle(prepared, encoded, time.perf_counter() - started)


def encoded_batches(items: Items, batches: Sequence[np.ndarray], forward: Forward, pace: Pace) -> Iterator[Encoded]:
    """The features of the batches, in order; `pace.workers` processes work ahead (0: everything happens here).

    `ValueError` when a worker is killed, by a damaged file that brings a decoder down, or for lack of memory.
    """
    on_gpu = default_device().type == "cuda"
    loader = DataLoader(
        cast("Dataset[Any]", Work(items, batches, None if on_gpu else forward)),
        batch_size=None,
        num_workers=pace.workers,
        multiprocessing_context=FORK if pace.workers else None,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its own, so that nobody's random numbers move
    )
    ready = _careful(iter(loader), pace, items, batches)
    yield from _through_gpu(items, ready, forward) if on_gpu else ready


def _as_it_is(batch: Any) -> Any:
    return batch


def _careful(ready: Iterator[Any], pace: Pace, items: Items, batches: Sequence[np.ndarray]) -> Iterator[Any]:
    """Count the waiting, and name the place where a worker died."""
    for rows in batches:
        try:
            with pace.waiting("items"):
                batch = next(ready)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            first = items.rows[int(rows[0])][0].id
            raise ValueError(
                f"a worker process was killed at sample {first!r} or a little later ({error}); "
                "with --workers 0 the file that does it is the last one that is read; with less memory take fewer workers"
            ) from error
        yield batch


def _through_gpu(items: Items, ready: Iterator[Prepared], forward: Forward) -> Iterator[Encoded]:
    """Encode with some batches in flight: while the GPU computes, the next is copied and the last one is read back."""
    flying: deque[tuple[Prepared, Tensor | None, float]] = deque()

    def land() -> Encoded:
        prepared, features, launched = flying.popleft()
        return items.settle(prepared, _numbers(features), time.perf_counter() - launched)

    for prepared in ready:
        flying.append((prepared, _launch(prepared, forward), time.perf_counter()))
        if len(flying) == IN_FLIGHT:
            yield land()
    while flying:
        yield land()


def _launch(prepared: Prepared, forward: Forward) -> Tensor | None:
    """Start to encode a batch; on a GPU the copy and the computation go on in the background."""
    if not len(prepared.good):
        return None
    batch = torch.from_numpy(prepared.good)
    device = default_device()
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    with torch.inference_mode():
        return forward(batch)


def _numbers(features: Tensor | None) -> np.ndarray:
    return np.zeros(0, dtype=np.float32) if features is None else features.cpu().numpy()
