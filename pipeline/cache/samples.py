"""What the manifest says about the samples of a cache: splits and labels are not in the cache itself."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.cache.reader import Cache
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.types import Sample


def home_of(path: Path) -> Path:
    """The home of a cache folder <home>/caches/<dataset>/<name>; `ValueError` when it lies elsewhere."""
    whole = Path(os.path.abspath(path))  # not resolved: a symbolic link stays the link that was named
    if whole.parent.parent.name != "caches":
        raise ValueError(f"{path} is not in <home>/caches/<dataset>/, where feature caches lie; diffalign cache ls shows them")
    return whole.parents[2]


def manifest_of(cache: Cache) -> tuple[Manifest, list[Sample]]:
    """The manifest in the cache's home, and its samples in the cache's order; `ValueError` when it is another one by now."""
    manifest = manifests.read_manifest(home_of(cache.path), str(cache.identity["dataset"]))
    if cache.identity.get("manifest") != manifest.fingerprint():
        raise ValueError(
            f"{cache.path} belongs to another manifest of {manifest.dataset} than the one that is prepared; "
            f"prepare that one again, or make a new cache with: {cache.provenance['command']}"
        )
    samples = {sample.id: sample for sample in manifest.samples}
    return manifest, [samples[sample_id] for sample_id in cache.ids]
