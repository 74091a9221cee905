"""The features of a cache together with the labels and splits of its manifest, as arrays for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache.reader import Cache
from pipeline.cache.table import label_tensor
from pipeline.data.manifest import Manifest
from pipeline.runtime.choices import unknown_choice

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset


@dataclass(frozen=True)
class Features:
    """The features of N samples, in the order of the manifest; all fields have the same order.

    Features in the cache lie in another order, and are found by sample id: never match the two by position.
    """

    ids: tuple[str, ...]
    labels: np.ndarray  # class indices int64 [N]; multi-label: 0/1 indicators float32 [N,C]
    split: np.ndarray  # "train", "val" or "test" for each sample [N]
    array: np.ndarray  # float32 [N, *shape]; a row without feature is NaN
    is_present: np.ndarray  # bool [N]; False: the row is NaN, because the medium cannot be decoded or there is no text
    class_names: tuple[str, ...]  # C names, by class index

    def __len__(self) -> int:
        return len(self.ids)

    def to_torch(self) -> Dataset[tuple[Tensor, ...]]:
        """Return a dataset of (feature float32 [*shape], label) pairs on the CPU, for a `torch.utils.data.DataLoader`.

        Rows without feature are left out, because one NaN spoils a whole training; `ids` of the others are
        `np.array(features.ids)[features.is_present]`. Labels are int64 [] or, multi-label, float32 [C].
        """
        import torch
        from torch.utils.data import TensorDataset

        present = self.is_present
        return TensorDataset(torch.from_numpy(self.array[present]), torch.from_numpy(self.labels[present]))


def read_features(manifest: Manifest, cache: Cache, split: str = "", aggregate: str = "") -> Features:
    """Read the features of a manifest's samples from one of its caches.

    Args:
        manifest: The dataset.
        cache: A cache of this manifest.
        split: "train", "val" or "test"; "": all samples.
        aggregate: How several texts of a sample become one vector: "mean" or "first"; "": as the dataset says, with the mean
            where it says that training draws one of them at random.

    Raises:
        UserError: there is no such split or aggregate, or a shard is damaged or missing.
    """
    if aggregate not in ("", "mean", "first"):
        raise unknown_choice(aggregate, f"unknown aggregate {aggregate!r}", ("mean", "first"))
    samples = manifest.split(split) if split else manifest.columns
    ids = tuple(samples.ids)
    chosen = aggregate or manifest.meta["text"]["aggregate"]
    array = cache.read(ids, "first" if chosen == "first" else "mean")
    return Features(
        ids=ids,
        labels=label_tensor(samples, manifest).numpy(),
        split=np.array(samples.strings("split"), dtype=str),
        array=array,
        is_present=np.asarray(np.isfinite(array).all(axis=tuple(range(1, array.ndim)))),
        class_names=manifest.class_names,
    )
