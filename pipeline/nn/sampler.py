"""The sampler of diffusion heads: it generates text features from image features with the reverse process, at test time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.denoisers import Denoiser
from pipeline.nn.diffusion import ddim_sample, trailing_steps
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings

NumSteps = Annotated[int, Range(1, 100_000), "T, steps of the diffusion"]
SampleSteps = Annotated[int, Range(1), "S, steps of ddim, at most T"]
PREDICTION_SETTINGS = (
    "sampler",
    "sample_steps",
    "chain_steps",
    "eta",
    "draws",
    "zero_start",
)  # those that training does not read


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Settings):
    """The settings of a method that samples: its `Config` inherits them."""

    num_steps: NumSteps = 1000
    sampler: Annotated[
        Literal["ddim", "ancestral"], "for prediction; ddim: S steps, ancestral: all T steps with the noise of the posterior"
    ] = "ddim"
    sample_steps: SampleSteps = 10
    chain_steps: Annotated[
        Literal["trained", "all"], "steps that the chain visits; trained: of these S or T steps, those that training draws"
    ] = "trained"
    eta: Annotated[float, Range(0, 1), "amount of noise of ddim; 1: the noise of the posterior"] = 0.0
    draws: Annotated[int, Range(1, 1_000), "K, chains per image, whose class probabilities are averaged; the papers have 1"] = 1
    zero_start: Annotated[bool, "start the chain from 0 instead of noise"] = False

    old_defaults: ClassVar[Mapping[str, Any]] = {"chain_steps": "all"}

    def trained_steps(self) -> Sequence[range]:
        """Return the steps that training draws; T-1 is one of them."""
        return (range(self.num_steps),)

    def recorded(self) -> dict[str, Any]:
        """Return the settings without `chain_steps` where all steps are trained: there it changes nothing."""
        settings = super().recorded()
        if sum(map(len, self.trained_steps())) == self.num_steps:
            del settings["chain_steps"]
        return settings

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler == "ddim":
            Range(1, self.num_steps).check("sample_steps", self.sample_steps)


class Sampler(nn.Module):
    """How the reverse process is run for one image: "ddim" with S steps, or "ancestral" with all T steps and eta = 1
    (MARNet eq. 21-23, SeDA eq. 13-15).

    The network has learned nothing at a step that training does not draw, so the chain leaves such steps out: the next trained
    step above stands in the place of each, and a jump from a step to itself changes nothing. The last jump goes from the lowest
    step that is left to the data. The chain keeps its length: heads that differ in the trained steps can be one ensemble.

    Args:
        config: the settings.
    """

    steps: Tensor

    def __init__(self, config: SamplerConfig) -> None:
        super().__init__()
        is_ancestral = config.sampler == "ancestral"
        num_sample_steps = config.num_steps if is_ancestral else config.sample_steps
        steps = trailing_steps(torch.tensor(float(config.num_steps)), num_sample_steps)
        if config.chain_steps == "trained":
            trained = config.trained_steps()
            is_trained = torch.tensor([any(step in each for each in trained) for step in steps.tolist()])
            steps = torch.where(is_trained, steps, config.num_steps).cummin(0).values
        self.eta = 1.0 if is_ancestral else config.eta
        self.num_draws, self.zero_start = config.draws, config.zero_start
        self.register_buffer("steps", steps, persistent=False)

    def generate(self, denoiser: Denoiser, x_v: Tensor, text_width: int, abar: Tensor, rng: KeyedRNG) -> Tensor:
        """Run one chain per image and return the predicted text features xhat_0, [B, text_width].

        Work that depends on the image alone or on the step alone is done once, before the chain.

        Args:
            denoiser: the network X_theta.
            x_v: visual features [B,Dv].
            text_width: D of the generated features.
            abar: see `diffusion.alphas_cumprod`, [T].
            rng: streams of random numbers; each number belongs to a sample, not to a position in the batch.
        """
        context = denoiser.image_context(x_v)
        step_table = denoiser.embed_step(self.steps)
        start = (
            torch.zeros(x_v.shape[0], text_width, device=x_v.device) if self.zero_start else rng.at("start").normal(text_width)
        )

        def model(x: Tensor, k: int) -> Tensor:
            return denoiser(x, step_table[k].flatten(), context)  # [E], also where k is a tensor [1]

        def noise(k: int) -> Tensor:
            return rng.at("step", k).normal(text_width)

        return ddim_sample(model, start, self.steps, abar, self.eta, noise)

    def average_predictions(self, logits_of: Callable[[int], Tensor], is_sigmoid: bool = False) -> Tensor:
        """Return the logits [B,C] of the class probabilities averaged over K draws; for K = 1, return the logits unchanged.

        Args:
            logits_of: `logits_of(draw)` returns the logits [B,C] of draw 0..K-1.
            is_sigmoid: whether each class has a probability of its own; else the probabilities are a softmax, and the result is
                their logarithm.
        """
        if self.num_draws == 1:
            return logits_of(0)
        logits = torch.stack([logits_of(draw) for draw in range(self.num_draws)])
        if is_sigmoid:  # log p - log(1 - p)
            return torch.logsumexp(F.logsigmoid(logits), dim=0) - torch.logsumexp(F.logsigmoid(-logits), dim=0)
        return torch.logsumexp(torch.log_softmax(logits, dim=-1), dim=0) - math.log(self.num_draws)
