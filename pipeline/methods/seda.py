"""SeDA: one diffusion maps image features to text features in two stages, through a semantic space (Li et al., IJCAI 2025).

The stages are the diffusion-based semantic learner (DSL), whose target is the visual feature, and the diffusion-based semantic
translator (DST), whose target is the text feature. The step n decides which stage is trained.
"""

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
from pipeline.nn.feature_space import ADAPTER_PHASE, AdapterKind, FeatureSpace, num_classes_in, require_in_range
from pipeline.nn.layers import LookupTable, ScaleMode, register_hyperparameters
from pipeline.nn.losses import (
    LabelLoss,
    StructuralReduction,
    classification_loss,
    mse_loss,
    multi_hot,
    structural_consistency_loss,
)
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
    """Settings of SeDA eq. 1-15. The defaults are inside the ranges of section 5.1, and at the optimum of section 5.4."""

    stages: Literal["both", "dsl", "dst"] = "both"  # both stages, the learner only, or the translator only (Table 2)
    # which steps the learner trains with stages="both": "literal": n <= t (eq. 12); "reverse": n >= T - t (section 4.2)
    stage_order: Literal["literal", "reverse"] = "literal"
    per_sample_stage: bool = False  # draw the stage for each sample instead of once per batch
    num_steps: int = 1500  # T, 1..100000
    stage_step: int = 300  # t, 0..T-1
    schedule: Schedule = "linear"  # noise schedule; the paper gives none
    train_min_step: float = 0.0  # fraction of T, 0..1: the translator does not train the steps below it; the paper has 0
    w_sc: float = 1.0  # alpha_1, weight of the structural consistency loss; the paper tries 0.1..2
    w_ce_dsl: float = 1.0  # beta, weight of the learner's cross-entropy; the paper tries 0.5..2
    w_mse: float = 1.0  # alpha_2, weight of the reconstruction loss; the paper tries 0.1..2
    w_ce_dst: float = 1.5  # gamma, weight of the translator's cross-entropy
    sc_reduction: StructuralReduction = "mean"  # of eq. 6: means, whose scale does not depend on the width, or its literal sums
    centres: Literal["batch", "train"] = "batch"  # visual class centres of eq. 5: of the batch, or of the training split
    denoiser: Literal["pfin", "unet"] = "pfin"
    interaction: Interaction = "cross_attention"  # of PFIN (Table 3)
    num_tokens: int = 8  # chunks per feature vector, 1..65536; it must divide the width
    token_width: int = 128  # width of a token, 1..65536
    num_heads: int = 4  # heads of the attention
    residual: bool = True  # add the noisy text to the output of the attention
    dropout: float = 0.0  # probability, in the denoiser, 0..0.99
    sampler: Literal["ddim", "ancestral"] = "ddim"  # for prediction: S steps, or all T steps
    sample_steps: int = 20  # S, steps of "ddim", 1..T; from 20 on, several of them are steps of the learner
    eta: float = 0.0  # amount of noise of "ddim", 0..1
    draws: int = 1  # K, chains per image, 1..1000; the paper has 1
    zero_start: bool = False  # start the chain from 0 instead of noise
    adapter: Literal["auto", "none", "classifier", "pca"] = "auto"  # frozen adapters; "auto": "classifier" if widths differ
    width: int = 512  # width of the adapters' outputs, 1..65536
    scale: ScaleMode = "per_dim"  # standardisation of image and text features
    label_loss: LabelLoss = "softmax_kl"  # for multi-label data

    def __post_init__(self) -> None:
        require_in_range(self, 0, math.inf, "w_sc", "w_ce_dsl", "w_mse", "w_ce_dst")
        require_in_range(self, 1, 65_536, "width", "num_tokens", "token_width", "num_heads")
        require_in_range(self, 1, 100_000, "num_steps")
        require_in_range(self, 1, 1_000, "draws")
        require_in_range(self, 0, self.num_steps - 1, "stage_step")
        if self.stages == "both" and self.stage_order == "reverse" and self.first_step >= self.num_steps - self.stage_step:
            raise ValueError(
                f"train_min_step {self.train_min_step} leaves the translator no step below T - t = "
                f"{self.num_steps - self.stage_step}: lower it, or say stages=dsl"
            )
        require_in_range(self, 0, 1, "train_min_step", "eta")
        require_in_range(self, 0, 0.99, "dropout")
        require_in_range(self, 1, self.num_steps if self.sampler == "ddim" else math.inf, "sample_steps")

    @property
    def first_step(self) -> int:
        """The lowest step that the translator trains."""
        return min(round(self.train_min_step * self.num_steps), self.num_steps - 1)


