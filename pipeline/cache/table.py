"""Turn cached features into batches: features and labels of samples are joined by id into tables, and cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.class_stream import draw_class_rows
from pipeline.data.manifest import Manifest
from pipeline.data.sample_columns import SampleColumns
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG, sample_keys
from pipeline.types import Batch, ClassStream, Sample, Source, Split


@dataclass(frozen=True, slots=True)
class Captions:
    """All text features of the samples of a split, [M,*shape]. Those of sample i are offsets[i] .. offsets[i+1]."""

    features: Tensor
    offsets: Tensor

    def draw(self, rows: Tensor, keys: Tensor, seed: int, epoch: int, mean: Tensor) -> Tensor:
        """Draw one text feature per sample. The choice is a function of (seed, epoch, sample id).

        Args:
            rows: the samples [B].
            keys: their random stream keys [B].
            seed: the seed of the run.
            epoch: the epoch.
            mean: [B,*shape]: taken for a sample without a usable text.

        Returns:
            Text features [B,*shape].
        """
        counts = (self.offsets[1:] - self.offsets[:-1])[rows]
        uniform = KeyedRNG.seeded(seed, keys).at("caption", epoch).uniform()
        chosen = self.offsets[rows] + torch.floor(uniform * counts).long()
        drawn = self.features[chosen.clamp(max=len(self.features) - 1)]
        usable = (counts > 0) & torch.isfinite(drawn).flatten(1).all(dim=1)
        return _where_rows(usable, drawn, mean)


def _where_rows(condition: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Return rows [B,*shape] where the condition [B] holds, and elsewhere the others, [B,*shape] or [*shape]."""
    return torch.where(condition.reshape(-1, *(1 for _ in rows.shape[1:])), rows, others)


