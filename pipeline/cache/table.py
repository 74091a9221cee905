"""Cached features as batches: a split is a table on the device, or several in turn, joined by sample id, shuffled by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Cache
from pipeline.data.manifest import Manifest
from pipeline.runtime.rng import KeyedRNG, sample_keys
from pipeline.types import Batch, Sample, Source, Split


@dataclass(frozen=True, slots=True)
class Captions:
    """All texts of the samples of a split: `features` [M,D], those of sample i from offsets[i] to offsets[i+1]."""

    features: Tensor
    offsets: Tensor

    def draw(self, rows: Tensor, keys: Tensor, seed: int, epoch: int, mean: Tensor) -> Tensor:
        """One text of each of these rows [B,D], named by (seed, epoch, sample id); `mean` [B,D] where there is none."""
        counts = (self.offsets[1:] - self.offsets[:-1])[rows]
        uniform = KeyedRNG.seeded(seed, keys).at("caption", epoch).uniform()
        chosen = self.offsets[rows] + torch.floor(uniform * counts).long()
        drawn = self.features[chosen.clamp(max=len(self.features) - 1)]
        usable = (counts > 0) & torch.isfinite(drawn).all(dim=1)
        return torch.where(usable[:, None], drawn, mean)


class FeatureSource(Protocol):
    """The usable samples of a split, all of them in memory or not."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    @property
    def excluded(self) -> tuple[str, ...]:
        """The ids that had to be left out."""
        ...

    @property
    def label(self) -> Tensor:
        """Of all samples, on the CPU."""
        ...

    def pieces(self) -> Iterator[FeatureTable]:
        """All samples in the manifest's order; a piece is to be let go of before the next one is asked for."""
        ...

    def windows(self, size: int, seed: int, epoch: int) -> Iterator[FeatureTable]:
        """All samples, each time those that are shuffled among each other: whole batches of this size, but for the last."""
        ...


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Samples in memory: their ids, their columns [N, ...] and the ids that had to be left out."""

    ids: tuple[str, ...]
    columns: Batch
    excluded: tuple[str, ...]
    captions: Captions | None = None  # when every epoch draws one text of each sample

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label(self) -> Tensor:
        return self.columns["label"].cpu()

    def pieces(self) -> Iterator[FeatureTable]:
        yield self

    def windows(self, size: int, seed: int, epoch: int) -> Iterator[FeatureTable]:
        yield self


def load(manifest: Manifest, caches: Mapping[str, Cache], split: Split, device: torch.device, aggregate: str) -> FeatureTable:
    """A split's features by batch key, labels and stream keys; samples without an image feature are left out, by id.

    Several texts of a sample become their mean, the first, or with "random" another one each epoch. A sample without text
    keeps its image: its text is the mean text of the split, and `paired` [N] is 0 for it.
    """
    table = gather(manifest, caches, samples_of(manifest, split), device, aggregate)
    check_usable(manifest, split, len(table), "text" not in caches or bool(table.columns["paired"].any()))
    return table


def samples_of(manifest: Manifest, split: Split) -> Sequence[Sample]:
    """The samples of a split; `ValueError` when there are none."""
    samples = manifest.split(split)
    if not samples:
        remedy = manifest.meta.get("val_remedy", "") if split == "val" else ""
        again = f"run: diffalign prepare {manifest.dataset} {remedy}" if remedy else "prepare it with samples in every split"
        raise ValueError(f"the {split} split of {manifest.dataset} is empty; {again}")
    return samples


def check_usable(manifest: Manifest, split: Split, num_images: int, has_text: bool) -> None:
    """`ValueError` when a split has nothing to read."""
    if not num_images:
        raise ValueError(f"the {split} split of {manifest.dataset} has no sample with an image feature")
    if not has_text:
        raise ValueError(f"no sample of the {split} split has a text feature; extract the texts, or use a method without text")


def gather(
    manifest: Manifest,
    caches: Mapping[str, Cache],
    samples: Sequence[Sample],
    device: torch.device,
    aggregate: str,
    mean_text: Tensor | None = None,
) -> FeatureTable:
    """These samples as a table; without a text they get the mean one, by default that of these samples. See `load`."""
    ids = [sample.id for sample in samples]
    arrays = {key: cache.read(ids, aggregate="first" if aggregate == "first" else "mean") for key, cache in caches.items()}
    usable = np.isfinite(arrays["image"]).reshape(len(ids), -1).all(axis=1)
    kept = np.flatnonzero(usable).tolist()
    kept_ids = [ids[row] for row in kept]
    columns = {key: torch.from_numpy(array if usable.all() else array[kept]) for key, array in arrays.items()}
    captions = None
    if "text" in columns:
        paired = torch.isfinite(columns["text"]).flatten(1).all(dim=1)
        if not paired.all():
            mean = columns["text"][paired].mean(dim=0) if mean_text is None else mean_text
            columns["text"] = torch.where(paired[:, None], columns["text"], mean)
        columns["paired"] = paired.float()
    if "text" in columns and aggregate == "random":
        features, counts = caches["text"].read_each(kept_ids)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        captions = Captions(torch.from_numpy(features).to(device), offsets.to(device))
    columns["label"] = labels([samples[row].labels for row in kept], manifest)
    columns["key"] = sample_keys(kept_ids)
    return FeatureTable(
        ids=tuple(kept_ids),
        columns={key: column.to(device) for key, column in columns.items()},
        excluded=tuple(ids[row] for row in np.flatnonzero(~usable).tolist()),
        captions=captions,
    )


def labels(sample_labels: list[tuple[int, ...]], manifest: Manifest) -> Tensor:
    """Class indices [N] int64 of single-label data, or 0/1 indicators [N,C] float32 of multi-label data."""
    if manifest.label_kind == "single":
        return torch.tensor([label for (label,) in sample_labels], dtype=torch.int64)
    indicators = torch.zeros(len(sample_labels), len(manifest.class_names))
    for row, present in enumerate(sample_labels):
        indicators[row, list(present)] = 1.0
    return indicators


def shuffled(rows: FeatureSource, batch_size: int, seed: int) -> Source:
    """Training batches: a permutation named by (seed, epoch, sample id); an incomplete last batch is dropped."""
    size = min(batch_size, len(rows.ids))

    def batches(epoch: int) -> Iterator[Batch]:
        for table in rows.windows(size, seed, epoch):
            rng = KeyedRNG.seeded(seed, table.columns["key"]).at("shuffle", epoch)
            order = torch.argsort(rng.bits())
            for start in range(0, len(table) - size + 1, size):
                yield _batch(table, order[start : start + size], seed, epoch)

    return batches


def ordered(rows: FeatureSource, seed: int, batch_size: int = 1024) -> Callable[[], Iterator[Batch]]:
    """Passes over all samples in the manifest's order; texts that are drawn by epoch are those of epoch -1."""

    def batches() -> Iterator[Batch]:
        for table in rows.pieces():
            for start in range(0, len(table), batch_size):
                some = torch.arange(start, min(start + batch_size, len(table)), device=table.columns["key"].device)
                yield _batch(table, some, seed, -1)

    return batches


def _batch(table: FeatureTable, rows: Tensor, seed: int, epoch: int) -> Batch:
    batch = {key: column[rows] for key, column in table.columns.items()}
    if table.captions:
        batch["text"] = table.captions.draw(rows, batch["key"], seed, epoch, batch["text"])
    return batch
