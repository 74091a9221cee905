"""Find the manifest of a cache. It has the splits and labels of the samples, which are not in the cache itself."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.cache.id_index import IdIndex
from pipeline.cache.reader import Cache
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.data.sample_columns import SampleColumns
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place, home_of_caches


def cache_home(path: Place) -> Path:
    """Return <home> of a cache <home>/caches/<dataset>/<name>, or of one at another place of caches, see `home_of_caches`.

    Raises:
        UserError: the folder is not at such a place.
    """
    absolute = Path(os.path.abspath(path)) if isinstance(path, Path) else path  # symbolic links are not resolved
    if home := home_of_caches(absolute.parent.parent):
        return home
    if isinstance(absolute, Address) or absolute.parent.parent.name != "caches":
        raise UserError(
            f"{path} is not in <home>/caches/<dataset>/, where feature caches lie; `diffalign cache ls` shows them; "
            "for one in another folder, add --caches FOLDER"
        )
    return absolute.parents[2]


def read_cache_manifest(cache: Cache) -> tuple[Manifest, SampleColumns]:
    """Return the manifest of a cache, and its samples in the order of the cache.

    Raises:
        UserError: there is no manifest in the cache's home, or it is not the one that the cache was made from.
    """
    manifest = read_manifest(cache_home(cache.path), str(cache.identity["dataset"]))
    if cache.identity.get("manifest") != manifest.fingerprint():
        raise UserError(
            f"{cache.path} belongs to another manifest of {manifest.dataset} than the one that is prepared; "
            f"prepare that one again, or make a new cache with: {cache.provenance['command']}"
        )
    ids = manifest.columns.ids
    if ids == cache.ids:
        return manifest, manifest.columns
    positions = IdIndex(ids).find(cache.ids)
    assert (positions >= 0).all(), cache.path
    return manifest, manifest.columns.select(positions)
