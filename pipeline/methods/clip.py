"""CLIP as a head: image and text of a sample find each other in the batch, at a learned temperature (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

from torch import Tensor

from pipeline.nn.common_space import CommonSpaceHead, LearnedScale, LinearProjector, scaled_phase
from pipeline.nn.layers import ScaleMode, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss, info_nce
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of CLIP. The weight of its loss beside the cross-entropy is ours."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common space"] = 768
    w_clip: Annotated[float, Range(0), "lam, weight of the contrastive loss"] = 1.0
    tau: Annotated[float, Range(0.01), "initial temperature of the cosine; it is learned, and stays at least 0.01"] = 0.07
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class CLIP(CommonSpaceHead):
    """Linear projections without bias, a classifier on that of the image, and the mean of the two contrastive losses.

    It differs from `ema` and `ita` in three points: the temperature is learned, the two directions are averaged instead of
    added, and the projections are linear. The scale 1/tau has no weight decay, and a step leaves it at most at 100.

    Scale, average and projections are the original's; its batches and rates are those of two encoders that learn from nothing,
    so that --preset paper changes the learning rate alone.
    """

    Config = Config
    symbols: ClassVar[Mapping[str, str]] = {"lam": "w_clip", "tau": "tau", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_clip": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_clip": (0.1, 0.3, 1.0, 3.0), "tau": (0.03, 0.07, 0.2)}
    phases = (scaled_phase("similarity_scale"),)

    w_clip: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes, partial(LinearProjector, out_width=config.width, is_plain=True))
        self.similarity_scale = LearnedScale(config.tau)
        register_hyperparameters(self, w_clip=config.w_clip)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return CE + lam L_CLIP, and both parts."""
        h_v, h_s = self.embeddings(batch)
        v2s, s2v = info_nce(h_v, h_s, 1.0 / self.similarity_scale(), batch["paired"])
        ce, clip = classification_loss(self.classifier(h_v), batch["label"], self.label_loss), (v2s + s2v) / 2.0
        return {"loss": ce + self.w_clip * clip, "ce": ce, "clip": clip}
