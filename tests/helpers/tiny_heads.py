"""Small heads on the tiny dataset: their settings, their caches, and a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.cache import find_caches, open_cache
from pipeline.data.manifest_files import read_manifest
from pipeline.encoders.random_projection import RandomProjection
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.runs import RunFolder
from pipeline.training.heads import plan_head, resolve_head_settings, train_head

FAST_TRAINING: dict[str, object] = {"epochs": 4, "batch_size": 8, "lr_step": 1}


def papers_methods_or_all() -> list[Any]:
    """Return parameters of a dear test: the papers' methods and `stacked`, and all others if exhaustive tests are asked for."""
    usual, dear = ("baseline", "ema", "cdr", "marnet", "seda", "stacked"), [pytest.mark.slow, pytest.mark.exhaustive]
    return [pytest.param(name, marks=[] if name in usual else dear) for name in plugins.names("methods")]


def small_settings(method: str) -> dict[str, Any]:
    """Return the settings of a small head, as the method itself gives them."""
    return plugins.get("methods", method).small()


def caches_by_key(home: Path) -> dict[str, str]:
    """Return the folder names of the tiny dataset's caches by batch key."""
    return {open_cache(path).identity["encoder"]["modality"]: path.name for path in find_caches(home, "tiny")}


def train_tiny(home: Path, method: str, seed: int = 0, training: dict[str, object] | None = None) -> RunFolder:
    """Train a small head on the tiny dataset and return its run."""
    settings, config = resolve_head_settings(
        "tiny", method, "head", small_settings(method), {**FAST_TRAINING, **(training or {})}
    )
    return train_head(plan_head(home, "tiny", method, settings, config, seed, caches_by_key(home)), progress=False)


def extract_tokens(home: Path, modality: str = "image") -> Path:
    """Extract a cache of the tiny dataset with 8 tokens of width 4 for each image, or for each text 2 to 8, and return it."""
    make, encode = RandomProjection.__init__, RandomProjection.forward

    def make_tokens(self: RandomProjection, config: Any) -> None:
        make(self, config)
        self.feature_shape = (8, 4)

    def encode_tokens(self: RandomProjection, prepared: Tensor) -> Tensor:
        tokens = encode(self, prepared).reshape(-1, 8, 4)
        if modality == "text":  # how many is a function of the text
            tokens[torch.arange(8) > 1 + ((prepared > 0).sum(1, keepdim=True) % 7)] = 0.0
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RandomProjection, "__init__", make_tokens)
        patch.setattr(RandomProjection, "forward", encode_tokens)
        settings = {"modality": modality, "width": 32, "seed": 1}
        options = ExtractOptions(progress=False, workers=0)
        return extract(read_manifest(home, "tiny"), "random_projection", settings, home, options=options)
