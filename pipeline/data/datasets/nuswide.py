"""NUS-WIDE: Flickr photos with 81 checked concepts and their photographers' tags, from the official files or common imports.

Labels are the AllLabels rows of the photos in the split lists; TrainTestLabels, which hold a corrupt value, are never read.
Sample ids are the paths without suffix, because six photo ids stand in two folders each, some with different labels.
Tags are streamed; a photo takes about 1 KB of memory: 8.1 million, 30 times NUS-WIDE, took 7.6 GiB to prepare, 6.5 to read.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.annotations import indicators, named, numbers, words_by_id
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import (
    binary_column,
    binary_rows,
    fault,
    listing,
    locate,
    locate_all,
    media_path,
    read_names,
    rows,
    sources,
)
from pipeline.data.spec import describe_spec, enforced_counts, held_out_percent, official_root
from pipeline.data.splits import is_held_out
from pipeline.types import SPLITS, Sample

FILTERS = ("none", "label", "label_and_tag")
VARIANTS = ("official", "csv", "hashnet", "mmcv")
TRAIN, TEST = SPLITS.index("train"), SPLITS.index("test")
_PREFIX = re.compile(r"([A-Za-z]:/ImageData/)?Flickr/|(\./)?(data/nuswide_(81|21)/)?images/")
_SUFFIX = re.compile(r"\.[^./]+$")
_OFFICIAL_NAME = re.compile(r"[^/]+/[^/]*_(\d{1,18})\.jpg", re.IGNORECASE)
_IMPORTED_ID = re.compile(r"_(\d{1,18})(_[0-9a-f]+_[a-z])?\.[a-z]+", re.IGNORECASE)  # …/<n>_<id>.jpg or <n>_<id>_<secret>_m.jpg


class Ragged(NamedTuple):
    """Numbers for each of N rows: those of a row are `values[offsets[row] : offsets[row + 1]]`."""

    offsets: NDArray[np.int64]  # [N + 1]
    values: NDArray[np.int32]

    @staticmethod
    def of(row: NDArray[np.int64], value: NDArray[np.int32], num_rows: int) -> Ragged:
        """From (row, value) pairs in any order of rows; the values of a row keep their order."""
        sizes = np.bincount(row, minlength=num_rows)
        return Ragged(np.concatenate([[0], np.cumsum(sizes)]), value[np.argsort(row, kind="stable")])

    def sizes(self) -> NDArray[np.int64]:
        """How many values each row has, [N]."""
        return np.diff(self.offsets)

    def row(self, row: int) -> list[int]:
        """The values of a row."""
        return self.values[self.offsets[row] : self.offsets[row + 1]].tolist()


class Photos(NamedTuple):
    """Every row of the image list: where it belongs, what it shows, how it is tagged, and the words for that."""

    paths: list[str]
    split: NDArray[np.int8]  # [N] index into SPLITS
    photo_id: NDArray[np.int64]  # [N] of Flickr; 0 when the name holds none
    labels: Ragged
    tags: Ragged
    class_names: list[str]
    vocabulary: list[str]


def build(spec: Mapping[str, Any], root: Path | None) -> Manifest:
    """The manifest of the official files, or of the import that `spec["variant"]` names.

    `ValueError` with file and line for whatever is wrong in them, or when the counts are not the expected ones.
    """
    for key, choices in (("filter", FILTERS), ("variant", VARIANTS)):
        if spec[key] not in choices:
            raise ValueError(f"unknown {key} {spec[key]!r}; choose one of: {', '.join(choices)}")
    percent = held_out_percent(spec)
    root = official_root(spec, root)
    photos, listed, files = _official(spec["layout"], root) if spec["variant"] == "official" else _imported(spec, root)
    labelled, tagged = photos.labels.sizes() > 0, photos.tags.sizes() > 0
    both = labelled & tagged
    keep = {"none": np.full_like(both, True), "label": labelled, "label_and_tag": both}[spec["filter"]]
    kept, split = np.flatnonzero(keep), _hold_out(photos, percent)
    straddling = _straddling(photos, kept, split)
    manifest = Manifest(
        dataset=spec["name"],
        label_kind=spec["label_kind"],
        class_names=tuple(photos.class_names),
        samples=tuple(_samples(photos, kept, split, set(straddling))),
        meta=describe_spec(
            spec,
            sources=sources(files, root),
            lists=listed,
            counts=_counts(photos, labelled, tagged),
            class_counts=_class_counts(photos, both),
            warnings=_warnings(photos, kept, straddling),
        ),
        media_root=locate(root, spec["layout"]["image_root"], "the folder of images"),
        rows=() if keep.all() else tuple(kept.tolist()),
    )
    check_manifest(manifest, enforced_counts(spec))
    return manifest


def _samples(photos: Photos, kept: NDArray[np.int64], split: NDArray[np.int8], straddling: set[int]) -> Iterator[Sample]:
    for row in kept.tolist():
        path, photo_id = photos.paths[row], int(photos.photo_id[row])
        yield Sample(
            id=_SUFFIX.sub("", path),
            split=SPLITS[split[row]],
            media=Path(path),
            texts=tuple(photos.vocabulary[tag] for tag in photos.tags.row(row)),
            labels=tuple(photos.labels.row(row)),
            group=str(photo_id) if photo_id and photo_id not in straddling else "",
        )


def _hold_out(photos: Photos, percent: int) -> NDArray[np.int8]:
    """The splits [N], with `percent` of the training photos, chosen by the SHA-256 of their ids, moved to validation."""
    split = photos.split.copy()
    for row in np.flatnonzero(split == TRAIN).tolist() if percent else ():
        name = str(photos.photo_id[row]) if photos.photo_id[row] else photos.paths[row]
        if is_held_out(name, percent):
            split[row] = SPLITS.index("val")
    return split


def _straddling(photos: Photos, kept: NDArray[np.int64], split: NDArray[np.int8]) -> dict[int, list[int]]:
    """The rows of every photo id that the official lists have put into more than one split."""
    ids = photos.photo_id[kept]
    known, counts = np.unique(ids[ids > 0], return_counts=True)
    twins: dict[int, list[int]] = {}
    for row in kept[np.isin(ids, known[counts > 1])].tolist():
        twins.setdefault(int(photos.photo_id[row]), []).append(row)
    return {photo_id: twin for photo_id, twin in twins.items() if len({int(split[row]) for row in twin}) > 1}


def _warnings(photos: Photos, kept: NDArray[np.int64], straddling: dict[int, list[int]]) -> list[str]:
    ids = photos.photo_id[kept]
    num_twins = int((ids > 0).sum()) - len(np.unique(ids[ids > 0]))
    if not num_twins:
        return []
    pairs = "; ".join(" and ".join(photos.paths[row] for row in twin) for twin in straddling.values())
    return [
        f"photos that stand in a second folder: {num_twins}; they are kept apart, as their labels may differ",
        *([f"the same photo is in two splits, as in the official lists: {pairs}"] if pairs else []),
    ]


def _counts(photos: Photos, labelled: NDArray[np.bool_], tagged: NDArray[np.bool_]) -> dict[str, int]:
    """What the lists hold before the filter: images, labelled, tagged, both, whole and by split; and sums of marks."""
    everything = np.full_like(labelled, True)
    counts: dict[str, int] = {}
    for name, rows_in in (("images", everything), ("labelled", labelled), ("tagged", tagged), ("both", labelled & tagged)):
        counts[name] = int(rows_in.sum())
        counts |= {f"{name}.{SPLITS[split]}": int((rows_in & (photos.split == split)).sum()) for split in (TRAIN, TEST)}
    return {
        **counts,
        "labels": len(photos.labels.values),
        "tags": len(photos.tags.values),
        "vocabulary": len(photos.vocabulary),
        "folders": len({path.rpartition("/")[0] for path in photos.paths}),
        "photo_ids": len(np.unique(photos.photo_id[photos.photo_id > 0])),
    }


def _class_counts(photos: Photos, both: NDArray[np.bool_]) -> dict[str, list[int]]:
    """Images per class among those with a label and a tag: the exact check of the filter."""
    row = np.repeat(np.arange(len(photos.paths)), photos.labels.sizes())
    return {
        SPLITS[split]: np.bincount(
            photos.labels.values[(both & (photos.split == split))[row]], minlength=len(photos.class_names)
        ).tolist()
        for split in (TRAIN, TEST)
    }


def _official(layout: Mapping[str, Any], root: Path) -> tuple[Photos, list[dict[str, Any]], list[Path]]:
    """The photos of the official files, the list they stand in, and all files that were read."""
    lists = locate(root, layout["imagelist_dir"], "the folder of image lists")
    whole, train, test = locate_all(
        lists, [[f"{name}list.txt"] for name in ("Image", "TrainImage", "TestImage")], "image lists"
    )
    concepts = locate(root, layout["concepts"], "the list of concepts")
    tag_dir = locate(root, layout["tags_dir"], "the folder of tags")
    vocabulary = locate(tag_dir, ["TagList1k.txt"], "the list of tags")
    class_names = read_names(concepts)
    label_dir = locate(root, layout["labels_dir"], "the folder AllLabels")
    label_files = locate_all(label_dir, [[f"Labels_{name}.txt"] for name in class_names], "label files")
    index, photo_ids = _image_list(whole)
    order = {TRAIN: _positions(train, index), TEST: _positions(test, index)}
    tags, tag_files = _tags(tag_dir, len(read_names(vocabulary)), order, len(index))
    photos = Photos(
        paths=list(index),
        split=_splits(order, whole, test, len(index)),
        photo_id=photo_ids,
        labels=_labels(label_files, len(index)),
        tags=tags,
        class_names=class_names,
        vocabulary=read_names(vocabulary),
    )
    files = [whole, train, test, concepts, vocabulary, *label_files, *tag_files]
    return photos, [listing(whole, root, len(index))], files


def _relative(text: str, path: Path, line: int) -> str:
    """A path below the image folder: without the prefixes that official and imported lists put before it."""
    posix = text.replace("\\", "/")
    return media_path(posix[match.end() :] if (match := _PREFIX.match(posix)) else posix, path, line)


def _image_list(path: Path) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Position of every path, in file order, and the photo ids [N]."""
    index: dict[str, int] = {}
    photo_ids = array("q")
    for line, text in rows(path):
        relative = _relative(text, path, line)
        match = _OFFICIAL_NAME.fullmatch(relative)
        if not match:
            raise fault(path, line, f"{relative[:80]!r} is not folder/NNNN_photoid.jpg")
        if index.setdefault(relative, len(photo_ids)) != len(photo_ids):
            raise fault(path, line, f"{relative} is already on line {index[relative] + 1}")
        photo_ids.append(int(match[1]))
    return index, np.frombuffer(photo_ids, np.int64)


