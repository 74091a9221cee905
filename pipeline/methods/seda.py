"""SeDA: from image to text features through a semantic space, in two stages of one diffusion (Li et al., IJCAI 2025)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.denoisers import PFIN, Denoiser, Interaction
from pipeline.nn.diffusion import Schedule, alphas_cumprod, q_sample
from pipeline.nn.feature_space import ADAPT, AdapterKind, LabelLoss, Scale, Space, label_count, require
from pipeline.nn.layers import LookupTable, register_hyperparameters
from pipeline.nn.losses import classification, membership, mse, structural_consistency
from pipeline.nn.sampler import Sampler
from pipeline.nn.unet import UNet
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, Phase, Shapes

NEEDS = ("image", "text", "paired", "label")
PREDICTION = ("sampler", "sample_steps", "eta", "draws", "zero_start")
SYMBOLS = {
    "T": "num_steps",
    "t": "stage_step",
    "gamma": "w_ce_dst",
    "beta": "w_ce_dsl",
    "alpha1": "w_sc",
    "alpha2": "w_mse",
}
GRID = {"w_ce_dst": (0.5, 1.0, 1.5, 2.0), "num_steps": (900, 1200, 1500, 1800), "stage_step": (0, 300, 500)}  # Figure 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SeDA eq. 1-15; defaults lie in the ranges of section 5.1 and at the optimum of section 5.4."""

    stages: Literal["both", "dsl", "dst"] = "both"  # bi-stage, semantic learner only, semantic translator only (Table 2)
    stage_order: Literal["literal", "reverse"] = "literal"  # learner at n <= t (eq. 12), or at n >= T - t (section 4.2)
    per_sample_stage: bool = False  # draw the stage for each sample instead of each batch
    num_steps: int = 1500  # T, 1..100000
    stage_step: int = 300  # t, 0..T-1
    schedule: Schedule = "linear"  # of the noise; the paper names none
    train_min_step: float = 0.0  # share of T, 0..1, below which the translator trains no step; 0 is the paper
    w_sc: float = 1.0  # alpha_1, weight of the structural consistency; the paper tries 0.1..2
    w_ce_dsl: float = 1.0  # beta, weight of the cross-entropy in the learner; the paper tries 0.5..2
    w_mse: float = 1.0  # alpha_2, weight of the reconstruction; the paper tries 0.1..2
    w_ce_dst: float = 1.5  # gamma, weight of the cross-entropy in the translator
    sc_reduction: Literal["mean", "literal"] = "mean"  # of eq. 6: free of scale, or its sums
    centres: Literal["batch", "train"] = "batch"  # visual class centres of eq. 5: of the batch, or of the training split
    denoiser: Literal["pfin", "unet"] = "pfin"
    interaction: Interaction = "cross_attention"  # of PFIN (Table 3)
    num_tokens: int = 8  # chunks a vector is cut into, 1..65536; a divisor of the width
    token_width: int = 128  # of a token, 1..65536
    num_heads: int = 4  # of the attention
    residual: bool = True  # add the noisy text to the attention's output
    dropout: float = 0.0  # probability, in the denoiser, 0..0.99
    sampler: Literal["ddim", "ancestral"] = "ddim"  # prediction: few steps, or all T
    sample_steps: int = 20  # S of ddim, 1..T; from 20 on several fall into the learner's steps
    eta: float = 0.0  # noise of ddim, 0..1
    draws: int = 1  # K, chains per image, 1..1000; 1 is the paper
    zero_start: bool = False  # start the chain from 0 instead of noise
    adapter: Literal["auto", "none", "classifier", "pca"] = "auto"  # frozen adapters; auto: classifier where widths differ
    width: int = 512  # of the adapters, 1..65536
    scale: Scale = "per_dim"  # standardisation of both features
    label_loss: LabelLoss = "softmax_kl"  # for multi-label data

    def __post_init__(self) -> None:
        require(self, 0, math.inf, "w_sc", "w_ce_dsl", "w_mse", "w_ce_dst")
        require(self, 1, 65_536, "width", "num_tokens", "token_width", "num_heads")
        require(self, 1, 100_000, "num_steps")
        require(self, 1, 1_000, "draws")
        require(self, 0, self.num_steps - 1, "stage_step")
        if self.stages == "both" and self.stage_order == "reverse" and self.first_step >= self.num_steps - self.stage_step:
            raise ValueError(
                f"train_min_step {self.train_min_step} leaves the translator no step below T - t = "
                f"{self.num_steps - self.stage_step}: lower it, or say stages=dsl"
            )
        require(self, 0, 1, "train_min_step", "eta")
        require(self, 0, 0.99, "dropout")
        require(self, 1, self.num_steps if self.sampler == "ddim" else math.inf, "sample_steps")

    @property
    def first_step(self) -> int:
        """The lowest step the translator trains."""
        return min(round(self.train_min_step * self.num_steps), self.num_steps - 1)


