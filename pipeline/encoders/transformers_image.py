"""Any image model of transformers (ViT, DINOv2, SigLIP, …), with the image processor that is saved with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from PIL import Image
from torch import Tensor

from pipeline.encoders._transformers import TransformersVision, VisionConfig
from pipeline.encoders._weights import probe_feature_shape
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(VisionConfig):
    """Which image model to use, with which weights, and which of its outputs is the feature."""

    model: Annotated[str, "a local folder or an id of the hub; it decides the preprocessing"] = (
        "google/vit-base-patch16-224-in21k"
    )
    pooling: Annotated[Literal["cls", "mean", "pooler"], "first token, mean of all tokens, or the model's own pooling"] = "cls"


class TransformersImage(TransformersVision):
    """A vision transformer, or the vision tower of a two-tower model; it computes in the compute dtype."""

    Config = Config
    modality = "image"

    def __init__(self, config: Config) -> None:
        super().__init__(config, "vision_model")
        blank = self.prepare_image(Image.new("RGB", (64, 64)))
        self.drawing_side = max(blank.shape[1:])
        self.feature_shape = probe_feature_shape(self, blank)

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return normalised pixels float32 [3,H,W] of an opened image."""
        prepared = self.processor(image, return_tensors="pt")
        if set(prepared) != {"pixel_values"}:
            raise UserError(f"model {self.config.model!r} reads {', '.join(prepared)}; only pixel_values are supported")
        return prepared["pixel_values"][0]

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] or [B,T,D] of pixels [B,3,H,W]."""
        output = self.run_network(prepared)
        if self.config.pooling == "pooler":
            if output.get("pooler_output") is None:
                raise UserError(f"model {self.config.model!r} has no pooler; set pooling=mean or pooling=cls")
            return output["pooler_output"].float().flatten(1)
        return self.token_features(output)