def _positions(path: Path, index: Mapping[str, int]) -> NDArray[np.int64]:
    """Where the rows of a split list stand in the image list."""
    positions = array("q")
    seen = bytearray(len(index))
    for line, text in rows(path):
        relative = _relative(text, path, line)
        position = index.get(relative, -1)
        if position < 0 or seen[position]:
            raise fault(path, line, f"{relative} is {'on this list twice' if position >= 0 else 'not on the image list'}")
        seen[position] = 1
        positions.append(position)
    return np.frombuffer(positions, np.int64)


def _splits(order: Mapping[int, NDArray[np.int64]], whole: Path, test: Path, num_rows: int) -> NDArray[np.int8]:
    split = np.full(num_rows, -1, np.int8)
    split[order[TRAIN]] = TRAIN
    shared = np.flatnonzero(split[order[TEST]] >= 0)
    if len(shared):
        raise fault(test, int(shared[0]) + 1, "this image is on the training list too")
    split[order[TEST]] = TEST
    if (split < 0).any():
        raise fault(whole, int(np.argmin(split)) + 1, "this image is on neither split list")
    return split


def _labels(files: Iterable[Path], num_rows: int) -> Ragged:
    columns = [binary_column(path, num_rows) for path in files]
    classes = np.repeat(np.arange(len(columns), dtype=np.int32), [len(column) for column in columns])
    return Ragged.of(np.concatenate(columns), classes, num_rows)


