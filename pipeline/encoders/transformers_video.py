"""Any video model of transformers with a fixed number of frames (VideoMAE, TimeSformer, X-CLIP, …), with its own processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from torch import Tensor

from pipeline.data.media import FRAME_SAMPLING, open_frames
from pipeline.encoders._transformers import TransformersVision, VisionConfig
from pipeline.encoders._weights import probe_feature_shape
from pipeline.runtime.device import use_precision
from pipeline.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(VisionConfig):
    """Which video model to use, with which weights, and which of its outputs is the feature."""

    model: Annotated[str, "a local folder or an id of the hub; it decides preprocessing and number of frames"] = (
        "MCG-NJU/videomae-base"
    )
    pooling: Annotated[Literal["mean", "cls", "pooler"], "mean of all tokens, first token, or the model's own (X-CLIP)"] = (
        "mean"
    )


class TransformersVideo(TransformersVision):
    """A video transformer over uniformly sampled frames; it computes in the compute dtype."""

    Config = Config
    modality = "video"

    def __init__(self, config: Config) -> None:
        super().__init__(config, "")
        blank = self.prepare_pictures([Image.new("RGB", (64, 64))] * self.num_frames)
        self.feature_shape = probe_feature_shape(self, blank)

    @property
    def num_frames(self) -> int:
        """The number of frames F that the model reads; 0 if it is not fixed."""
        described = self.network.config
        return getattr(getattr(described, "vision_config", described), "num_frames", 0)

    def check_network(self) -> None:
        """Raise `UserError` if the network has no fixed number of frames, or not the token that the config asks for."""
        if not self.num_frames:
            raise UserError(f"model {self.config.model!r} has no fixed number of frames; for an image model take frames")
        super().check_network()

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model, the number of frames, and how they are sampled."""
        return {**super().identity(), "num_frames": self.num_frames, "sampling": FRAME_SAMPLING}

    def open_pictures(self, path: Path) -> list[Image.Image]:
        """Return the sampled frames of a clip."""
        return open_frames(path, self.num_frames)

    def prepare_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return normalised pixels float32 [F,3,H,W] of the sampled frames of a clip."""
        pixels = self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        return pixels.reshape(self.num_frames, *pixels.shape[-3:])

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] or [B,T,D] of pixels [B,F,3,H,W]."""
        # X-CLIP combines frames only on the way to the space that it shares with texts
        encode_video = getattr(self.network, "get_video_features", None)
        if (encode_video is not None) != (self.config.pooling == "pooler"):
            choices = "pooler" if encode_video else "mean or pooling=cls"
            raise UserError(f"model {self.config.model!r} takes pooling={choices}")
        if encode_video is None:
            return self.token_features(self.run_network(prepared))
        with use_precision(self.compute_dtype, self.device):
            features = encode_video(prepared.to(self.device, self.input_dtype))
            return getattr(features, "pooler_output", features).float()
