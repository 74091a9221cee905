"""SeDA: one diffusion maps image features to text features in two stages, through a semantic space (Li et al., IJCAI 2025).

The stages are the diffusion-based semantic learner (DSL), whose target is the visual feature, and the diffusion-based semantic
translator (DST), whose target is the text feature. The step n decides which stage is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.nn.denoisers import PFIN, Denoiser, Interaction, Residual
from pipeline.nn.diffusion import Schedule, alphas_cumprod, noise_levels, q_sample
from pipeline.nn.feature_space import ADAPTER_PHASE, AdapterKind, FeatureSpace, num_classes_in
from pipeline.nn.layers import LookupTable, ScaleMode, register_hyperparameters
from pipeline.nn.losses import (
    LabelLoss,
    StructuralReduction,
    classification_losses,
    mse_loss,
    multi_hot,
    structural_consistency_loss,
)
from pipeline.nn.method import Method
from pipeline.nn.sampler import NumSteps, Sampler, SamplerConfig, SampleSteps
from pipeline.nn.unet import UNet
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range
from pipeline.types import Batch, Phase, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(SamplerConfig):
    """Settings of SeDA eq. 1-15. The defaults are inside the ranges of section 5.1, and at the optimum of section 5.4."""

    stages: Annotated[Literal["both", "dsl", "dst"], "both stages, the learner only, or the translator only (Table 2)"] = "both"
    stage_order: Annotated[
        Literal["literal", "reverse"],
        "steps that the learner trains with stages=both; literal: n <= t (eq. 12), reverse: n >= T - t (section 4.2)",
    ] = "literal"
    per_sample_stage: Annotated[bool, "draw the stage for each sample instead of once per batch"] = False
    num_steps: NumSteps = 1500
    stage_step: Annotated[int, Range(0), "t, below T: the border between the stages"] = 300
    schedule: Annotated[Schedule, "noise schedule; the paper gives none"] = "linear"
    train_min_step: Annotated[
        float, Range(0, 1), "fraction of T: the translator does not train the steps below it; the paper has 0"
    ] = 0.0
    w_sc: Annotated[float, Range(0), "alpha_1, weight of the structural consistency loss; the paper tries 0.1..2"] = 1.0
    w_ce_dsl: Annotated[float, Range(0), "beta, weight of the learner's cross-entropy; the paper tries 0.5..2"] = 1.0
    w_mse: Annotated[float, Range(0), "alpha_2, weight of the reconstruction loss; the paper tries 0.1..2"] = 1.0
    w_ce_dst: Annotated[float, Range(0), "gamma, weight of the translator's cross-entropy"] = 1.5
    sc_reduction: Annotated[
        StructuralReduction, "of eq. 6; mean: means, whose scale does not depend on the width, literal: its sums"
    ] = "mean"
    centres: Annotated[Literal["batch", "train"], "visual class centres of eq. 5: of the batch, or of the training split"] = (
        "batch"
    )
    denoiser: Annotated[Literal["pfin", "unet"], "network; unet has no settings of its own"] = "pfin"
    interaction: Annotated[Interaction, "of image and text in PFIN (Table 3)"] = "cross_attention"
    num_tokens: Annotated[int, Range(1, 65_536), "chunks per feature vector; it must divide the width"] = 8
    token_width: Annotated[int, Range(1, 65_536), "width of a token"] = 128
    num_heads: Annotated[int, Range(1, 65_536), "heads of the attention"] = 4
    residual: Annotated[
        Residual, "added to PFIN's attention: visual: a linear map of the image, text: the noisy text; eq. 2 has none"
    ] = "visual"
    dropout: Annotated[float, Range(0, 0.99), "probability, in the denoiser"] = 0.0
    sample_steps: Annotated[SampleSteps, "S, steps of ddim, at most T; from 20 on, several are steps of the learner"] = 20
    adapter: Annotated[Literal["auto", "none", "classifier", "pca"], "frozen adapters; auto: classifier if widths differ"] = (
        "auto"
    )
    width: Annotated[int, Range(1, 65_536), "width of the adapters' outputs"] = 512
    scale: Annotated[ScaleMode, "standardisation of image and text features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

    old_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {"residual": {"true": "text", "false": "none"}}
    old_defaults: ClassVar[Mapping[str, Any]] = {"residual": "text"}

    def __post_init__(self) -> None:
        super().__post_init__()
        Range(0, self.num_steps - 1).check("stage_step", self.stage_step)
        if self.stages == "both" and self.stage_order == "reverse" and self.first_step >= self.num_steps - self.stage_step:
            raise UserError(
                f"train_min_step {self.train_min_step} leaves the translator no step below T - t = "
                f"{self.num_steps - self.stage_step}: lower it, or say stages=dsl"
            )

    @property
    def first_step(self) -> int:
        """The lowest step that the translator trains."""
        return min(round(self.train_min_step * self.num_steps), self.num_steps - 1)

    def stage_ranges(self) -> tuple[range, range]:
        """Return the steps that the learner (DSL) trains and those that the translator (DST) trains."""
        steps, first = self.num_steps, self.first_step
        if self.stages == "dsl":
            return range(steps), range(0)
        if self.stages == "dst":
            return range(0), range(first, steps)
        if self.stage_order == "literal":
            border = self.stage_step + 1  # eq. 12: the learner trains i <= t
            return range(border), range(max(border, first), steps)
        border = steps - self.stage_step
        return range(border, steps), range(first, border)


class SeDA(Method):
    """One denoiser and one classifier for both stages; see the module docstring."""

    Config = Config
    needs = ("image", "text", "paired", "label")
    symbols: ClassVar[Mapping[str, str]] = {
        "T": "num_steps",
        "t": "stage_step",
        "gamma": "w_ce_dst",
        "beta": "w_ce_dsl",
        "alpha1": "w_sc",
        "alpha2": "w_mse",
    }
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "w_ce_dst": (0.5, 1.0, 1.5, 2.0),
        "num_steps": (900, 1200, 1500, 1800),
        "stage_step": (0, 300, 500),
    }  # Figure 3
    prediction = ("sampler", "sample_steps", "eta", "draws", "zero_start")

    centres: Tensor
    dsl_low: Tensor
    dsl_probability: Tensor
    dsl_steps: Tensor
    dst_low: Tensor
    dst_steps: Tensor
    steps: Tensor
    w_ce_dsl: Tensor
    w_ce_dst: Tensor
    w_mse: Tensor
    w_sc: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.per_sample_stage = config.per_sample_stage
        self.has_train_centres = config.centres == "train"
        self.sc_reduction: StructuralReduction = config.sc_reduction
        self.label_loss: LabelLoss = config.label_loss
        self.space = FeatureSpace(shapes, _adapter_kind(config, shapes), config.width, config.scale)
        width = self.space.text_width
        if width != self.space.image_width:
            raise UserError(f"seda needs equal widths, not {self.space.image_width} and {width}: set adapter=classifier or pca")
        self.phases = (*self.space.phases, Phase("head", ("denoiser.", "classifier.")))
        self.num_classes = num_classes_in(shapes)
        self.denoiser: Denoiser = (
            UNet(width, config.num_steps, dropout=config.dropout)
            if config.denoiser == "unet"
            else PFIN(
                width,
                config.num_steps,
                config.interaction,
                config.num_tokens,
                config.token_width,
                config.num_heads,
                config.residual,
                dropout=config.dropout,
            )
        )
        self.classifier = nn.Linear(width, self.num_classes)
        self.sampler = Sampler.from_config(config)
        abar = alphas_cumprod(config.schedule, config.num_steps)
        self.abar, self.levels = LookupTable(abar), LookupTable(noise_levels(abar))
        self.register_buffer("centres", torch.zeros(self.num_classes, width))
        dsl, dst = config.stage_ranges()
        register_hyperparameters(self, steps=config.num_steps, dsl_probability=len(dsl) / (len(dsl) + len(dst)))
        register_hyperparameters(self, dsl_low=dsl.start, dsl_steps=len(dsl), dst_low=dst.start, dst_steps=len(dst))
        register_hyperparameters(self, w_sc=config.w_sc, w_ce_dsl=config.w_ce_dsl, w_mse=config.w_mse, w_ce_dst=config.w_ce_dst)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {
            "width": 16,
            "num_tokens": 4,
            "token_width": 8,
            "num_heads": 2,
            "num_steps": 20,
            "stage_step": 5,
            "sample_steps": 5,
        }

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

    def draw_steps(self, x_s: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a step for each sample, uniformly over the trained steps (eq. 12 divided by T).

        By default the stage is drawn once per batch, because class centres need many samples of one stage. The probability of a
        stage is its fraction of the trained steps. Then the step of each sample is drawn uniformly from the steps of the stage.

        Args:
            x_s: [B,D].

        Returns:
            Steps n, int64 [B], and whether the learner (DSL) trains the sample, else the translator (DST) does: bool [B], or []
            for the whole batch.
        """
        place = torch.rand(len(x_s), device=x_s.device)
        stage = torch.rand(place.shape if self.per_sample_stage else (), device=x_s.device)
        is_dsl = stage < self.dsl_probability
        low, num_steps = torch.where(is_dsl, self.dsl_low, self.dst_low), torch.where(is_dsl, self.dsl_steps, self.dst_steps)
        return (low + torch.floor(place * num_steps)).long(), is_dsl

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return L and its parts: L_SCC for samples of the learner, L_CT for samples of the translator (eq. 8, 11, 12).

        A sample without a text does not count in L_MSE. It counts in L_SC, which needs only the image.
        """
        if phase == ADAPTER_PHASE.name:
            return self.space.adapter_loss(batch, self.label_loss)
        x_v, x_s = self.space.image(batch["image"]), self.space.text(batch["text"])
        n, is_dsl = self.draw_steps(x_s)
        x_n = q_sample(x_s, n, torch.randn_like(x_s), self.levels.values)
        x_r = self.denoiser(x_n, self.denoiser.embed_step(n), self.denoiser.image_context(x_v))
        in_dsl = is_dsl.float()
        ce = classification_losses(self.classifier(x_r), batch["label"], self.label_loss)
        w_ce = torch.where(is_dsl, self.w_ce_dsl, self.w_ce_dst)
        if self.per_sample_stage:  # samples of the other stage do not count in a loss
            dsl_share, in_sc, in_mse = in_dsl.mean(), in_dsl, (1.0 - in_dsl) * batch["paired"]
            weighted_ce, ce = (w_ce * ce).mean(), ce.mean()
        else:  # the whole batch is of one stage, whose share is 0 or 1
            dsl_share, in_sc, in_mse, ce = in_dsl, None, batch["paired"], ce.mean()
            weighted_ce = w_ce * ce
        # Targets are data: where the encoders are trained too, no gradient reaches them through a target.
        x_v, x_s, centres = x_v.detach(), x_s.detach(), self.centres if self.has_train_centres else None
        sc = structural_consistency_loss(x_r, x_v, batch["label"], self.num_classes, centres, self.sc_reduction, in_sc)
        sc, mse = dsl_share * sc, (1.0 - dsl_share) * mse_loss(x_r, x_s, "mean", in_mse)
        return {"loss": self.w_sc * sc + self.w_mse * mse + weighted_ce, "sc": sc, "mse": mse, "ce": ce}

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
