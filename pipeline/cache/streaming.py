"""A split that is larger than memory: read stretch by stretch from the caches, the next one while this one is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.cache.table import FeatureSource, FeatureTable, check_usable, gather, labels, load, samples_of
from pipeline.data.manifest import Manifest
from pipeline.runtime.device import total_bytes
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Sample, Split

MEMORY_SHARE = 0.5  # of the device's memory, and of this machine's, that features may take
BLOCKS = 16  # stretches of the split that meet in a window


def fitting(caches: Mapping[str, Cache], aggregate: str, device: torch.device) -> int:
    """How many samples of these caches may be in memory at a time; 0: all of them fit."""
    size = sample_bytes(caches, aggregate)
    budget = int(MEMORY_SHARE * min(total_bytes(device), total_bytes(torch.device("cpu"))))
    if size * len(caches["image"].ids) <= budget:
        return 0
    most = max(1, budget // size // 2)  # one window is in use, and one is being read
    return 1 << (most.bit_length() - 1)  # the same on machines of about the same memory


def sample_bytes(caches: Mapping[str, Cache], aggregate: str) -> int:
    """Memory of a sample's features, on average."""
    rows = {key: 1.0 for key in caches}
    if aggregate == "random" and "text" in caches:
        rows["text"] += float(caches["text"].offsets[-1]) / len(caches["text"].ids)
    return max(1, round(sum(4 * prod(cache.feature_shape) * rows[key] for key, cache in caches.items())))


def open_rows(
    manifest: Manifest, caches: Mapping[str, Cache], split: Split, device: torch.device, aggregate: str, window: int
) -> FeatureSource:
    """A split as `sources.load` reads it, of which at most `window` samples are used at a time; 0: all of them."""
    samples = samples_of(manifest, split)
    if not 0 < window < len(samples):
        return load(manifest, caches, split, device, aggregate)
    stretch = Stretches(manifest, caches, device, aggregate)
    ids: list[str] = []
    excluded: list[str] = []
    total, paired = torch.zeros(()), 0
    starts = ProgressBar(range(0, len(samples), window), label=f"reading {split}", unit="window", delay=2)
    for table in stretch.ahead([samples[start : start + window] for start in starts]):
        ids += table.ids
        excluded += table.excluded
        if "paired" in table.columns:
            here = table.columns["paired"] > 0
            total = total + table.columns["text"][here].sum(dim=0, dtype=torch.float64).cpu()
            paired += int(here.sum())
    check_usable(manifest, split, len(ids), "text" not in caches or paired > 0)
    mean = (total / paired).float() if paired else None
    left_out = set(excluded)
    usable = tuple(sample for sample in samples if sample.id not in left_out)
    return StreamedFeatures(Stretches(manifest, caches, device, aggregate, mean), usable, tuple(excluded), window)


@dataclass(frozen=True, slots=True)
class Stretches:
    """Reads some samples at a time."""

    manifest: Manifest
    caches: Mapping[str, Cache]
    device: torch.device
    aggregate: str
    mean_text: Tensor | None = None  # of the whole split

    def read(self, samples: Sequence[Sample]) -> FeatureTable:
        return gather(self.manifest, self.caches, samples, self.device, self.aggregate, self.mean_text)

    def ahead(self, parts: Sequence[Sequence[Sample]]) -> Iterator[FeatureTable]:
        """The tables of some parts; when one is handed out, the next is being read."""
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self.read, parts[0])
            for following in (*parts[1:], None):
                table = coming.result()
                if following is not None:
                    coming = reader.submit(self.read, following)
                yield table
                del table


@dataclass(frozen=True, slots=True)
class StreamedFeatures:
    """`sources.Rows` of which a window is in memory, and the next one.

    An epoch shuffles blocks of neighbouring samples, and then the samples of as many blocks as a window holds. The order is
    named by (seed, epoch, window): a window of the whole split has the batches of a table.
    """

    stretches: Stretches
    samples: tuple[Sample, ...]
    excluded: tuple[str, ...]
    window: int  # samples

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    @property
    def label(self) -> Tensor:
        return labels([sample.labels for sample in self.samples], self.stretches.manifest)

    def pieces(self) -> Iterator[FeatureTable]:
        starts = range(0, len(self.samples), self.window)
        return self.stretches.ahead([self.samples[start : start + self.window] for start in starts])

    def windows(self, size: int, seed: int, epoch: int) -> Iterator[FeatureTable]:
        block = max(1, self.window // BLOCKS // size) * size
        starts = torch.arange(0, len(self.samples), block)
        order = torch.argsort(KeyedRNG.seeded(seed, starts).at("windows", epoch).bits())
        parts: list[list[Sample]] = [[]]
        for start in starts[order].tolist():
            some = self.samples[start : start + block]
            if len(parts[-1]) + len(some) > self.window:
                parts.append([])
            parts[-1] += some
        return self.stretches.ahead(parts)
