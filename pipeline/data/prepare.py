"""Stage 0: parse official files into a manifest, compare it with published counts, look for its media, and write it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Manifest, found_counts, load_spec, recurring_texts, split_counts, write_manifest
from pipeline.data.media import open_frames, open_image
from pipeline.data.readers import missing_media
from pipeline.runtime import plugins
from pipeline.runtime.files import write_atomic
from pipeline.runtime.logs import ProgressBar

TEXT_OPTIONS = ("aggregate", "sep", "empty")  # of a spec's text
FIXED = ("name", "media_type", "label_kind", "licence", "attribution")  # not open to settings


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and how it compares with what is published."""

    path: Path  # of the Parquet file
    fingerprint: str
    counts: tuple[Mapping[str, Any], ...]  # rows for a table: count, found, expected ("" when nothing is published), verdict
    warnings: tuple[str, ...]
    missing: int  # media files that were left out because they are not there
    missing_list: str  # the file that names them; "" when there are none
    undecodable: tuple[str, ...]  # "file, line: reason" of media that cannot be decoded; () when not verified


def prepare(
    dataset: str,
    root: Path | None,
    home: Path,
    settings: Mapping[str, str],
    *,
    image_root: Path | None = None,
    verify_media: bool = False,
    progress: bool = False,
) -> Report:
    """Build, check and write the manifest of a dataset from the official files in `root`.

    `settings` change what `open_settings` lists, such as {"filter": "label", "tags_dir": "/data/tags"};
    `image_root` is the folder of media when it is not below `root`; `verify_media` decodes every file once.
    The order of checks: parse, schema, counts, leaks between splits, missing media, decoding.
    `ValueError` names file and line, or what is missing and the remedy.
    """
    spec = configured(load_spec(dataset), settings)
    if image_root is not None:
        spec = _with_image_root(spec, image_root)
    manifest = plugins.get("datasets", dataset).build(spec, root)
    counts, differences = _compare(manifest, spec)
    missing_list = home / "manifests" / f"{dataset}.missing.txt"
    manifest, num_missing = _without_missing(manifest, missing_list, spec["allow_missing"])
    if num_missing:
        counts += [_count(f"{split} with media", found) for split, found in split_counts(manifest).items()]
    shared = len(recurring_texts(manifest))
    counts.append(_count("test texts in train", shared))
    undecodable = _undecodable(manifest, progress) if verify_media else {}
    if verify_media:
        manifest = replace(manifest, media_ok={sample.id: i not in undecodable for i, sample in enumerate(manifest.samples)})
    return Report(
        path=write_manifest(manifest, home),
        fingerprint=manifest.fingerprint(),
        counts=tuple(counts),
        warnings=(*manifest.meta.get("warnings", ()), *differences, *_advice(manifest, shared)),
        missing=num_missing,
        missing_list=str(missing_list) if num_missing else "",
        undecodable=tuple(f"{manifest.where(position)}: {reason}" for position, reason in undecodable.items()),
    )


def open_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that can be set, with its value: options, places of the layout, and how texts become one vector."""
    options = {key: value for key, value in spec.items() if key == "splits" or (key not in FIXED and _is_plain(value))}
    places = {key: value for key, value in spec["layout"].items() if _is_plain(value)}
    return {**options, **places, "empty": "skip", **{key: spec["text"][key] for key in TEXT_OPTIONS if key in spec["text"]}}


def configured(spec: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """The spec with settings changed; `ValueError` names the key and the choices.

    Lists and percents are given with commas: {"train_splits": "train,val", "splits": "80,10,10"}.
    """
    changed = {**spec, "layout": dict(spec["layout"]), "text": dict(spec["text"])}
    current = open_settings(spec)
    for key, text in settings.items():
        if key not in current:
            raise ValueError(f"unknown setting {key!r} of {spec['name']}; choose one of: {', '.join(current)}")
        part = changed if key in spec else changed["text"] if key in TEXT_OPTIONS else changed["layout"]
        part[key] = _coerced(key, text, current[key])
    return changed


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _coerced(key: str, text: str, example: Any) -> Any:
    """The text as what the yaml holds there."""
    if isinstance(example, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"setting {key!r} is {text!r}; it takes true or false")
        return text.lower() == "true"
    parts = [part.strip() for part in text.split(",")]
    numbers = 1 if isinstance(example, int) else len(example) if isinstance(example, dict) else 0
    if numbers and (len(parts) != numbers or not all(part.isdecimal() for part in parts)):
        names = f"for {', '.join(example)}, parted by commas" if isinstance(example, dict) else ""
        raise ValueError(f"setting {key!r} is {text!r}; it takes a whole number {names}".rstrip())
    if isinstance(example, dict):
        return dict(zip(example, map(int, parts), strict=True))
    if isinstance(example, int):
        return int(text)
    return parts if isinstance(example, list) else text


def _with_image_root(spec: Mapping[str, Any], image_root: Path) -> dict[str, Any]:
    if "image_root" not in spec["layout"]:
        raise ValueError(f"{spec['name']} finds its media by itself: leave out --image-root")
    if not image_root.is_dir():
        raise ValueError(f"--image-root {image_root} is no folder")
    return {**spec, "layout": {**spec["layout"], "image_root": [str(image_root.resolve())]}}


def _compare(manifest: Manifest, spec: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of found and published counts, one warning for each difference); nothing is expected of a miniature."""
    official = spec["counts_profile"] == "official"
    expected = {**spec.get("counts", {}), **spec.get("counts_warn", {})} if official else {}
    rows: list[dict[str, Any]] = []
    for name, found in found_counts(manifest).items():
        verdict = ("same" if found == expected[name] else "differs") if name in expected else ""
        rows.append(_count(name, found, expected.get(name, ""), verdict))
    warnings = [f"{row['count']}: {row['found']}, published {row['expected']}" for row in rows if row["verdict"] == "differs"]
    for split, published in (spec.get("class_counts", {}) if official else {}).items():
        found = manifest.meta["class_counts"][split]
        wanted = [published] * len(found) if isinstance(published, int) else published
        different = _different_classes(manifest.class_names, found, wanted)
        verdict = "differs" if different else "same"
        rows.append(_count(f"classes of {split}", len(found) - len(different), len(wanted), verdict))
        if different:
            warnings.append(f"{split}: {len(different)} classes differ from the published counts: {', '.join(different[:10])}")
    return rows, warnings


