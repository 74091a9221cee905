"""Random numbers of training steps, which depend on the step alone, and of samples: predictions, order, captions, augmentation.

In training, `seed_step` seeds torch's own generators before every step. Whatever a method draws in it, with `torch.rand` or
with a layer, is a function of the run's seed, the phase, the epoch and the step. A resumed run needs no saved state, and all
heads of an ensemble that have the same seed get the same numbers.

A sample must get the same numbers in any batch when it is predicted, and the same place in an epoch. A `KeyedRNG` holds a key
and one number per sample. `rng.at("noise", step)` mixes the name of a stream into the key. Drawing hashes (key, sample,
position) with the finaliser of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"). There is
no state. Therefore a draw does not depend on the batch size, on the order of samples, on the other samples of the batch, or on
earlier draws. A key is an int, which needs no memory on the device, or a tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
Word = Any  # a 64-bit word: a signed int, or an int64 tensor


def sample_keys(ids: Iterable[str]) -> Tensor:
    """Return one int64 per sample id [N]: the first eight bytes of the SHA-256 of the id."""
    return content_keys(hashlib.sha256(sample_id.encode()).digest()[:8] for sample_id in ids)


def content_keys(digests: Iterable[bytes]) -> Tensor:
    """Return one int64 per digest of 8 bytes [N], for media that are no samples: the numbers depend on the content alone."""
    return torch.from_numpy(np.frombuffer(b"".join(digests), "<i8").astype(np.int64))


def _wrapped(value: Word) -> Word:
    """Wrap an int to a signed 64-bit value; int64 tensors do this by themselves."""
    return value if isinstance(value, Tensor) else (value + 2**63) % 2**64 - 2**63


def _shift(value: Word, bits: int) -> Word:
    """Logical right shift: zeros are shifted in, whereas >> on signed integers copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Word) -> Word:
    """Finaliser of SplitMix64: a bijection of 64-bit integers; each input bit changes about half of the output bits."""
    value = _wrapped((value ^ _shift(value, 30)) * _MIX1)
    value = _wrapped((value ^ _shift(value, 27)) * _MIX2)
    return value ^ _shift(value, 31)


def _word(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def seed_step(seed: int, phase: str, epoch: int, step: int, generator: torch.Generator | None = None) -> None:
    """Seed a generator for one training step; without one, those of torch, of the processor and of the GPU in use."""
    number = _word(f"{seed}/{phase}/{epoch}/{step}")
    if generator:
        generator.manual_seed(number)
        return
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)


def make_streams_compilable() -> None:
    """Let torch.compile take the hash of a stream's name as a constant, because it cannot trace it; call this before compiling.

    As a decorator of the hash this would import torch._dynamo, 3 seconds of CPU, in programs that compile nothing.
    """
    torch.compiler.assume_constant_result(_word)


@dataclass(frozen=True, slots=True)
class KeyedRNG:
    """Named streams of random numbers for the samples of one batch.

    Args:
        key: 64 bits that stand for the seed and the name of the stream.
        samples: one key per sample, int64 [B] (see `sample_keys`).
    """

    key: int | Tensor
    samples: Tensor

    @staticmethod
    def drawn(num_samples: int, device: torch.device) -> KeyedRNG:
        """Return streams whose key is drawn from torch's generator, for predictions of a batch inside a training step."""
        return KeyedRNG(torch.randint(2**62, (), device=device), torch.arange(num_samples, device=device))

    @staticmethod
    def seeded(seed: int | Tensor, samples: Tensor) -> KeyedRNG:
        """Return the streams of a seed, or of a tensor of seeds, for samples with these keys [B] (see `sample_keys`)."""
        return KeyedRNG(_mix(_wrapped(seed + _GOLDEN)), samples)

    def at(self, *names: int | str | Tensor) -> KeyedRNG:
        """Return the streams with these names added, such as `at("noise", draw, step)`; the order of names matters."""
        key = self.key
        for name in names:
            key = _mix(_wrapped(_wrapped(key * 3 + _GOLDEN) + (_word(name) if isinstance(name, str) else name)))
        return KeyedRNG(key, self.samples)

    def bits(self, *shape: int) -> Tensor:
        """Return hashes of (key, sample, position), int64 [B, *shape]."""
        position = torch.arange(math.prod(shape), device=self.samples.device).reshape(shape) * _GOLDEN
        sample = _mix(self.samples ^ self.key).reshape(-1, *(1 for _ in shape))
        return _mix(sample + position)

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1), float32 [B, *shape]."""
        return _shift(self.bits(*shape), 40).to(torch.float32) * 2.0**-24

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32 [B, *shape], by the Box-Muller transform."""
        bits = self.bits(*shape)
        radius = torch.sqrt(-2.0 * torch.log((_shift(bits, 32).to(torch.float32) + 0.5) * 2.0**-32))
        return radius * torch.cos((bits & 0xFFFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-32))
