"""Any image network of timm, with the preprocessing that timm records for its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import Tensor

from pipeline.encoders._encoder import Encoder
from pipeline.encoders._weights import (
    fixed_seed,
    hub_folder,
    image_to_uint8,
    load_matching_state,
    probe_feature_shape,
    read_state_dict,
    split_transform,
    state_sha256,
)
from pipeline.runtime.device import ComputeDtype, use_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import Settings

PRESETS = {"repvgg": "repvgg_b0", "swin_tiny": "swin_tiny_patch4_window7_224"}  # short name -> timm's name
_WEIGHTS_FILE = "model.safetensors"  # in timm's repositories on the hub
_CONFIG_FILE = "config.json"  # in folders that timm saves


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which network to use, with which weights, and which of its outputs is the feature."""

    model: Annotated[str, "timm's name, NAME.TAG, or a folder saved by timm; it decides the preprocessing"] = (
        "vit_base_patch16_224"
    )
    weights: Annotated[str, "pretrained, a tag of the model, random, or a local .pth or .safetensors file or folder"] = (
        "pretrained"
    )
    pooling: Annotated[Literal["native", "mean"], "native: the input of the network's own classifier; mean: over positions"] = (
        "native"
    )
    layer: Annotated[int, "block (or stage) whose output is used: 0, 1, … or, from the end, -1, -2, …"] = -1
    tokens: Annotated[bool, "all positions [T,D] instead of one vector"] = False
    compute_dtype: Annotated[ComputeDtype, "auto: bfloat16 if the processor supports it; mixed keeps float32 parameters"] = (
        "auto"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer != -1 and self.pooling == "native" and not self.tokens:
            raise UserError(f"layer {self.layer} has no native pooling; set pooling=mean or tokens=true")


class Timm(Encoder):
    """The network without its classifier; it computes in the compute dtype, with channels last."""

    Config = Config
    config: Config
    modality = "image"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.network, self.arguments = _load_network(config)
        self.weights_sha256 = state_sha256(self.network)
        self.preprocessing: dict[str, Any] = resolve_data_config({}, model=self.network)
        input_size = self.preprocessing["input_size"]
        self.drawing_side = round(input_size[-1] / self.preprocessing["crop_pct"])  # after resizing
        self.resize, self.normalize = split_transform(create_transform(**self.preprocessing))
        self.move_for_inference(config.compute_dtype)
        self.network.to(memory_format=torch.channels_last)
        self.feature_shape = probe_feature_shape(self, torch.zeros(input_size, dtype=torch.uint8))

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return the settings of timm's smallest transformer."""
        return {"model": "test_vit", "weights": "random"}

    def identity(self) -> dict[str, Any]:
        """Return architecture, a folder's arguments, weights, preprocessing, pooling, layer, tokens and compute dtype."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.preprocessing.items()}
        return {
            "architecture": self.network.pretrained_cfg["architecture"],
            **({"arguments": self.arguments} if self.arguments else {}),
            "weights_sha256": self.weights_sha256,
            "preprocessing": plain,
            "pooling": "none" if self.config.tokens else self.config.pooling,
            "layer": self.config.layer,
            "compute_dtype": self.compute_dtype,
        }

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return pixels uint8 [3,H,W] of an opened image."""
        return image_to_uint8(self.resize(image))

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] or [B,T,D] of pixels uint8 [B,3,H,W]."""
        images = self.normalize(prepared.to(self.device, torch.float32) / 255)
        images = images.to(self.input_dtype, memory_format=torch.channels_last)
        config = self.config
        with use_precision(self.compute_dtype, self.device):
            if config.pooling == "native" and not config.tokens:
                return self.network(images).float()
            (map_BDHW,) = self.network.forward_intermediates(
                images, indices=[config.layer], norm=config.layer == -1, stop_early=True, intermediates_only=True
            )
        tokens_BTD = map_BDHW.float().flatten(2).transpose(1, 2)
        return tokens_BTD if config.tokens else tokens_BTD.mean(dim=1)


def _load_network(config: Config) -> tuple[Any, dict[str, Any]]:
    """Return the network with its weights, and the arguments with which a folder of timm builds it ({} if there is none)."""
    folder = Path(PRESETS.get(config.model, config.model))
    arguments: dict[str, Any] = {}
    if folder.is_dir():
        arguments = _folder_arguments(folder)
        name, weights = f"local-dir:{folder}", str(folder) if config.weights == "pretrained" else config.weights
    else:
        name, weights = _resolve_model(str(folder), config.weights)
    options: dict[str, Any] = {}
    if weights == "pretrained":
        recorded = timm.get_pretrained_cfg(name)
        if not (recorded and recorded.hf_hub_id):
            raise UserError(f"the weights of {name} are not on the hub; download them and give --set weights=FILE")
        path = hub_folder(recorded.hf_hub_id, _WEIGHTS_FILE) / _WEIGHTS_FILE
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    with fixed_seed():
        network = timm.create_model(name, num_classes=0, **options)
    if weights not in ("pretrained", "random"):
        load_matching_state(network, read_state_dict(Path(weights)), Path(weights).name)
    return network, arguments


def _folder_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments with which a folder of timm builds its network (global_pool, …).

    The number of classes is left out, because the classifier is left out.
    """
    if not (folder / _CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds no {_CONFIG_FILE}; give a folder that timm saved")
    arguments = json.loads((folder / _CONFIG_FILE).read_text()).get("model_args", {})
    return {name: value for name, value in arguments.items() if name != "num_classes"}


def _resolve_model(model: str, weights: str) -> tuple[str, str]:
    """Return timm's name of the model with its tag, and the weights; weights that are a tag go into the name."""
    architecture, _, tag = model.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {model!r}; for its names: python -c 'import timm; print(timm.list_models())'")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if weights in tags:
        return f"{architecture}.{weights}", "pretrained"
    if (tag and tag not in tags) or (weights == "pretrained" and not tags):
        known = ", ".join(tags) or "random"
        raise UserError(f"timm has no weights {tag or weights!r} of {architecture}; choose one of: {known}")
    return model, weights
