"""MARNet: EMA and CDR side by side, fused by features or by logits (MARNet section 3.4, eq. 24)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.methods import cdr, ema
from pipeline.nn.diffusion import Schedule
from pipeline.nn.feature_space import LabelLoss, Scale, label_count
from pipeline.nn.losses import classification
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, Phase, Shapes

NEEDS = ("image", "text", "paired", "label")
PREDICTION = ("fusion", "sampler", "sample_steps", "eta", "draws", "zero_start")
SYMBOLS = {"T": "num_steps", "alpha1": "w_ce_ema", "beta": "w_ita", "alpha2": "w_ce_cdr", "gamma": "w_mse", "tau": "tau"}
GRID = {"w_ita": (0.1, 0.3, 1.0, 3.0), "w_mse": (0.1, 0.3, 1.0, 3.0), "num_steps": (900, 1000, 1200, 1500)}
BY_FEATURE = ("concat", "add", "mul")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of both branches, as in `ema` and `cdr`, and of their fusion."""

    fusion: Literal["concat", "add", "mul", "sum", "hm"] = "concat"  # may be changed at prediction: all of them are trained
    regime: Literal["staged", "joint"] = "staged"  # fuse sampled features of frozen branches, or one-step predictions at once
    width: int = 768  # d of EMA, 1..65536
    tau: float = 0.07  # temperature of EMA
    learn_tau: bool = False  # learn log(1/tau), with 1/tau at most 100
    w_ce_ema: float = 1.0  # alpha_1
    w_ita: float = 1.0  # beta
    hidden: int = 1024  # width of CDR's MLP, 1..65536
    num_steps: int = 1000  # T of CDR, 1..100000
    schedule: Schedule = "linear"  # of CDR's noise
    w_ce_cdr: float = 1.0  # alpha_2
    w_mse: float = 1.0  # gamma
    mse_reduction: Literal["mean", "sum_dim"] = "mean"  # over the text dimensions
    ce_min_step: float = 0.0  # share of T, 0..1, below which CDR's cross-entropy is left out
    train_min_step: float = 0.0  # share of T, 0..1, below which CDR trains no step
    dropout_ema: float = 0.0  # probability, 0..0.99
    dropout_cdr: float = 0.0  # probability, 0..0.99
    sampler: Literal["ddim", "ancestral"] = "ddim"  # of CDR
    sample_steps: int = 10  # S of ddim, 1..T
    eta: float = 0.0  # noise of ddim, 0..1
    draws: int = 1  # K, chains per image, 1..1000
    zero_start: bool = False  # start the chain from 0 instead of noise
    scale: Scale = "per_dim"  # standardisation of both features
    label_loss: LabelLoss = "softmax_kl"  # for multi-label data

    def __post_init__(self) -> None:
        self.ema()
        self.cdr()

    def ema(self) -> ema.Config:
        """The alignment branch's settings."""
        return ema.Config(
            width=self.width,
            tau=self.tau,
            learn_tau=self.learn_tau,
            w_ce=self.w_ce_ema,
            w_ita=self.w_ita,
            dropout=self.dropout_ema,
            scale=self.scale,
            label_loss=self.label_loss,
        )

    def cdr(self) -> cdr.Config:
        """The reconstruction branch's settings."""
        return cdr.Config(
            hidden=self.hidden,
            num_steps=self.num_steps,
            schedule=self.schedule,
            w_ce=self.w_ce_cdr,
            w_mse=self.w_mse,
            mse_reduction=self.mse_reduction,
            ce_min_step=self.ce_min_step,
            train_min_step=self.train_min_step,
            dropout=self.dropout_cdr,
            sampler=self.sampler,
            sample_steps=self.sample_steps,
            eta=self.eta,
            draws=self.draws,
            zero_start=self.zero_start,
            scale=self.scale,
            label_loss=self.label_loss,
        )


def fuse_sum(z_e: Tensor, z_c: Tensor) -> Tensor:
    """log sigmoid(z_E + z_C): SUM of Niu et al. 2021 (CF-VQA), without its counterfactual part."""
    return F.logsigmoid(z_e + z_c)


def fuse_hm(z_e: Tensor, z_c: Tensor) -> Tensor:
    """log(Z / (1 + Z)) with Z = sigmoid(z_E) sigmoid(z_C): HM of Niu et al. 2021 (CF-VQA)."""
    log_z = F.logsigmoid(z_e) + F.logsigmoid(z_c)
    return log_z - F.softplus(log_z)


