"""List the caches of a home; copy and remove a cache."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache import near_duplicates
from pipeline.cache.reader import info, list_caches, open_cache
from pipeline.cache.samples import cache_home
from pipeline.cache.verify import verify
from pipeline.runtime.claims import CLAIMS, hold
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock, sync_folder
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.places import Address, Place
from pipeline.runtime.stores import REQUESTS_IN_FLIGHT, exists, object_sha256, remove_objects, store_of

COPY_BYTES = 2**26  # of objects that `copy` moves at a time, unless a single one is larger: each has the time of a request
_PARTS = {  # of a cache in an object store
    *("zarr.json", "features", "ids", "offsets", "commits", "failures.parquet"),
    *(near_duplicates.RECORD_NAME, CLAIMS),
}
_CACHE_NAME = re.compile(r"-[0-9a-f]{12}$")


@dataclass(frozen=True)
class RemovalSummary:
    """A cache, and the number and total size of its files."""

    path: Place
    files: int
    bytes: int


def ls(home: Path) -> list[dict[str, Any]]:
    """Return one line per cache, complete or not: its encoder, its size and the command that made it, as JSON values."""
    return [_describe_cache(path) for path in list_caches(home)]


def _describe_cache(path: Place) -> dict[str, Any]:
    line = {"dataset": path.parent.name, "name": path.name, "problem": ""}
    try:
        facts = info(path)
    except UserError as error:
        return {**line, "complete": False, "problem": str(error)}
    numbers = {key: facts[key] for key in ("samples", "rows", "feature_shape", "store_dtype", "bytes", "failed", "complete")}
    return {**line, "encoder": facts["identity"]["encoder"]["name"], **numbers, "command": facts["provenance"]["command"]}


def preview_removal(path: Place) -> RemovalSummary:
    """Return what `rm` would remove.

    Raises:
        UserError: the folder is not a cache in <home>/caches/<dataset>/, or it is reached by a symbolic link.
    """
    if isinstance(path, Address):
        objects = store_of(path).list(path) if _CACHE_NAME.search(path.name) else []
        others = {str(found.place).removeprefix(f"{path}/").partition("/")[0] for found in objects} - _PARTS
        if not objects or others:
            raise UserError(f"{path} is not a feature cache; `diffalign cache ls` shows them")
        return RemovalSummary(path, len(objects), sum(found.num_bytes for found in objects))
    cache_home(path)  # only a folder in a place of caches is removed
    folder = Path(os.path.abspath(path))  # "." has no name
    if path.is_symlink() or folder.parent.is_symlink():
        raise UserError(f"{path} is reached by a symbolic link; give the folder itself")
    is_cache = bool(_CACHE_NAME.search(folder.name)) and (folder / "zarr.json").exists()
    if not is_cache and not _removal_path(folder).is_dir():
        raise UserError(f"{path} is not a feature cache; `diffalign cache ls` shows them")
    files = [
        file for root in (folder, _removal_path(folder)) for file in root.rglob("*") if file.is_file() and not file.is_symlink()
    ]
    return RemovalSummary(folder, len(files), sum(file.stat().st_size for file in files))


def rm(path: Place) -> RemovalSummary:
    """Remove a cache, and return what it was.

    A folder is renamed first. If the process is killed, the whole cache is left or none of it. In an object store, the metadata
    without which there is no cache go first. The same command then goes on.

    Raises:
        UserError: as in `preview_removal`, or another process writes to the cache.
    """
    removed = preview_removal(path)
    if isinstance(removed.path, Address):
        with hold(removed.path):
            remove_objects(removed.path, first="zarr.json", kept=CLAIMS)
        return removed
    renamed = _removal_path(removed.path)
    if removed.path.is_dir():
        with lock(removed.path):
            if renamed.is_dir():
                shutil.rmtree(renamed)
            removed.path.rename(renamed)
            sync_folder(renamed.parent)
    shutil.rmtree(renamed)
    return removed


def copy(path: Place, target: Place) -> Place:
    """Copy a complete cache from a disk or an object store to another place for caches; shards keep every bit.

    What is there already is not copied again. `zarr.json` comes last: until then there is no cache.

    Args:
        path: the cache.
        target: the place that holds caches, by dataset: <home>/caches, or an address.

    Returns:
        The place of the copy.

    Raises:
        UserError: the cache is incomplete, or the copy is not the same: an object of it was damaged.
    """
    cache = open_cache(path)
    source = path.absolute()
    copied = target / str(cache.identity["dataset"]) / source.name
    if copied.absolute() == source:
        raise UserError(f"{path} is there already; give another place to copy it to")
    sizes = {str(found.place).removeprefix(f"{source}/"): found.num_bytes for found in store_of(source).list(source)}
    is_part = {name: not (name.startswith(f"{CLAIMS}/") or name.rpartition("/")[2].startswith(".")) for name in sizes}
    names = [name for name in sizes if is_part[name] and name != "zarr.json"]
    largest = max((sizes[name] for name in names), default=0)

    def copy_object(name: str) -> int:
        if not (exists(copied / name) and object_sha256(copied / name) == object_sha256(source / name)):
            store_of(copied).put(copied / name, store_of(source).get(source / name))
        return sizes[name]

    num_threads = min(REQUESTS_IN_FLIGHT, max(1, COPY_BYTES // max(1, largest)))
    total = sum(sizes[name] for name in names)
    with (
        hold(copied),
        ThreadPoolExecutor(num_threads) as threads,
        ProgressBar(total=total, unit="B", unit_scale=True, label=f"copying {source.name}") as bar,
    ):
        for num_bytes in threads.map(copy_object, names):
            bar.update(num_bytes)
        copy_object("zarr.json")
    if problems := verify(copied):
        raise UserError(f"{copied} is not the same as {path}: {'; '.join(problems)}; run the same command again")
    return copied


def _removal_path(path: Path) -> Path:
    """Return the folder to which a cache is renamed while it is removed. No cache has such a name."""
    return path.with_name(f"{path.name}.removed")
