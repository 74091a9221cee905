"""Methods of the sizes that computations by hand assume: T = 12, t = 4, 4 steps of the sampler, adapters of width 12."""

from __future__ import annotations

from typing import Any

from helpers import method_cases
from helpers.method_cases import WIDTH
from pipeline.runtime import plugins
from pipeline.runtime.settings import find_settings
from pipeline.types import Batch

SIZES = {
    "hidden": 20,
    "num_steps": 12,
    "stage_step": 4,
    "sample_steps": 4,
    "num_tokens": 4,
    "token_width": 8,
    "num_heads": 2,
    "width": 12,
}


def _sized(method: str, changes: dict[str, Any]) -> dict[str, Any]:
    config_type = plugins.get("methods", method).Config
    return {name: size for name, size in SIZES.items() if find_settings(config_type, name)} | changes


def settings(method: str, **changes: Any) -> Any:
    """Return the config of a method with these sizes."""
    return method_cases.settings(method, **_sized(method, changes))


def build(method: str, kind: str = "single", text_width: int = WIDTH, seed: int = 0, **changes: Any) -> Any:
    return method_cases.build(method, kind, text_width, seed, **_sized(method, changes))


def fitted(method: str, kind: str = "single", text_width: int = WIDTH, seed: int = 0, **changes: Any) -> tuple[Any, Batch]:
    return method_cases.fitted(method, kind, text_width, seed, **_sized(method, changes))