class SeDA(nn.Module):
    """One denoiser and one classifier; the step decides whether the visual or the text feature is the target."""

    centres: Tensor
    first_step: Tensor
    p_dropout: Tensor
    stage_step: Tensor
    steps: Tensor
    w_ce_dsl: Tensor
    w_ce_dst: Tensor
    w_mse: Tensor
    w_sc: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__()
        self.stages, self.stage_order, self.per_sample_stage = config.stages, config.stage_order, config.per_sample_stage
        self.train_centres = config.centres == "train"
        self.sc_reduction: Literal["mean", "literal"] = config.sc_reduction
        self.label_loss: LabelLoss = config.label_loss
        self.space = Space(shapes, _adapter(config, shapes), config.width, config.scale)
        width = self.space.text_width
        if width != self.space.image_width:
            raise ValueError(
                f"seda needs equal widths, not {self.space.image_width} and {width}: set adapter=classifier or pca"
            )
        self.needs = NEEDS
        self.phases = (*self.space.phases, Phase("head", ("denoiser.", "classifier.")))
        self.num_classes = label_count(shapes)
        self.denoiser: Denoiser = (
            UNet(width)
            if config.denoiser == "unet"
            else PFIN(width, config.interaction, config.num_tokens, config.token_width, config.num_heads, config.residual)
        )
        self.classifier = nn.Linear(width, self.num_classes)
        self.sampler = Sampler.of(config)
        self.abar = LookupTable(alphas_cumprod(config.schedule, config.num_steps))
        self.register_buffer("centres", torch.zeros(self.num_classes, width))
        register_hyperparameters(self, steps=config.num_steps, stage_step=config.stage_step, first_step=config.first_step)
        register_hyperparameters(self, w_sc=config.w_sc, w_ce_dsl=config.w_ce_dsl, w_mse=config.w_mse, w_ce_dst=config.w_ce_dst)
        register_hyperparameters(self, p_dropout=config.dropout)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Statistics of both features and, where `centres` asks for them, the visual class centres of the training split."""
        self.space.begin(phase, train)
        if phase == ADAPT.name or not self.train_centres:
            return
        total = torch.zeros_like(self.centres)
        count = total.new_zeros(self.num_classes)
        for batch in train():
            member = membership(batch["label"], self.num_classes)
            total += member.T @ self.space.image(batch["image"])
            count += member.sum(dim=0)
        self.centres.copy_(total / count.clamp(min=1.0).unsqueeze(1))

    def draw_steps(self, rng: KeyedRNG) -> tuple[Tensor, Tensor]:
        """Steps n [B] int64 and whether the semantic learner trains there, 0 or 1 [B].

        Uniform over the trained steps, as in eq. 12 divided by T. By default the stage is drawn once per batch, with the share
        of its steps, because class centres need many samples of one stage, and the step uniformly within the stage.
        """
        low_dsl, high_dsl, low_dst, high_dst = self.stage_ranges()
        num_dsl, num_dst = high_dsl - low_dsl, high_dst - low_dst
        stage = rng.at("stage")
        share = stage.uniform() if self.per_sample_stage else stage.shared_uniform()
        learner = share * (num_dsl + num_dst) < num_dsl
        low, count = torch.where(learner, low_dsl, low_dst), torch.where(learner, num_dsl, num_dst)
        n = low + torch.floor(rng.at("n").uniform() * count)
        return n.long(), learner.float().expand(n.shape)

    def stage_ranges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """First step and the one past the last, of the learner and of the translator, all []."""
        zero, steps, first = torch.zeros_like(self.steps), self.steps, self.first_step
        if self.stages == "dsl":
            return zero, steps, steps, steps
        if self.stages == "dst":
            return zero, zero, first, steps
        if self.stage_order == "literal":
            border = self.stage_step + 1  # i <= t
            return zero, border, torch.maximum(border, first), steps
        border = steps - self.stage_step
        return border, steps, first, border

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """L = L_SCC where the learner trains, L_CT where the translator does (eq. 8, 11, 12).

        A sample without a text of its own has no part in L_MSE; L_SC asks for the image alone.
        """
        if phase == ADAPT.name:
            return self.space.adapter_loss(batch, self.label_loss)
        x_v, x_s = self.space.image(batch["image"]), self.space.text(batch["text"])
        n, learner = self.draw_steps(rng)
        x_n = q_sample(x_s, n, rng.at("noise").normal(x_s.shape[1]), self.abar.values)
        x_r = self.denoiser(x_n, self.denoiser.time(n), self.denoiser.condition(x_v), rng.at("dropout"), self.p_dropout)
        centres = self.centres if self.train_centres else None
        sc = structural_consistency(x_r, x_v, batch["label"], self.num_classes, centres, self.sc_reduction, learner)
        error = mse(x_r, x_s, "mean", (1.0 - learner) * batch["paired"])
        logits = self.classifier(x_r)
        ce_dsl = classification(logits, batch["label"], self.label_loss, learner)
        ce_dst = classification(logits, batch["label"], self.label_loss, 1.0 - learner)
        share = learner.mean()
        scc = self.w_sc * sc + self.w_ce_dsl * ce_dsl  # eq. 8
        ct = self.w_mse * error + self.w_ce_dst * ce_dst  # eq. 11
        return {
            "loss": share * scc + (1.0 - share) * ct,
            "sc": share * sc,
            "mse": (1.0 - share) * error,
            "ce": share * ce_dsl + (1.0 - share) * ce_dst,
            "cos_image": F.cosine_similarity(x_r, x_v).mean(),
            "cos_text": F.cosine_similarity(x_r, x_s).mean(),
        }

    def feature(self, image: Tensor, rng: KeyedRNG, draw: int = 0) -> Tensor:
        """The aligned feature x̂_r^0 [B,D] of image features [B,Dv]: one draw of the reverse chain (eq. 13-15)."""
        x_v, rng = self.space.image(image), rng.at("draw", draw)
        return self.sampler.generate(self.denoiser, x_v, self.space.text_width, self.abar.values, self.steps, rng)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [B,C] of image features [B,Dv]."""
        return self.sampler.mean_logits(lambda draw: self.classifier(self.feature(image, rng, draw)))


def _adapter(config: Config, shapes: Shapes) -> AdapterKind:
    if config.adapter != "auto":
        return config.adapter
    return "none" if shapes["image"] == shapes["text"] else "classifier"


def build(config: Config, shapes: Shapes) -> SeDA:
    """A SeDA head for features of these shapes."""
    return SeDA(config, shapes)
