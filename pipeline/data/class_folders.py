"""Read a tree of media with one folder per class: <class>/… or <split>/<class>/…; the name of the folder is the label."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data import readers
from pipeline.data.cells import SPLIT_ALIASES, looks_like_splits, nfc
from pipeline.data.pictures import starts_like_picture
from pipeline.data.table_files import METADATA_FILES, TABLE_SUFFIXES, tables_in
from pipeline.data.table_rows import TableRow, TableRows
from pipeline.runtime.errors import UserError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".jp2", ".j2k", ".svg"),
)
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
_MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_HELPER_FOLDERS = ("__MACOSX", "@eaDir", "lost+found")  # of operating systems; they hold copies or thumbnails of the media
_HUB_CACHE = {"blobs", "refs", "snapshots"}  # the folders of one data set in a cache of the Hugging Face hub
_NOTES = (".txt", ".md", ".rst", ".json", ".html", ".xml", ".yaml", ".yml", ".ini", ".db")  # left out without a word
_NOTES_WITHOUT_ENDING = ("readme", "license", "licence", "notice", "copying")
_MAX_SHOWN = 3  # files or folders in a message


def read_class_folders(spec: Mapping[str, Any], media_root: Path, root: Path) -> tuple[TableRows, list[str]]:
    """Return one row for every media file below a class folder, in the order of the paths, and warnings.

    Hidden files and folders, and those of operating systems, are skipped; of a cache of the hub, the snapshots are read. Media
    are told by their endings; a file without one by its first bytes.

    Args:
        spec: the spec of the dataset.
        media_root: the folder of the class folders.
        root: the folder that `--root` names; tables in it are a reason to ask about a single class folder.
    """
    left_out: list[Path] = []
    depth = _split_depth(media_root)
    rows = TableRows.of(_read_files(media_root, root, depth, left_out))
    if not spec["folder_labels"]:
        tables = [path for path in left_out if path.suffix.lower() in TABLE_SUFFIXES]
        _check_class_folders(media_root, rows, depth, _remedies_of_tables([*tables, *tables_in(root)], root))
    return rows, _warn_about_left_out(left_out, media_root)


def _read_files(media_root: Path, root: Path, depth: int, left_out: list[Path]) -> Iterator[TableRow]:
    for line, path in enumerate(walk_media(media_root, left_out), start=1):
        media = readers.parse_media_path(path.relative_to(media_root).as_posix(), media_root, line)
        parts = media.split("/")
        if len(parts) < depth + 2:
            remedies = _remedies_of_tables(tables_in(root), root) or ["name a table, --set file=NAME"]
            raise UserError(f"{media_root / media} is in no class folder; {remedies[0]}; or make folders <class>/…")
        split = SPLIT_ALIASES[parts[0].lower()] if depth else ""
        yield TableRow(media_root, line, media, (nfc(parts[depth]),), (), split, "", "")


def walk_media(folder: Path, left_out: list[Path], above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield the media files below a folder, sorted, and add the other files to `left_out`, but for hidden ones and notes.

    Links to folders are followed, and refused if they form a circle; `above` are the folders that this one lies in.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{folder} is a symbolic link to a folder that it lies in; remove it")
    with os.scandir(folder) as found:
        is_folder = {entry.name: entry.is_dir() for entry in found if not _is_hidden(entry.name)}
    for name in sorted(is_folder):
        if is_folder[name]:
            continue
        if _is_media(folder / name):
            yield folder / name
        elif not _is_note(name):
            left_out.append(folder / name)
    stores = _HUB_CACHE - {"snapshots"} if is_folder.keys() >= _HUB_CACHE else set()
    for name in sorted(is_folder.keys() - stores):
        if is_folder[name]:
            yield from walk_media(folder / name, left_out, above | {real})


def _is_media(path: Path) -> bool:
    return path.name.lower().endswith(_MEDIA_SUFFIXES) or (not path.suffix and path.is_file() and starts_like_picture(path))


def _is_note(name: str) -> bool:
    return name.lower().endswith(_NOTES) or name.lower() in _NOTES_WITHOUT_ENDING


def _warn_about_left_out(left_out: Sequence[Path], root: Path) -> list[str]:
    """Return a warning with the number of files that are no media, and an example of each of some endings; or none."""
    if not left_out:
        return []
    examples = {path.suffix.lower(): path.relative_to(root).as_posix() for path in reversed(left_out)}
    shown = ", ".join(sorted(examples.values())[:_MAX_SHOWN])
    more = " …" if len(left_out) > min(len(examples), _MAX_SHOWN) else ""
    return [f"{len(left_out)} files below {root} are left out, they are not known as pictures or videos: {shown}{more}"]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _HELPER_FOLDERS


def _check_class_folders(root: Path, rows: TableRows, depth: int, remedies: Sequence[str]) -> None:
    """Refuse folders that are named like splits, and a single one whose folders, or tables at hand, may give the classes.

    Args:
        root: the folder of the class folders.
        rows: the rows of all media.
        depth: 1 below split folders, else 0.
        remedies: what to do if the tables that were found give the classes.
    """
    classes = set(rows.labels)
    if looks_like_splits(classes):
        raise UserError(
            f"the folders {', '.join(sorted(classes))} below {root} look like splits and not like classes: call the splits "
            "train, val and test, with the folders of the classes in them; if they are classes, say --set folder_labels=true"
        )
    if len(classes) != 1:
        return
    (name,) = classes
    below = {"/".join(media.split("/")[depth + 1 : -1][:1]) for media in rows.samples.strings("media")}  # "" for a file itself
    if len(below) > 1 and "" not in below:
        root_of_all = f"give --root {root / name}" if not depth else f"put them beside {name}"
        shown = ", ".join(sorted(below)[:5])
        remedies = [*remedies, f"if the folders in it are the classes ({shown} …), {root_of_all}"]
    if remedies:
        raise UserError(
            f"all media below {root} are in the one class folder {name!r}; {'; '.join(remedies)}; "
            "if it is a class, say --set folder_labels=true"
        )


def _remedies_of_tables(tables: Sequence[Path], root: Path) -> list[str]:
    """Return what to do if one of these tables says the classes: give the root of an imagefolder, else name the table."""
    imagefolders = dict.fromkeys(
        (path.name, path.parent.parent if path.parent.name.lower() in SPLIT_ALIASES else path.parent)
        for path in tables
        if path.name in METADATA_FILES
    )
    if imagefolders:
        shown = " or ".join(f"--root {folder} (its {name})" for name, folder in list(imagefolders)[:_MAX_SHOWN])
        return [f"if an imagefolder's metadata say the classes, give {shown}"]
    names = dict.fromkeys(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in tables)
    shown = " or ".join(f"--set file={name}" for name in list(names)[:_MAX_SHOWN])
    return [f"if a table says the classes, name it: {shown}"] if names else []


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
