"""MARNet's cross-modal diffusion reconstruction (CDR): it denoises text features, given image features (MARNet sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pipeline.nn.denoisers import ConcatMLP, Denoiser
from pipeline.nn.diffusion import Schedule, alphas_cumprod, noise_levels, q_sample
from pipeline.nn.feature_space import ADAPTER_PHASE, AdapterKind, FeatureSpace, num_classes_in
from pipeline.nn.layers import MLP, LookupTable, ScaleMode, register_hyperparameters
from pipeline.nn.losses import LabelLoss, MSEReduction, classification_loss, mse_loss, uses_sigmoid
from pipeline.nn.method import Method
from pipeline.nn.sampler import PREDICTION_SETTINGS, Sampler, SamplerConfig
from pipeline.nn.unet import UNet
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range
from pipeline.types import Batch, Phase, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(SamplerConfig):
    """Settings of MARNet eq. 14-23. In MARNet gamma weights the MSE; in SeDA it weights the cross-entropy."""

    denoiser: Annotated[
        Literal["mlp", "unet", "regression"], "regression: the row +MLP of Table 2, four layers without diffusion"
    ] = "mlp"
    hidden: Annotated[int, Range(1, 65_536), "width of the MLP"] = 1024
    schedule: Annotated[Schedule, "noise schedule; the paper gives none"] = "linear"
    w_ce: Annotated[float, Range(0), "alpha_2, weight of the cross-entropy"] = 1.0
    w_mse: Annotated[float, Range(0), "gamma, weight of the reconstruction loss"] = 1.0
    mse_reduction: Annotated[MSEReduction, "over the text dimensions"] = "mean"
    ce_min_step: Annotated[
        float,
        Range(0, 1),
        "fraction of T: at steps below it there is no cross-entropy, because the input still contains much of the text",
    ] = 0.0
    train_min_step: Annotated[float, Range(0, 1), "fraction of T: steps below it are not trained; the paper has 0"] = 0.0
    dropout: Annotated[float, Range(0, 0.99), "probability, in the denoiser"] = 0.0
    adapter: Annotated[AdapterKind, "frozen adapters to a common width"] = "none"
    width: Annotated[int, Range(1, 65_536), "width of the adapters' outputs"] = 512
    scale: Annotated[ScaleMode, "standardisation of image and text features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denoiser == "regression" and self.ce_min_step > 0:
            raise UserError("ce_min_step must be 0 with denoiser=regression, which has no steps")

    def trained_steps(self) -> tuple[range]:
        """Return the steps that training draws."""
        return (range(self.first_step, self.num_steps),)

    @property
    def first_step(self) -> int:
        """The lowest step that is trained."""
        return min(round(self.train_min_step * self.num_steps), self.num_steps - 1)


class RegressionDenoiser(nn.Module):
    """Four linear layers from x_v to x_s. It is a `Denoiser` that ignores the noisy text and the step."""

    def __init__(self, text_width: int, image_width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.mlp = MLP([image_width, hidden, hidden, hidden, text_width], dropout)

    def image_context(self, x_v: Tensor) -> Tensor:
        """Return x_v."""
        return x_v

    def embed_step(self, n: Tensor) -> Tensor:
        """Return zeros [..., 1], because the step is ignored."""
        return torch.zeros(*n.shape, 1, device=n.device)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor) -> Tensor:
        """Return the prediction of x_s [B,D] from context = x_v [B,Dv]."""
        return self.mlp(context)


def build_denoiser(config: Config, text_width: int, image_width: int) -> Denoiser:
    """Return the denoiser that the config names.

    Raises:
        UserError: the U-Net is asked for and the two widths differ.
    """
    if config.denoiser == "mlp":
        return ConcatMLP(text_width, image_width, config.num_steps, hidden=config.hidden, dropout=config.dropout)
    if config.denoiser == "regression":
        return RegressionDenoiser(text_width, image_width, config.hidden, config.dropout)
    if text_width != image_width:
        raise UserError(f"denoiser 'unet' needs equal widths, not {text_width} and {image_width}: set adapter=classifier")
    return UNet(text_width, config.num_steps, dropout=config.dropout)


class CDR(Method):
    """The forward process adds noise to x_s, X_theta(x_s^n, n, x_v) predicts x_s, and a classifier reads the prediction."""

    Config = Config
    needs = ("image", "text", "paired", "label")
    symbols: ClassVar[Mapping[str, str]] = {"T": "num_steps", "alpha2": "w_ce", "gamma": "w_mse"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_mse": 0.0, "adapter": "none"}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_mse": (0.1, 0.3, 1.0, 3.0), "num_steps": (900, 1000, 1200, 1500)}
    prediction = PREDICTION_SETTINGS

    first_ce_step: Tensor
    first_step: Tensor
    steps: Tensor
    w_ce: Tensor
    w_mse: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.mse_reduction: MSEReduction = config.mse_reduction
        self.label_loss: LabelLoss = config.label_loss
        self.is_sigmoid = uses_sigmoid(shapes, config.label_loss)
        self.space = FeatureSpace(shapes, config.adapter, config.width, config.scale)
        self.phases = (*self.space.phases, Phase("head", ("denoiser.", "classifier.")))
        width = self.space.text_width
        self.denoiser = build_denoiser(config, width, self.space.image_width)
        self.classifier = nn.Linear(width, num_classes_in(shapes))
        if config.denoiser == "regression":  # has no chain: one call is the prediction
            chain = replace(config, sampler="ddim", sample_steps=1, eta=0.0, draws=1, zero_start=True)
        else:
            chain = config
        self.sampler = Sampler(chain)
        abar = alphas_cumprod(config.schedule, config.num_steps)
        self.abar, self.levels = LookupTable(abar), LookupTable(noise_levels(abar))
        first_ce_step = min(round(config.ce_min_step * config.num_steps), config.num_steps - 1)
        register_hyperparameters(self, steps=config.num_steps, first_step=config.first_step, first_ce_step=first_ce_step)
        register_hyperparameters(self, w_ce=config.w_ce, w_mse=config.w_mse)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16, "hidden": 32, "num_steps": 20, "sample_steps": 5}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.space.begin(phase, train)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return L_CDR = alpha_2 L_CE + gamma L_MSE (eq. 19-20) of the one-step prediction, and its parts."""
        if phase == ADAPTER_PHASE.name:
            return self.space.adapter_loss(batch, self.label_loss)
        return self.objective(*self.predict_one_step(batch), batch)

    def predict_one_step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a uniform random step n for each sample and predict x_s from its noisy version x_s^n.

        Returns:
            The prediction X_theta(x_s^n, n, x_v) [B,Ds], its target x_s [B,Ds], and n, int64 [B].
        """
        x_v, x_s = self.space.image(batch["image"]), self.space.text(batch["text"])
        uniform = torch.rand(len(x_s), device=x_s.device)
        n = (self.first_step + torch.floor(uniform * (self.steps - self.first_step))).long()
        x_n = q_sample(x_s, n, torch.randn_like(x_s), self.levels.values)
        x_0 = self.denoiser(x_n, self.denoiser.embed_step(n), self.denoiser.image_context(x_v))
        return x_0, x_s, n

    def objective(self, x_0: Tensor, x_s: Tensor, n: Tensor, batch: Batch) -> Batch:
        """Return L_CDR and its parts from the outputs of `predict_one_step`; for "weight" see `EMA.loss`."""
        error = mse_loss(x_0, x_s.detach(), self.mse_reduction, batch["paired"])  # the target is data, also if it is trained
        has_ce = (n >= self.first_ce_step).float()
        if "weight" in batch:
            has_ce = has_ce * batch["weight"]
        ce = classification_loss(self.classifier(x_0), batch["label"], self.label_loss, has_ce)
        return {"loss": self.w_ce * ce + self.w_mse * error, "ce": ce, "mse": error}

    def feature(self, image: Tensor, rng: KeyedRNG, draw: int = 0) -> Tensor:
        """Return x_CDR [B,Ds] from image features [B,Dv]: the result of one reverse chain (eq. 21-23)."""
        x_v, rng = self.space.image(image), rng.at("draw", draw)
        return self.sampler.generate(self.denoiser, x_v, self.space.text_width, self.abar.values, rng)

    def text_target(self, text: Tensor) -> Tensor:
        """Return x_s [B,Ds] from text features."""
        return self.space.text(text)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.sampler.average_predictions(lambda draw: self.classifier(self.feature(image, rng, draw)), self.is_sigmoid)
