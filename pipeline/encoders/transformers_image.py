"""Any image model of transformers (ViT, DINOv2, SigLIP, …), with the image processor that is saved with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from pipeline.encoders._transformers import (
    TransformersVision,
    VisionConfig,
    check_class_token,
    check_keep,
    given_attention,
    keep_most_attended,
    num_kept,
)
from pipeline.encoders._weights import probe_feature_shape
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import Range


@dataclass(frozen=True, kw_only=True)
class Config(VisionConfig):
    """Which image model to use, with which weights, and which of its outputs is the feature."""

    model: Annotated[str, "a local folder or an id of the hub; it decides the preprocessing"] = (
        "google/vit-base-patch16-224-in21k"
    )
    pooling: Annotated[Literal["cls", "mean", "pooler"], "first token, mean of all tokens, or the model's own pooling"] = "cls"
    keep: Annotated[
        float, Range(1e-3, 1), "share of the patches that tokens=true keeps: those that the class token attends to most"
    ] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep, self.tokens, self.layer)


class TransformersImage(TransformersVision):
    """A vision transformer, or the vision tower of a two-tower model; it computes in the compute dtype."""

    Config = Config
    modality = "image"

    def __init__(self, config: Config) -> None:
        super().__init__(config, "vision_model")
        self.keep = config.keep
        if self.keep < 1:
            check_class_token(self.network)
            self.network.set_attn_implementation("eager")  # the others do not give their attention
        blank = self.prepare_image(Image.new("RGB", (64, 64)))
        self.drawing_side = max(blank.shape[1:])
        self.feature_shape = probe_feature_shape(self, blank)

    def identity(self) -> dict[str, Any]:
        """Return the identity of its kind and, if not all patches are kept, their share."""
        return super().identity() | ({"keep": self.keep} if self.keep < 1 else {})

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return normalised pixels float32 [3,H,W] of an opened image."""
        prepared = self.processor(image, return_tensors="pt")
        if set(prepared) != {"pixel_values"}:
            raise UserError(f"model {self.config.model!r} reads {', '.join(prepared)}; only pixel_values are supported")
        return prepared["pixel_values"][0]

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] or [B,T,D] of pixels [B,3,H,W]."""
        if self.keep < 1:
            return self._attended_patches(self.run_network(prepared, output_attentions=True))
        output = self.run_network(prepared)
        if self.config.pooling == "pooler":
            if output.get("pooler_output") is None:
                raise UserError(f"model {self.config.model!r} has no pooler; set pooling=mean or pooling=cls")
            return output["pooler_output"].float().flatten(1)
        return self.token_features(output)

    def _attended_patches(self, output: Any) -> Tensor:
        """Return the patches [B,T,D] that the class token, which is the first, attends to most; it and registers are none."""
        first = 1 + getattr(self.network.config, "num_register_tokens", 0)
        patches_BTD = self.token_features(output)[:, first:]
        row_B = torch.zeros(len(patches_BTD), dtype=torch.long, device=patches_BTD.device)
        attention_BT = given_attention(output, self.config.layer, row_B)[:, first:]
        count_B = num_kept(self.keep, torch.full_like(row_B, patches_BTD.shape[1]))
        return keep_most_attended(patches_BTD, attention_BT, count_B, int(count_B[0]))
