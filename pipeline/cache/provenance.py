"""The provenance of a cache: the command that makes it, its batch size, and the versions of the libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
from collections.abc import Mapping
from functools import cache
from typing import Any

from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Place

MEDIA_MODALITIES = ("image", "video")
ALL_MODALITIES = (*MEDIA_MODALITIES, "text")
FEATURE_LIBRARIES: Mapping[str, tuple[str, ...]] = {  # library -> modalities whose features it can change
    "torch": ALL_MODALITIES,
    "torchvision": MEDIA_MODALITIES,
    "timm": MEDIA_MODALITIES,
    "open_clip_torch": ALL_MODALITIES,
    "transformers": ALL_MODALITIES,
    "tokenizers": ("text",),
    "numpy": ALL_MODALITIES,
    "pillow": MEDIA_MODALITIES,
    "resvg-py": ("image",),
    "av": ("video",),
    "zarr": (),
}


def make_provenance(
    dataset: str,
    encoder: str,
    settings: Mapping[str, str],
    store_dtype: str,
    compiled: bool,
    shard_rows: int,
    batch_size: int,
) -> dict[str, Any]:
    """Return the provenance of a new cache as JSON values.

    Args:
        dataset: the dataset.
        encoder: the encoder.
        settings: its settings that are not the defaults.
        store_dtype: number format of the cache.
        compiled: whether the encoder is compiled.
        shard_rows: rows per shard.
        batch_size: items that are encoded at a time.

    Returns:
        The command that completes the cache, the settings, both sizes, and the versions of the libraries.
    """
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    options += ["--store-dtype", store_dtype] if store_dtype != "float16" else []
    options += ["--compile"] if compiled else []
    return {
        "command": shlex.join(["diffalign", "extract", dataset, "--encoder", encoder, *options]),
        "settings": dict(settings),
        "shard_rows": shard_rows,
        "batch_size": batch_size,
        "versions": dict(_versions()),
    }


@cache
def _versions() -> Mapping[str, str]:
    """Return the versions of the installed libraries that compute features. The look-up is slow, so it is done once."""
    versions = {}
    for name in FEATURE_LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # resvg-py is installed only for drawings
            versions[name] = importlib.metadata.version(name)
    return versions


def check_libraries(path: Place, recorded: Mapping[str, str], modality: str) -> list[str]:
    """Check that features can be added to a cache with the libraries that are installed here.

    Only libraries that compute features of this modality count; those of the store cannot change a number. Another patch
    release (the third number) gives a warning: it corrects faults, and should not keep hours of work from being completed.
    Another release is an error: it may decode, scale or multiply in another way, and one cache would hold features of two
    kinds.

    Args:
        path: the place of the cache, for messages.
        recorded: the versions with which the cache was begun.
        modality: image, video or text.

    Returns:
        The warnings.

    Raises:
        UserError: a library has another release; the message has the remedy.
    """
    installed = _versions()
    changed = {
        name: version
        for name, version in recorded.items()
        if modality in FEATURE_LIBRARIES.get(name, ()) and version != installed.get(name, "none")
    }
    if not changed:
        return []
    current = {name: installed.get(name, "none") for name in changed}
    message = f"{path} was begun with {_format_versions(changed)}; here is {_format_versions(current)}"
    if all(_release_of(version) == _release_of(current[name]) for name, version in changed.items()):
        return [f"{message}: the last bits of what is added may differ"]
    pins = " ".join(f"{name}=={version}" for name, version in changed.items())
    raise UserError(
        f"{message}: one cache would hold features of two kinds; run: pip install {pins}, "
        f"or remove it (diffalign cache rm {path}) and extract it anew"
    )


def _format_versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _release_of(version: str) -> list[str]:
    """Return the first two numbers of a version: 2.11.1+cu128 is a patch of release 2.11."""
    return version.partition("+")[0].split(".")[:2]
