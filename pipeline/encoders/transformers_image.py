"""Any image model of transformers (ViT, DINOv2, SigLIP, …), with the image processor that is saved beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from pipeline.data.media import open_image
from pipeline.encoders._weights import (
    architecture,
    check_class_token,
    feature_shape,
    plain,
    pooled,
    states_of,
    transformers_folder,
    transformers_network,
)
from pipeline.runtime.device import ComputeDtype, Precision, computing, default_device, place_network, resolve_dtype


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model, with which weights, and what of it is the feature."""

    model: str = "google/vit-base-patch16-224-in21k"  # a local folder or an id of the hub; it decides the preprocessing
    weights: str = "pretrained"  # pretrained (the model's own), random, or a local .pth or .safetensors file or folder
    pooling: Literal["cls", "mean", "pooler"] = "cls"  # first token, mean of all tokens, or the model's own pooling
    layer: int = -1  # hidden state: 0 the embeddings, 1, 2, … the blocks, -1 the final one after its norm
    tokens: bool = False  # all tokens [T, D] instead of one vector
    compute_dtype: ComputeDtype = "auto"  # auto: bfloat16 where the processor has it; mixed keeps float32 parameters

    def __post_init__(self) -> None:
        if self.pooling == "pooler" and (self.layer != -1 or self.tokens):
            raise ValueError("pooling=pooler reads the final layer and gives one vector; leave layer and tokens alone")


class TransformersImage(nn.Module):
    """A vision transformer, or the vision tower of a model of two; in the compute dtype."""

    modality: Literal["image", "video", "text"] = "image"

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.device = default_device()
        self.compute_dtype: Precision = resolve_dtype(config.compute_dtype, self.device)
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.network: Any = transformers_network(folder, config.weights, "vision_model", pooler=config.pooling == "pooler")
        if config.pooling == "cls" and not config.tokens:
            check_class_token(self.network)
        self.architecture = architecture(self.network)
        self.input_dtype = place_network(self, self.compute_dtype, self.device)
        blank = self.prepare_image(Image.new("RGB", (64, 64)))
        self.side = max(blank.shape[1:])
        self.feature_shape: tuple[int, ...] = feature_shape(self, blank)

    def identity(self) -> dict[str, Any]:
        """Configuration, weights, the processor's settings, pooling, layer, tokens and the resolved compute dtype."""
        return {
            **self.architecture,
            "preprocessing": plain(self.processor),
            "pooling": "none" if self.config.tokens else self.config.pooling,
            "layer": self.config.layer,
            "compute_dtype": self.compute_dtype,
        }

    def prepare(self, raw: Path | str) -> Tensor:
        """Normalised pixels float32 [3,H,W]; a drawing is rendered at the size of the model's input."""
        return self.prepare_image(open_image(Path(raw), self.side))

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Normalised pixels float32 [3,H,W] of an opened image."""
        prepared = self.processor(image, return_tensors="pt")
        if set(prepared) != {"pixel_values"}:
            raise ValueError(f"model {self.config.model!r} reads {', '.join(prepared)}; only pixel_values are supported")
        return prepared["pixel_values"][0]

    def forward(self, prepared: Tensor) -> Tensor:
        """Features float32 [B,D] or [B,T,D] of pixels [B,3,H,W]."""
        config = self.config
        with computing(self.compute_dtype, self.device):
            output = self.network(
                pixel_values=prepared.to(self.device, self.input_dtype), output_hidden_states=config.layer != -1
            )
        if config.pooling == "pooler":
            if output.get("pooler_output") is None:
                raise ValueError(f"model {config.model!r} has no pooler; set pooling=mean or pooling=cls")
            return output["pooler_output"].float().flatten(1)
        return pooled(states_of(output, config.layer), config.pooling, config.tokens)


def build(config: Config) -> TransformersImage:
    """The encoder of a config; `ValueError` when the model or its weights cannot be had, or do not fit each other."""
    return TransformersImage(config, transformers_folder(config.model, config.weights))
