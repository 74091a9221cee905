"""Stage 0: parse official files into a manifest, compare it with published counts, look for its media, and write it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline import plugins
from pipeline.lists import missing_media
from pipeline.manifest import Manifest, found_counts, load_spec, split_counts, write
from pipeline.media import open_image
from pipeline.runs import write_atomic

FIXED = ("name", "media_type", "label_kind", "licence", "attribution")  # not open to settings
ANIMATED = (".gif", ".webp", ".png", ".apng")  # videos that are images with frames
DEFAULTS: Mapping[str, Any] = {"allow_missing": False, "counts_profile": "official"}  # of specs that do not have them


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was written, and how it compares with what is published."""

    path: Path  # of the Parquet file
    fingerprint: str
    counts: tuple[Mapping[str, Any], ...]  # rows for a table: count, found, expected ("" when nothing is published), verdict
    warnings: tuple[str, ...]
    missing: int  # media files that were left out because they are not there
    missing_list: str  # the file that names them; "" when there are none
    undecodable: tuple[str, ...]  # "id: reason" of media that cannot be decoded; () when not verified


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

    `settings` change options or places of its yaml, such as {"filter": "label", "tags_dir": "/data/tags"};
    `image_root` is the folder of media when it is not below `root`; `verify_media` decodes every file once.
    The order of checks: parse, schema, counts, leaks between splits, missing media, decoding.
    `ValueError` names file and line, or what is missing and the remedy.
    """
    spec = load_spec(dataset)
    spec = configured({**spec, **{key: spec.get(key, value) for key, value in DEFAULTS.items()}}, settings)
    if image_root is not None:
        spec = _with_image_root(spec, image_root)
    manifest = plugins.get("datasets", dataset).build(spec, root)
    counts, differences = _compare(manifest, spec)
    missing_list = home / "manifests" / f"{dataset}.missing.txt"
    manifest, num_missing = _without_missing(manifest, missing_list, spec["allow_missing"])
    undecodable: dict[str, str] = {}
    if verify_media:
        undecodable = _undecodable(manifest, progress)
        manifest = replace(manifest, media_ok={sample.id: sample.id not in undecodable for sample in manifest.samples})
    return Report(
        path=write(manifest, home),
        fingerprint=manifest.fingerprint(),
        counts=tuple(counts),
        warnings=(*manifest.meta.get("warnings", ()), *differences, *_advice(manifest, spec)),
        missing=num_missing,
        missing_list=str(missing_list) if num_missing else "",
        undecodable=tuple(f"{sample_id}: {reason}" for sample_id, reason in undecodable.items()),
    )


def configured(spec: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """The spec with options, or places of its layout, changed; `ValueError` names the key and the choices.

    A list is given with commas: {"train_splits": "train,val"}.
    """
    layout = dict(spec.get("layout", {}))
    changed = {**spec, "layout": layout}
    options = [key for key, value in spec.items() if key not in FIXED and _is_plain(value)]
    places = [key for key, value in layout.items() if _is_plain(value)]
    for key, text in settings.items():
        if key not in options and key not in places:
            raise ValueError(f"unknown setting {key!r} of {spec['name']}; choose one of: {', '.join([*options, *places])}")
        target = changed if key in options else layout
        target[key] = _coerced(key, text, target[key])
    return changed


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _coerced(key: str, text: str, example: Any) -> Any:
    """The text as what the yaml holds there."""
    if isinstance(example, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"setting {key!r} is {text!r}; it takes true or false")
        return text.lower() == "true"
    if isinstance(example, int):
        if not text.isdecimal():
            raise ValueError(f"setting {key!r} is {text!r}; it takes a whole number")
        return int(text)
    return [part.strip() for part in text.split(",")] if isinstance(example, list) else text


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
        rows.append({"count": name, "found": found, "expected": expected.get(name, ""), "verdict": verdict})
    warnings = [f"{row['count']}: {row['found']}, published {row['expected']}" for row in rows if row["verdict"] == "differs"]
    for split, published in (spec.get("class_counts", {}) if official else {}).items():
        found = manifest.meta["class_counts"][split]
        wanted = [published] * len(found) if isinstance(published, int) else published
        different = _different_classes(manifest.class_names, found, wanted)
        rows.append({"count": f"classes of {split}", "found": len(found) - len(different), "expected": len(wanted)})
        rows[-1]["verdict"] = "differs" if different else "same"
        if different:
            warnings.append(f"{split}: {len(different)} classes differ from the published counts: {', '.join(different[:10])}")
    return rows, warnings


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


def _undecodable(manifest: Manifest, progress: bool) -> dict[str, str]:
    """The reason for every sample whose media file cannot be decoded, by id."""

    def reason(position: int) -> str:
        try:
            _decode(manifest.media_path(manifest.samples[position]), manifest.meta["media_type"])
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = tqdm(
            pool.map(reason, range(len(manifest.samples))),
            total=len(manifest.samples),
            unit="file",
            disable=not progress,
            file=sys.stderr,
        )
        return {manifest.samples[position].id: text for position, text in enumerate(reasons) if text}


def _decode(path: Path, media_type: str) -> None:
    """Decode an image, or the first frame of a video; `ValueError` with the reason when there is none."""
    if media_type == "image" or path.suffix.lower() in ANIMATED:
        open_image(path, 64)
        return
    import av  # only videos need it
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video or next(container.decode(video=0), None) is None:
                raise ValueError(f"{path.name}: no frame can be decoded")
    except FFmpegError as error:
        raise ValueError(f"{path.name}: no video that can be decoded ({error.strerror})") from error


def _advice(manifest: Manifest, spec: Mapping[str, Any]) -> list[str]:
    """A warning for every split that is empty, and for validation what to do about it."""
    sizes = split_counts(manifest)
    warnings = [f"the {split} split is empty" for split in ("train", "test") if not sizes[split]]
    if not sizes["val"]:
        remedy = ""
        if "val_percent" in spec:
            remedy = "; --set val_percent=10 takes it from the training samples"
        elif len(spec.get("train_splits", ())) > 1:
            remedy = f"; --set train_splits={spec['train_splits'][0]} keeps the official one"
        warnings.append(f"the val split is empty, and heads are selected on it{remedy}")
    return warnings
