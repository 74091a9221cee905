"""The sampler of diffusion heads: it generates text features from image features with the reverse process, at test time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from pipeline.nn.denoisers import Denoiser
from pipeline.nn.diffusion import ddim_sample, trailing_steps
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings

NumSteps = Annotated[int, Range(1, 100_000), "T, steps of the diffusion"]
SampleSteps = Annotated[int, Range(1), "S, steps of ddim, at most T"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Settings):
    """The settings of a method that samples: its `Config` inherits them."""

    num_steps: NumSteps = 1000
    sampler: Annotated[
        Literal["ddim", "ancestral"], "for prediction; ddim: S steps, ancestral: all T steps with the noise of the posterior"
    ] = "ddim"
    sample_steps: SampleSteps = 10
    eta: Annotated[float, Range(0, 1), "amount of noise of ddim; 1: the noise of the posterior"] = 0.0
    draws: Annotated[int, Range(1, 1_000), "K, chains per image, whose class probabilities are averaged; the papers have 1"] = 1
    zero_start: Annotated[bool, "start the chain from 0 instead of noise"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler == "ddim":
            Range(1, self.num_steps).check("sample_steps", self.sample_steps)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the reverse process is run for one image."""

    num_sample_steps: int = 20  # S, 1..T; see `trailing_steps`
    eta: float = 0.0  # amount of noise: 0 is deterministic, 1 is the posterior's noise
    num_draws: int = 1  # K, chains per image; their class probabilities are averaged
    zero_start: bool = False  # start from 0 instead of noise

    @staticmethod
    def from_config(config: SamplerConfig) -> Sampler:
        """Return the sampler that a config names.

        It is "ddim" with S steps, or "ancestral" with all T steps and eta = 1 (MARNet eq. 21-23, SeDA eq. 13-15).
        """
        if config.sampler == "ancestral":
            num_sample_steps, eta = config.num_steps, 1.0
        else:
            num_sample_steps, eta = config.sample_steps, config.eta
        return Sampler(num_sample_steps=num_sample_steps, eta=eta, num_draws=config.draws, zero_start=config.zero_start)

    def generate(
        self, denoiser: Denoiser, x_v: Tensor, text_width: int, abar: Tensor, num_train_steps: Tensor, rng: KeyedRNG
    ) -> Tensor:
        """Run one chain per image and return the predicted text features xhat_0, [B, text_width].

        Work that depends on the image alone or on the step alone is done once, before the chain.

        Args:
            denoiser: the network X_theta.
            x_v: visual features [B,Dv].
            text_width: D of the generated features.
            abar: see `diffusion.alphas_cumprod`, [T].
            num_train_steps: T, in a tensor [].
            rng: streams of random numbers; each number belongs to a sample, not to a position in the batch.
        """
        steps = trailing_steps(num_train_steps, self.num_sample_steps)
        context = denoiser.image_context(x_v)
        step_table = denoiser.embed_step(steps)
        start = torch.zeros(len(x_v), text_width, device=x_v.device) if self.zero_start else rng.at("start").normal(text_width)

        def model(x: Tensor, k: int) -> Tensor:
            return denoiser(x, step_table[k], context)

        def noise(k: int) -> Tensor:
            return rng.at("step", k).normal(text_width)

        return ddim_sample(model, start, steps, abar, self.eta, noise)

    def average_predictions(self, logits_of: Callable[[int], Tensor]) -> Tensor:
        """Return the log of the class probabilities averaged over K draws, [B,C]; for K = 1, return the logits unchanged.

        Args:
            logits_of: `logits_of(draw)` returns the logits [B,C] of draw 0..K-1.
        """
        if self.num_draws == 1:
            return logits_of(0)
        log_probabilities = [torch.log_softmax(logits_of(draw), dim=-1) for draw in range(self.num_draws)]
        return torch.logsumexp(torch.stack(log_probabilities), dim=0) - math.log(self.num_draws)
