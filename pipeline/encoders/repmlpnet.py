"""RepMLPNet (Ding 2022), fully connected layers over the positions of a picture: 512 pooled features of RepMLPNet-T.

A checkpoint of DingXiaoH/RepMLP is read as it is (RepMLPNet-B256 is `variant=B side=256`), in its training form or its deploy
form. The training form has convolutions beside its fully connected layers. A convolution is a linear map of all positions, so
the deploy form has them merged into these layers and gives the same features. Fine-tune the training form.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

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

STRIDE = 32  # pixels per position in the last stage; 4 in the first
KERNELS = (1, 3)  # sides of the convolutions beside a fully connected layer

_LAYOUT = CheckpointLayout(
    origin="DingXiaoH/RepMLP",
    merged_tensor="stages.0.0.repmlp_block.fc3.bias",
    whole=("stages.",),
    settings="variant and side",
)


class Sizes(NamedTuple):
    """The sizes of a variant, by stage."""

    widths: tuple[int, ...]  # channels
    lengths: tuple[int, ...]  # blocks
    num_sets: tuple[int, ...]  # sets of weights of a fully connected layer, which the channels take in turn


VARIANTS = {
    "T": Sizes((64, 128, 256, 512), (2, 2, 6, 2), (1, 4, 16, 128)),
    "B": Sizes((96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128)),
    "D": Sizes((80, 160, 320, 640), (2, 2, 18, 2), (1, 4, 16, 128)),
    "L": Sizes((96, 192, 384, 768), (2, 2, 18, 2), (1, 4, 32, 256)),
}


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which network with which weights, and what it sees of a picture."""

    variant: Annotated[Literal["T", "B", "D", "L"], "the letter in RepMLPNet-T224"] = "T"
    side: Annotated[int, Range(32, 512), "pixels of the square that the network sees, 224 or 256 in the checkpoints"] = 224
    weights: Annotated[str, "a .pth or .safetensors file or folder in the layout of DingXiaoH/RepMLP; or random"] = ""
    form: Annotated[Form, "deploy: the convolutions are merged into the fully connected layers"] = "training"
    crop: Annotated[float, Range(0.25, 1), "share of the shorter side that the network sees"] = 0.875
    compute_dtype: Annotated[ComputeDtype, "auto: mixed if the processor has bfloat16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side % STRIDE:
            raise UserError(f"side must be a multiple of {STRIDE}, not {self.side}")


class RepMLPNetEncoder(Encoder):
    """The network without its classifier."""

    Config = Config
    config: Config
    modality = "image"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        with fixed_seed():
            self.network = RepMLPNet(VARIANTS[config.variant], config.side)
        self.weights_sha256 = load_in_form(self.network, config.weights, config.form, _LAYOUT)
        self.feature_shape = (self.network.head_norm.num_features,)
        self.drawing_side = round(config.side / config.crop)
        transform = create_transform((3, config.side, config.side), crop_pct=config.crop, interpolation="bilinear")
        self.resize, self.normalize = split_transform(transform)
        self.move_for_inference(config.compute_dtype, lower="mixed")

    def identity(self) -> dict[str, Any]:
        """Return the architecture, the weights as they were loaded, the form, the preprocessing and the compute dtype."""
        config = self.config
        return {
            "architecture": f"RepMLPNet-{config.variant}{config.side}",
            "weights_sha256": self.weights_sha256,
            "form": config.form,
            "preprocessing": {"side": config.side, "crop": config.crop, "interpolation": "bilinear", "statistics": "imagenet"},
            "pooling": "average",
            "compute_dtype": self.compute_dtype,
        }

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return the settings of the smallest input."""
        return {"side": STRIDE, "weights": "random"}

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return pixels uint8 [3,side,side] of an opened image."""
        return image_to_uint8(self.resize(image))

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] of pixels uint8 [B,3,side,side]."""
        images = self.normalize(prepared.to(self.device, torch.float32) / 255)
        with use_precision(self.compute_dtype, self.device):
            return self.network(images.to(self.input_dtype)).float()


class RepMLPNet(nn.Module):
    """Stages of blocks, each with half as many positions; the names of the tensors are those of the public checkpoints."""

    def __init__(self, sizes: Sizes, side: int) -> None:
        """Build the training form with random weights.

        Args:
            sizes: the sizes of the stages.
            side: pixels of the square that the network reads.
        """
        super().__init__()
        widths, positions = sizes.widths, [side // 4 // 2**stage for stage in range(len(sizes.widths))]
        self.conv_embedding = _conv_bn(3, widths[0], kernel=4, stride=4)
        self.stages = nn.ModuleList(
            nn.ModuleList(RepMLPUnit(width, side_, num_sets) for _ in range(length))
            for width, length, num_sets, side_ in zip(*sizes, positions, strict=True)
        )
        self.embeds = nn.ModuleList(_conv_bn(width, wider, kernel=2, stride=2) for width, wider in pairwise(widths))
        self.head_norm = nn.BatchNorm2d(widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled features [B,D] of images [B,3,side,side]."""
        x = F.relu(self.conv_embedding(images))
        for number, stage in enumerate(self.stages):
            x = F.relu(self.embeds[number - 1](x)) if number else x
            assert isinstance(stage, nn.ModuleList)
            for unit in stage:
                x = unit(x)
        return self.head_norm(x).mean(dim=(2, 3))

    def merge(self) -> None:
        """Give the network the deploy form."""
        for module in self.modules():
            if isinstance(module, RepMLPBlock):
                module.merge()


