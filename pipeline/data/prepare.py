"""Stage 0: build the manifest of a dataset from its official files, check it, and write it.

The counts are compared with the published ones, and every media file is looked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.fetch import download_folder
from pipeline.data.manifest import DATASET_NAME, Manifest, found_counts, recurring_texts, split_counts, text_counts
from pipeline.data.manifest_files import left_out_path, write_manifest
from pipeline.data.media import open_frames, open_image
from pipeline.data.media_copies import copied_media
from pipeline.data.readers import media_file
from pipeline.data.recipes import Recipe, check_not_another, read_recipe, write_recipe
from pipeline.data.same_media import sample_media_sizes, warn_about_copies, warn_about_labels
from pipeline.data.sample_columns import list_sizes
from pipeline.data.spec import load_spec
from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.places import Address, Place, parse_place
from pipeline.types import Sample

logger = logging.getLogger(__name__)

TEXT_OPTIONS = ("aggregate", "sep", "empty")  # settings in the `text` part of a spec
DECODED_TOGETHER = 64  # media files
_FIXED_KEYS = ("name", "media_type", "label_kind")  # keys of a spec that users cannot change
_TO_A_FOLDER = (
    "copy the files to a disk, or mount the bucket (rclone mount, s3fs, gcsfuse); tar files of samples are read from an object "
    "store: diffalign prepare webdataset --root s3://bucket/prefix"
)
_RIGHTS = ("licence", "attribution")  # nor can they change these of data that have owners: of specs without a `description`


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """The result of `prepare`: what was written, and how it compares with the published counts."""

    path: Path  # of the Parquet file
    fingerprint: str
    counts: tuple[Mapping[str, Any], ...]  # rows of a table: count, found, expected ("": nothing is published), verdict
    warnings: tuple[str, ...]
    missing: int  # number of samples that were left out because their media file does not exist
    missing_list: str  # path of the file that lists them; "" if there are none
    undecodable: tuple[str, ...]  # "id (file, line): reason" for media that cannot be decoded; () if that was not tried
    left_out: int  # number of samples that the files hold and that cannot be used
    left_out_list: str  # path of the table that lists them, with the reasons; "" if there are none


def prepare(
    dataset: str,
    root: Place | None,
    home: Path,
    settings: Mapping[str, str],
    *,
    name: str = "",
    image_root: Path | None = None,
    verify_media: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> PrepareReport:
    """Build, check and write the manifest of a dataset from the official files in `root`.

    The order of checks: parse, schema, counts, leaks between splits, missing media, decoding.

    Args:
        dataset: name of the dataset's plug-in, or of a dataset in `home`, which is then prepared again from the files as they
            are now; `settings` are added to those of then.
        root: folder of the official files; None: that of `fetch`, else that of the last time, else a package's. With a dataset
            in `home` it is the place that the files have moved to. Tar files of samples may lie in an object store.
        home: folder to write to.
        settings: new values for settings of the spec, see `changeable_settings`; for example {"filter": "label",
            "tags_dir": "/data/tags"}.
        name: name of the dataset in `home`, so that a home holds several datasets of one plug-in; "": the plug-in's name.
        image_root: folder of the media, if it is not in its usual place below `root`.
        verify_media: whether to decode every media file once.
        overwrite: whether to replace a dataset of the same name that was built from other files of the user's.
        progress: whether to show a progress bar.

    Raises:
        UserError: names file and line, or what is missing and the remedy.
    """
    dataset, name, recipe = _find_recipe(home, dataset, name, Recipe(dataset, root, image_root, settings))
    spec = apply_settings(load_spec(dataset), recipe.settings)
    if recipe.image_root is not None:
        spec = _with_image_root(spec, recipe.image_root)
    _check_own_name(name, dataset)
    builder: Any = plugins.get("datasets", dataset)()
    if isinstance(recipe.root, Address) and not builder.reads_object_stores:
        raise UserError(f"--root {recipe.root}: {dataset} is read from a folder; {_TO_A_FOLDER}")
    manifest = builder.build({**spec, "name": name}, recipe.root)
    own = {"plugin": dataset} if name != dataset else {}
    is_users = recipe.root is not None and not _is_below(recipe.root, download_folder(dataset, home))
    own |= {"follows_links": True} if is_users else {}
    manifest = replace(manifest, dataset=name, meta={**manifest.meta, **own})
    if is_users and not overwrite:
        check_not_another(home, manifest)
    counts, differences = _compare_counts(manifest, spec)
    missing_list = home / "manifests" / f"{manifest.dataset}.missing.txt"
    num_samples = len(manifest.samples)
    manifest, sizes = _leave_out_missing(manifest, missing_list, spec["allow_missing"])
    num_missing = num_samples - len(sizes)
    if num_missing:
        counts += [_count_row("without media, left out", num_missing), _count_row("all with media", len(manifest.samples))]
        counts += [_count_row(f"{split} with media", found) for split, found in split_counts(manifest).items()]
    copies = [*warn_about_labels(manifest), *warn_about_copies(manifest, home, sizes)]
    num_recurring = len(recurring_texts(manifest))
    counts.append(_count_row("train with text", int(np.count_nonzero(text_counts(manifest.split("train"))))))
    counts.append(_count_row("test texts in train", num_recurring))
    undecodable = _find_undecodable(manifest, progress) if verify_media else {}
    if verify_media:
        manifest = replace(manifest, media_ok={id: i not in undecodable for i, id in enumerate(manifest.columns.ids)})
    path = write_manifest(manifest, home)
    write_recipe(home, name, recipe)
    return PrepareReport(
        path=path,
        fingerprint=manifest.fingerprint(),
        counts=tuple(counts),
        warnings=(*manifest.meta.get("warnings", ()), *differences, *copies, *_warn_about_splits(manifest, num_recurring)),
        missing=num_missing,
        missing_list=str(missing_list) if num_missing else "",
        undecodable=tuple(
            f"{manifest.columns.ids[position]!r} ({manifest.source_location(position)}): {reason}"
            for position, reason in undecodable.items()
        ),
        left_out=len(manifest.left_out or ()),
        left_out_list=str(left_out_path(home, name)) if manifest.left_out else "",
    )


def _find_recipe(home: Path, dataset: str, name: str, given: Recipe) -> tuple[str, str, Recipe]:
    """Return the plug-in, the name of the dataset, and what to prepare it from: what is given, completed by the last time."""
    is_plugin = dataset in plugins.names("datasets")
    last = read_recipe(home, (name or dataset) if is_plugin else dataset)
    if not is_plugin and last:
        name, dataset = name or dataset, last.plugin
    name, fetched = name or dataset, download_folder(dataset, home)
    has_old_root = not is_plugin and last and last.root and (isinstance(last.root, Address) or last.root.is_dir())
    root = given.root or (fetched if fetched.is_dir() and not has_old_root else None)
    if last is None or last.plugin != dataset or (is_plugin and (root or last.root is None)):
        return dataset, name, given._replace(plugin=dataset, root=root)
    moved = last.moved_to(root) if root else last
    logger.info("%s is prepared again%s", name, f" from {moved.root}" if moved.root else "")
    settings = {**last.settings, **given.settings}
    return dataset, name, moved._replace(image_root=given.image_root or moved.image_root, settings=settings)


def _is_below(place: Place, folder: Path) -> bool:
    return isinstance(place, Path) and place.absolute().is_relative_to(folder.absolute())


def _check_own_name(name: str, dataset: str) -> None:
    """Refuse a name that cannot be one of files, or that is another plug-in's."""
    if not DATASET_NAME.fullmatch(name):
        raise UserError(f"--name {name!r} may hold only letters, digits, '_', '-' and '.'")
    if name != dataset and name in plugins.names("datasets"):
        raise UserError(f"--name {name!r} is a dataset of its own: choose another name for what {dataset} builds")


