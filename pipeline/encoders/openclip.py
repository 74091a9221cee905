"""The image or the text tower of any model of OpenCLIP: vectors in the space that both towers share."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import open_clip
import torch
from open_clip.factory import load_checkpoint
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
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
from pipeline.runtime.files import fingerprint
from pipeline.runtime.settings import Settings

_WEIGHTS_FILE = "open_clip_model.safetensors"  # in folders that OpenCLIP saves
_CONFIG_FILE = "open_clip_config.json"


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which model to use, with which weights, which of its towers, and which of its outputs is the feature."""

    model: Annotated[str, "NAME/TAG, NAME, or a folder saved by OpenCLIP; it decides the preprocessing"] = (
        "ViT-B-32/laion2b_s34b_b79k"
    )
    weights: Annotated[str, "pretrained, a tag of the model, random, or a local .pth or .safetensors file or folder"] = (
        "pretrained"
    )
    modality: Annotated[Literal["image", "text"], "which tower"] = "image"
    pooling: Annotated[Literal["native", "mean"], "native: vector in the shared space; mean: over an image's patches"] = (
        "native"
    )
    layer: Annotated[int, "block of the image tower whose output is used: 0, 1, … or, from the end, -1, -2, …"] = -1
    tokens: Annotated[bool, "all patches [T,D] of an image, or tokens of a text, instead of one vector"] = False
    compute_dtype: Annotated[ComputeDtype, "auto: bfloat16 if the processor supports it; mixed keeps float32 parameters"] = (
        "auto"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality == "text" and (self.pooling != "native" or self.layer != -1):
            raise UserError("modality=text has native pooling or tokens; for layers of a text model take transformers_text")
        if self.layer != -1 and self.pooling == "native" and not self.tokens:
            raise UserError(f"layer {self.layer} has no native pooling; set pooling=mean or tokens=true")


class OpenClip(Encoder):
    """One tower of a two-tower model; it computes in the compute dtype. Features are not scaled to length 1."""

    Config = Config
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.modality = config.modality
        settings, self.network, self.tokenizer = _load_model(config)
        self.architecture = fingerprint(settings)
        self.weights_sha256 = state_sha256(self.network)
        self.preprocessing = dict(self.network.visual.preprocess_cfg)
        preprocessing = PreprocessCfg(**self.preprocessing)
        self.drawing_side = max(preprocessing.input_size)
        self.resize, self.normalize = split_transform(image_transform_v2(preprocessing, is_train=False))
        self.move_for_inference(config.compute_dtype)
        if config.modality == "text" and config.tokens:
            _check_end_token(self.network, config.model)
        image = config.modality == "image"
        blank = torch.zeros(preprocessing.input_size, dtype=torch.uint8) if image else self.prepare("a")
        self.feature_shape = probe_feature_shape(self, blank)

    def identity(self) -> dict[str, Any]:
        """Return architecture, weights, preprocessing or tokenizer, pooling, layer, tokens and resolved compute dtype."""
        if self.modality == "image":
            inputs = {key: list(value) if isinstance(value, tuple) else value for key, value in self.preprocessing.items()}
        else:
            inputs = {
                "tokenizer": type(self.tokenizer).__name__,
                "tokenizer_sha256": tokenizer_digest(self.tokenizer),
                "context_length": self.tokenizer.context_length,
            }
        return {
            "architecture": self.architecture,
            "weights_sha256": self.weights_sha256,
            "preprocessing": inputs,
            "pooling": "none" if self.config.tokens else self.config.pooling,
            "layer": self.config.layer,
            "compute_dtype": self.compute_dtype,
        }

    def prepare(self, raw: Path | str) -> Tensor:
        """Return pixels uint8 [3,H,W] of a file, or token ids int64 [L] of a text."""
        if self.modality == "image":
            return super().prepare(raw)
        if not str(raw).strip():
            raise UserError("the text is blank")
        return self.tokenizer([str(raw)])[0]

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return pixels uint8 [3,H,W] of an opened image."""
        return image_to_uint8(self.resize(image))

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] or [B,T,D] of pixels uint8 [B,3,H,W], or [B,D] or [B,L,D] of token ids [B,L]."""
        config, prepared = self.config, prepared.to(self.device)
        with use_precision(self.compute_dtype, self.device):
            if self.modality == "text":
                return self._encode_tokens(prepared) if config.tokens else self.network.encode_text(prepared).float()
            images = self.normalize(prepared.to(torch.float32) / 255).to(self.input_dtype)
            if config.pooling == "native" and not config.tokens:
                return self.network.encode_image(images).float()
            (map_BDHW,) = self.network.visual.forward_intermediates(
                images,
                indices=[config.layer],
                normalize_intermediates=config.layer == -1,
                stop_early=True,
                intermediates_only=True,
            )["image_intermediates"]
        tokens_BTD = map_BDHW.float().flatten(2).transpose(1, 2)
        return tokens_BTD if config.tokens else tokens_BTD.mean(dim=1)

    def _encode_tokens(self, ids_BL: Tensor) -> Tensor:
        """Return the last hidden states of all tokens of texts, after the final norm [B,L,D]; behind the end token, zeros."""
        (hidden_BLD,) = self.network.forward_intermediates(
            text=ids_BL, text_indices=[-1], normalize_intermediates=True, intermediates_only=True
        )["text_intermediates"]
        is_padding_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) > ids_BL.argmax(dim=1, keepdim=True)
        return hidden_BLD.float().masked_fill(is_padding_BL.unsqueeze(-1), 0.0)


