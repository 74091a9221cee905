"""List the caches of a home, and remove a cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.reader import find_caches, info
from pipeline.cache.samples import cache_home
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock, sync_folder


@dataclass(frozen=True)
class RemovalSummary:
    """A cache folder, and the number and total size of its files."""

    path: Path
    files: int
    bytes: int


def ls(home: Path) -> list[dict[str, Any]]:
    """Return one line per cache, complete or not: its encoder, its size and the command that made it, as JSON values."""
    return [_describe_cache(path) for path in list_folders(home)]


def list_folders(home: Path) -> list[Path]:
    """Return the folders of all caches of a home, complete or not."""
    folders = sorted(folder for folder in (home / "caches").glob("*") if folder.is_dir())
    return [path for folder in folders for path in find_caches(home, folder.name)]


def _describe_cache(path: Path) -> dict[str, Any]:
    line = {"dataset": path.parent.name, "name": path.name, "problem": ""}
    try:
        facts = info(path)
    except UserError as error:
        return {**line, "complete": False, "problem": str(error)}
    numbers = {key: facts[key] for key in ("samples", "rows", "feature_shape", "store_dtype", "bytes", "failed", "complete")}
    return {**line, "encoder": facts["identity"]["encoder"]["name"], **numbers, "command": facts["provenance"]["command"]}


def preview_removal(path: Path) -> RemovalSummary:
    """Return what `rm` would remove.

    Raises:
        UserError: the folder is not a cache in <home>/caches/<dataset>/, or it is reached by a symbolic link.
    """
    absolute = path.absolute()  # "." has no name
    folder = cache_home(path) / "caches" / absolute.parent.name / absolute.name
    if path.is_symlink() or folder.parent.is_symlink():
        raise UserError(f"{path} is reached by a symbolic link; give the folder itself")
    if folder not in find_caches(cache_home(path), folder.parent.name) and not _removal_path(folder).is_dir():
        raise UserError(f"{path} is not a feature cache; diffalign cache ls shows them")
    files = [
        file for root in (folder, _removal_path(folder)) for file in root.rglob("*") if file.is_file() and not file.is_symlink()
    ]
    return RemovalSummary(folder, len(files), sum(file.stat().st_size for file in files))


def rm(path: Path) -> RemovalSummary:
    """Remove a cache, and return what it was.

    The folder is renamed first. If the process is killed, the whole cache is left or none of it. The same command then goes on.

    Raises:
        UserError: as in `preview_removal`, or another process writes to the cache.
    """
    removed = preview_removal(path)
    renamed = _removal_path(removed.path)
    if removed.path.is_dir():
        with lock(removed.path):
            if renamed.is_dir():
                shutil.rmtree(renamed)
            removed.path.rename(renamed)
            sync_folder(renamed.parent)
    shutil.rmtree(renamed)
    return removed


def _removal_path(path: Path) -> Path:
    """Return the folder to which a cache is renamed while it is removed. No cache has such a name."""
    return path.with_name(f"{path.name}.removed")