def _tags(folder: Path, width: int, order: Mapping[int, NDArray[np.int64]], num_rows: int) -> tuple[Ragged, list[Path]]:
    """The tags of every row, streamed from the split files or, when they are not there, from AllTags1k.txt."""
    files = {TRAIN: folder / "Train_Tags1k.dat", TEST: folder / "Test_Tags1k.dat"}
    if not any(path.exists() for path in files.values()) and (folder / "AllTags1k.txt").exists():
        files, order = {TRAIN: folder / "AllTags1k.txt"}, {TRAIN: np.arange(num_rows)}
    row_of: list[NDArray[np.int64]] = []
    values = array("i")
    for split, path in files.items():
        found = locate(folder, [path.name], "a file of tags")
        sizes = array("q")
        for positions in binary_rows(found, width):
            sizes.append(len(positions))
            values.extend(positions.tolist())
        if len(sizes) != len(order[split]):
            raise fault(found, len(sizes), f"the file ends after {len(sizes)} rows, the image list has {len(order[split])}")
        row_of.append(np.repeat(order[split], np.frombuffer(sizes, np.int64)))
    return Ragged.of(np.concatenate(row_of), np.frombuffer(values, np.int32), num_rows), list(files.values())


def _imported(spec: Mapping[str, Any], root: Path) -> tuple[Photos, list[dict[str, Any]], list[Path]]:
    """The photos of an import; their tags are those of the official All_Tags.txt, by photo id."""
    options, kind = spec["variants"][spec["variant"]], spec["variant"]
    if kind == "csv":
        files = [locate(root, [options["file"]], "the CSV file")]
        class_names, lines = named(files[0], options["splits"])
    else:
        lists = {split: locate(root, [name], "a label list") for split, name in options.items()}
        files = list(lists.values())
        class_names, lines = (indicators if kind == "hashnet" else numbers)(lists, spec["class_names"])
    paths = [_relative(line.media, line.file, line.line) for line in lines]
    photo_id = np.array([int(match[1]) if (match := _IMPORTED_ID.search(path)) else 0 for path in paths], np.int64)
    vocabulary, tags, tag_files = _tags_by_id(spec, root, photo_id)
    label_rows = np.repeat(np.arange(len(lines)), [len(line.labels) for line in lines])
    label_values = np.array([label for line in lines for label in line.labels], np.int32)
    photos = Photos(
        paths=paths,
        split=np.array([SPLITS.index(line.split) for line in lines], np.int8),
        photo_id=photo_id,
        labels=Ragged.of(label_rows, label_values, len(lines)),
        tags=tags,
        class_names=class_names,
        vocabulary=vocabulary,
    )
    of_file = [[line for line in lines if line.file == path] for path in files]
    listed = [listing(path, root, len(own), own[0].line) for path, own in zip(files, of_file, strict=True) if own]
    return photos, listed, [*files, *tag_files]


def _tags_by_id(spec: Mapping[str, Any], root: Path, photo_id: NDArray[np.int64]) -> tuple[list[str], Ragged, list[Path]]:
    """Vocabulary, tags of every row and the files they come from; no tags without files, unless the filter asks for tags."""
    candidates = [f"{folder}/All_Tags.txt" for folder in spec["layout"]["tags_dir"]]
    try:
        tags_file = locate(root, candidates, "the file of tags")
    except ValueError as error:
        if spec["filter"] == "label_and_tag":
            raise ValueError(f"{error}; without it prepare with --set filter=label") from error
        return [], Ragged.of(np.zeros(0, np.int64), np.zeros(0, np.int32), len(photo_id)), []
    words_file = locate(tags_file.parent, ["TagList1k.txt"], "the list of tags")
    vocabulary = read_names(words_file)
    tags_of = words_by_id(tags_file, vocabulary)
    tags = [tags_of.get(number, []) for number in photo_id.tolist()]
    row = np.repeat(np.arange(len(tags)), [len(own) for own in tags])
    return (
        vocabulary,
        Ragged.of(row, np.array([tag for own in tags for tag in own], np.int32), len(tags)),
        [tags_file, words_file],
    )