def _count(name: str, found: int, expected: int | str = "", verdict: str = "") -> dict[str, Any]:
    return {"count": name, "found": found, "expected": expected, "verdict": verdict}


def _different_classes(names: Sequence[str], found: Sequence[int], published: Sequence[int]) -> list[str]:
    if len(found) != len(published):
        return [f"{len(found)} classes, published {len(published)}"]
    pairs = zip(names, found, published, strict=True)
    return [f"{name} {count} (published {wanted})" for name, count, wanted in pairs if count != wanted]


def _without_missing(manifest: Manifest, missing_list: Path, allow: bool) -> tuple[Manifest, int]:
    """(the manifest without samples that have no media file, their number); they are listed in a file of their own.

    `ValueError` when there are any and that is not allowed.
    """
    media = (sample.media.as_posix() for sample in manifest.samples)
    missing = missing_media(manifest.media_root, media, manifest.where)
    if not missing:
        missing_list.unlink(missing_ok=True)
        return manifest, 0
    lines = [f"{manifest.where(position)}: {manifest.samples[position].media.as_posix()}" for position in missing]
    write_atomic(missing_list, "\n".join(lines) + "\n")
    share = f"{len(missing)} of {len(manifest.samples)} media files of {manifest.dataset} are missing"
    if not allow:
        raise ValueError(
            f"{share} below {manifest.media_root}, the first of {lines[0]}; {missing_list} lists them. "
            "Say where they are with --image-root, or leave these samples out with --allow-missing"
        )
    if len(missing) == len(manifest.samples):
        raise ValueError(f"{share} below {manifest.media_root}: there is nothing to prepare; see {missing_list}")
    gone = set(missing)
    kept = [position for position in range(len(manifest.samples)) if position not in gone]
    rest = replace(
        manifest,
        samples=tuple(manifest.samples[position] for position in kept),
        rows=tuple(manifest.rows[position] for position in kept) if manifest.rows else tuple(kept),
        meta={**manifest.meta, "missing_media": [manifest.samples[position].id for position in missing]},
    )
    return rest, len(missing)


def _undecodable(manifest: Manifest, progress: bool) -> dict[int, str]:
    """The reason for every sample whose media file cannot be decoded as extraction would, by position."""

    def reason(position: int) -> str:
        try:
            path = manifest.media_path(manifest.samples[position])
            if manifest.meta["media_type"] == "video":
                open_frames(path, 1)
            else:
                open_image(path, 64)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        total = len(manifest.samples)
        reasons = ProgressBar(pool.map(reason, range(total)), label="decoding", total=total, unit="file", show=progress)
        return {position: text for position, text in enumerate(reasons) if text}


def _advice(manifest: Manifest, shared: int) -> list[str]:
    """Warnings about splits that are empty, samples without label, and texts that stand in test and train, with the remedy."""
    sizes = split_counts(manifest)
    warnings = [f"the {split} split is empty" for split in ("train", "test") if not sizes[split]]
    if not sizes["val"]:
        remedy = manifest.meta["val_remedy"]
        again = f"; prepare with {remedy}" if remedy else ""
        warnings.append(f"the val split is empty, and heads are selected on it{again}")
    unlabelled = sum(not sample.labels for sample in manifest.samples)
    if unlabelled:
        remedy = " with --set filter=label" if "filter" in manifest.meta["options"] else ""
        warnings.append(f"{unlabelled} samples have no label, and heads cannot be scored on them; leave them out{remedy}")
    if shared:
        warnings.append(
            f"{shared} of {sizes['test']} test samples have the texts of a training sample, as texts_recur: true allows; "
            "a score that reads test texts is flattered by them, one that reads images alone is not"
        )
    return warnings
