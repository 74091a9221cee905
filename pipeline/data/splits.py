"""Assign groups of samples to splits and folds by the hashes of their names: the result is the same on every machine."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.sample_columns import SampleColumns
from pipeline.data.spec import held_out_percent
from pipeline.runtime.errors import UserError
from pipeline.types import Sample


def by_hash(group: str, percent: Mapping[str, int]) -> str:
    """Return the split of one group; it does not depend on the other groups.

    The first 8 bytes of the SHA-256 of the name, divided by 2^64, are a number in [0, 1). The percentages cut this interval.

    Args:
        group: name of the group.
        percent: percentage of each split.

    Raises:
        UserError: the percentages do not add up to 100.
    """
    return by_hashes([group], percent)[0]


def by_hashes(groups: Iterable[str], percent: Mapping[str, int]) -> list[str]:
    """Return the split of each group, as `by_hash` does."""
    if sum(percent.values()) != 100:
        raise UserError(f"the splits {dict(percent)} do not add up to 100 percent")
    of_share = [split for split, part in percent.items() for _ in range(part)]
    digests = (hashlib.sha256(group.encode()).digest() for group in groups)
    return [of_share[int.from_bytes(digest[:8], "big") * 100 >> 64] for digest in digests]


def choose_splits(names: Sequence[str], given: Sequence[str] | None, spec: Mapping[str, Any]) -> list[str]:
    """Return the split of each sample, of which `spec["val_percent"]` moves a share of the training samples to validation.

    Args:
        names: the group of each sample, or its id.
        given: the split of each sample; None: the hash of the name decides.
        spec: the spec of the dataset.

    Raises:
        UserError: percentages are wrong.
    """
    chosen = by_hashes(names, spec["splits"]) if given is None else list(given)
    percent = held_out_percent(spec)
    if percent:
        # the hash that dealt the splits cannot deal again: its training samples are those with the smallest hashes
        keys = names if given is not None else [f"held out: {name}" for name in names]
        held_out = by_hashes(keys, {"val": percent, "train": 100 - percent})
        chosen = ["val" if (split, part) == ("train", "val") else split for split, part in zip(chosen, held_out, strict=True)]
    return chosen


def by_rank(groups: Iterable[str], percent: Mapping[str, int]) -> dict[str, str]:
    """Return the split of every group of one class.

    The groups are sorted by the SHA-256 of their names, and the sorted list is cut at the percentages; each cut is rounded
    half up. Every split gets at least one group, as long as there are enough groups.

    Args:
        groups: names of the groups.
        percent: percentage of each split.

    Raises:
        UserError: the percentages do not add up to 100.
    """
    if sum(percent.values()) != 100:
        raise UserError(f"the splits {dict(percent)} do not add up to 100 percent")
    ordered = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    result: dict[str, str] = {}
    start = cumulative = 0
    for num_later, (split, part) in zip(reversed(range(len(percent))), percent.items(), strict=True):
        cumulative += part
        end = max(start + 1, min((cumulative * len(ordered) + 50) // 100, len(ordered) - num_later))
        result |= dict.fromkeys(ordered[start:end], split)
        start = end
    return result


def by_fold(samples: Sequence[Sample], num_folds: int) -> list[int]:
    """Return the fold of every sample; samples of one group are in one fold.

    The groups, sorted by the labels of their first sample and then by the SHA-256 of their names, are dealt to the folds in
    turn, so that every fold has groups of every class, if there are enough. A sample without a group is its own group.
    """
    labels: dict[str, tuple[int, ...]] = {}
    for sample in samples:
        labels.setdefault(sample.group or sample.id, sample.labels)
    ordered = sorted(labels, key=lambda group: (labels[group], hashlib.sha256(group.encode()).digest()))
    fold = {group: rank % num_folds for rank, group in enumerate(ordered)}
    return [fold[sample.group or sample.id] for sample in samples]


def by_fraction(samples: Sequence[Sample], fraction: float) -> SampleColumns:
    """Return a fraction of the samples of every class, at least one, in their order; smaller fractions are among larger ones.

    The samples of a class are sorted by the SHA-256 of their ids, and the first are kept. Samples of multi-label data are one
    class.

    Raises:
        UserError: the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"a fraction of the training split must be above 0 and at most 1, not {fraction}")
    is_single = all(len(sample.labels) == 1 for sample in samples)
    ids: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for sample in samples:
        ids[sample.labels if is_single else ()].append(sample.id)
    kept: set[str] = set()
    for members in ids.values():
        ordered = sorted(members, key=lambda each: hashlib.sha256(each.encode()).digest())
        kept.update(ordered[: max(1, int(fraction * len(ordered) + 0.5))])
    return SampleColumns.of(samples).select([position for position, sample in enumerate(samples) if sample.id in kept])


def is_held_out(group: str, percent: int) -> bool:
    """Return whether a group of training samples is among the `percent` of groups that are held out for validation."""
    return by_hash(group, {"val": percent, "train": 100 - percent}) == "val"