def changeable_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that users can change, with their values: options, paths, and how texts become one vector."""
    fixed = _FIXED_KEYS if "description" in spec else (*_FIXED_KEYS, *_RIGHTS)
    options = {key: value for key, value in spec.items() if key == "splits" or (key not in fixed and _is_plain_value(value))}
    paths = {key: value for key, value in spec["layout"].items() if _is_plain_value(value)}
    return {**options, **paths, "empty": "skip", **{key: spec["text"][key] for key in TEXT_OPTIONS if key in spec["text"]}}


def apply_settings(spec: Mapping[str, Any], settings: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of the spec with settings changed.

    Args:
        spec: the spec of a dataset.
        settings: new values as text. Lists and percentages are written with commas: {"train_splits": "train,val",
            "splits": "80,10,10"}.

    Raises:
        UserError: a setting is unknown (the message lists the choices), or its value has the wrong type.
    """
    changed = {**spec, "layout": dict(spec["layout"]), "text": dict(spec["text"])}
    current = changeable_settings(spec)
    for key, text in settings.items():
        if key not in current:
            raise unknown_choice(key, f"unknown setting {key!r} of {spec['name']}", current)
        part = changed if key in spec else changed["text"] if key in TEXT_OPTIONS else changed["layout"]
        part[key] = _parse_setting(key, text, current[key])
    return changed


