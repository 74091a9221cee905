"""Batches that bring prepared items beside cached features: decoded once into a mapped file, read a batch ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pictures

from pipeline.cache.table import Captions
from pipeline.extraction.inputs import Items
from pipeline.extraction.workers import prepared_batches
from pipeline.runtime.files import written_aside
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, Source

Chunks = Generator[Tensor, None, None]  # of rows
READ = 64  # items at a time
MIN_AREA = 0.5  # share of an image that a random crop sees at least


def mapped(path: Path, chunks: Callable[[], Chunks], length: int) -> Tensor:
    """Rows [length, ...] in a file that memory need not hold; what `chunks` gives, in order, unless the file is there.

    The file is whole or not there at all; whoever makes it holds the lock of its run. `OSError` when there is no room for it.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, alone=True) as aside, aside.open("wb") as file, closing(chunks()) as given:
            _write(file, given, length)  # closed before an error is told: a progress bar ends its line
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    return rows.view(torch.bfloat16) if rows.dtype == torch.int16 else rows


def _write(file: BinaryIO, chunks: Chunks, length: int) -> None:
    """Chunks of rows as one array of NumPy's; written one after the other, since a mapping of a full disk kills the process."""
    written = 0
    for chunk in chunks:
        array = np.ascontiguousarray(_stored(chunk))
        if not written:
            shape = (length, *array.shape[1:])
            described = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, described)
        file.write(array.data)
        written += len(array)
    assert written == length, file.name


def _stored(rows: Tensor) -> np.ndarray:
    """The rows as an array; NumPy has no bfloat16, and nothing else here is int16."""
    assert rows.dtype != torch.int16
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).cpu().numpy()


def picked(items: Tensor, rows: Tensor) -> Tensor:
    """These rows of mapped items, copied by one thread: torch would take the cores from the encoder, and spin on them after."""
    plain = items.view(torch.int16) if items.dtype == torch.bfloat16 else items
    return torch.from_numpy(plain.numpy()[rows.numpy()]).view(items.dtype)


def prepared_items(items: Items, path: Path, workers: int, progress: bool) -> Tensor:
    """Every row of the items, prepared [N, ...]; `ValueError` names the first that cannot be prepared any more."""

    def chunks() -> Chunks:
        batches = [np.arange(start, min(start + READ, len(items))) for start in range(0, len(items), READ)]
        few = len(items) < 64 * max(workers, 1)  # done before the workers have started
        with ProgressBar(total=len(items), label=path.stem, unit=" items", show=progress) as bar:
            for batch in prepared_batches(items, batches, 0 if few else workers):
                for row, reason in zip(batch.rows, batch.errors, strict=True):
                    if reason:
                        sample, _ = items.rows[row]
                        raise ValueError(f"sample {sample.id!r} could be encoded once, and cannot be read now: {reason}")
                bar.update(len(batch.rows))
                yield torch.from_numpy(batch.good)

    return mapped(path, chunks, len(items))


@dataclass(frozen=True)
class Texts:
    """The live texts of a split's samples: those from offsets[i] to offsets[i+1] of sample i, or one of them drawn by epoch."""

    offsets: Tensor  # int64 [N+1]
    drawn: Captions | None = None  # a text's number is its "feature", so that the draw is that of stage 2

    def of(self, batch: Batch, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Numbers of the texts [M], and the sample in the batch that each belongs to [M]."""
        rows, batch_size = batch["row"], len(batch["row"])
        if self.drawn:
            none = torch.full((batch_size, 1), math.nan, dtype=torch.float64)
            numbers = self.drawn.draw(rows, batch["key"], seed, epoch, none)[:, 0]
            owner = torch.nonzero(numbers.isfinite())[:, 0]
            return numbers[owner].long(), owner
        counts = (self.offsets[1:] - self.offsets[:-1])[rows]
        owner = torch.repeat_interleave(torch.arange(batch_size), counts)
        before = torch.cumsum(counts, 0) - counts
        return (self.offsets[rows] - before)[owner] + torch.arange(len(owner)), owner


def augmented(items: Tensor, rng: KeyedRNG) -> Tensor:
    """Images [B, ..., 3, H, W], each cropped at random to at least half its area, resized back, and mirrored half the time.

    Ratios of the sides are within 3/4 to 4/3 of what they were. `ValueError` for items that are no pictures.
    """
    if items.ndim < 4 or items.shape[-3] != 3:
        raise ValueError("--augment needs an encoder whose prepared items are pictures")
    height, width = items.shape[-2:]
    results = []
    for item, (area, ratio, top, left, flip) in zip(items, rng.uniform(5).tolist(), strict=True):
        seen, stretch = MIN_AREA + (1 - MIN_AREA) * area, (4 / 3) ** (2 * ratio - 1)
        own_height = min(height, round(height * math.sqrt(seen / stretch)))
        own_width = min(width, round(width * math.sqrt(seen * stretch)))
        corner = round(top * (height - own_height)), round(left * (width - own_width))
        item = pictures.resized_crop(item, *corner, own_height, own_width, [height, width], antialias=True)
        results.append(pictures.horizontal_flip(item) if flip < 0.5 else item)
    return torch.stack(results)


def with_items(source: Source, fetch: Callable[[Batch, int], Batch]) -> Source:
    """The batches of a source with what `fetch` adds to each in an epoch, fetched by a thread while the one before is used."""

    def batches(epoch: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as thread:
            coming = None
            for batch in source(epoch):
                ready, coming = coming, thread.submit(lambda batch=batch: {**batch, **fetch(batch, epoch)})
                if ready:
                    yield ready.result()
            if coming:
                yield coming.result()

    return batches


def to_device(items: Tensor, device: torch.device) -> Tensor:
    """Items on the device; on their way to a GPU nothing waits for them."""
    return items.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else items
