"""Random numbers that are pure functions of their name.

A `KeyedRNG` is a key and one counter per sample. Naming a stream (`rng.at("noise", step)`) folds the name into the key; drawing
hashes (key, sample, position) with the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number
generators"). Nothing is consumed, so a draw does not depend on batch size, order, neighbours, or on what was drawn before, and
a resumed run needs no saved state. A key is an int, which costs a device nothing, or a tensor, over which `torch.func.vmap` can
batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
Word = Any  # 64 bits: a signed int, or an int64 tensor


def sample_keys(ids: Iterable[str]) -> Tensor:
    """One int64 per sample id [N]: the first eight bytes of its SHA-256."""
    digests = [hashlib.sha256(sample_id.encode()).digest()[:8] for sample_id in ids]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)


def _wrapped(value: Word) -> Word:
    """Modulo 2**64, as tensors are by themselves."""
    return value if isinstance(value, Tensor) else (value + 2**63) % 2**64 - 2**63


def _shift(value: Word, bits: int) -> Word:
    """Logical right shift; the shift of signed integers copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Word) -> Word:
    """SplitMix64's finaliser: a bijection of 64-bit integers that avalanches."""
    value = _wrapped((value ^ _shift(value, 30)) * _MIX1)
    value = _wrapped((value ^ _shift(value, 27)) * _MIX2)
    return value ^ _shift(value, 31)


@torch.compiler.assume_constant_result  # torch.compile cannot trace a hash
def _word(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


@dataclass(frozen=True, slots=True)
class KeyedRNG:
    """Named random streams for the samples of one batch: `key` of 64 bits, `samples` [B] int64."""

    key: int | Tensor
    samples: Tensor

    @staticmethod
    def seeded(seed: int, samples: Tensor) -> KeyedRNG:
        """Streams of a run's seed for the samples with these keys [B] (see `sample_keys`)."""
        return KeyedRNG(_mix(_wrapped(seed + _GOLDEN)), samples)

    def at(self, *names: int | str | Tensor) -> KeyedRNG:
        """The streams under these names, e.g. `at("noise", draw, step)`; order matters."""
        key = self.key
        for name in names:
            key = _mix(_wrapped(_wrapped(key * 3 + _GOLDEN) + (_word(name) if isinstance(name, str) else name)))
        return KeyedRNG(key, self.samples)

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
        number = _shift(_mix(_wrapped(self.key + _GOLDEN)), 40) * 2.0**-24
        return number if isinstance(number, Tensor) else torch.full((), number, device=self.samples.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float32 [B, *shape], by Box and Muller's transform."""
        bits = self.bits(*shape)
        radius = torch.sqrt(-2.0 * torch.log((_shift(bits, 32).to(torch.float32) + 0.5) * 2.0**-32))
        return radius * torch.cos((bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32))
