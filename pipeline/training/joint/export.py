"""Encoders behind caches: built again to be trained, exported when they are, and run over the dataset once more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from pipeline.cache import Cache, open_cache
from pipeline.cache.reader import identity_differences
from pipeline.data.manifest import Manifest
from pipeline.encoders._factory import build_encoder
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.files import canonical_json, write_atomic
from pipeline.runtime.runs import RunFolder


@dataclass(frozen=True)
class Origin:
    """How the encoder of a cache is built so that it can be trained: float32 parameters, products as in stage 1."""

    name: str
    settings: Mapping[str, Any]
    encoder: Any


def rebuild(cache: Cache) -> Origin:
    """The encoder of a cache; `ValueError` when it has no weights to tune, or is no longer the one that made the cache."""
    made_by = cache.identity["encoder"]
    name, inner = made_by["name"], made_by.get("image")  # `frames` has an image encoder inside
    looks = inner["name"] if inner else name
    if looks not in plugins.names("encoders"):
        raise ValueError(f"{cache.path} was computed elsewhere, so there is nothing to tune; extract features with an encoder")
    if "weights" not in {field.name for field in fields(plugins.get("encoders", looks).Config)}:
        raise ValueError(f"{looks} takes no weights, so it cannot be tuned; extract features with another encoder")
    precision = "float32" if (inner or made_by)["compute_dtype"] == "float32" else "mixed"
    settings = dict(cache.provenance["settings"])
    if inner:
        own = [pair for pair in settings.get("settings", "").split(",") if pair and not pair.startswith("compute_dtype=")]
        settings["settings"] = ",".join([*own, f"compute_dtype={precision}"])
    else:
        settings["compute_dtype"] = precision
    _, encoder = build_encoder(name, settings)
    found = json.loads(canonical_json({"name": name, "modality": encoder.modality, **encoder.identity()}))
    for field, wanted, have in identity_differences(made_by, found, "encoder."):
        if not field.endswith("compute_dtype"):
            raise ValueError(f"{cache.path} was made with {field} = {wanted!r}, which is {have!r} by now; extract it again")
    return Origin(name, settings, encoder)


def joint_weights(run: RunFolder, key: str) -> dict[str, Tensor]:
    """What a joint run has learned of "head", "image" or "text"; `ValueError` when its checkpoint is not the one it wrote."""
    state = safetensors.torch.load(run.weights())
    return {name.removeprefix(f"{key}."): tensor for name, tensor in state.items() if name.startswith(f"{key}.")}


def export_encoder(run: RunFolder, key: str) -> Path:
    """The tuned weights of a joint run's encoder in a file of their own, which `extract --weights` takes."""
    path = run.path / f"{key}.safetensors"
    if not path.is_file():
        write_atomic(path, safetensors.torch.save(joint_weights(run, key)))
    return path


def extract_again(origin: Origin, weights: Path, cache: Cache, manifest: Manifest, home: Path, effort: ExtractOptions) -> Cache:
    """The next generation of a cache: the same encoder with tuned weights, over the same samples.

    What failed in stage 1 may fail again, beside the share that the effort allows.
    """
    failed = np.isin(cache.ids, list(cache.failed_ids))
    share = float(np.diff(cache.offsets)[failed].sum() / cache.offsets[-1])
    effort = replace(effort, max_failures=min(1.0, effort.max_failures + share))
    settings = {**origin.settings, "weights": str(weights)}
    return open_cache(extract(manifest, origin.name, settings, home, store_dtype=cache.identity["store_dtype"], effort=effort))
