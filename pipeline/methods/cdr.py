"""MARNet's cross-modal diffusion reconstruction: text features denoised from noise, given the image (MARNet section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.nn.denoisers import ConcatMLP, Denoiser
from pipeline.nn.diffusion import Schedule, alphas_cumprod, q_sample
from pipeline.nn.feature_space import ADAPT, AdapterKind, LabelLoss, Scale, Space, label_count, require
from pipeline.nn.layers import MLP, LookupTable, register_hyperparameters
from pipeline.nn.losses import classification, mse
from pipeline.nn.sampler import Sampler
from pipeline.nn.unet import UNet
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, Phase, Shapes

NEEDS = ("image", "text", "paired", "label")
PREDICTION = ("sampler", "sample_steps", "eta", "draws", "zero_start")
SYMBOLS = {"T": "num_steps", "alpha2": "w_ce", "gamma": "w_mse"}
GRID = {"w_mse": (0.1, 0.3, 1.0, 3.0), "num_steps": (900, 1000, 1200, 1500)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MARNet eq. 14-23. In MARNet gamma weights the MSE; in SeDA it weights the cross-entropy."""

    denoiser: Literal["mlp", "unet", "regression"] = "mlp"  # "regression" is the +MLP row of Table 2: no diffusion
    hidden: int = 1024  # width of the MLP, 1..65536
    num_steps: int = 1000  # T, 1..100000
    schedule: Schedule = "linear"  # of the noise; the paper names none
    w_ce: float = 1.0  # alpha_2, weight of the cross-entropy
    w_mse: float = 1.0  # gamma, weight of the reconstruction
    mse_reduction: Literal["mean", "sum_dim"] = "mean"  # over the text dimensions
    ce_min_step: float = (
        0.0  # share of T, 0..1, below which the cross-entropy is left out: there the input still shows the text
    )
    train_min_step: float = 0.0  # share of T, 0..1, below which no step is trained; 0 is the paper
    dropout: float = 0.0  # probability, in the denoiser, 0..0.99
    sampler: Literal["ddim", "ancestral"] = "ddim"  # prediction: few steps, or all T
    sample_steps: int = 10  # S of ddim, 1..T
    eta: float = 0.0  # noise of ddim, 0..1
    draws: int = 1  # K, chains per image, 1..1000; 1 is the paper
    zero_start: bool = False  # start the chain from 0 instead of noise
    adapter: AdapterKind = "none"  # frozen adapters to a common width
    width: int = 512  # of the adapters, 1..65536
    scale: Scale = "per_dim"  # standardisation of both features
    label_loss: LabelLoss = "softmax_kl"  # for multi-label data

    def __post_init__(self) -> None:
        require(self, 0, math.inf, "w_ce", "w_mse")
        require(self, 1, 65_536, "hidden", "width")
        require(self, 1, 100_000, "num_steps")
        require(self, 1, 1_000, "draws")
        require(self, 0, 1, "ce_min_step", "train_min_step", "eta")
        require(self, 0, 0.99, "dropout")
        require(self, 1, self.num_steps if self.sampler == "ddim" else math.inf, "sample_steps")
        if self.denoiser == "regression" and self.ce_min_step > 0:
            raise ValueError("ce_min_step must be 0 with denoiser=regression, which has no steps")


