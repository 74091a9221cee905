"""From an image feature to generated text features: the reverse process as a head runs it at test time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.nn.denoisers import Denoiser
from pipeline.nn.diffusion import ddim, sample_steps
from pipeline.runtime.rng import KeyedRNG


class SamplerConfig(Protocol):
    """What a method's config says of sampling."""

    @property
    def sampler(self) -> str: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def sample_steps(self) -> int: ...
    @property
    def eta(self) -> float: ...
    @property
    def draws(self) -> int: ...
    @property
    def zero_start(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the chain is run."""

    num_steps: int = 20  # S, 1..T, of a trailing grid
    eta: float = 0.0  # noise: 0 deterministic, 1 the posterior's
    draws: int = 1  # K, chains per image whose class probabilities are averaged
    zero_start: bool = False  # start from 0 instead of noise

    @staticmethod
    def of(settings: SamplerConfig) -> Sampler:
        """The sampler that a method's settings name: ddim, or the ancestral chain (M eq. 21-23, S eq. 13-15)."""
        every = settings.sampler == "ancestral"  # eta = 1 over all T steps
        num_steps, eta = (settings.num_steps, 1.0) if every else (settings.sample_steps, settings.eta)
        return Sampler(num_steps=num_steps, eta=eta, draws=settings.draws, zero_start=settings.zero_start)

    def generate(
        self, denoiser: Denoiser, image: Tensor, width: int, abar: Tensor, num_train_steps: Tensor, rng: KeyedRNG
    ) -> Tensor:
        """One draw of x̂_0 [B,width] given x_v [B,Dv], abar [T] and T []; every number it uses is named by the sample.

        What depends on the image or on the step alone is computed once, not once per step.
        """
        steps = sample_steps(num_train_steps, self.num_steps)
        context = denoiser.condition(image)
        table = denoiser.time(steps)
        no_dropout = torch.zeros((), device=image.device)
        start = torch.zeros(len(image), width, device=image.device) if self.zero_start else rng.at("start").normal(width)

        def model(x: Tensor, k: int) -> Tensor:
            return denoiser(x, table[k], context, None, no_dropout)

        def noise(k: int) -> Tensor:
            return rng.at("step", k).normal(width)

        return ddim(model, start, steps, abar, self.eta, noise)

    def mean_logits(self, logits_of: Callable[[int], Tensor]) -> Tensor:
        """log of the softmax probabilities averaged over the draws [B,C]; a single draw's logits stay as they are."""
        if self.draws == 1:
            return logits_of(0)
        draws = [torch.log_softmax(logits_of(draw), dim=-1) for draw in range(self.draws)]
        return torch.logsumexp(torch.stack(draws), dim=0) - math.log(self.draws)
