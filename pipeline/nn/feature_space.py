"""The space a diffusion head works in: image and text features standardised, after frozen adapters where widths differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.nn.layers import Adapter, Standardise
from pipeline.nn.losses import classification
from pipeline.types import Batch, Phase, Shapes

AdapterKind = Literal["none", "classifier", "pca"]
Scale = Literal["per_dim", "global", "l2sqrtd"]
LabelLoss = Literal["softmax_kl", "bce", "softmax_multihot"]
ADAPT = Phase("adapt", ("space.",), share=0.4)  # 8 of the default 20 epochs


def require(config: Any, low: float, high: float, *names: str) -> None:
    """`ValueError` that names the first of these settings of a config that is not in low..high, both included."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            raise ValueError(f"{name} must be {f'in {low}..{high}' if high < math.inf else f'at least {low}'}, not {value}")


def label_count(shapes: Shapes) -> int:
    """C, the number of classes."""
    return shapes["classes"][0]


def paired_text(batch: Batch) -> Tensor:
    """The text features of the samples that have a text; statistics are taken of these alone."""
    return batch["text"][batch["paired"] > 0]


class Space(nn.Module):
    """x_v and x_s at unit scale, through adapters of a common width when `adapter` is not "none".

    Adapters are fitted on the training split and then frozen: a target that is learned together with its regression collapses.
    "classifier" adapters learn in a phase of their own from the labels, "pca" adapters take principal components. The owner
    calls its module `space`, puts `phases` before its own, and forwards `begin` and, in the phase "adapt", `adapter_loss`.
    """

    def __init__(self, shapes: Shapes, adapter: AdapterKind, width: int, scale: Scale) -> None:
        super().__init__()
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        self.kind = adapter
        self.phases = (ADAPT,) if adapter == "classifier" else ()
        self.image_width, self.text_width = image_width, text_width
        self.image_scale, self.text_scale = Standardise(scale, image_width), Standardise(scale, text_width)
        if adapter == "pca" and width > min(image_width, text_width):
            raise ValueError(f"width is {width}; pca adapters of widths {image_width} and {text_width} cannot widen them")
        if adapter != "none":
            self.image_width = self.text_width = width
            # a classifier adapter learns behind a batch normalisation, whose place unit deviations take
            after: Scale = "per_dim" if adapter == "classifier" else scale
            self.image_adapter = Adapter(image_width, width, label_count(shapes))
            self.text_adapter = Adapter(text_width, width, label_count(shapes))
            self.image_rescale, self.text_rescale = Standardise(after, width), Standardise(after, width)

    @torch.no_grad()
    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Takes statistics: of the raw features before anything else, of the adapters' outputs once these are fixed."""
        if phase == "adapt" or self.kind != "classifier":
            self.image_scale.fit(batch["image"] for batch in train())
            self.text_scale.fit(paired_text(batch) for batch in train())
        if self.kind == "pca":
            self.image_adapter.fit_pca(self.image_scale(batch["image"]) for batch in train())
            self.text_adapter.fit_pca(self.text_scale(paired_text(batch)) for batch in train())
        if phase != "adapt" and self.kind != "none":
            self.image_rescale.fit(self.image_adapter.feature(self.image_scale(batch["image"])) for batch in train())
            self.text_rescale.fit(self.text_adapter.feature(self.text_scale(paired_text(batch))) for batch in train())

    def adapter_loss(self, batch: Batch, label_loss: LabelLoss) -> Batch:
        """Cross-entropy of each adapter's own classifier."""
        ce_image = classification(self.image_adapter.logits(self.image_scale(batch["image"])), batch["label"], label_loss)
        text_logits = self.text_adapter.logits(self.text_scale(batch["text"]))
        ce_text = classification(text_logits, batch["label"], label_loss, batch["paired"])
        return {"loss": ce_image + ce_text, "ce_image": ce_image, "ce_text": ce_text}

    def image(self, x: Tensor) -> Tensor:
        """x_v [B, image_width] of raw image features."""
        x = self.image_scale(x)
        return x if self.kind == "none" else self.image_rescale(self.image_adapter.feature(x))

    def text(self, x: Tensor) -> Tensor:
        """x_s [B, text_width] of raw text features."""
        x = self.text_scale(x)
        return x if self.kind == "none" else self.text_rescale(self.text_adapter.feature(x))
