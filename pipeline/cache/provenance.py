"""Where features come from, beside their identity: the command that makes them, their batches, the libraries at work."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

MEDIA = ("image", "video")
ALL = (*MEDIA, "text")
LIBRARIES: Mapping[str, tuple[str, ...]] = {  # and the modalities whose features they can change
    "torch": ALL,
    "torchvision": MEDIA,
    "timm": MEDIA,
    "open_clip_torch": ALL,
    "transformers": ALL,
    "tokenizers": ("text",),
    "numpy": ALL,
    "pillow": MEDIA,
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
    """The command that completes a cache, the same as values, and the libraries; `settings` are those that are no defaults."""
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
    """Versions of the installed libraries that turn bytes into features; they are looked up once, which takes its time."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # drawings have a renderer of their own
            versions[name] = importlib.metadata.version(name)
    return versions


def check_libraries(path: Path, recorded: Mapping[str, str], modality: str) -> list[str]:
    """Whether features of a modality can be added here to a cache that was begun with the `recorded` versions.

    Only libraries that compute such features count: the store's own cannot change a number. Another patch release of one (the
    third number) is a warning, which is returned: it mends faults, and should not keep hours of work from being completed.
    Another release is a `ValueError` with the remedy: it may decode, scale or multiply otherwise, and one cache would hold
    features of two kinds.
    """
    here = _versions()
    changed = {
        name: version
        for name, version in recorded.items()
        if modality in LIBRARIES.get(name, ()) and version != here.get(name, "none")
    }
    if not changed:
        return []
    told = f"{path} was begun with {_listed(changed)}; here is {_listed({name: here.get(name, 'none') for name in changed})}"
    if all(_release(version) == _release(here.get(name, "none")) for name, version in changed.items()):
        return [f"{told}: the last bits of what is added may differ"]
    pins = " ".join(f"{name}=={version}" for name, version in changed.items())
    raise ValueError(
        f"{told}: one cache would hold features of two kinds; run: pip install {pins}, "
        f"or remove it (diffalign cache rm {path}) and extract it anew"
    )


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _release(version: str) -> list[str]:
    """2.11.1+cu128 is a patch of release 2.11."""
    return version.partition("+")[0].split(".")[:2]
