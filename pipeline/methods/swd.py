"""Sliced Wasserstein discrepancy (SWD): image and text decide about the classes in the same way, as sets (Lee et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.nn.common_space import CommonSpaceHead
from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss, sliced_wasserstein
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of SWD. The weight of its loss beside the cross-entropies is ours."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common space"] = 768
    w_swd: Annotated[float, Range(0), "lam/C: the discrepancy of probabilities is at most about 2/C, for C classes"] = 1.0
    num_directions: Annotated[int, Range(1, 65_536), "P, random directions, fresh ones in every step"] = 128
    detach_text: Annotated[bool, "the discrepancy trains the image alone: the text is its teacher"] = False
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class SWD(CommonSpaceHead):
    """A classifier on the image, one on the text, and the discrepancy of the two sets of class probabilities in a batch.

    The discrepancy compares sets, not pairs. The original measures two classifiers on unlabelled data, and plays them against
    the features; where all samples have labels there is no such play. The number of directions is the original's; its weights
    and rates belong to that play, so that --preset paper changes the learning rate alone.
    """

    Config = Config
    symbols: ClassVar[Mapping[str, str]] = {"d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_swd": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_swd": (0.1, 0.3, 1.0, 3.0)}

    w_swd: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.num_directions, self.detach_text = config.num_directions, config.detach_text
        self.text_classifier = nn.Linear(config.width, num_classes_in(shapes))
        register_hyperparameters(self, w_swd=config.w_swd)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16, "num_directions": 8}

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return CE of the image + CE of the text + lam SWD of their class probabilities, and the three parts."""
        paired, label = batch["paired"], batch["label"]
        z_v = self.classifier(self.common.image(batch["image"]))
        z_s = self.text_classifier(self.common.text(batch["text"], paired))
        ce = classification_loss(z_v, label, self.label_loss)
        ce_text = classification_loss(z_s, label, self.label_loss, paired)
        num_classes = z_v.shape[1]
        directions = torch.randn(num_classes, self.num_directions, device=z_v.device)
        p_v, p_s = z_v.softmax(1), (z_s.detach() if self.detach_text else z_s).softmax(1)
        swd = num_classes * sliced_wasserstein(p_v, p_s, directions, paired)
        return {"loss": ce + ce_text + self.w_swd * swd, "ce": ce, "ce_text": ce_text, "swd": swd}
