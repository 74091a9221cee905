"""Prepared items for joint training: decoded once into a memory-mapped file, and added to batches one batch ahead."""

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
from torchvision.transforms.v2 import functional as image_ops

from pipeline.cache.table import Captions
from pipeline.extraction.inputs import EncoderInputs
from pipeline.extraction.workers import prepare_batches
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import written_aside
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, Source

TensorChunks = Generator[Tensor, None, None]  # tensors [n, ...] of consecutive rows
CHUNK_ITEMS = 64  # items that are prepared at a time
MIN_CROP_AREA = 0.5  # smallest share of the area of an image that a random crop keeps


def open_mapped(path: Path, chunks: Callable[[], TensorChunks], length: int) -> Tensor:
    """Return the rows [length, ...] of a memory-mapped file; write the file first if it does not exist.

    The file is written completely or not at all. The process that writes it must hold the lock of its run.

    Args:
        path: The file, in NumPy's format.
        chunks: Yields the rows in order; called only if there is no file.
        length: The number of all rows.

    Raises:
        OSError: there is no room for the file.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path, alone=True) as aside, aside.open("wb") as file, closing(chunks()) as given:
            _write_npy(file, given, length)  # on an error, `closing` ends the progress bar before the message is printed
    rows = torch.from_numpy(np.load(path, mmap_mode="c"))
    return rows.view(torch.bfloat16) if rows.dtype == torch.int16 else rows


def _write_npy(file: BinaryIO, chunks: TensorChunks, length: int) -> None:
    """Write chunks of rows as one NumPy array.

    The chunks are written one after the other, because writing to a memory map kills the process when the disk is full.
    """
    written = 0
    for chunk in chunks:
        array = np.ascontiguousarray(_to_storable(chunk))
        if not written:
            shape = (length, *array.shape[1:])
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)
        written += len(array)
    assert written == length, file.name


def _to_storable(rows: Tensor) -> np.ndarray:
    """Return rows as an array; bfloat16 is stored as int16, because NumPy has no bfloat16 and no rows here are int16."""
    assert rows.dtype != torch.int16
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).cpu().numpy()


def select_items(items: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of some rows of memory-mapped items.

    NumPy copies with one thread. Torch would use all cores, take them from the encoder, and keep them busy afterwards.
    """
    storable = items.view(torch.int16) if items.dtype == torch.bfloat16 else items
    return torch.from_numpy(storable.numpy()[rows.numpy()]).view(items.dtype)


def open_prepared_items(inputs: EncoderInputs, path: Path, workers: int, progress: bool) -> Tensor:
    """Return all prepared items [N, ...] in a memory-mapped file; prepare them first if the file does not exist.

    Args:
        inputs: The rows and the encoder that prepares them.
        path: The file.
        workers: The number of worker processes.
        progress: Whether to show a progress bar.

    Raises:
        UserError: an item cannot be prepared any more; the message names the first such sample.
    """

    def chunks() -> TensorChunks:
        batches = [np.arange(start, min(start + CHUNK_ITEMS, len(inputs))) for start in range(0, len(inputs), CHUNK_ITEMS)]
        is_small = len(inputs) < 64 * max(workers, 1)  # preparing takes less time than starting the workers
        with ProgressBar(total=len(inputs), label=f"preparing {path.stem}", unit=" items", show=progress) as bar:
            for batch in prepare_batches(inputs, batches, 0 if is_small else workers):
                for row, reason in zip(batch.rows, batch.errors, strict=True):
                    if reason:
                        sample, _ = inputs.rows[row]
                        raise UserError(f"sample {sample.id!r} could be encoded once, and cannot be read now: {reason}")
                bar.update(len(batch.rows))
                yield torch.from_numpy(batch.items)

    return open_mapped(path, chunks, len(inputs))


@dataclass(frozen=True)
class TextIndex:
    """Which prepared texts belong to which sample of a split.

    Sample i owns the texts from offsets[i] to offsets[i+1]. With `captions`, each epoch draws one of them instead.
    """

    offsets: Tensor  # int64 [N+1]
    captions: Captions | None = None  # the "feature" of a text is its number here, so that stage 3 draws as stage 2 does

    def texts_of_batch(self, batch: Batch, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the texts of a batch.

        Returns:
            The numbers of the texts [M], and for each text the position in the batch of the sample that owns it [M].
        """
        rows, batch_size = batch["row"], len(batch["row"])
        if self.captions:
            none = torch.full((batch_size, 1), math.nan, dtype=torch.float64)
            numbers = self.captions.draw(rows, batch["key"], seed, epoch, none)[:, 0]
            owner = torch.nonzero(numbers.isfinite())[:, 0]
            return numbers[owner].long(), owner
        counts = (self.offsets[1:] - self.offsets[:-1])[rows]
        owner = torch.repeat_interleave(torch.arange(batch_size), counts)
        before = torch.cumsum(counts, 0) - counts
        return (self.offsets[rows] - before)[owner] + torch.arange(len(owner)), owner


def augment_images(items: Tensor, rng: KeyedRNG) -> Tensor:
    """Return images [B, ..., 3, H, W], each randomly cropped, resized to its old size, and mirrored half of the time.

    A crop keeps at least half of the area. It changes the ratio of the sides by a factor of 3/4 to 4/3.

    Raises:
        UserError: the items are not images.
    """
    if items.ndim < 4 or items.shape[-3] != 3:
        raise UserError("--augment needs an encoder whose prepared items are pictures")
    height, width = items.shape[-2:]
    results = []
    for item, (area, ratio, top, left, flip) in zip(items, rng.uniform(5).tolist(), strict=True):
        area_share, ratio_factor = MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area, (4 / 3) ** (2 * ratio - 1)
        crop_height = min(height, round(height * math.sqrt(area_share / ratio_factor)))
        crop_width = min(width, round(width * math.sqrt(area_share * ratio_factor)))
        corner = round(top * (height - crop_height)), round(left * (width - crop_width))
        item = image_ops.resized_crop(item, *corner, crop_height, crop_width, [height, width], antialias=True)
        results.append(image_ops.horizontal_flip(item) if flip < 0.5 else item)
    return torch.stack(results)


def prefetch_items(source: Source, fetch: Callable[[Batch, int], Batch]) -> Source:
    """Return a source whose batches also hold the items that `fetch` returns.

    A thread fetches the items of the next batch while the current one is used.

    Args:
        source: Yields the batches of an epoch.
        fetch: Returns additional entries for a batch of an epoch.
    """

    def batches(epoch: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as thread:
            upcoming = None
            for batch in source(epoch):
                ready, upcoming = upcoming, thread.submit(lambda batch=batch: {**batch, **fetch(batch, epoch)})
                if ready:
                    yield ready.result()
            if upcoming:
                yield upcoming.result()

    return batches


def to_device(items: Tensor, device: torch.device, channels_last: bool = False) -> Tensor:
    """Move items to the device; a copy to a GPU runs in the background. `channels_last`: the memory format of images."""
    moved = items.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else items
    return moved.contiguous(memory_format=torch.channels_last) if channels_last and items.ndim == 4 else moved
