"""Which caches there are, and how to be rid of one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.reader import find_caches, info
from pipeline.cache.samples import home_of
from pipeline.runtime.files import lock, sync_folder


@dataclass(frozen=True)
class Contents:
    """What is in a folder that `rm` would remove."""

    path: Path
    files: int
    bytes: int


def ls(home: Path) -> list[dict[str, Any]]:
    """Every cache of a home, complete or not, with its encoder, size and the command that made it, as JSON values."""
    folders = sorted(folder for folder in (home / "caches").glob("*") if folder.is_dir())
    return [_line(path) for folder in folders for path in find_caches(home, folder.name)]


def _line(path: Path) -> dict[str, Any]:
    line = {"dataset": path.parent.name, "name": path.name, "problem": ""}
    try:
        facts = info(path)
    except ValueError as error:
        return {**line, "complete": False, "problem": str(error)}
    same = {key: facts[key] for key in ("samples", "rows", "feature_shape", "store_dtype", "bytes", "failed", "complete")}
    return {**line, "encoder": facts["identity"]["encoder"]["name"], **same, "command": facts["provenance"]["command"]}


def contents(path: Path) -> Contents:
    """What `rm` would remove; `ValueError` when the folder is not a cache in <home>/caches/<dataset>/, or a symbolic link."""
    whole = path.absolute()  # "." has no name
    folder = home_of(path) / "caches" / whole.parent.name / whole.name
    if path.is_symlink() or folder.parent.is_symlink():
        raise ValueError(f"{path} is reached by a symbolic link; give the folder itself")
    if folder not in find_caches(home_of(path), folder.parent.name) and not _leftover(folder).is_dir():
        raise ValueError(f"{path} is not a feature cache; diffalign cache ls shows them")
    files = [
        file for each in (folder, _leftover(folder)) for file in each.rglob("*") if file.is_file() and not file.is_symlink()
    ]
    return Contents(folder, len(files), sum(file.stat().st_size for file in files))


def rm(path: Path) -> Contents:
    """Remove a cache and say what it was; errors as in `contents`, and when another process writes to it.

    The folder is renamed first: killed at any moment, this leaves a whole cache or none, and the same command goes on.
    """
    removed = contents(path)
    leftover = _leftover(removed.path)
    if removed.path.is_dir():
        with lock(removed.path):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            removed.path.rename(leftover)
            sync_folder(leftover.parent)
    shutil.rmtree(leftover)
    return removed


def _leftover(path: Path) -> Path:
    """The name of a cache that is being removed, which no cache has."""
    return path.with_name(f"{path.name}.removed")