class RepMLPUnit(nn.Module):
    """A block that mixes positions and one that mixes channels, each with a normalisation before it and a shortcut."""

    def __init__(self, width: int, side: int, num_sets: int) -> None:
        super().__init__()
        self.prebn1, self.prebn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.repmlp_block = RepMLPBlock(width, side, num_sets)
        self.ffn_block = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps [B,C,H,W] of maps [B,C,H,W]."""
        x = x + self.repmlp_block(self.prebn1(x))
        return x + self.ffn_block(self.prebn2(x))


class FeedForward(nn.Module):
    """Two 1x1 convolutions, the inner width four times the outer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn_fc1, self.ffn_fc2 = _conv_bn(width, 4 * width), _conv_bn(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps [B,C,H,W] of maps [B,C,H,W]."""
        return self.ffn_fc2(F.gelu(self.ffn_fc1(x)))


class RepMLPBlock(nn.Module):
    """A fully connected layer over the H*W positions and convolutions beside it, times a gate that sees the whole picture.

    There are S sets of weights: the layer and the convolutions treat channel c with set c mod S.
    """

    def __init__(self, width: int, side: int, num_sets: int) -> None:
        """Build the training form.

        Args:
            width: channels, a multiple of the sets.
            side: H = W.
            num_sets: S.
        """
        super().__init__()
        self.num_sets, self.num_positions = num_sets, side * side
        self.gp = Gate(width)
        inputs = num_sets * self.num_positions
        self.fc3 = nn.Conv2d(inputs, inputs, 1, groups=num_sets, bias=False)  # a linear map [H*W,H*W] of each set
        self.fc3_bn: nn.Module = nn.BatchNorm2d(num_sets)
        for kernel in KERNELS:
            self.add_module(f"repconv{kernel}", _conv_bn(num_sets, num_sets, kernel, groups=num_sets))

    def forward(self, x: Tensor) -> Tensor:
        """Return maps [B,C,H,W] of maps [B,C,H,W]."""
        maps_NSHW = x.reshape(-1, self.num_sets, *x.shape[2:])  # N = B*C/S
        mixed = self.fc3_bn(self.fc3(maps_NSHW.reshape(len(maps_NSHW), -1, 1, 1)).reshape(maps_NSHW.shape))
        for convolution in self._convolutions().values():
            mixed = mixed + convolution(maps_NSHW)
        return mixed.reshape(x.shape) * self.gp(x)

    def _convolutions(self) -> dict[str, Any]:
        """Return the convolutions with their normalisations by name; the deploy form has none."""
        return {name: module for name, module in self.named_children() if name.startswith("repconv")}

    @torch.no_grad()
    def merge(self) -> None:
        """Make the normalisations and the convolutions a part of the fully connected layer."""
        S, HW = self.num_sets, self.num_positions
        weight, bias = fold_normalization(self.fc3.weight.reshape(S, HW * HW, 1, 1), None, self.fc3_bn)
        maps_SOI, bias_S = weight.double().reshape(S, HW, HW), bias.double()
        for name, convolution in self._convolutions().items():
            kernel, bias = fold_normalization(convolution.conv.weight, None, convolution.bn)
            maps_SOI, bias_S = maps_SOI + self._as_linear_map(kernel.double()), bias_S + bias.double()
            delattr(self, name)
        self.fc3: Any = nn.Conv2d(S * HW, S * HW, 1, groups=S)
        self.fc3.weight.copy_(maps_SOI.reshape(self.fc3.weight.shape))
        self.fc3.bias.copy_(bias_S.repeat_interleave(HW))
        self.fc3_bn = nn.Identity()

    def _as_linear_map(self, kernel: Tensor) -> Tensor:
        """Return the matrices [S,H*W,H*W] of convolutions with kernels [S,1,k,k]: column i is what position i alone gives."""
        side = round(self.num_positions**0.5)
        basis = torch.eye(self.num_positions, dtype=kernel.dtype).reshape(-1, 1, side, side).expand(-1, self.num_sets, -1, -1)
        columns_ISO = F.conv2d(basis, kernel, padding=kernel.shape[-1] // 2, groups=self.num_sets).flatten(2)
        return columns_ISO.permute(1, 2, 0)


class Gate(nn.Module):
    """A factor 0..1 for each channel, from the means of all channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return factors [B,C,1,1] of maps [B,C,H,W]."""
        return torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))))


def _conv_bn(width: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution and its normalisation; with stride 1, the map keeps its size."""
    padding = kernel // 2 if stride == 1 else 0
    conv = nn.Conv2d(width, width_out, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width_out)))
