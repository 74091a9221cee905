"""Read a tree of media with one folder per class: <class>/… or <split>/<class>/…; the name of the folder is the label."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data import readers
from pipeline.data.cells import SPLIT_ALIASES, looks_like_splits, nfc
from pipeline.data.table_rows import TableRow
from pipeline.runtime.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
_HELPER_FOLDERS = ("__MACOSX", "@eaDir", "lost+found")  # of operating systems; they hold copies or thumbnails of the media


def read_class_folders(spec: Mapping[str, Any], root: Path) -> list[TableRow]:
    """Return one row for every media file below a class folder, in the order of the paths.

    Hidden files and folders, and those of operating systems, are skipped.
    """
    rows: list[TableRow] = []
    depth = _split_depth(root)
    for path in _walk(root, frozenset()):
        line = len(rows) + 1
        media = readers.parse_media_path(path.relative_to(root).as_posix(), root, line)
        parts = media.split("/")
        if len(parts) < depth + 2:
            raise UserError(f"{root / media} is in no class folder; name a table, or make folders <class>/…")
        split = SPLIT_ALIASES[parts[0].lower()] if depth else ""
        rows.append(TableRow(root, line, media, (nfc(parts[depth]),), (), split, "", ""))
    if not spec["folder_labels"]:
        _check_class_folders(root, rows, depth)
    return rows


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """Yield the media files below a folder, sorted; links to folders are followed, and refused if they form a circle."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a symbolic link to a folder that it lies in; remove it")
    with os.scandir(folder) as found:
        is_folder = {entry.name: entry.is_dir() for entry in found if not _is_hidden(entry.name)}
    for name in sorted(is_folder):
        if name.lower().endswith((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)) and not is_folder[name]:
            yield folder / name
    for name in sorted(is_folder):
        if is_folder[name]:
            yield from _walk(folder / name, above | {real})


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _HELPER_FOLDERS


def _check_class_folders(root: Path, rows: Sequence[TableRow], depth: int) -> None:
    """Refuse folders that are named like splits, and a single one whose own folders may be the classes."""
    classes = {row.labels[0] for row in rows}
    if looks_like_splits(classes):
        raise UserError(
            f"the folders {', '.join(sorted(classes))} below {root} look like splits and not like classes: call the splits "
            "train, val and test, with the folders of the classes in them; if they are classes, say --set folder_labels=true"
        )
    below = {row.media.split("/")[depth + 1] for row in rows if row.media.count("/") > depth + 1}
    if len(classes) == 1 and len(below) > 1 and all(row.media.count("/") > depth + 1 for row in rows):
        (name,) = classes
        root_of_all = f"give --root {root / name}" if not depth else f"put them beside {name}"
        raise UserError(
            f"all media below {root} are in the one class folder {name!r}; if the folders in it are the classes "
            f"({', '.join(sorted(below)[:5])} …), {root_of_all}; if it is a class, say --set folder_labels=true"
        )


def _split_depth(root: Path) -> int:
    """Return 1 if the folders below the root are splits, 0 if they are classes; `UserError` if they are a mixture."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not _is_hidden(path.name))
    named = [name for name in folders if name.lower() in SPLIT_ALIASES]
    if len(named) < 2 or len(named) == len(folders):  # a single "train" folder may be the class of trains
        return int(bool(folders) and len(named) == len(folders))
    other = next(name for name in folders if name not in named)
    raise UserError(
        f"{root} holds split folders ({', '.join(named)}) and others ({other}); move the others away, or name a table"
    )