class Regression(nn.Module):
    """Four linear layers from x_v to x_s, behind the interface of a denoiser that ignores noise and step."""

    def __init__(self, text_width: int, image_width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = MLP([image_width, hidden, hidden, hidden, text_width])

    def condition(self, x_v: Tensor) -> Tensor:
        """x_v itself."""
        return x_v

    def time(self, n: Tensor) -> Tensor:
        """Nothing: zeros [..., 1]."""
        return torch.zeros(*n.shape, 1, device=n.device)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """x̂_s [B,D] of x_v [B,Dv]."""
        return self.mlp(context, rng, p)


def build_denoiser(config: Config, text_width: int, image_width: int) -> Denoiser:
    """The network that the config names; `ValueError` when the widths do not fit it."""
    if config.denoiser == "mlp":
        return ConcatMLP(text_width, image_width, hidden=config.hidden)
    if config.denoiser == "regression":
        return Regression(text_width, image_width, config.hidden)
    if text_width != image_width:
        raise ValueError(f"denoiser 'unet' needs equal widths, not {text_width} and {image_width}: set adapter=classifier")
    return UNet(text_width)


class CDR(nn.Module):
    """q noises x_s, X_theta(x_s^n, n, x_v) predicts it back, and a classifier reads the prediction."""

    first_ce_step: Tensor
    first_step: Tensor
    p_dropout: Tensor
    steps: Tensor
    w_ce: Tensor
    w_mse: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__()
        self.mse_reduction: Literal["mean", "sum_dim"] = config.mse_reduction
        self.label_loss: LabelLoss = config.label_loss
        self.space = Space(shapes, config.adapter, config.width, config.scale)
        self.needs = NEEDS
        self.phases = (*self.space.phases, Phase("head", ("denoiser.", "classifier.")))
        width = self.space.text_width
        self.denoiser = build_denoiser(config, width, self.space.image_width)
        self.classifier = nn.Linear(width, label_count(shapes))
        regression = config.denoiser == "regression"  # has nothing to iterate
        self.sampler = Sampler(num_steps=1, zero_start=True) if regression else Sampler.of(config)
        self.abar = LookupTable(alphas_cumprod(config.schedule, config.num_steps))
        last = config.num_steps - 1
        register_hyperparameters(
            self, steps=config.num_steps, first_step=min(round(config.train_min_step * config.num_steps), last)
        )
        register_hyperparameters(self, first_ce_step=min(round(config.ce_min_step * config.num_steps), last))
        register_hyperparameters(self, p_dropout=config.dropout, w_ce=config.w_ce, w_mse=config.w_mse)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Statistics of both features."""
        self.space.begin(phase, train)

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """L_CDR = alpha_2 L_CE + gamma L_MSE (eq. 19-20), both on the one-step prediction at a random step."""
        if phase == ADAPT.name:
            return self.space.adapter_loss(batch, self.label_loss)
        return self.objective(*self.one_step(batch, rng), batch)

    def one_step(self, batch: Batch, rng: KeyedRNG) -> tuple[Tensor, Tensor, Tensor]:
        """X_theta(x_s^n, n, x_v) and its target x_s [B,Ds] at random steps n [B]."""
        x_v, x_s = self.space.image(batch["image"]), self.space.text(batch["text"])
        n = (self.first_step + torch.floor(rng.at("n").uniform() * (self.steps - self.first_step))).long()
        x_n = q_sample(x_s, n, rng.at("noise").normal(x_s.shape[1]), self.abar.values)
        x_0 = self.denoiser(x_n, self.denoiser.time(n), self.denoiser.condition(x_v), rng.at("dropout"), self.p_dropout)
        return x_0, x_s, n

    def objective(self, x_0: Tensor, x_s: Tensor, n: Tensor, batch: Batch) -> Batch:
        """L_CDR and its parts from the outcome of `one_step`."""
        error = mse(x_0, x_s, self.mse_reduction, batch["paired"])
        late = (n >= self.first_ce_step).float()
        ce = classification(self.classifier(x_0), batch["label"], self.label_loss, late)
        return {"loss": self.w_ce * ce + self.w_mse * error, "ce": ce, "mse": error}

    def feature(self, image: Tensor, rng: KeyedRNG, draw: int = 0) -> Tensor:
        """x_CDR [B,Ds] of image features [B,Dv]: one draw of the reverse chain (eq. 21-23)."""
        x_v, rng = self.space.image(image), rng.at("draw", draw)
        return self.sampler.generate(self.denoiser, x_v, self.space.text_width, self.abar.values, self.steps, rng)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [B,C] of image features [B,Dv]."""
        return self.sampler.mean_logits(lambda draw: self.classifier(self.feature(image, rng, draw)))


def build(config: Config, shapes: Shapes) -> CDR:
    """A CDR head for features of these shapes."""
    return CDR(config, shapes)
