"""SeDA: one diffusion maps image features to text features in two stages, through a semantic space (Li et al., IJCAI 2025).

The stages are the diffusion-based semantic learner (DSL), whose target is the visual feature, and the diffusion-based semantic
translator (DST), whose target is the text feature. The step n decides which stage is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.denoisers import PFIN, Denoiser, Interaction
from pipeline.nn.diffusion import Schedule, alphas_cumprod, q_sample
from pipeline.nn.feature_space import ADAPTER_PHASE, AdapterKind, FeatureSpace, num_classes_in
from pipeline.nn.layers import LookupTable, ScaleMode, register_hyperparameters
from pipeline.nn.losses import (
    LabelLoss,
    StructuralReduction,
    classification_loss,
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
    residual: Annotated[bool, "add the noisy text to the output of the attention"] = True
    dropout: Annotated[float, Range(0, 0.99), "probability, in the denoiser"] = 0.0
    sample_steps: Annotated[SampleSteps, "S, steps of ddim, at most T; from 20 on, several are steps of the learner"] = 20
    adapter: Annotated[Literal["auto", "none", "classifier", "pca"], "frozen adapters; auto: classifier if widths differ"] = (
        "auto"
    )
    width: Annotated[int, Range(1, 65_536), "width of the adapters' outputs"] = 512
    scale: Annotated[ScaleMode, "standardisation of image and text features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

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
    first_step: Tensor
    p_dropout: Tensor
    stage_step: Tensor
    steps: Tensor
    w_ce_dsl: Tensor
    w_ce_dst: Tensor
    w_mse: Tensor
    w_sc: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.stages, self.stage_order, self.per_sample_stage = config.stages, config.stage_order, config.per_sample_stage
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
