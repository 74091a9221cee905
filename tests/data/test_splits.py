"""Folds keep groups whole, have every class, and do not depend on the order of the samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.data.splits import by_fold
from pipeline.types import Sample

FOLDS = 5


def make_samples(num_groups: int, num_classes: int) -> list[Sample]:
    """Return one to three samples for each group; every fourth group is a single sample without a group."""
    samples = []
    for number in range(num_groups):
        size, group = (1, "") if number % 4 == 0 else (1 + number % 3, f"group {number}")
        for twin in range(size):
            samples.append(Sample(f"{number}.{twin}", "train", Path("x.png"), (), (number % num_classes,), group))
    return samples


def test_groups_are_whole_and_every_fold_has_every_class() -> None:
    samples = make_samples(200, 7)
    folds = by_fold(samples, FOLDS)
    folds_of: dict[str, set[int]] = {}
    for sample, fold in zip(samples, folds, strict=True):
        folds_of.setdefault(sample.group or sample.id, set()).add(fold)
    assert all(len(found) == 1 for found in folds_of.values())
    groups = Counter((sample.labels, min(folds_of[sample.group or sample.id])) for sample in samples)
    assert len(groups) == 7 * FOLDS
    sizes = Counter(min(found) for found in folds_of.values())
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_folds_follow_from_the_names_alone() -> None:
    samples = make_samples(60, 4)
    there = dict(zip([sample.id for sample in samples], by_fold(samples, FOLDS), strict=True))
    back = samples[::-1]
    assert dict(zip([sample.id for sample in back], by_fold(back, FOLDS), strict=True)) == there
