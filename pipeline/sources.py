"""Cached features as batches: one table per split on the device, joined by sample id, shuffled by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import Cache, find_caches, open_cache
from pipeline.cache.reader import read_attributes
from pipeline.manifest import Manifest
from pipeline.streams import Streams, sample_keys
from pipeline.types import Batch, Source, Split


def find_cache(home: Path, manifest: Manifest, name: str) -> Cache:
    """The manifest's cache of that encoder, folder name or fingerprint; `ValueError` names the choices, or what has changed.

    Of several caches of an encoder its name means the one made with its default settings, unless some are of another modality.
    """
    folders = find_caches(home, manifest.dataset)
    named = [path for path in folders if _is_named(path.name, name)]
    wanted = manifest.fingerprint()
    fitting = [path for path in named if read_attributes(path)["identity"]["manifest"] == wanted]
    if len(fitting) > 1:
        about = [read_attributes(path) for path in fitting]
        default = [path for path, each in zip(fitting, about, strict=True) if not each["provenance"].get("settings")]
        alike = len({each["identity"]["encoder"].get("modality") for each in about}) == 1
        fitting = default if len(default) == 1 and alike else fitting
    if len(fitting) == 1 or (named and not fitting):
        return open_cache((fitting or named)[0], {"manifest": wanted})
    problem = "several caches" if fitting else "no cache"
    choices = ", ".join(path.name for path in fitting or folders) or "none yet"
    command = f"diffalign extract {manifest.dataset}"
    raise ValueError(f"{problem} of {manifest.dataset} named {name!r} (there are: {choices}); make one with: {command}")


def _is_named(folder: str, name: str) -> bool:
    """Whether a cache's folder is meant by an encoder, by its own name, or by a fingerprint of 12 or 64 digits."""
    encoder, _, digits = folder.rpartition("-")
    return name in (folder, encoder, digits) or (len(name) == 64 and name.startswith(digits))


@dataclass(frozen=True, slots=True)
class Captions:
    """All texts of the samples of a split: `features` [M,D], those of sample i from offsets[i] to offsets[i+1]."""

    features: Tensor
    offsets: Tensor

    def draw(self, rows: Tensor, keys: Tensor, seed: int, epoch: int, mean: Tensor) -> Tensor:
        """One text of each of these rows [B,D], named by (seed, epoch, sample id); `mean` [B,D] where there is none."""
        counts = (self.offsets[1:] - self.offsets[:-1])[rows]
        uniform = Streams.seeded(seed, keys).at("caption", epoch).uniform()
        chosen = self.offsets[rows] + torch.floor(uniform * counts).long()
        drawn = self.features[chosen.clamp(max=len(self.features) - 1)]
        usable = (counts > 0) & torch.isfinite(drawn).all(dim=1)
        return torch.where(usable[:, None], drawn, mean)


@dataclass(frozen=True, slots=True)
class Table:
    """The usable samples of one split: their ids, their columns [N, ...] and the ids that had to be left out."""

    ids: tuple[str, ...]
    columns: Batch
    excluded: tuple[str, ...]
    captions: Captions | None = None  # when every epoch draws one text of each sample

    def __len__(self) -> int:
        return len(self.ids)


def load(manifest: Manifest, caches: Mapping[str, Cache], split: Split, device: torch.device, aggregate: str) -> Table:
    """A split's features by batch key, labels and stream keys; samples without an image feature are left out, by id.

    Several texts of a sample become their mean, the first, or with "random" another one each epoch. A sample without text
    keeps its image: its text is the mean text of the split, and `paired` [N] is 0 for it.
    """
    samples = manifest.split(split)
    ids = [sample.id for sample in samples]
    arrays = {key: cache.read(ids, aggregate="first" if aggregate == "first" else "mean") for key, cache in caches.items()}
    if not ids:
        remedy = manifest.meta.get("val_remedy", "") if split == "val" else ""
        again = f"run: diffalign prepare {manifest.dataset} {remedy}" if remedy else "prepare it with samples in every split"
        raise ValueError(f"the {split} split of {manifest.dataset} is empty; {again}")
    usable = np.isfinite(arrays["image"]).reshape(len(ids), -1).all(axis=1)
    if not usable.any():
        raise ValueError(f"the {split} split of {manifest.dataset} has no sample with an image feature")
    kept = np.flatnonzero(usable)
    kept_ids = [ids[row] for row in kept]
    columns = {key: torch.from_numpy(array[kept]) for key, array in arrays.items()}
    captions = None
    if "text" in columns:
        columns["text"], columns["paired"] = _fill_missing_text(columns["text"], split)
    if "text" in columns and aggregate == "random":
        features, counts = caches["text"].read_each(kept_ids)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        captions = Captions(torch.from_numpy(features).to(device), offsets.to(device))
    columns["label"] = labels([samples[row].labels for row in kept], manifest)
    columns["key"] = sample_keys(kept_ids)
    return Table(
        ids=tuple(kept_ids),
        columns={key: column.to(device) for key, column in columns.items()},
        excluded=tuple(ids[row] for row in np.flatnonzero(~usable)),
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


def _fill_missing_text(text: Tensor, split: str) -> tuple[Tensor, Tensor]:
    paired = torch.isfinite(text).flatten(1).all(dim=1)
    if not paired.any():
        raise ValueError(f"no sample of the {split} split has a text feature; extract the texts, or use a method without text")
    return torch.where(paired[:, None], text, text[paired].mean(dim=0)), paired.float()


def shuffled(table: Table, batch_size: int, seed: int) -> Source:
    """Training batches: a permutation named by (seed, epoch, sample id); an incomplete last batch is dropped."""
    size = min(batch_size, len(table))

    def batches(epoch: int) -> Iterator[Batch]:
        rng = Streams.seeded(seed, table.columns["key"]).at("shuffle", epoch)
        order = torch.argsort(rng.bits())
        for start in range(0, len(table) - size + 1, size):
            yield _batch(table, order[start : start + size], seed, epoch)

    return batches


def ordered(table: Table, seed: int, batch_size: int = 1024) -> Callable[[], Iterator[Batch]]:
    """Passes over the whole table in the manifest's order; texts that are drawn by epoch are those of epoch -1."""

    def batches() -> Iterator[Batch]:
        for start in range(0, len(table), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(table)), device=table.columns["key"].device)
            yield _batch(table, rows, seed, -1)

    return batches


def _batch(table: Table, rows: Tensor, seed: int, epoch: int) -> Batch:
    batch = {key: column[rows] for key, column in table.columns.items()}
    if table.captions:
        batch["text"] = table.captions.draw(rows, batch["key"], seed, epoch, batch["text"])
    return batch
