"""MSR-VTT: YouTube clips in 20 categories with 20 captions each, from the official JSON files or copies of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.dataset import Dataset
from pipeline.data.json_reader import json_records
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import line_error, list_entry, locate, parse_whole_number, source_hashes, stripped_lines
from pipeline.data.spec import manifest_meta, official_root, required_counts, target_splits
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

_SPLIT_ALIASES = {"train": "train", "validate": "validate", "val": "validate", "validation": "validate", "test": "test"}
# the video numbers of each split, from the official readme
_VIDEO_NUMBERS = {
    "train": range(6513),
    "validate": range(6513, 7010),
    "test": range(7010, 10000),
}
_YOUTUBE = re.compile(r"[?&]v=([\w-]{6,20})|youtu\.be/([\w-]{6,20})")
_NAME = re.compile(r"[A-Za-z]+(\d{1,18})")


class MsrvttClip(NamedTuple):
    """An entry of "videos"."""

    name: str  # video<number>
    split: str  # train, validate or test
    category: int
    extra: Mapping[str, Any]  # url, start and end time in the YouTube video (the files are already cut), official split


class MsrVtt(Dataset):
    """The annotation files of the official release, or copies of them."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the first set of annotation files that is complete.

        Args:
            spec: the contents of msrvtt.yaml.
            root: the folder of the official files.

        Raises:
            UserError: annotations are missing or faulty (the message names file and line), or the counts are not as expected.
        """
        layout, root = spec["layout"], official_root(spec, root)
        target = target_splits(spec, list(_VIDEO_NUMBERS))
        annotations = _find_annotations(root, layout["annotations"])
        categories = [locate(root, [name], "category.txt") for name in layout["categories"] if (root / name).is_file()][:1]
        class_names = _categories(categories[0]) if categories else spec["class_names"]
        clips: dict[str, MsrvttClip] = {}
        captions: dict[str, list[str]] = {}
        sizes: dict[Path, int] = {}
        for path in annotations:
            own = _clips(path, clips, len(class_names))
            captions |= _captions(path, own, spec["dedup_captions"])
            clips |= own
            sizes[path] = len(own)
        media_root = locate(root, layout["image_root"], "the folder of videos")
        media = _media_files(media_root, layout["video_roots"], layout["suffixes"], clips)
        manifest = Manifest(
            dataset=spec["name"],
            label_kind=spec["label_kind"],
            class_names=tuple(class_names),
            samples=tuple(
                Sample(name, target[clip.split], media[name], tuple(captions[name]), (clip.category,), _group(clip))
                for name, clip in clips.items()
            ),
            meta=manifest_meta(
                spec,
                sources=source_hashes([*annotations, *categories], root),
                lists=[list_entry(path, root, sizes[path], unit="video") for path in annotations],
                counts=_counts(list(clips.values()), captions),
                class_counts=_class_counts(list(clips.values()), len(class_names)),
            ),
            media_root=media_root,
            extra={name: json.dumps(clip.extra, sort_keys=True, ensure_ascii=False) for name, clip in clips.items()},
        )
        check_manifest(manifest, required_counts(spec))
        return manifest


def _find_annotations(root: Path, choices: Sequence[Sequence[str]]) -> list[Path]:
    """Return the files of the first set that is complete; `UserError` lists the sets."""
    for choice in choices:
        if all((root / name).is_file() for name in choice):
            return [locate(root, [name], "the annotations") for name in choice]
    sets = "; or ".join(" and ".join(choice) for choice in choices)
    raise UserError(f"{root} has no MSR-VTT annotations: looked for {sets}")


def _categories(path: Path) -> list[str]:
    """Return the category names in the order of their numbers. A line of category.txt is a name, a tab and the number."""
    found: dict[int, str] = {}
    for line, text in stripped_lines(path):
        name, tab, number = text.rpartition("\t")
        if not tab or found.setdefault(parse_whole_number(number, path, line), name.strip()) != name.strip():
            raise line_error(path, line, f"{text[:80]!r} is not a name, a tab and a number of its own")
    if sorted(found) != list(range(len(found))):
        raise UserError(f"{path}: the numbers of the categories are not 0..{len(found) - 1}")
    return [found[number] for number in range(len(found))]


def _clips(path: Path, known: Mapping[str, MsrvttClip], num_classes: int) -> dict[str, MsrvttClip]:
    """Return the clips of one file by name.

    Args:
        path: the annotation file.
        known: the clips of the files that were read before; a clip may not be listed twice.
        num_classes: the number of categories.
    """
    clips: dict[str, MsrvttClip] = {}
    for line, record in json_records(path, "videos"):
        name, source_split, category = (record.get(key) for key in ("video_id", "split", "category"))
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if not match:
            raise line_error(path, line, f"video_id {str(name)[:40]!r} is not video<number>")
        if name in clips or name in known:
            raise line_error(path, line, f"{name} is listed twice")
        if not isinstance(source_split, str) or source_split not in _SPLIT_ALIASES:
            raise line_error(path, line, f"{name}: unknown split {source_split!r}; choose one of: {', '.join(_SPLIT_ALIASES)}")
        if type(category) is not int or not 0 <= category < num_classes:
            raise line_error(path, line, f"{name}: category {category!r} is outside 0..{num_classes - 1}")
        split = _SPLIT_ALIASES[source_split]
        if int(match[1]) not in _VIDEO_NUMBERS[split]:
            raise line_error(
                path,
                line,
                f"{name} is in {source_split}, which has {_VIDEO_NUMBERS[split].start}..{_VIDEO_NUMBERS[split].stop - 1}",
            )
        extra = {key: record[key] for key in ("url", "start time", "end time") if key in record}
        wrong_key = next((key for key, value in extra.items() if type(value) not in (str, int, float)), "")
        if wrong_key:
            raise line_error(path, line, f"{name}: {wrong_key!r} is neither a text nor a number")
        clips[match[0]] = MsrvttClip(match[0], split, category, {**extra, "source_split": source_split})
    return clips


def _captions(path: Path, clips: Mapping[str, MsrvttClip], dedup: bool) -> dict[str, list[str]]:
    """Return the captions of the clips of one file, in the order of their sentence numbers.

    In the file, sentences are in no particular order. A sentence of a clip that is not in the same file is refused: it could
    be a test caption among the training captions.
    """
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in clips}
    for line, record in json_records(path, "sentences"):
        name, caption, number = (record.get(key) for key in ("video_id", "caption", "sen_id"))
        if name not in found:
            raise line_error(path, line, f"a sentence of {str(name)[:40]!r}, which is not among the videos of this file")
        if not isinstance(caption, str) or type(number) is not int:
            raise line_error(path, line, f"a sentence of {name} without caption or sen_id")
        found[name].append((number, caption))
    ordered = {name: [caption for _, caption in sorted(pairs)] for name, pairs in found.items()}
    return {name: list(dict.fromkeys(texts)) for name, texts in ordered.items()} if dedup else ordered


def _media_files(media_root: Path, folders: Sequence[str], suffixes: Sequence[str], clips: Collection[str]) -> dict[str, Path]:
    """Return the file of every clip, relative to the media root.

    The first folder that has the clip is used and, in this folder, the first suffix. A clip without a file gets the path where
    its file is expected first, so that it is reported as missing.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        entries = {entry.name for entry in (media_root / folder).iterdir()} if (media_root / folder).is_dir() else set()
        for suffix in suffixes:
            stems = {entry.removesuffix(suffix) for entry in entries if entry.endswith(suffix)}
            found |= {stem: Path(folder, f"{stem}{suffix}") for stem in stems.intersection(clips) - found.keys()}
    return {name: Path(folders[0], f"{name}{suffixes[0]}") for name in clips} | found


def _group(clip: MsrvttClip) -> str:
    """Return the name of the YouTube video that a clip is cut from, or ""."""
    match = _YOUTUBE.search(str(clip.extra.get("url", "")))
    return f"youtube:{match[1] or match[2]}" if match else ""


def _counts(clips: Sequence[MsrvttClip], captions: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the numbers of clips, captions and clips without text."""
    sizes = Counter(clip.split for clip in clips)
    return {
        "clips": len(clips),
        **{f"clips.{split}": sizes[split] for split in _VIDEO_NUMBERS},
        "captions": sum(map(len, captions.values())),
        "without_text": sum(not texts for texts in captions.values()),
    }


def _class_counts(clips: Sequence[MsrvttClip], num_classes: int) -> dict[str, list[int]]:
    """Return the number of clips of every category, for each official split."""
    counts = Counter((clip.split, clip.category) for clip in clips)
    return {split: [counts[split, category] for category in range(num_classes)] for split in _VIDEO_NUMBERS}
