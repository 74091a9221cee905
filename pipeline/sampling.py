"""From an image feature to generated text features: the reverse process as a head runs it at test time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.denoisers import Denoiser
from pipeline.diffusion import ddim, sample_steps
from pipeline.streams import Streams


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the chain is run: "ddim" over a trailing grid, or "ancestral" over every step (M eq. 21-23, S eq. 13-15)."""

    kind: Literal["ddim", "ancestral"] = "ddim"
    num_steps: int = 20  # S of ddim, 1..T; "ancestral" takes all T
    eta: float = 0.0  # noise of ddim: 0 deterministic, 1 the posterior's
    draws: int = 1  # K, chains per image whose class probabilities are averaged
    zero_start: bool = False  # start from 0 instead of noise

    def generate(self, denoiser: Denoiser, image: Tensor, width: int, abar: Tensor, rng: Streams) -> Tensor:
        """One draw of x̂_0 [B,width] given x_v [B,Dv] and abar [T]; every number it uses is named by the sample.

        What depends on the image or on the step alone is computed once, not once per step.
        """
        num_train_steps = len(abar)
        every = self.kind == "ancestral"
        steps = sample_steps(num_train_steps, num_train_steps if every else self.num_steps)
        context = denoiser.condition(image)
        table = denoiser.time(torch.tensor(steps, device=image.device))
        no_dropout = torch.zeros((), device=image.device)
        start = torch.zeros(len(image), width, device=image.device) if self.zero_start else rng.at("start").normal(width)

        def model(x: Tensor, k: int) -> Tensor:
            return denoiser(x, table[k], context, None, no_dropout)

        def noise(k: int) -> Tensor:
            return rng.at("step", k).normal(width)

        # eta = 1 over every step is the ancestral chain
        return ddim(model, start, steps, abar, 1.0 if every else self.eta, noise)

    def mean_logits(self, logits_of: Callable[[int], Tensor]) -> Tensor:
        """log of the softmax probabilities averaged over the draws [B,C]; a single draw's logits stay as they are."""
        if self.draws == 1:
            return logits_of(0)
        draws = [torch.log_softmax(logits_of(draw), dim=-1) for draw in range(self.draws)]
        return torch.logsumexp(torch.stack(draws), dim=0) - math.log(self.draws)
