"""Any video model of transformers with a fixed number of frames (VideoMAE, TimeSformer, X-CLIP, …), with its own processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor

from pipeline.data.media import SAMPLING, open_frames
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
    """Which model, with which weights, and what of it is the feature; the number of frames is the model's own."""

    model: str = "MCG-NJU/videomae-base"  # a local folder or an id of the hub; it decides the preprocessing
    weights: str = "pretrained"  # pretrained (the model's own), random, or a local .pth or .safetensors file or folder
    pooling: Literal["mean", "cls", "pooler"] = "mean"  # mean of all tokens, first token, or the model's own (X-CLIP)
    layer: int = -1  # hidden state: 0 the embeddings, 1, 2, … the blocks, -1 the final one after its norm
    tokens: bool = False  # all tokens [T, D] instead of one vector
    compute_dtype: ComputeDtype = "auto"  # auto: bfloat16 where the processor has it; mixed keeps float32 parameters

    def __post_init__(self) -> None:
        if self.pooling == "pooler" and (self.layer != -1 or self.tokens):
            raise ValueError("pooling=pooler reads the final layer and gives one vector; leave layer and tokens alone")


class TransformersVideo(nn.Module):
    """A video transformer over uniformly sampled frames; in the compute dtype."""

    modality: Literal["image", "video", "text"] = "video"

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.device = default_device()
        self.compute_dtype: Precision = resolve_dtype(config.compute_dtype, self.device)
        self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.network: Any = transformers_network(folder, config.weights, "", pooler=config.pooling == "pooler")
        described = self.network.config
        self.num_frames: int = getattr(getattr(described, "vision_config", described), "num_frames", 0)
        if not self.num_frames:
            raise ValueError(f"model {config.model!r} has no fixed number of frames; for an image model take frames")
        if config.pooling == "cls" and not config.tokens:
            check_class_token(self.network)
        self.architecture = architecture(self.network)
        self.input_dtype = place_network(self, self.compute_dtype, self.device)
        blank = self._process([Image.new("RGB", (64, 64))] * self.num_frames)
        self.feature_shape: tuple[int, ...] = feature_shape(self, blank)

    def identity(self) -> dict[str, Any]:
        """Configuration, weights, frames, the processor's settings, pooling, layer, tokens and the resolved compute dtype."""
        return {
            **self.architecture,
            "num_frames": self.num_frames,
            "sampling": SAMPLING,
            "preprocessing": plain(self.processor),
            "pooling": "none" if self.config.tokens else self.config.pooling,
            "layer": self.config.layer,
            "compute_dtype": self.compute_dtype,
        }

    def prepare(self, raw: Path | str) -> Tensor:
        """Normalised pixels float32 [F,3,H,W] of the sampled frames of a clip."""
        return self._process(open_frames(Path(raw), self.num_frames))

    def _process(self, frames: list[Image.Image]) -> Tensor:
        pixels = self.processor(frames, return_tensors="pt")["pixel_values"]
        return pixels.reshape(self.num_frames, *pixels.shape[-3:])

    def forward(self, prepared: Tensor) -> Tensor:
        """Features float32 [B,D] or [B,T,D] of pixels [B,F,3,H,W]."""
        config, pixels = self.config, prepared.to(self.device, self.input_dtype)
        joint = getattr(self.network, "get_video_features", None)  # X-CLIP: frames meet only on the way to the shared space
        if (joint is not None) != (config.pooling == "pooler"):
            raise ValueError(f"model {config.model!r} takes pooling={'pooler' if joint else 'mean or pooling=cls'}")
        with computing(self.compute_dtype, self.device):
            if joint is not None:
                features = joint(pixels)
                return getattr(features, "pooler_output", features).float()
            output = self.network(pixel_values=pixels, output_hidden_states=config.layer != -1)
        return pooled(states_of(output, config.layer), config.pooling, config.tokens)


def build(config: Config) -> TransformersVideo:
    """The encoder of a config; `ValueError` when the model or its weights cannot be had, or do not fit each other."""
    return TransformersVideo(config, transformers_folder(config.model, config.weights))
