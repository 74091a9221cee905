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

from pipeline.nn.denoisers import PFIN, ConcatMLP, Denoiser, Interaction, Residual
from pipeline.nn.diffusion import Schedule, alphas_cumprod, noise_levels, q_sample
from pipeline.nn.feature_space import ADAPTER_PHASE, AdapterKind, FeatureSpace, num_classes_in
from pipeline.nn.layers import LookupTable, ScaleMode, register_hyperparameters
from pipeline.nn.losses import (
    LabelLoss,
    MSEReduction,
    StructuralReduction,
    classification_losses,
    mse_loss,
    multi_hot,
    structural_consistency_loss,
    uses_sigmoid,
    weighted_mean,
)
from pipeline.nn.method import Method
from pipeline.nn.sampler import PREDICTION_SETTINGS, NumSteps, Sampler, SamplerConfig, SampleSteps
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
    ce_min_step: Annotated[
        float,
        Range(0, 1),
        "fraction of T: at steps below it there is no cross-entropy, because the input still contains much of the text",
    ] = 0.0
    on_policy: Annotated[
        float, Range(0, 1), "probability that a sample's noisy text is made from the network's own prediction; the paper has 0"
    ] = 0.0
    w_sc: Annotated[float, Range(0), "alpha_1, weight of the structural consistency loss; the paper tries 0.1..2"] = 1.0
    w_ce_dsl: Annotated[float, Range(0), "beta, weight of the learner's cross-entropy; the paper tries 0.5..2"] = 1.0
    w_mse: Annotated[float, Range(0), "alpha_2, weight of the reconstruction loss; the paper tries 0.1..2"] = 1.0
    w_ce_dst: Annotated[float, Range(0), "gamma, weight of the translator's cross-entropy"] = 1.5
    mse_reduction: Annotated[MSEReduction, "over the text dimensions; eq. 10 has the sum"] = "mean"
    sc_reduction: Annotated[
        StructuralReduction, "of eq. 6; mean: means, whose scale does not depend on the width, literal: its sums"
    ] = "mean"
    centres: Annotated[Literal["batch", "train"], "visual class centres of eq. 5: of the batch, or of the training split"] = (
        "batch"
    )
    denoiser: Annotated[
        Literal["pfin", "mlp", "unet"], "network; mlp: CDR's four linear layers; unet has no settings of its own (Table 3)"
    ] = "pfin"
    hidden: Annotated[int, Range(1, 65_536), "width of denoiser=mlp"] = 1024
    interaction: Annotated[Interaction, "of image and text in PFIN (Table 3)"] = "cross_attention"
    num_tokens: Annotated[int, Range(1, 65_536), "chunks per feature vector; it must divide the width"] = 8
    token_width: Annotated[int, Range(1, 65_536), "width of a token"] = 128
    num_heads: Annotated[int, Range(1, 65_536), "heads of the attention"] = 4
    residual: Annotated[
        Residual, "added to PFIN's attention: visual: a linear map of the image, text: the noisy text; eq. 2 has none"
    ] = "visual"
    dropout: Annotated[float, Range(0, 0.99), "probability, in the denoiser"] = 0.3
    sample_steps: Annotated[SampleSteps, "S, steps of ddim, at most T; from 20 on, several are steps of the learner"] = 20
    adapter: Annotated[
        Literal["contrastive_if_needed", "pca_if_needed", "auto", "none", "contrastive", "pca", "classifier"],
        "frozen adapters to a common width; …_if_needed: where widths differ, pca to at most `width`; auto: then classifier",
    ] = "contrastive_if_needed"
    width: Annotated[int, Range(1, 65_536), "width of the adapters' outputs"] = 512
    condition: Annotated[
        Literal["adapted", "raw"], "image feature that the denoiser reads: the adapter's output, or its input at its own width"
    ] = "adapted"
    scale: Annotated[ScaleMode, "standardisation of image and text features"] = "global"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

    old_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {"residual": {"true": "text", "false": "none"}}
    old_defaults: ClassVar[Mapping[str, Any]] = {**SamplerConfig.old_defaults, "residual": "text"}

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

    def trained_steps(self) -> tuple[range, range]:
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
    without_text: ClassVar[Mapping[str, Any]] = {"w_mse": 0.0, "adapter": "pca_if_needed"}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "w_ce_dst": (0.5, 1.0, 1.5, 2.0),
        "num_steps": (900, 1200, 1500, 1800),
        "stage_step": (0, 300, 500),
    }  # Figure 3
    paper: ClassVar[Mapping[str, Any]] = {
        "residual": "none",
        "adapter": "auto",
        "scale": "per_dim",
        "dropout": 0.0,
        "sampler": "ancestral",
    }
    prediction = PREDICTION_SETTINGS

    centres: Tensor
    ce_low: Tensor
    dsl_low: Tensor
    dsl_probability: Tensor
    dsl_steps: Tensor
    dst_low: Tensor
    dst_steps: Tensor
    own_probability: Tensor
    last_step: Tensor
    learner_weights: Tensor  # of the losses L_SC, L_MSE, L_CE, [3] each
    translator_weights: Tensor
    learner_parts: Tensor  # which of these losses the stage has
    translator_parts: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        dsl, dst = config.trained_steps()
        self.per_sample_stage = config.per_sample_stage
        self.has_train_centres = config.centres == "train"
        self.has_ce_limit, self.has_own_texts = config.ce_min_step > 0, config.on_policy > 0
        self.sc_reduction: StructuralReduction = config.sc_reduction
        self.mse_reduction: MSEReduction = config.mse_reduction
        self.label_loss: LabelLoss = config.label_loss
        self.is_sigmoid = uses_sigmoid(shapes, config.label_loss)
        self.space = FeatureSpace(shapes, *_adapter(config, shapes), config.scale)
        self.reads_raw_image = config.condition == "raw"
        width, image_width = self.space.text_width, self.space.image_width
        self.has_learner = image_width == width  # whether L_SC can be computed, also where its weight is 0
        if len(dsl) and not self.has_learner:
            raise UserError(
                f"the learner's target needs equal widths, not {image_width} and {width}: set adapter=classifier or pca"
            )
        self.phases = (*self.space.phases, Phase("head", ("denoiser.", "classifier.")))
        self.num_classes = num_classes_in(shapes)
        self.denoiser = _build_denoiser(config, width, self.space.raw_image_width if self.reads_raw_image else image_width)
        self.classifier = nn.Linear(width, self.num_classes)
        self.sampler = Sampler(config)
        abar = alphas_cumprod(config.schedule, config.num_steps)
        self.abar, self.levels = LookupTable(abar), LookupTable(noise_levels(abar))
        self.register_buffer("centres", torch.zeros(self.num_classes, width))
        self.register_buffer("dsl_low", torch.tensor(dsl.start), persistent=False)
        self.register_buffer("dst_low", torch.tensor(dst.start), persistent=False)
        register_hyperparameters(self, dsl_steps=len(dsl), dst_steps=len(dst))
        register_hyperparameters(self, dsl_probability=len(dsl) / (len(dsl) + len(dst)), last_step=config.num_steps - 1)
        register_hyperparameters(self, ce_low=config.ce_min_step * config.num_steps, own_probability=config.on_policy)
        for stage, weights in (
            ("learner", (config.w_sc, 0.0, config.w_ce_dsl)),
            ("translator", (0.0, config.w_mse, config.w_ce_dst)),
        ):
            self.register_buffer(f"{stage}_weights", torch.tensor(weights), persistent=False)
        self.register_buffer("learner_parts", torch.tensor([1.0, 0.0, 1.0]), persistent=False)
        self.register_buffer("translator_parts", torch.tensor([0.0, 1.0, 1.0]), persistent=False)

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
        return (place * num_steps).long() + low, is_dsl

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return L and its parts: L_SCC for samples of the learner, L_CT for samples of the translator (eq. 8, 11, 12).

        A sample without a text does not count in L_MSE. It counts in L_SC, which needs only the image.
        """
        if phase == ADAPTER_PHASE.name:
            return self.space.adapter_loss(batch, self.label_loss)
        x_s, condition = self.space.text(batch["text"]), self.condition(batch["image"])
        n, is_dsl = self.draw_steps(x_s)
        context = self.denoiser.image_context(condition)
        start = self.mix_own_texts(x_s, context) if self.has_own_texts else x_s
        x_n = q_sample(start, n, torch.randn_like(x_s), self.levels.values)
        x_r = self.denoiser(x_n, self.denoiser.embed_step(n), context)
        in_dsl, paired = None, batch["paired"]
        if self.per_sample_stage:  # a sample counts in the losses of its own stage; else the whole batch has one stage
            in_dsl = is_dsl.float()
            paired = (1.0 - in_dsl) * paired
        # Targets are data: where the encoders are trained too, no gradient reaches them through a target.
        mse = mse_loss(x_r, x_s.detach(), self.mse_reduction, paired)
        if not self.has_learner:
            sc = torch.zeros_like(mse)
        else:
            x_v = (self.space.image(batch["image"]) if self.reads_raw_image else condition).detach()
            centres = self.centres if self.has_train_centres else None
            sc = structural_consistency_loss(x_r, x_v, batch["label"], self.num_classes, centres, self.sc_reduction, in_dsl)
        ces = classification_losses(self.classifier(x_r), batch["label"], self.label_loss)
        has_ce = (n >= self.ce_low).float() if self.has_ce_limit else None
        parts = torch.stack([sc, mse, weighted_mean(ces, has_ce)])
        if in_dsl is None:
            counted = torch.where(is_dsl, self.learner_parts, self.translator_parts)
            loss = (torch.where(is_dsl, self.learner_weights, self.translator_weights) * parts).sum()
        else:
            share, (w_sc, _, w_ce_dsl), (_, w_mse, w_ce_dst) = in_dsl.mean(), self.learner_weights, self.translator_weights
            counted = torch.stack([share, 1.0 - share, torch.ones_like(share)])
            weighted_ce = weighted_mean(torch.where(is_dsl, w_ce_dsl, w_ce_dst) * ces, has_ce)
            loss = w_sc * share * sc + w_mse * (1.0 - share) * mse + weighted_ce
        sc, mse, ce = (counted * parts).unbind()
        return {"loss": loss, "sc": sc, "mse": mse, "ce": ce}

    def condition(self, image: Tensor) -> Tensor:
        """Return what the denoiser reads of image features [B,Dv]: x_v, or the features at their own width."""
        return self.space.raw_image(image) if self.reads_raw_image else self.space.image(image)

    def mix_own_texts(self, x_s: Tensor, context: Any) -> Tensor:
        """Return text features [B,D] of which a share is predicted from pure noise: as in the chain, errors and all.

        Without it, the network learns its low steps on noisy versions of the true text alone, which no chain ever meets. No
        gradient goes through what is predicted.
        """
        last = self.last_step.long().expand(len(x_s))
        with torch.no_grad():
            predicted = self.denoiser(torch.randn_like(x_s), self.denoiser.embed_step(last), context)
        is_own = torch.rand(len(x_s), 1, device=x_s.device) < self.own_probability
        return torch.where(is_own, predicted.to(x_s.dtype), x_s)

    def feature(self, image: Tensor, rng: KeyedRNG, draw: int = 0) -> Tensor:
        """Return the aligned feature xhat_r^0 [B,D] from image features [B,Dv]: the result of one reverse chain (eq. 13-15)."""
        condition, rng = self.condition(image), rng.at("draw", draw)
        return self.sampler.generate(self.denoiser, condition, self.space.text_width, self.abar.values, rng)

    def text_target(self, text: Tensor) -> Tensor:
        """Return x_s [B,D] from text features."""
        return self.space.text(text)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.sampler.average_predictions(lambda draw: self.classifier(self.feature(image, rng, draw)), self.is_sigmoid)


def _build_denoiser(config: Config, width: int, image_width: int) -> Denoiser:
    """Return the denoiser that the config names, for text features of a width and image features of another.

    Raises:
        UserError: the network needs equal widths, and these differ.
    """
    if config.denoiser == "mlp":
        return ConcatMLP(width, image_width, config.num_steps, hidden=config.hidden, dropout=config.dropout)
    if config.denoiser == "unet":
        if image_width != width:
            raise UserError(f"denoiser 'unet' needs equal widths, not {width} and {image_width}: set condition=adapted")
        return UNet(width, config.num_steps, dropout=config.dropout)
    return PFIN(
        width,
        config.num_steps,
        config.interaction,
        config.num_tokens,
        config.token_width,
        config.num_heads,
        config.residual,
        dropout=config.dropout,
        image_width=image_width,
    )


def _adapter(config: Config, shapes: Shapes) -> tuple[AdapterKind, int]:
    """Return kind and width of the adapters; pca_if_needed takes a width that components can have and PFIN can cut."""
    if config.adapter in ("none", "contrastive", "pca", "classifier"):
        return config.adapter, config.width
    widths = *shapes["image"], *shapes["text"]
    if len(set(widths)) == 1:
        return "none", config.width
    if config.adapter == "pca_if_needed":
        width = min(config.width, *widths)
        return "pca", width - width % config.num_tokens or width
    return "classifier" if config.adapter == "auto" else "contrastive", config.width
