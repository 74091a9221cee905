"""Random numbers that are pure functions of their name.

A `Streams` is a key and one counter per sample. Naming a stream (`rng.at("noise", step)`) folds the name into the key; drawing
hashes (key, sample, position) with the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number
generators"). Nothing is consumed, so a draw does not depend on batch size, order, neighbours, or on what was drawn before, a
resumed run needs no saved state, and everything is a tensor operation that `torch.func.vmap` can batch over keys.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def sample_keys(ids: Iterable[str]) -> Tensor:
    """One int64 per sample id [N]: the first eight bytes of its SHA-256."""
    digests = [hashlib.sha256(sample_id.encode()).digest()[:8] for sample_id in ids]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64 tensor."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit integers that avalanches."""
    value = (value ^ _shift(value, 30)) * _MIX1
    value = (value ^ _shift(value, 27)) * _MIX2
    return value ^ _shift(value, 31)


def _name(name: int | str | Tensor) -> int | Tensor:
    if isinstance(name, str):
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    return name


@dataclass(frozen=True, slots=True)
class Streams:
    """Named random streams for the samples of one batch: `key` [] int64, `samples` [B] int64."""

    key: Tensor
    samples: Tensor

    @staticmethod
    def seeded(seed: int, samples: Tensor) -> Streams:
        """Streams of a run's seed for the samples with these keys [B] (see `sample_keys`)."""
        return Streams(_mix(torch.tensor(seed, dtype=torch.int64, device=samples.device) + _GOLDEN), samples)

    def at(self, *names: int | str | Tensor) -> Streams:
        """The streams under these names, e.g. `at("noise", draw, step)`; order matters."""
        key = self.key
        for name in names:
            key = _mix(key * 3 + _name(name) + _GOLDEN)
        return Streams(key, self.samples)

    def bits(self, *shape: int) -> Tensor:
        """Hashes [B, *shape] int64 of (key, sample, position)."""
        position = torch.arange(math.prod(shape), device=self.samples.device).reshape(shape) * _GOLDEN
        sample = _mix(self.samples ^ self.key).reshape(-1, *(1 for _ in shape))
        return _mix(sample + position)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1), float32 [B, *shape]."""
        return _shift(self.bits(*shape), 40).to(torch.float32) * 2.0**-24

    def shared_uniform(self) -> Tensor:
        """One uniform number in [0, 1) for the whole batch, float32 []; it depends on the key alone."""
        return _shift(_mix(self.key + _GOLDEN), 40).to(torch.float32) * 2.0**-24

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 [B, *shape], by Box and Muller's transform."""
        bits = self.bits(*shape)
        radius = torch.sqrt(-2.0 * torch.log((_shift(bits, 32).to(torch.float32) + 0.5) * 2.0**-32))
        return radius * torch.cos((bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32))
