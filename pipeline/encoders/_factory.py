"""An encoder by its name: the one place that builds encoders, and that puts an image encoder into `frames`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.encoders import frames
from pipeline.runtime import plugins
from pipeline.types import Encoder

PLACES = ("model", "weights")  # settings that may name a local file or folder
WORDS = ("package", "pretrained", "random")  # that such a setting takes, too


def build_encoder(name: str, settings: Mapping[str, Any]) -> tuple[Any, Encoder]:
    """The config and the encoder of a name and its settings; `ValueError` for names, settings or weights that do not exist.

    The config names local files by their absolute paths: it means the same from wherever it is built again.
    """
    module = plugins.get("encoders", name)
    config = plugins.configure(module.Config, located(settings))
    if not isinstance(config, frames.Config):
        return config, module.build(config)
    weights = {"weights": config.weights} if config.weights else {}
    _, image = build_encoder(config.encoder, _assignments(config.settings) | weights)
    return config, module.build(config, image)


def located(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an encoder, and of the one inside `frames`, with absolute paths of the files and folders that exist."""
    places = {key: str(Path(settings[key]).absolute()) for key in PLACES if _is_place(settings.get(key, ""))}
    inner = {}
    if settings.get("settings"):
        pairs = located(_assignments(settings["settings"]))
        inner = {"settings": ",".join(f"{key}={value}" for key, value in pairs.items())}
    return {**settings, **places, **inner}


def _is_place(value: Any) -> bool:
    return str(value) not in ("", *WORDS) and os.path.exists(value)


def _assignments(settings: str) -> dict[str, str]:
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"settings takes KEY=VALUE,KEY=VALUE, not {settings!r}")
    return {key: value for key, _, value in pairs}
