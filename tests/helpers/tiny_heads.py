"""Small heads on the tiny dataset: their settings, their caches, and a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.cache import find_caches, open_cache
from pipeline.runtime import plugins
from pipeline.runtime.runs import RunFolder
from pipeline.training.heads import plan_head, resolve_head_settings, train_head

FAST_TRAINING: dict[str, object] = {"epochs": 4, "batch_size": 8, "lr_step": 1}


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
