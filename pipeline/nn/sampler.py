"""The sampler of diffusion heads: it generates text features from image features with the reverse process, at test time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from pipeline.nn.denoisers import Denoiser
from pipeline.nn.diffusion import ddim_sample, trailing_steps
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range

# the fields of a method's `Config` that describe sampling
SamplerKind = Annotated[
    Literal["ddim", "ancestral"], "for prediction; ddim: S steps, ancestral: all T steps with the noise of the posterior"
]
SampleSteps = Annotated[int, Range(1), "S, steps of ddim, at most T"]
Eta = Annotated[float, Range(0, 1), "amount of noise of ddim; 1: the noise of the posterior"]
Draws = Annotated[int, Range(1, 1_000), "K, chains per image, whose class probabilities are averaged; the papers have 1"]
ZeroStart = Annotated[bool, "start the chain from 0 instead of noise"]


class SamplerConfig(Protocol):
    """The fields of a method's `Config` that describe sampling; `num_steps` is T, `sample_steps` is S, `draws` is K."""

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


def check_sample_steps(config: SamplerConfig) -> None:
    """Check that "ddim" has at most T steps.

    Raises:
        UserError: it has more.
    """
    if config.sampler == "ddim":
        Range(1, config.num_steps).check("sample_steps", config.sample_steps)


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
