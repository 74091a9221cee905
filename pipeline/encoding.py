"""An encoder by its name: the one place that builds encoders, and that puts an image encoder into `frames`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import plugins
from pipeline.encoders import frames
from pipeline.types import Encoder


def build_encoder(name: str, settings: Mapping[str, Any]) -> tuple[Any, Encoder]:
    """The config and the encoder of a name and its settings; `ValueError` for names, settings or weights that do not exist."""
    module = plugins.get("encoders", name)
    config = plugins.configure(module.Config, settings)
    if not isinstance(config, frames.Config):
        return config, module.build(config)
    weights = {"weights": config.weights} if config.weights else {}
    _, image = build_encoder(config.encoder, _assignments(config.settings) | weights)
    return config, module.build(config, image)


def _assignments(settings: str) -> dict[str, str]:
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"settings takes KEY=VALUE,KEY=VALUE, not {settings!r}")
    return {key: value for key, _, value in pairs}