class FeatureReader(Protocol):
    """What tables are read from: a `Cache`, or what stands in its place."""

    def read(self, ids: Sequence[str], aggregate: Any = "mean") -> np.ndarray:
        """Return one feature per sample; see `Cache.read`."""
        ...

    def read_rows(self, ids: Sequence[str], first_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return all rows of samples; see `Cache.read_rows`."""
        ...


class FeatureSource(Protocol):
    """The usable samples of a split. All of them are in memory, or only some at a time."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    @property
    def excluded(self) -> tuple[str, ...]:
        """The ids of the samples that are left out, because they have no image feature."""
        ...

    @property
    def label(self) -> Tensor:
        """The labels of all samples, on the CPU; see `label_tensor`."""
        ...

    def tables(self) -> Iterator[FeatureTable]:
        """Yield all samples in the manifest's order. Release each table before asking for the next one, to save memory."""
        ...

    def windows(self, batch_size: int, seed: int, epoch: int) -> Iterator[FeatureTable]:
        """Yield all samples of an epoch in tables. The samples of a table are to be shuffled among each other.

        Args:
            batch_size: every table but the last holds whole batches.
            seed: the seed of the run.
            epoch: the epoch.
        """
        ...


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """A `FeatureSource` of which all samples are in memory."""

    ids: tuple[str, ...]
    columns: Batch  # [N, ...] each
    excluded: tuple[str, ...]  # ids of the samples that are left out
    captions: Captions | None = None  # if one text of each sample is drawn in every epoch

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label(self) -> Tensor:
        return self.columns["label"].cpu()

    def tables(self) -> Iterator[FeatureTable]:
        yield self

    def windows(self, batch_size: int, seed: int, epoch: int) -> Iterator[FeatureTable]:
        yield self


def load_split(
    manifest: Manifest, caches: Mapping[str, FeatureReader], split: Split, device: torch.device, aggregate: str
) -> FeatureTable:
    """Read a split into memory: features by batch key, labels and random stream keys.

    Samples without an image feature are left out. A sample without text keeps its image: its text is the mean text of the
    split, and `paired` [N] is 0 for it.

    Args:
        manifest: the dataset.
        caches: by batch key.
        split: the split.
        device: where the table is.
        aggregate: how several texts of a sample become one: "mean", "first", or "random" (another one in each epoch).

    Raises:
        UserError: the split has no samples, or none with an image feature, or none with a text feature.
    """
    table = read_table(manifest, caches, split_samples(manifest, split), device, aggregate)
    check_split_usable(manifest, split, len(table), "text" not in caches or bool(table.columns["paired"].any()))
    return table


def split_samples(manifest: Manifest, split: Split) -> SampleColumns:
    """Return the samples of a split.

    Raises:
        UserError: there are none.
    """
    samples = manifest.split(split)
    if not samples:
        remedy = manifest.meta.get("val_remedy", "") if split == "val" else ""
        again = f"run: {manifest.prepare_command} {remedy}" if remedy else "prepare it with samples in every split"
        raise UserError(f"the {split} split of {manifest.dataset} is empty; {again}")
    return samples


def check_split_usable(manifest: Manifest, split: Split, num_images: int, has_text: bool) -> None:
    """Check that a split has something to train on.

    Raises:
        UserError: it has no sample with an image feature, or none with a text feature.
    """
    if not num_images:
        raise UserError(f"the {split} split of {manifest.dataset} has no sample with an image feature")
    if not has_text:
        raise UserError(f"no sample of the {split} split has a text feature; extract the texts, or use a method without text")


def read_table(
    manifest: Manifest,
    caches: Mapping[str, FeatureReader],
    samples: Sequence[Sample],
    device: torch.device,
    aggregate: str,
    mean_text: Tensor | None = None,
    keys: Tensor | None = None,
) -> FeatureTable:
    """Read some samples into memory, as in `load_split`.

    Args:
        manifest: the dataset.
        caches: by batch key.
        samples: the samples.
        device: where the table is.
        aggregate: see `load_split`.
        mean_text: the text feature of samples without text; None: the mean of these samples' texts.
        keys: the random stream keys of the samples; None: they are computed.
    """
    columns_of_samples = SampleColumns.of(samples)
    ids = list(columns_of_samples.ids)
    arrays = {key: cache.read(ids, aggregate="first" if aggregate == "first" else "mean") for key, cache in caches.items()}
    usable = np.isfinite(arrays["image"]).reshape(len(ids), -1).all(axis=1)
    is_whole, kept = bool(usable.all()), np.flatnonzero(usable)
    kept_ids = ids if is_whole else [ids[row] for row in kept.tolist()]
    columns = {key: torch.from_numpy(array if is_whole else array[kept]) for key, array in arrays.items()}
    captions = None
    if "text" in columns:
        paired = torch.isfinite(columns["text"]).flatten(1).all(dim=1)
        if not paired.all():
            mean = columns["text"][paired].mean(dim=0) if mean_text is None else mean_text
            columns["text"] = _where_rows(paired, columns["text"], mean)
        columns["paired"] = paired.float()
    if "text" in columns and aggregate == "random":
        features, counts = caches["text"].read_rows(kept_ids)
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
        captions = Captions(torch.from_numpy(features).to(device), offsets.to(device))
    columns["label"] = label_tensor(columns_of_samples if is_whole else columns_of_samples.select(kept), manifest)
    columns["key"] = sample_keys(kept_ids) if keys is None else keys[torch.from_numpy(kept)]
    return FeatureTable(
        ids=tuple(kept_ids),
        columns={key: column.to(device) for key, column in columns.items()},
        excluded=tuple(ids[row] for row in np.flatnonzero(~usable).tolist()),
        captions=captions,
    )


def label_tensor(samples: SampleColumns, manifest: Manifest) -> Tensor:
    """Return class indices [N] int64 of a single-label dataset, or 0/1 indicators [N,C] float32 of a multi-label dataset."""
    if manifest.label_kind == "single":
        return torch.from_numpy(samples.labels()[1])
    indicators = torch.zeros(len(samples), len(manifest.class_names))
    indicators[tuple(map(torch.from_numpy, samples.labels()))] = 1.0
    return indicators


def shuffled_batches(source: FeatureSource, batch_size: int, seed: int, class_stream: ClassStream | None = None) -> Source:
    """Return the training batches. The order is a function of (seed, epoch, sample id).

    A batch is not larger than the split. An incomplete last batch is dropped. A batch has the rows of the class stream, too, if
    there is one and a class has two samples.
    """
    size = min(batch_size, len(source.ids))

    def batches(epoch: int) -> Iterator[Batch]:
        for table in source.windows(size, seed, epoch):
            rng = KeyedRNG.seeded(seed, table.columns["key"]).at("shuffle", epoch)
            order = torch.argsort(rng.bits())
            num_steps = len(table) // size
            rows, label = draw_class_rows(table.columns, class_stream, num_steps, seed, epoch) if class_stream else ((), ())
            for step in range(num_steps):
                batch = _select_batch(table, order[step * size : (step + 1) * size], seed, epoch)
                if len(rows) and len(rows[step]):
                    drawn = _select_batch(table, rows[step], seed, epoch)
                    batch |= {f"class_{key}": drawn[key] for key in ("image", "text") if key in drawn}
                    batch["class_label"] = label[step]
                yield batch

    return batches


def ordered_batches(source: FeatureSource, seed: int, batch_size: int = 1024) -> Callable[[], Iterator[Batch]]:
    """Return a function that starts a pass over all samples in the manifest's order.

    Texts that are drawn anew in each epoch are those of epoch -1.
    """

    def batches() -> Iterator[Batch]:
        for table in source.tables():
            for start in range(0, len(table), batch_size):
                rows = torch.arange(start, min(start + batch_size, len(table)), device=table.columns["key"].device)
                yield _select_batch(table, rows, seed, -1)

    return batches


def _select_batch(table: FeatureTable, rows: Tensor, seed: int, epoch: int) -> Batch:
    batch = {key: column.index_select(0, rows) for key, column in table.columns.items()}
    if table.captions:
        batch["text"] = table.captions.draw(rows, batch["key"], seed, epoch, batch["text"])
    return batch
