"""VanillaNet (Chen 2023), few wide layers without shortcuts: 4,096 pooled features.

A checkpoint of huawei-noah/VanillaNet is read as it is (`weights=vanillanet_10.pth depth=10`), in its training form or its
deploy form. The training form has two 1x1 convolutions per layer, between which a leaky activation fades away: its negative slope
grows to 1. With slope 1 both are one convolution, so the deploy form has them merged and gives the same features. Fine-tune the
training form.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from pipeline.encoders._encoder import Encoder
from pipeline.encoders._forms import CheckpointLayout, Form, fold_normalization, load_in_form
from pipeline.encoders._weights import fixed_seed, image_to_uint8, split_transform
from pipeline.runtime.device import ComputeDtype, use_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import Range, Settings

BASE_WIDTH = 512  # channels of the stem; the last layers have eight times as many
EPSILON = 1e-6  # of the batch normalisations
SERIES = 3  # n of the series activation, a sum over (2n+1) x (2n+1) positions

_LAYOUT = CheckpointLayout(
    origin="huawei-noah/VanillaNet",
    merged_tensor="stem.0.weight",
    whole=("stages.",),
    settings="depth and width",
)


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which network with which weights, and what it sees of a picture."""

    depth: Annotated[int, Range(5, 13), "layers: 5 to 13, as in the names of the checkpoints"] = 10
    width: Annotated[float, Range(1 / 64, 4), "factor of all widths; 1.5 in the checkpoint vanillanet_13_x1_5"] = 1.0
    weights: Annotated[str, "a .pth or .safetensors file or folder in the layout of huawei-noah/VanillaNet; or random"] = ""
    form: Annotated[Form, "deploy: the convolutions of each layer are merged into one"] = "training"
    slope: Annotated[float, Range(0, 1), "negative slope inside a layer; 1 at the end of training, 0 at its start"] = 1.0
    side: Annotated[int, Range(32, 1024), "pixels of the square that the network sees; it was pretrained with 224"] = 224
    crop: Annotated[float, Range(0.25, 1), "share of the shorter side that the network sees"] = 0.875
    compute_dtype: Annotated[ComputeDtype, "auto: mixed if the processor has bfloat16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "deploy" and self.slope != 1:
            raise UserError(f"slope {self.slope} keeps the layers from being merged; set slope=1 or form=training")


class VanillaNetEncoder(Encoder):
    """The network without its classifier."""

    Config = Config
    config: Config
    modality = "image"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        with fixed_seed():
            self.network = VanillaNet(config.depth, config.width, config.slope)
        self.weights_sha256 = load_in_form(self.network, config.weights, config.form, _LAYOUT)
        self.feature_shape = (self.network.num_features,)
        self.drawing_side = round(config.side / config.crop)
        transform = create_transform((3, config.side, config.side), crop_pct=config.crop, interpolation="bicubic")
        self.resize, self.normalize = split_transform(transform)
        self.move_for_inference(config.compute_dtype, lower="mixed")
        self.network.to(memory_format=torch.channels_last)

    def identity(self) -> dict[str, Any]:
        """Return the architecture, the weights as they were loaded, the form, the preprocessing and the compute dtype."""
        config = self.config
        return {
            "architecture": f"vanillanet_{config.depth}",
            "width": config.width,
            "weights_sha256": self.weights_sha256,
            "form": config.form,
            "slope": config.slope,
            "preprocessing": {"side": config.side, "crop": config.crop, "interpolation": "bicubic", "statistics": "imagenet"},
            "pooling": "average",
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return the settings of few, narrow layers."""
        return {"depth": 5, "width": 1 / 64, "side": 32, "weights": "random"}

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return pixels uint8 [3,side,side] of an opened image."""
        return image_to_uint8(self.resize(image))

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] of pixels uint8 [B,3,side,side]."""
        images = self.normalize(prepared.to(self.device, torch.float32) / 255)
        with use_precision(self.compute_dtype, self.device):
            return self.network(images.to(self.input_dtype, memory_format=torch.channels_last)).float()


class VanillaNet(nn.Module):
    """The stem, a convolution over 4x4 pixels, and the layers; the names of its tensors are those of the public checkpoints."""

    def __init__(self, depth: int, width: float, slope: float) -> None:
        """Build the training form with random weights.

        Args:
            depth: layers of the whole network, with the stem and the classifier.
            width: factor of all numbers of channels.
            slope: negative slope of the activation inside a layer.
        """
        super().__init__()
        self.slope = slope
        self.stem: nn.Module | None = None  # of the deploy form, in place of the next two
        unit = round(BASE_WIDTH * width)
        self.stem1 = nn.Sequential(nn.Conv2d(3, unit, 4, stride=4), nn.BatchNorm2d(unit, EPSILON))
        self.stem2 = nn.Sequential(nn.Conv2d(unit, unit, 1), nn.BatchNorm2d(unit, EPSILON), SeriesActivation(unit))
        layers = _layers(depth)
        widths = [unit, *(unit * factor for factor, _ in layers)]
        self.stages = nn.ModuleList(
            VanillaLayer(*ends, stride, slope) for ends, (_, stride) in zip(pairwise(widths), layers, strict=True)
        )
        self.num_features = widths[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the statistics of the normalisations stay, so the weights must keep the scale
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features [B,D] of images [B,3,H,W]."""
        x = self.stem(images) if self.stem else self.stem2(F.leaky_relu(self.stem1(images), self.slope))
        for stage in self.stages:
            x = stage(x)
        return x.mean(dim=(2, 3))

    def merge(self) -> None:
        """Give the network the deploy form, which computes the same if the slope is 1."""
        *second, activation = self.stem2
        self.stem = nn.Sequential(_merged(*self.stem1, *second), activation)
        del self.stem1, self.stem2
        for module in [*self.modules()]:
            if isinstance(module, VanillaLayer | SeriesActivation):
                module.merge()


def _layers(depth: int) -> list[tuple[int, int]]:
    """Return for each layer after the stem how many times as many channels as the stem it has, and its stride."""
    if depth == 5:
        return [(2, 2), (4, 2), (8, 2)]
    first = [(1, 1)] if depth > 6 else []
    return [*first, (2, 2), (4, 2), *[(4, 1)] * (depth - 7), (8, 2), (8, 1)]


class VanillaLayer(nn.Module):
    """Two 1x1 convolutions with a fading activation between them, maximum pooling, and the series activation."""

    def __init__(self, width: int, width_out: int, stride: int, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.conv: nn.Module | None = None  # of the deploy form, in place of the next two
        self.conv1 = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width, EPSILON))
        self.conv2 = nn.Sequential(nn.Conv2d(width, width_out, 1), nn.BatchNorm2d(width_out, EPSILON))
        self.pool = nn.Identity() if stride == 1 else nn.MaxPool2d(stride)
        self.act = SeriesActivation(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps [B,width_out,H/stride,W/stride] of maps [B,width,H,W]."""
        x = self.conv(x) if self.conv else self.conv2(F.leaky_relu(self.conv1(x), self.slope))
        return self.act(self.pool(x))

    def merge(self) -> None:
        """Replace both convolutions and their normalisations by one convolution."""
        self.conv = _merged(*self.conv1, *self.conv2)
        del self.conv1, self.conv2


class SeriesActivation(nn.Module):
    """A ReLU, of whose values each channel sums those of (2n+1) x (2n+1) neighbours with weights of its own (eq. 6)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, 2 * SERIES + 1, 2 * SERIES + 1))
        self.register_parameter("bias", None)
        self.bn: nn.Module = nn.BatchNorm2d(width, EPSILON)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return maps [B,D,H,W] of maps [B,D,H,W]."""
        return self.bn(F.conv2d(F.relu(x), self.weight, self.bias, padding=SERIES, groups=len(self.weight)))

    def merge(self) -> None:
        """Make the normalisation a part of the weights and a bias."""
        self.weight, self.bias = fold_normalization(self.weight, self.bias, self.bn)
        self.bn = nn.Identity()


@torch.no_grad()
def _merged(first: Any, first_bn: nn.Module, second: Any, second_bn: nn.Module) -> nn.Conv2d:
    """Return the convolution that computes what a convolution, a 1x1 convolution and their normalisations compute."""
    weight1, bias1 = (each.double() for each in fold_normalization(first.weight, first.bias, first_bn))
    weight2, bias2 = (each.double() for each in fold_normalization(second.weight, second.bias, second_bn))
    product = weight2[:, :, 0, 0]
    merged: Any = nn.Conv2d(first.in_channels, second.out_channels, first.kernel_size, first.stride)
    merged.weight.copy_(torch.tensordot(product, weight1, dims=1))
    merged.bias.copy_(product @ bias1 + bias2)
    return merged