def _is_plain_value(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _parse_setting(key: str, text: str, example: Any) -> Any:
    """Convert the text of a setting to the type of the value in the YAML file, `example`."""
    if isinstance(example, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"setting {key!r} is {text!r}; it takes true or false")
        return text.lower() == "true"
    parts = [part.strip() for part in text.split(",")]
    numbers = 1 if isinstance(example, int) else len(example) if isinstance(example, dict) else 0
    if numbers and (len(parts) != numbers or not all(part.isdecimal() for part in parts)):
        names = f"for {', '.join(example)}, parted by commas" if isinstance(example, dict) else ""
        raise UserError(f"setting {key!r} is {text!r}; it takes a whole number {names}".rstrip())
    if isinstance(example, dict):
        return dict(zip(example, map(int, parts), strict=True))
    if isinstance(example, int):
        return int(text)
    return parts if isinstance(example, list) else text


def _with_image_root(spec: Mapping[str, Any], image_root: Path) -> dict[str, Any]:
    if "image_root" not in spec["layout"]:
        raise UserError(f"{spec['name']} finds its media by itself: leave out --image-root")
    if isinstance(address := parse_place(image_root), Address):
        raise UserError(f"--image-root {address}: media are read from a folder; {_TO_A_FOLDER}")
    if not image_root.is_dir():
        raise UserError(f"--image-root {image_root} is no folder")
    return {**spec, "layout": {**spec["layout"], "image_root": [str(image_root.resolve())]}}


def _compare_counts(manifest: Manifest, spec: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare the counts of a manifest with the published ones; a fixture (a small imitation for tests) has none.

    Returns:
        The rows of the table of counts, and one warning for each difference.
    """
    official = spec["counts_profile"] == "official"
    expected = {**spec.get("counts", {}), **spec.get("counts_warn", {})} if official else {}
    rows: list[dict[str, Any]] = []
    for name, found in found_counts(manifest).items():
        verdict = ("same" if found == expected[name] else "differs") if name in expected else ""
        rows.append(_count_row(name, found, expected.get(name, ""), verdict))
    warnings = [f"{row['count']}: {row['found']}, published {row['expected']}" for row in rows if row["verdict"] == "differs"]
    for split, published in (spec.get("class_counts", {}) if official else {}).items():
        found = manifest.meta["class_counts"][split]
        wanted = [published] * len(found) if isinstance(published, int) else published
        different = _different_classes(manifest.class_names, found, wanted)
        verdict = "differs" if different else "same"
        rows.append(_count_row(f"classes of {split}", len(found) - len(different), len(wanted), verdict))
        if different:
            warnings.append(f"{split}: {len(different)} classes differ from the published counts: {', '.join(different[:10])}")
    return rows, warnings


def _count_row(name: str, found: int, expected: int | str = "", verdict: str = "") -> dict[str, Any]:
    return {"count": name, "found": found, "expected": expected, "verdict": verdict}


def _different_classes(names: Sequence[str], found: Sequence[int], published: Sequence[int]) -> list[str]:
    if len(found) != len(published):
        return [f"{len(found)} classes, published {len(published)}"]
    pairs = zip(names, found, published, strict=True)
    return [f"{name} {count} (published {wanted})" for name, count, wanted in pairs if count != wanted]


def _leave_out_missing(manifest: Manifest, missing_list: Path, allow: bool) -> tuple[Manifest, NDArray[np.int64]]:
    """Remove the samples that have no media file, and list them in the file `missing_list`.

    Returns:
        The remaining manifest, and the size of the media file of each of its samples in bytes.

    Raises:
        UserError: media files are missing and that is not allowed, or all are missing.
    """
    sizes = sample_media_sizes(manifest)
    missing = np.flatnonzero(sizes < 0).tolist()
    if not missing:
        missing_list.unlink(missing_ok=True)
        return manifest, sizes
    lines = [f"{manifest.source_location(position)}: {manifest.samples[position].media.as_posix()}" for position in missing]
    write_atomic(missing_list, "\n".join(lines) + "\n")
    share = f"{len(missing)} of {len(manifest.samples)} media files of {manifest.dataset} are missing"
    if not allow:
        _refuse_irregular(manifest, missing)
        broken = sum((manifest.media_root / manifest.samples[position].media).is_symlink() for position in missing)
        links = f", {broken} of them links to nothing (get the files: git annex get, dvc pull)" if broken else ""
        raise UserError(
            f"{share} below {manifest.media_root}{links}, the first of {lines[0]}; {missing_list} lists them. "
            "Say where they are with --image-root, or leave these samples out with --allow-missing"
        )
    if len(missing) == len(manifest.samples):
        raise UserError(f"{share} below {manifest.media_root}: there is nothing to prepare; see {missing_list}")
    kept = np.flatnonzero(sizes >= 0)
    left_out = manifest.columns.ids.take(missing)
    return manifest.select(kept, meta={**manifest.meta, "missing_media": left_out}), sizes[kept]


def _refuse_irregular(manifest: Manifest, missing: Sequence[int]) -> None:
    """Refuse media that are there, but as a folder, pipe, socket or device: another folder of media does not help."""
    paths = {position: media_file(manifest.media_root, manifest.samples[position].media) for position in missing}
    odd = [position for position, path in paths.items() if os.path.exists(path) and not os.path.isfile(path)]
    if odd:
        kind = "a folder" if os.path.isdir(paths[odd[0]]) else "a pipe, socket or device"
        raise UserError(
            f"{len(odd)} of {len(manifest.samples)} media of {manifest.dataset} are no regular files, the first of "
            f"{manifest.source_location(odd[0])}: {paths[odd[0]]} is {kind}; put files in their place, or leave these samples "
            "out with --allow-missing"
        )


def _find_undecodable(manifest: Manifest, progress: bool) -> dict[int, str]:
    """Decode every media file as extraction does; return the reason for each that fails, by the position of its sample."""
    total, media = len(manifest.samples), manifest.columns.strings("media")
    batches = [range(start, min(start + DECODED_TOGETHER, total)) for start in range(0, total, DECODED_TOGETHER)]
    found: dict[int, str] = {}

    def media_of(batch: int) -> Iterator[PurePosixPath]:
        return map(PurePosixPath, media.take(np.array(batches[batch])))

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        ProgressBar(total=total, label="decoding", unit="file", show=progress) as bar,
        copied_media(manifest, list(map(len, batches)), media_of) as (here, copies),
    ):
        for number, batch in enumerate(batches):
            copies.wait(number)
            reasons = pool.map(lambda position: _decoding_problem(here, manifest.samples[position]), batch)
            found |= {position: reason for position, reason in zip(batch, reasons, strict=True) if reason}
            copies.drop(number)
            bar.update(len(batch))
    return found


def _decoding_problem(manifest: Manifest, sample: Sample) -> str:
    """Return why a media file cannot be decoded; "": it can."""
    try:
        path = manifest.media_path(sample)
        if manifest.meta["media_type"] == "video":
            open_frames(path, 1)
        else:
            open_image(path, 64)
    except UserError as error:
        return str(error)
    return ""


def _warn_about_splits(manifest: Manifest, num_recurring: int) -> list[str]:
    """Return warnings, with remedies: empty splits, samples without label, test texts that are also training texts."""
    sizes = split_counts(manifest)
    warnings = [f"the {split} split is empty" for split in ("train", "test") if not sizes[split]]
    if not sizes["val"]:
        remedy = manifest.meta["val_remedy"]
        again = f"; prepare with {remedy}" if remedy else ""
        warnings.append(f"the val split is empty, and heads are selected on it{again}")
    unlabelled = sum(np.count_nonzero(list_sizes(block.column(0)) == 0) for block in manifest.columns.blocks(["labels"]))
    if unlabelled:
        remedy = " with --set filter=label" if "filter" in manifest.meta["options"] else ""
        warnings.append(f"{unlabelled} samples have no label, and heads cannot be scored on them; leave them out{remedy}")
    if num_recurring:
        warnings.append(
            f"{num_recurring} of {sizes['test']} test samples have the texts of a training sample, as texts_recur: true allows;"
            " a score that reads test texts is flattered by them, one that reads images alone, as of all methods, is not"
        )
    return warnings