def _check_end_token(network: Any, model: str) -> None:
    """Raise `UserError` if the text's vector is not that of its end token, the largest id: nothing else says where it ends."""
    tower = getattr(network, "text", None)
    if (getattr(network, "text_pool_type", "") or getattr(tower, "pool_type", "")) != "argmax":
        raise UserError(f"the text tower of {model!r} does not say where a text ends; for tokens=true take transformers_text")


def _load_model(config: Config) -> tuple[dict[str, Any], Any, Any]:
    """Return the settings of a model that its name does not say, the model with its weights, and its tokenizer."""
    if Path(config.model).is_dir():
        if not (Path(config.model) / _CONFIG_FILE).is_file():
            raise UserError(f"{config.model} holds no {_CONFIG_FILE}; give a folder that OpenCLIP saved")
        name, tag = f"local-dir:{config.model}", ""
        weights = config.model if config.weights == "pretrained" else config.weights
    else:
        name, tag, weights = _resolve_model(config.model, config.weights)
    described: Mapping[str, Any] = open_clip.get_pretrained_cfg(name, tag) if tag else {}
    network, tokenizer = _create_random(name, described)
    if weights == "pretrained":
        hub_id, _, file = described["hf_hub"].rpartition("/")
        file = file or _WEIGHTS_FILE
        load_checkpoint(network, str(hub_folder(hub_id, file) / file))
    elif weights != "random":
        path = Path(weights)
        state = read_state_dict(path / _WEIGHTS_FILE if (path / _WEIGHTS_FILE).is_file() else path, config.modality)
        load_matching_state(network, state, path.name)
    settings = {"model": open_clip.get_model_config(name), "quick_gelu": described.get("quick_gelu", False)}
    return settings, network, tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of the vocabulary and the rules of a tokenizer.

    Args:
        tokenizer: OpenCLIP's own tokenizer, or one of transformers that OpenCLIP wraps.
    """
    if isinstance(tokenizer, SimpleTokenizer):
        return fingerprint({"vocabulary": tokenizer.encoder, "merges": list(map(list, tokenizer.bpe_ranks))})
    wrapped = tokenizer.tokenizer
    sides = {"padding_side": wrapped.padding_side, "truncation_side": wrapped.truncation_side}
    if not wrapped.is_fast:
        return fingerprint({"vocabulary": wrapped.get_vocab(), **sides})
    rules = json.loads(wrapped.backend_tokenizer.to_str())
    return fingerprint(rules | {"truncation": {}, "padding": {}} | sides)  # the last call of the tokenizer changes these two


def _resolve_model(model: str, weights: str) -> tuple[str, str, str]:
    """Return OpenCLIP's name of the model, a tag, and the weights.

    The tag describes the preprocessing; "" means the model's own. Weights that are a tag of the model become the tag.
    """
    name, _, tag = model.partition("/")
    if name not in open_clip.list_models():
        raise UserError(f"OpenCLIP has no model {name!r}; choose one of: {', '.join(open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights in tags:
        tag, weights = weights, "pretrained"
    if tag not in ("", *tags) or (weights == "pretrained" and not tag):
        known = ", ".join(f"{name}/{each}" for each in tags)
        raise UserError(f"model {model!r} names no weights that OpenCLIP has; choose one of: {known}")
    return name, tag, weights


def _create_random(name: str, described: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a model with random weights, and its tokenizer.

    Args:
        name: OpenCLIP's name of the model.
        described: OpenCLIP's description of a tag; the preprocessing and the activation are taken from it.
    """
    logging.disable(logging.WARNING)  # otherwise OpenCLIP warns that the weights are random
    try:
        with fixed_seed():
            network = open_clip.create_model(
                name,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=bool(described.get("quick_gelu", False)),
                force_preprocess_cfg=merge_preprocess_dict({}, dict(described)),
            )
        return network, open_clip.get_tokenizer(name)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model {name!r} is configured by another one on the hub, which is not stored here: {reason}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
