"""Splits that depend on nothing but names: the same samples fall into the same split on every machine, for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import accumulate


def by_hash(group: str, percent: Mapping[str, int]) -> str:
    """The split of a group on its own: the first 8 bytes of the name's SHA-256, as a share of 2^64, cut at the percents."""
    if sum(percent.values()) != 100:
        raise ValueError(f"the splits {dict(percent)} do not add up to 100 percent")
    share = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") * 100 // 2**64
    return next(split for split, part in zip(percent, accumulate(percent.values()), strict=True) if share < part)


def by_rank(groups: Iterable[str], percent: Mapping[str, int]) -> dict[str, str]:
    """The split of every group of one class: sorted by SHA-256 and cut at the percents, each cut rounded half up.

    Every split gets at least one group as long as there are enough of them.
    """
    if sum(percent.values()) != 100:
        raise ValueError(f"the splits {dict(percent)} do not add up to 100 percent")
    ordered = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    result: dict[str, str] = {}
    start = share = 0
    for later, (split, part) in zip(reversed(range(len(percent))), percent.items(), strict=True):
        share += part
        end = max(start + 1, min((share * len(ordered) + 50) // 100, len(ordered) - later))
        result |= dict.fromkeys(ordered[start:end], split)
        start = end
    return result


def is_held_out(group: str, percent: int) -> bool:
    """Whether a group of the training samples is among the `percent` held out for validation."""
    return by_hash(group, {"val": percent, "train": 100 - percent}) == "val"
