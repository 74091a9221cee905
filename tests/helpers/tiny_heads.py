"""Small heads on the tiny dataset: their settings, their caches, and a trained run."""

from __future__ import annotations

from pathlib import Path

from pipeline.cache import find_caches, open_cache
from pipeline.runtime.runs import RunFolder
from pipeline.training.heads import plan_head, resolve_head_settings, train_head

SMALL_SETTINGS: dict[str, dict[str, object]] = {
    "baseline": {},
    "ema": {"width": 16},
    "cdr": {"width": 16, "hidden": 32, "num_steps": 20, "sample_steps": 5},
    "marnet": {"width": 16, "hidden": 32, "num_steps": 20, "sample_steps": 5},
    "seda": {
        "width": 16,
        "num_tokens": 4,
        "token_width": 8,
        "num_heads": 2,
        "num_steps": 20,
        "stage_step": 5,
        "sample_steps": 5,
    },
}
FAST_TRAINING: dict[str, object] = {"epochs": 4, "batch_size": 8, "lr_step": 1}


def caches_by_key(home: Path) -> dict[str, str]:
    """Return the folder names of the tiny dataset's caches by batch key."""
    return {open_cache(path).identity["encoder"]["modality"]: path.name for path in find_caches(home, "tiny")}


def train_tiny(home: Path, method: str, seed: int = 0, training: dict[str, object] | None = None) -> RunFolder:
    """Train a small head on the tiny dataset and return its run."""
    settings, config = resolve_head_settings(
        "tiny", method, "head", SMALL_SETTINGS.get(method, {}), {**FAST_TRAINING, **(training or {})}
    )
    return train_head(plan_head(home, "tiny", method, settings, config, seed, caches_by_key(home)), progress=False)
