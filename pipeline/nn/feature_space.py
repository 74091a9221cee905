"""The feature space of a diffusion head: standardised image and text features, with frozen adapters if their widths differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.nn.layers import Adapter, ScaleMode, Standardise
from pipeline.nn.losses import LabelLoss, classification_loss, info_nce
from pipeline.runtime.errors import UserError
from pipeline.types import Batch, Phase, Shapes

AdapterKind = Literal["none", "classifier", "pca", "contrastive"]
CONTRAST_TEMPERATURE = 0.07  # of "contrastive" adapters: the initial tau of MARNet
ADAPTER_PHASE = Phase("adapt", ("space.",), share=0.4)  # 8 of the default 20 epochs


def num_classes_in(shapes: Shapes) -> int:
    """Return C, the number of classes."""
    return shapes["classes"][0]


def paired_text(batch: Batch) -> Tensor:
    """Return the text features of the samples that have a text; only these enter the statistics."""
    return batch["text"][batch["paired"] > 0]


class FeatureSpace(nn.Module):
    """Maps raw features to x_v and x_s at unit scale; unless `adapter` is "none", adapters map both to a common width first.

    Adapters are fitted on the training split and then frozen, because a regression target that is trained together with its
    regression collapses. "classifier" adapters learn from the labels in a phase of their own; "pca" adapters are principal
    components; "contrastive" adapters learn, in the phase, what MARNet's projectors learn: to match image and text of a sample,
    and to classify the image (eq. 6-13). Statistics of texts are those of the samples that have a text.

    A method that uses this class must do three things: store it in the attribute `space`, put `phases` before its own phases,
    and call `begin` and, in the phase "adapt", `adapter_loss`.

    Args:
        shapes: shapes of the batch, see `types.Shapes`.
        adapter: kind of the adapters.
        width: common width of the adapters' outputs.
        scale: see `layers.Standardise`.

    Raises:
        UserError: "pca" adapters would have to increase a width.
    """

    def __init__(self, shapes: Shapes, adapter: AdapterKind, width: int, scale: ScaleMode) -> None:
        super().__init__()
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        self.kind = adapter
        self.is_trained = adapter in ("classifier", "contrastive")
        self.phases = (ADAPTER_PHASE,) if self.is_trained else ()
        self.raw_image_width, self.image_width, self.text_width = image_width, image_width, text_width
        self.image_scale, self.text_scale = Standardise(scale, image_width), Standardise(scale, text_width)
        if adapter == "pca" and width > min(image_width, text_width):
            raise UserError(
                f"width is {width}; pca adapters of widths {image_width} and {text_width} cannot widen them: set a width of "
                f"at most {min(image_width, text_width)}"
            )
        if adapter != "none":
            self.image_width = self.text_width = width
            # A classifier adapter is trained with batch normalisation after it; "per_dim" takes over the same role.
            output_scale: ScaleMode = "per_dim" if adapter == "classifier" else scale
            num_classes, is_contrast = num_classes_in(shapes), adapter == "contrastive"
            self.image_adapter = Adapter(image_width, width, num_classes, is_contrast)
            self.text_adapter = Adapter(text_width, width, 0 if is_contrast else num_classes, is_contrast)
            if adapter == "pca":
                nn.init.zeros_(self.image_adapter.project.weight)
                nn.init.zeros_(self.text_adapter.project.weight)
            self.image_rescale, self.text_rescale = Standardise(output_scale, width), Standardise(output_scale, width)

    @torch.no_grad()
    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the raw features and, once the adapters are frozen, those of the adapters' outputs.

        Principal components are found once: in joint training they stay what the head was trained with.

        Args:
            phase: name of the phase that is about to start.
            train: starts an ordered pass over the training split.
        """
        if phase == "adapt" or not self.is_trained:
            self.image_scale.fit(batch["image"] for batch in train())
            self.text_scale.fit(paired_text(batch) for batch in train())
        if self.kind == "pca" and not self.image_adapter.is_fitted:
            self.image_adapter.fit_pca(self.image_scale(batch["image"]) for batch in train())
            self.text_adapter.fit_pca(self.text_scale(paired_text(batch)) for batch in train())
        if phase != "adapt" and self.kind != "none":
            self.image_rescale.fit(self.image_adapter.feature(self.image_scale(batch["image"])) for batch in train())
            self.text_rescale.fit(self.text_adapter.feature(self.text_scale(paired_text(batch))) for batch in train())

    def adapter_loss(self, batch: Batch, label_loss: LabelLoss) -> Batch:
        """Return the loss of the phase "adapt", and its parts: the two adapters' cross-entropies, or that of the image and the
        contrast L_ITA of "contrastive" adapters.
        """
        image, text, paired = self.image_scale(batch["image"]), self.text_scale(batch["text"]), batch["paired"]
        if self.kind == "contrastive":
            x_v, x_s = self.image_adapter.feature(image), self.text_adapter.feature(text)
            ce = classification_loss(self.image_adapter.classifier(x_v), batch["label"], label_loss)
            v2s, s2v = info_nce(x_v, x_s, CONTRAST_TEMPERATURE, paired)
            return {"loss": ce + v2s + s2v, "ce_image": ce, "ita": v2s + s2v}
        image_logits = self.image_adapter.logits(image, torch.ones_like(paired))
        ce_image = classification_loss(image_logits, batch["label"], label_loss)
        ce_text = classification_loss(self.text_adapter.logits(text, paired), batch["label"], label_loss, paired)
        return {"loss": ce_image + ce_text, "ce_image": ce_image, "ce_text": ce_text}

    def raw_image(self, x: Tensor) -> Tensor:
        """Return standardised image features at their own width [B,Dv]."""
        return self.image_scale(x)

    def image(self, x: Tensor) -> Tensor:
        """Return x_v [B, image_width] from raw image features [B,Dv]."""
        x = self.image_scale(x)
        return x if self.kind == "none" else self.image_rescale(self.image_adapter.feature(x))

    def text(self, x: Tensor) -> Tensor:
        """Return x_s [B, text_width] from raw text features [B,Ds]."""
        x = self.text_scale(x)
        return x if self.kind == "none" else self.text_rescale(self.text_adapter.feature(x))
