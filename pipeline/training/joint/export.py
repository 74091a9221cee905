"""The encoders of caches: rebuild them for training, export their tuned weights, and extract features with these."""

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
from pipeline.encoders._factory import build_encoder, encoder_identity
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, write_atomic
from pipeline.runtime.runs import RunFolder


@dataclass(frozen=True)
class RebuiltEncoder:
    """The encoder of a cache, built again for training: float32 parameters, and products in the format of stage 1."""

    name: str
    settings: Mapping[str, Any]
    encoder: Any


def rebuild_encoder(cache: Cache) -> RebuiltEncoder:
    """Build the encoder of a cache again, so that it can be trained.

    Raises:
        UserError: the encoder has no weights to tune, or it is no longer the encoder that made the cache.
    """
    made_by = cache.identity["encoder"]
    name, inner = made_by["name"], made_by.get("image")  # the encoder `frames` has an image encoder inside
    inner_name = inner["name"] if inner else name
    if inner_name not in plugins.names("encoders"):
        raise UserError(f"{cache.path} was computed elsewhere, so there is nothing to tune; extract features with an encoder")
    if "weights" not in {field.name for field in fields(plugins.get("encoders", inner_name).Config)}:
        raise UserError(f"{inner_name} takes no weights, so it cannot be tuned; extract features with another encoder")
    precision = "float32" if (inner or made_by)["compute_dtype"] == "float32" else "mixed"
    settings = dict(cache.provenance["settings"])
    if inner:
        pairs = settings.get("settings", "").split(",")
        kept_pairs = [pair for pair in pairs if pair and not pair.startswith("compute_dtype=")]
        settings["settings"] = ",".join([*kept_pairs, f"compute_dtype={precision}"])
    else:
        settings["compute_dtype"] = precision
    encoder = build_encoder(name, settings)
    found = json.loads(canonical_json(encoder_identity(name, encoder)))
    for field, wanted, have in identity_differences(made_by, found, "encoder."):
        if not field.endswith("compute_dtype"):
            raise UserError(f"{cache.path} was made with {field} = {wanted!r}, which is {have!r} by now; extract it again")
    return RebuiltEncoder(name, settings, encoder)


def load_joint_weights(run: RunFolder, key: str) -> dict[str, Tensor]:
    """Return the trained weights of one part of a joint run.

    Args:
        run: A finished joint run.
        key: "head", "image" or "text".

    Raises:
        UserError: the checkpoint is not the one that the run wrote.
    """
    state = safetensors.torch.load(run.read_checkpoint())
    return {name.removeprefix(f"{key}."): tensor for name, tensor in state.items() if name.startswith(f"{key}.")}


def export_encoder(run: RunFolder, key: str) -> Path:
    """Write the tuned weights of an encoder to a file of their own, for `extract --weights`, and return its path."""
    path = run.path / f"{key}.safetensors"
    if not path.is_file():
        write_atomic(path, safetensors.torch.save(load_joint_weights(run, key)))
    return path


def extract_tuned_features(
    rebuilt: RebuiltEncoder, weights: Path, cache: Cache, manifest: Manifest, home: Path, options: ExtractOptions
) -> Cache:
    """Extract the next generation of a cache: the same samples, and the same encoder with tuned weights.

    Items that failed in stage 1 may fail again: their share is added to the share of failures that `options` allows.
    """
    is_failed = np.isin(cache.ids, list(cache.failed_ids))
    failed_share = float(np.diff(cache.offsets)[is_failed].sum() / cache.offsets[-1])
    options = replace(options, max_failures=min(1.0, options.max_failures + failed_share))
    settings = {**rebuilt.settings, "weights": str(weights)}
    store_dtype = cache.identity["store_dtype"]
    return open_cache(extract(manifest, rebuilt.name, settings, home, store_dtype=store_dtype, options=options))
