"""Build an encoder from its name and its settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.encoders._encoder import Encoder
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import configure

_PATH_SETTINGS = ("model", "weights")  # settings whose value may be a local file or folder
_PATH_KEYWORDS = ("package", "pretrained", "random")  # other values of these settings; a file of the same name is ignored


def build_encoder(name: str, settings: Mapping[str, Any]) -> Encoder:
    """Build an encoder. Its config names local files by absolute paths, so that it means the same in any folder.

    Args:
        name: name of the encoder.
        settings: values of its config by field name.

    Raises:
        UserError: the name, a setting or the weights do not exist.
    """
    plugin = plugins.get("encoders", name)
    return plugin(configure(plugin.Config, with_absolute_paths(settings)))


def encoder_identity(name: str, encoder: Encoder) -> dict[str, Any]:
    """Return everything about an encoder that can change its features.

    Of an encoder from outside of this package, and of one inside `frames`, that is also the SHA-256 of its file.
    """
    identity = {"name": name, "modality": encoder.modality, **encoder.identity()}
    used = (name, *([identity["image"]["name"]] if name == "frames" else []))
    digests = {each: digest for each in used if (digest := plugins.external_sha256("encoders", each))}
    return {**identity, **({"plugin_sha256": digests} if digests else {})}


def with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an encoder with absolute paths in place of files and folders that exist.

    The settings of the image encoder inside `frames` are treated in the same way.
    """
    paths = {key: str(Path(settings[key]).absolute()) for key in _PATH_SETTINGS if _is_existing_path(settings.get(key, ""))}
    inner = {}
    if settings.get("settings"):
        pairs = with_absolute_paths(parse_settings(settings["settings"]))
        inner = {"settings": ",".join(f"{key}={value}" for key, value in pairs.items())}
    return {**settings, **paths, **inner}


def local_files(settings: Mapping[str, Any]) -> list[Path]:
    """Return the files and folders that settings of an encoder name, those of the encoder inside `frames` too."""
    own = [Path(settings[key]) for key in _PATH_SETTINGS if _is_existing_path(settings.get(key, ""))]
    return own + (local_files(parse_settings(settings["settings"])) if settings.get("settings") else [])


def with_files_of(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings of an encoder with files of a folder in place of absolute paths that are not on this machine.

    Raises:
        UserError: the folder has no file of that name either.
    """
    moved = {key: _found(str(settings[key]), folder) for key in _PATH_SETTINGS if key in settings}
    if settings.get("settings"):
        pairs = with_files_of(parse_settings(settings["settings"]), folder)
        moved["settings"] = ",".join(f"{key}={value}" for key, value in pairs.items())
    return {**settings, **moved}


def _found(value: str, folder: Path) -> str:
    """Return a path that exists on this machine, for the value of a setting that may be one."""
    path = Path(value)
    if not path.is_absolute() or path.exists():
        return value
    if (folder / path.name).exists():
        return str((folder / path.name).absolute())
    raise UserError(f"{value} of the encoder is not on this machine: copy it to {folder / path.name}")


def _is_existing_path(value: Any) -> bool:
    return str(value) not in ("", *_PATH_KEYWORDS) and os.path.exists(value)


def parse_settings(settings: str) -> dict[str, str]:
    """Parse "KEY=VALUE,KEY=VALUE", the settings of the image encoder inside `frames`."""
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise UserError(f"settings takes KEY=VALUE,KEY=VALUE, not {settings!r}")
    return {key: value for key, _, value in pairs}
