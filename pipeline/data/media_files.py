"""Find media files that belong to no dataset, from what a user names: files, folders and patterns."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.data.class_folders import walk_media
from pipeline.data.manifest import Manifest
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import is_address
from pipeline.types import Sample

logger = logging.getLogger(__name__)


def find_media(paths: Iterable[str | Path]) -> list[str]:
    """Return the files that are meant, in the order of the names; a file that is not there stays in the list.

    Args:
        paths: files; folders, of which all pictures and videos are taken, sorted; and patterns such as photos/**/*.jpg.

    Raises:
        UserError: a folder has no media in it, a pattern fits no file, a name is an address (s3://…), or nothing is named.
    """
    found = [file for path in paths for file in _find(os.fspath(path))]
    if not found:
        raise UserError("no file is named: give pictures or clips, folders, or patterns such as 'photos/**/*.jpg'")
    return found


def _find(path: str) -> list[str]:
    if os.path.isdir(path):
        left_out: list[Path] = []
        files = [str(file) for file in walk_media(Path(path), left_out)]
        if not files:
            raise UserError(f"{path}: no picture or video is in this folder")
        if left_out:
            logger.info("%s: %d files are left out, they are not known as pictures or videos", path, len(left_out))
        return files
    if is_address(path) and not os.path.lexists(path):  # which may have a password in it, so it is not repeated
        raise UserError(
            f"{path.partition(':')[0]}://… is an address, and pictures and clips are read from files: copy them to a disk, or "
            "mount the bucket (rclone mount, s3fs, gcsfuse)"
        )
    if os.path.lexists(path) or not glob.has_magic(path):  # a file may be called img[1].jpg
        return [path]
    files = sorted(file for file in glob.iglob(path, recursive=True) if not os.path.isdir(file))
    if not files:
        raise UserError(f"no file fits the pattern {path}")
    return files


def manifest_of_files(files: Iterable[str], media_type: str) -> Manifest:
    """Return a manifest, without texts and labels, by which files anywhere on this machine are read; the ids are positions."""
    paths = [Path(os.path.realpath(os.path.dirname(file))) / os.path.basename(file) for file in files]  # "link/.." is no "."
    samples = (Sample(str(row), "", path.relative_to(path.anchor), (), (), "") for row, path in enumerate(paths))
    return Manifest(
        dataset="files",
        label_kind="multi",
        class_names=(),
        samples=tuple(samples),
        meta={"media_type": media_type, "follows_links": True},
        media_root=Path(paths[0].anchor),
    )