class SeDA(nn.Module):
    """One denoiser and one classifier for both stages; see the module docstring."""

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
        self.has_train_centres = config.centres == "train"
        self.sc_reduction: StructuralReduction = config.sc_reduction
        self.label_loss: LabelLoss = config.label_loss
        self.space = FeatureSpace(shapes, _adapter_kind(config, shapes), config.width, config.scale)
        width = self.space.text_width
        if width != self.space.image_width:
            raise ValueError(
                f"seda needs equal widths, not {self.space.image_width} and {width}: set adapter=classifier or pca"
            )
        self.needs = NEEDS
        self.phases = (*self.space.phases, Phase("head", ("denoiser.", "classifier.")))
        self.num_classes = num_classes_in(shapes)
        self.denoiser: Denoiser = (
            UNet(width)
            if config.denoiser == "unet"
            else PFIN(width, config.interaction, config.num_tokens, config.token_width, config.num_heads, config.residual)
        )
        self.classifier = nn.Linear(width, self.num_classes)
        self.sampler = Sampler.from_config(config)
        self.abar = LookupTable(alphas_cumprod(config.schedule, config.num_steps))
        self.register_buffer("centres", torch.zeros(self.num_classes, width))
        register_hyperparameters(self, steps=config.num_steps, stage_step=config.stage_step, first_step=config.first_step)
        register_hyperparameters(self, w_sc=config.w_sc, w_ce_dsl=config.w_ce_dsl, w_mse=config.w_mse, w_ce_dst=config.w_ce_dst)
        register_hyperparameters(self, p_dropout=config.dropout)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the features and, if centres="train", the visual class centres of the training split."""
        self.space.begin(phase, train)
        if phase == ADAPTER_PHASE.name or not self.has_train_centres:
            return
        total = torch.zeros_like(self.centres)
        count = total.new_zeros(self.num_classes)
        for batch in train():
            member = multi_hot(batch["label"], self.num_classes)
            total += member.T @ self.space.image(batch["image"])
            count += member.sum(dim=0)
        self.centres.copy_(total / count.clamp(min=1.0).unsqueeze(1))

    def draw_steps(self, rng: KeyedRNG) -> tuple[Tensor, Tensor]:
        """Draw a step for each sample, uniformly over the trained steps (eq. 12 divided by T).

        By default the stage is drawn once per batch, because class centres need many samples of one stage. The probability of a
        stage is its fraction of the trained steps. Then the step of each sample is drawn uniformly from the steps of the stage.

        Returns:
            Steps n, int64 [B], and a mask [B] that is 1 if the learner (DSL) is trained and 0 if the translator (DST) is.
        """
        low_dsl, high_dsl, low_dst, high_dst = self.stage_ranges()
        num_dsl, num_dst = high_dsl - low_dsl, high_dst - low_dst
        stage_rng = rng.at("stage")
        uniform = stage_rng.uniform() if self.per_sample_stage else stage_rng.shared_uniform()
        is_dsl = uniform * (num_dsl + num_dst) < num_dsl
        low, num_steps = torch.where(is_dsl, low_dsl, low_dst), torch.where(is_dsl, num_dsl, num_dst)
        n = low + torch.floor(rng.at("n").uniform() * num_steps)
        return n.long(), is_dsl.float().expand(n.shape)

    def stage_ranges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the ranges of steps that the two stages train.

        Returns:
            low_dsl, high_dsl, low_dst, high_dst, all []: the learner trains low_dsl <= n < high_dsl, the translator trains
            low_dst <= n < high_dst.
        """
        zero, steps, first = torch.zeros_like(self.steps), self.steps, self.first_step
        if self.stages == "dsl":
            return zero, steps, steps, steps
        if self.stages == "dst":
            return zero, zero, first, steps
        if self.stage_order == "literal":
            border = self.stage_step + 1  # eq. 12: the learner trains i <= t
            return zero, border, torch.maximum(border, first), steps
        border = steps - self.stage_step
        return border, steps, first, border

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """Return L and its parts: L_SCC for samples of the learner, L_CT for samples of the translator (eq. 8, 11, 12).

        A sample without a text does not count in L_MSE. It counts in L_SC, which needs only the image.
        """
        if phase == ADAPTER_PHASE.name:
            return self.space.adapter_loss(batch, self.label_loss)
        x_v, x_s = self.space.image(batch["image"]), self.space.text(batch["text"])
        n, is_dsl = self.draw_steps(rng)
        x_n = q_sample(x_s, n, rng.at("noise").normal(x_s.shape[1]), self.abar.values)
        e, context = self.denoiser.embed_step(n), self.denoiser.image_context(x_v)
        x_r = self.denoiser(x_n, e, context, rng.at("dropout"), self.p_dropout)
        centres = self.centres if self.has_train_centres else None
        sc = structural_consistency_loss(x_r, x_v, batch["label"], self.num_classes, centres, self.sc_reduction, is_dsl)
        error = mse_loss(x_r, x_s, "mean", (1.0 - is_dsl) * batch["paired"])
        logits = self.classifier(x_r)
        ce_dsl = classification_loss(logits, batch["label"], self.label_loss, is_dsl)
        ce_dst = classification_loss(logits, batch["label"], self.label_loss, 1.0 - is_dsl)
        dsl_fraction = is_dsl.mean()
        scc = self.w_sc * sc + self.w_ce_dsl * ce_dsl  # eq. 8
        ct = self.w_mse * error + self.w_ce_dst * ce_dst  # eq. 11
        return {
            "loss": dsl_fraction * scc + (1.0 - dsl_fraction) * ct,
            "sc": dsl_fraction * sc,
            "mse": (1.0 - dsl_fraction) * error,
            "ce": dsl_fraction * ce_dsl + (1.0 - dsl_fraction) * ce_dst,
            "cos_image": F.cosine_similarity(x_r, x_v).mean(),
            "cos_text": F.cosine_similarity(x_r, x_s).mean(),
        }

    def feature(self, image: Tensor, rng: KeyedRNG, draw: int = 0) -> Tensor:
        """Return the aligned feature xhat_r^0 [B,D] from image features [B,Dv]: the result of one reverse chain (eq. 13-15)."""
        x_v, rng = self.space.image(image), rng.at("draw", draw)
        return self.sampler.generate(self.denoiser, x_v, self.space.text_width, self.abar.values, self.steps, rng)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.sampler.average_predictions(lambda draw: self.classifier(self.feature(image, rng, draw)))


def _adapter_kind(config: Config, shapes: Shapes) -> AdapterKind:
    if config.adapter != "auto":
        return config.adapter
    return "none" if shapes["image"] == shapes["text"] else "classifier"


def build(config: Config, shapes: Shapes) -> SeDA:
    """Return a SeDA head for features of these shapes."""
    return SeDA(config, shapes)
