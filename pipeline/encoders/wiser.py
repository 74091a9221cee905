"""WISeR (Martinel 2018), a wide residual network beside a convolution over whole rows: 2,048 features of a picture of food.

The convolution sees slices, 5 rows of the whole width, and so the layers of which food is built up; maxima over 5 positions
leave room for their height. Two fully connected layers join both branches, and their output is the feature. No checkpoint of
the whole network is public. With `weights=pretrained` the residual branch has the weights that timm records for it, and the
rest is random: a feature means something only after `diffalign finetune`. The input is always 224 x 224 pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from pipeline.encoders._encoder import Encoder
from pipeline.encoders._weights import (
    fixed_seed,
    hub_folder,
    image_to_uint8,
    load_matching_state,
    read_state_dict,
    split_transform,
    state_sha256,
)
from pipeline.runtime.device import ComputeDtype, use_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import Range, Settings

logger = logging.getLogger(__name__)

SIDE = 224  # pixels
SLICE_ROWS = 5  # rows that the slice convolution sees at a time, and positions of a maximum
POOL_STRIDE = 3
NUM_SLICES = (SIDE - SLICE_ROWS + 1 - SLICE_ROWS) // POOL_STRIDE + 1  # positions after pooling: 72

_WEIGHTS_FILE = "model.safetensors"  # in timm's repositories on the hub


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which residual branch, which weights, and how wide the rest is; the defaults are the paper's."""

    residual: Annotated[str, "timm's name of the residual branch, with or without .TAG"] = "wide_resnet50_2"
    weights: Annotated[
        str, "pretrained (of the residual branch), random, or a file or folder with that branch or the whole network"
    ] = "pretrained"
    num_maps: Annotated[int, Range(1, 4096), "maps of the slice convolution"] = 320
    width: Annotated[int, Range(1, 16_384), "outputs of each fully connected layer"] = 2048
    crop: Annotated[float, Range(0.25, 1), "share of the shorter side that the network sees"] = 0.875
    compute_dtype: Annotated[ComputeDtype, "auto: mixed if the processor has bfloat16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not timm.is_model(self.residual.partition(".")[0]):
            raise UserError(f"residual {self.residual!r} is no model of timm; wide_resnet50_2 is the paper's")


class Wiser(Encoder):
    """The network without its classifier."""

    Config = Config
    config: Config
    modality = "image"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        with fixed_seed():
            self.network = WideSliceNet(config.residual, config.num_maps, config.width)
        _load(self.network, config)
        self.weights_sha256 = state_sha256(self.network)
        self.feature_shape = (config.width,)
        self.drawing_side = round(SIDE / config.crop)
        transform = create_transform((3, SIDE, SIDE), crop_pct=config.crop, interpolation="bicubic")
        self.resize, self.normalize = split_transform(transform)
        self.move_for_inference(config.compute_dtype, lower="mixed")
        self.network.to(memory_format=torch.channels_last)

    def identity(self) -> dict[str, Any]:
        """Return the architecture, the weights, the preprocessing and the compute dtype."""
        config = self.config
        return {
            "architecture": f"wiser-{config.residual.partition('.')[0]}",
            "num_maps": config.num_maps,
            "width": config.width,
            "weights_sha256": self.weights_sha256,
            "preprocessing": {"side": SIDE, "crop": config.crop, "interpolation": "bicubic", "statistics": "imagenet"},
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return the settings of narrow branches."""
        return {"residual": "test_resnet", "num_maps": 4, "width": 16, "weights": "random"}

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return pixels uint8 [3,224,224] of an opened image."""
        return image_to_uint8(self.resize(image))

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,width] of pixels uint8 [B,3,224,224]."""
        images = self.normalize(prepared.to(self.device, torch.float32) / 255)
        with use_precision(self.compute_dtype, self.device):
            return self.network(images.to(self.input_dtype, memory_format=torch.channels_last)).float()


class WideSliceNet(nn.Module):
    """The residual branch, the slice branch, and the two layers that join them.

    The paper's dropout between these is left out: encoders are trained in evaluation mode.
    """

    def __init__(self, residual: str, num_maps: int, width: int) -> None:
        """Build the network with random weights.

        Args:
            residual: timm's name of the residual branch.
            num_maps: maps of the slice convolution.
            width: outputs of each fully connected layer.
        """
        super().__init__()
        self.residual: Any = timm.create_model(residual, pretrained=False, num_classes=0)
        self.slice = nn.Sequential(
            nn.Conv2d(3, num_maps, (SLICE_ROWS, SIDE)),
            nn.BatchNorm2d(num_maps),
            nn.ReLU(),
            nn.MaxPool2d((SLICE_ROWS, 1), (POOL_STRIDE, 1)),
            nn.Flatten(),
        )
        self.fc1 = nn.Linear(self.residual.num_features + num_maps * NUM_SLICES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, images: Tensor) -> Tensor:
        """Return features [B,width] of images [B,3,224,224]."""
        joined = torch.cat([self.residual(images), self.slice(images)], dim=1)
        return F.relu(self.fc2(F.relu(self.fc1(joined))))


def _load(network: WideSliceNet, config: Config) -> None:
    """Load the weights into the whole network, or into its residual branch if there are no others.

    Raises:
        UserError: the weights are not there, or do not fit.
    """
    if config.weights == "random":
        return
    if config.weights == "pretrained":
        recorded = timm.get_pretrained_cfg(config.residual)
        if not (recorded and recorded.hf_hub_id):
            raise UserError(f"weights of {config.residual} are not on the hub; download them and give --set weights=FILE")
        path = hub_folder(recorded.hf_hub_id, _WEIGHTS_FILE, setting="weights") / _WEIGHTS_FILE
    else:
        path = Path(config.weights)
    state, remedy = read_state_dict(path), "set residual, num_maps and width to those of the file"
    if _is_whole(state):
        load_matching_state(network, state, path.name, remedy=remedy)
    else:
        load_matching_state(network.residual, state, path.name, remedy=remedy)
        logger.warning(
            "%s holds the residual branch of WISeR alone; the rest is random, so fine-tune before features are used", path.name
        )


def _is_whole(state: Mapping[str, Tensor]) -> bool:
    """Whether a state is of the whole network: residual.*, slice.*, fc1.*, fc2.*."""
    return any(name.startswith("residual.") for name in state)
