"""Read a split that is larger than memory, one window of samples at a time. The next window is read ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.table import (
    FeatureReader,
    FeatureSource,
    FeatureTable,
    check_split_usable,
    label_tensor,
    load_split,
    read_table,
    split_samples,
)
from pipeline.data.manifest import Manifest
from pipeline.data.sample_columns import SampleColumns
from pipeline.runtime.device import total_bytes
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.places import Address
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Split

FEATURE_MEMORY_SHARE = 0.5  # of the device's memory, and of this machine's, that features may take
BLOCKS_PER_WINDOW = 16  # blocks of neighbouring samples that are shuffled together in a window


def choose_window(caches: Mapping[str, Cache], aggregate: str, device: torch.device) -> int:
    """Return how many samples of these caches may be in memory at a time; 0: all of them fit.

    Args:
        caches: by batch key.
        aggregate: see `load_split`.
        device: where the features will be.

    Returns:
        0, or a window that is a power of two.
    """
    sample_bytes = bytes_per_sample(caches, aggregate)
    max_bytes = int(FEATURE_MEMORY_SHARE * min(total_bytes(device), total_bytes(torch.device("cpu"))))
    if sample_bytes * caches["image"].num_samples <= max_bytes:
        return 0
    most = max(1, max_bytes // sample_bytes // 2)  # one window is in use, and one is being read
    return 1 << (most.bit_length() - 1)  # so that machines of about the same memory get the same window


def bytes_per_sample(caches: Mapping[str, Cache], aggregate: str) -> int:
    """Return the bytes that the features of a sample take in memory, on average."""
    rows = {key: 1.0 for key in caches}
    if aggregate == "random" and "text" in caches:
        rows["text"] += float(caches["text"].offsets[-1]) / caches["text"].num_samples
    return max(1, round(sum(4 * prod(cache.feature_shape) * rows[key] for key, cache in caches.items())))


def open_split(
    manifest: Manifest, caches: Mapping[str, FeatureReader], split: Split, device: torch.device, aggregate: str, window: int
) -> FeatureSource:
    """Open a split, as `load_split` does, but with at most `window` samples in use at a time.

    The whole split is read once, to find the samples without features and the mean text.

    Args:
        manifest: the dataset.
        caches: by batch key.
        split: the split.
        device: where the tables are.
        aggregate: see `load_split`.
        window: samples; 0: all of them are loaded.

    Raises:
        UserError: as in `load_split`.
    """
    samples = split_samples(manifest, split)
    if not 0 < window < len(samples):
        return load_split(manifest, caches, split, device, aggregate)
    reader = WindowReader(manifest, caches, device, aggregate)
    keys: list[Tensor] = []
    excluded: list[str] = []
    text_sum, num_paired = torch.zeros(()), 0
    starts = ProgressBar(range(0, len(samples), window), label=f"reading {split}", unit="window", delay=2)
    for table in reader.prefetch(Window(samples[start : start + window]) for start in starts):
        keys.append(table.columns["key"].cpu())
        excluded += table.excluded
        if "paired" in table.columns:
            is_paired = table.columns["paired"] > 0
            text_sum = text_sum + table.columns["text"][is_paired].sum(dim=0, dtype=torch.float64).cpu()
            num_paired += int(is_paired.sum())
    check_split_usable(manifest, split, sum(map(len, keys)), "text" not in caches or num_paired > 0)
    mean_text = (text_sum / num_paired).float() if num_paired else None
    excluded_ids = set(excluded)
    usable = samples.select([position for position, id in enumerate(samples.ids) if id not in excluded_ids])
    reader = WindowReader(manifest, caches, device, aggregate, mean_text)
    return StreamedFeatures(reader, usable, torch.cat(keys), tuple(excluded), window)


class Window(NamedTuple):
    """Samples that are read together."""

    samples: SampleColumns
    keys: Tensor | None = None  # their random stream keys; None: not known


@dataclass(frozen=True, slots=True)
class WindowReader:
    """Reads the features of some samples of a split at a time."""

    manifest: Manifest
    caches: Mapping[str, FeatureReader]
    device: torch.device
    aggregate: str
    mean_text: Tensor | None = None  # of the whole split

    def read(self, window: Window) -> FeatureTable:
        samples, keys = window
        return read_table(self.manifest, self.caches, samples, self.device, self.aggregate, self.mean_text, keys)

    def prefetch(self, windows: Iterable[Window]) -> Iterator[FeatureTable]:
        """Yield the table of each window. While one is used, a thread reads the next one.

        Of an object store, two threads read two of them: while one waits for its requests, the other converts what it has.
        """
        num_ahead = 2 if any(isinstance(getattr(cache, "path", None), Address) for cache in self.caches.values()) else 1
        upcoming = iter(windows)
        with ThreadPoolExecutor(num_ahead) as executor:
            pending = deque(executor.submit(self.read, window) for window in islice(upcoming, num_ahead))
            while pending:
                table = pending.popleft().result()
                pending.extend(executor.submit(self.read, window) for window in islice(upcoming, 1))
                yield table
                del table  # so that no more tables than these are in memory


@dataclass(frozen=True, slots=True)
class StreamedFeatures:
    """A `FeatureSource` of which two windows are in memory: one in use and the next one, of an object store the next two.

    An epoch shuffles blocks of neighbouring samples, and then the samples of as many blocks as a window holds. The order is a
    function of (seed, epoch, window). With a window of the whole split, the batches are those of a `FeatureTable`.
    """

    reader: WindowReader
    samples: SampleColumns
    keys: Tensor  # of the samples, see `rng.sample_keys`: to compute them takes longer than to read the features
    excluded: tuple[str, ...]
    window: int  # samples

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.samples.ids)

    @property
    def label(self) -> Tensor:
        return label_tensor(self.samples, self.reader.manifest)

    def tables(self) -> Iterator[FeatureTable]:
        num_samples = len(self.samples)
        starts = range(0, num_samples, self.window)
        return self._read(np.arange(start, min(start + self.window, num_samples)) for start in starts)

    def windows(self, batch_size: int, seed: int, epoch: int) -> Iterator[FeatureTable]:
        block_size = max(1, self.window // BLOCKS_PER_WINDOW // batch_size) * batch_size
        starts = torch.arange(0, len(self.samples), block_size)
        order = torch.argsort(KeyedRNG.seeded(seed, starts).at("windows", epoch).bits())
        return self._read(self._join_blocks(starts[order].tolist(), block_size))

    def _join_blocks(self, starts: Iterable[int], block_size: int) -> Iterator[NDArray[np.int64]]:
        """Yield the samples of each window: those of the blocks that begin here, as many as it holds."""
        blocks: list[NDArray[np.int64]] = []
        for start in starts:
            block = np.arange(start, min(start + block_size, len(self.samples)))
            if blocks and sum(map(len, blocks)) + len(block) > self.window:
                yield np.concatenate(blocks)
                blocks = []
            blocks.append(block)
        yield np.concatenate(blocks)

    def _read(self, windows: Iterable[NDArray[np.int64]]) -> Iterator[FeatureTable]:
        """Yield the tables of windows that are given by the positions of their samples."""
        return self.reader.prefetch(Window(self.samples.select(own), self.keys[torch.from_numpy(own)]) for own in windows)