class FeatureFusion(nn.Module):
    """A classifier on x_EMA and x_CDR, both at length sqrt(D), joined by one of concat, add and mul."""

    def __init__(self, kind: str, ema_width: int, cdr_width: int, num_classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Linear(cdr_width, ema_width) if cdr_width != ema_width else nn.Identity()
        self.classifier = nn.Linear(2 * ema_width if kind == "concat" else ema_width, num_classes)

    def join(self, f_e: Tensor, f_c: Tensor) -> Tensor:
        """[B, D] or, for concat, [B, 2D] of features [B,D] and [B,Ds]."""
        length = f_e.shape[1] ** 0.5
        f_e, f_c = F.normalize(f_e, dim=1) * length, F.normalize(self.project(f_c), dim=1) * length
        if self.kind == "concat":
            return torch.cat([f_e, f_c], dim=1)
        return f_e + f_c if self.kind == "add" else f_e * f_c

    def forward(self, f_e: Tensor, f_c: Tensor) -> Tensor:
        """Logits [B,C]."""
        return self.classifier(self.join(f_e, f_c))


class MARNet(nn.Module):
    """EMA, then CDR, then, on frozen branches, a classifier for each operator, fed with features sampled without any text.

    The joint regime trains everything at once on CDR's one-step predictions, which see the noised text: at test its fusion
    meets another distribution.
    """

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__()
        self.fusion: str = config.fusion
        self.label_loss: LabelLoss = config.label_loss
        self.ema = ema.build(config.ema(), shapes)
        self.cdr = cdr.build(config.cdr(), shapes)
        (text_width,) = shapes["text"]
        staged = config.regime == "staged"
        kinds = [kind for kind in BY_FEATURE if staged or kind == config.fusion]
        classes = label_count(shapes)
        self.fusions = nn.ModuleDict({kind: FeatureFusion(kind, config.width, text_width, classes) for kind in kinds})
        self.needs = NEEDS
        stages = (Phase("ema", ("ema.",)), Phase("cdr", ("cdr.",)), Phase("fusion", ("fusions.",), share=0.5))
        self.phases = stages if staged else (Phase("joint"),)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Statistics of both features, for the branches that the phase trains."""
        if phase in ("ema", "joint"):
            self.ema.begin(phase, train)
        if phase in ("cdr", "joint"):
            self.cdr.begin(phase, train)

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """L_EMA (eq. 13), L_CDR (eq. 20), the cross-entropies of the fusions (eq. 24), or all of them in the phase "joint"."""
        if phase == "ema":
            return self.ema.loss(batch, rng, phase)
        if phase == "cdr":
            return self.cdr.loss(batch, rng, phase)
        if phase == "joint":
            return self._joint_loss(batch, rng)
        with torch.no_grad():
            f_e = self.ema.feature(batch["image"], rng)
            f_c = self.cdr.feature(batch["image"], rng)
        losses = {kind: self._fusion_loss(kind, f_e, f_c, batch) for kind in self.fusions}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def _joint_loss(self, batch: Batch, rng: KeyedRNG) -> Batch:
        aligned = self.ema.loss(batch, rng.at("ema"), "joint")
        x_0, x_s, n = self.cdr.one_step(batch, rng.at("cdr"))
        rebuilt = self.cdr.objective(x_0, x_s, n, batch)
        fused = self._fusion_loss(self.fusion, self.ema.feature(batch["image"], rng), x_0, batch)
        parts = {"ita": aligned["ita"], "mse": rebuilt["mse"], "ce_ema": aligned["ce"], "ce_cdr": rebuilt["ce"]}
        return {"loss": aligned["loss"] + rebuilt["loss"] + fused, **parts, "ce_fused": fused}

    def _fusion_loss(self, kind: str, f_e: Tensor, f_c: Tensor, batch: Batch) -> Tensor:
        return classification(self.fused(kind, f_e, f_c), batch["label"], self.label_loss)

    def fused(self, kind: str, f_e: Tensor, f_c: Tensor) -> Tensor:
        """Logits [B,C] of x_EMA [B,d] and x_CDR [B,Ds] by an operator; SUM and HM join the branches' own logits."""
        if kind in BY_FEATURE:
            return self.fusions[kind](f_e, f_c)
        z_e, z_c = self.ema.classifier(f_e), self.cdr.classifier(f_c)
        return fuse_sum(z_e, z_c) if kind == "sum" else fuse_hm(z_e, z_c)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [B,C] of image features [B,Dv]."""
        f_e = self.ema.feature(image, rng)
        return self.cdr.sampler.mean_logits(lambda draw: self.fused(self.fusion, f_e, self.cdr.feature(image, rng, draw)))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """The fused feature; for the operators on logits, both branches' features side by side."""
        f_e, f_c = self.ema.feature(image, rng), self.cdr.feature(image, rng)
        if self.fusion not in BY_FEATURE:
            return torch.cat([f_e, f_c], dim=1)
        fusion = self.fusions[self.fusion]
        assert isinstance(fusion, FeatureFusion)
        return fusion.join(f_e, f_c)


def build(config: Config, shapes: Shapes) -> MARNet:
    """A MARNet head for features of these shapes."""
    return MARNet(config, shapes)
