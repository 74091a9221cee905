"""The second stream of training samples that a method may ask for: in every step, some classes and some samples of each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, ClassStream


def draw_class_rows(columns: Batch, stream: ClassStream, num_steps: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw the rows of the stream for some steps: a function of (seed, epoch) and of the first sample's id.

    Only classes with two samples or more enter, and only samples with a text, where texts are read. All classes are equally
    likely. A class with fewer samples than asked for gives some of them twice, and of fewer classes than asked for, all enter.

    Args:
        columns: the columns of the samples, [N, ...] each.
        stream: how many classes, and samples of each.
        num_steps: S, the number of steps.
        seed: the seed of the run.
        epoch: the epoch.

    Returns:
        Rows int64 [S,M], and the class that each was drawn for, int64 [S,M]; M is 0 if no class has two samples. A sample with
        several labels can be drawn for any of them.
    """
    members = _rows_of_classes(columns)
    classes = np.array([number for number, rows in enumerate(members) if len(rows) > 1], dtype=np.int64)
    number = int(KeyedRNG.seeded(seed, columns["key"][:1]).at("classes", epoch).bits()) % 2**63
    rng, count, device = np.random.default_rng(number), min(stream.num_classes, len(classes)), columns["key"].device
    drawn = np.empty((num_steps, count * stream.num_samples), dtype=np.int64)
    chosen = np.empty((num_steps, count), dtype=np.int64)
    for step in range(num_steps):
        chosen[step] = rng.choice(classes, count, replace=False) if count else ()
        drawn[step] = [row for each in chosen[step] for row in np.resize(rng.permutation(members[each]), stream.num_samples)]
    label = chosen.repeat(stream.num_samples, axis=1)
    return torch.from_numpy(drawn).to(device), torch.from_numpy(label).to(device)


def _rows_of_classes(columns: Batch) -> list[np.ndarray]:
    """Return the rows of the samples of each class, of those that have a text."""
    label = columns["label"].cpu().numpy()
    usable = (columns["paired"] > 0).cpu().numpy() if "paired" in columns else np.ones(len(label), dtype=bool)
    if label.ndim == 1:
        return [np.flatnonzero(usable & (label == number)) for number in range(label.max() + 1)]
    return [np.flatnonzero(usable & (member > 0)) for member in label.T]
