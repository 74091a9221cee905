"""NUS-WIDE: Flickr photos with 81 verified concepts and their photographers' tags, from the official files or common imports.

An import is a list of the same photos that another project distributes (see `VARIANTS`). Labels are the AllLabels rows of the
photos in the split lists. TrainTestLabels hold a corrupt value and are never read. Sample ids are paths without suffix, because
six photo ids occur in two folders each, some with different labels. Tags are streamed. A photo takes about 1 KB of memory:
8.1 million photos, 30 times NUS-WIDE, took 7.6 GiB to prepare and 6.5 GiB to read.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.annotations import read_class_name_csv, read_class_number_lists, read_indicator_lists, read_tags_by_id
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import (
    binary_column,
    binary_rows,
    line_error,
    list_entry,
    locate,
    locate_all,
    parse_media_path,
    read_names,
    source_hashes,
    stripped_lines,
)
from pipeline.data.spec import held_out_percent, manifest_meta, official_root, required_counts
from pipeline.data.splits import is_held_out
from pipeline.runtime.errors import UserError
from pipeline.types import SPLITS, Sample

FILTERS = ("none", "label", "label_and_tag")
VARIANTS = ("official", "csv", "hashnet", "mmcv")
_TRAIN, _TEST = SPLITS.index("train"), SPLITS.index("test")
_PREFIX = re.compile(r"([A-Za-z]:/ImageData/)?Flickr/|(\./)?(data/nuswide_(81|21)/)?images/")
_SUFFIX = re.compile(r"\.[^./]+$")
_OFFICIAL_NAME = re.compile(r"[^/]+/[^/]*_(\d{1,18})\.jpg", re.IGNORECASE)
_IMPORTED_ID = re.compile(r"_(\d{1,18})(_[0-9a-f]+_[a-z])?\.[a-z]+", re.IGNORECASE)  # …/<n>_<id>.jpg or <n>_<id>_<secret>_m.jpg


class RaggedRows(NamedTuple):
    """A different number of values for each of N rows: those of a row are `values[offsets[row] : offsets[row + 1]]`."""

    offsets: NDArray[np.int64]  # [N + 1]
    values: NDArray[np.int32]

    @staticmethod
    def from_pairs(row: NDArray[np.int64], value: NDArray[np.int32], num_rows: int) -> RaggedRows:
        """Build from (row, value) pairs; rows may come in any order, and the values of a row keep their order."""
        sizes = np.bincount(row, minlength=num_rows)
        return RaggedRows(np.concatenate([[0], np.cumsum(sizes)]), value[np.argsort(row, kind="stable")])

    def sizes(self) -> NDArray[np.int64]:
        """Return the number of values of each row, [N]."""
        return np.diff(self.offsets)

    def row(self, row: int) -> list[int]:
        """Return the values of a row."""
        return self.values[self.offsets[row] : self.offsets[row + 1]].tolist()


class Photos(NamedTuple):
    """All N photos of the image list: their split, labels and tags, and the names of labels and tags."""

    paths: list[str]
    split: NDArray[np.int8]  # [N] index into SPLITS
    photo_id: NDArray[np.int64]  # [N] number of the photo at Flickr; 0 if the file name holds none
    labels: RaggedRows
    tags: RaggedRows  # positions in the vocabulary
    class_names: list[str]
    vocabulary: list[str]  # the names of the tags


class NusWide(Dataset):
    """The official lists, or one of the imports that circulate."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the official files, or from the import that `spec["variant"]` names.

        Args:
            spec: the contents of nuswide.yaml.
            root: the folder of the official files, or of the import.

        Raises:
            UserError: an option is unknown, a file is missing or faulty (the message names file and line), or the counts are
                not the expected ones.
        """
        for key, choices in (("filter", FILTERS), ("variant", VARIANTS)):
            if spec[key] not in choices:
                raise UserError(f"unknown {key} {spec[key]!r}; choose one of: {', '.join(choices)}")
        percent = held_out_percent(spec)
        root = official_root(spec, root)
        photos, list_entries, files = (
            _read_official(spec["layout"], root) if spec["variant"] == "official" else _read_import(spec, root)
        )
        labelled, tagged = photos.labels.sizes() > 0, photos.tags.sizes() > 0
        both = labelled & tagged
        keep = {"none": np.full_like(both, True), "label": labelled, "label_and_tag": both}[spec["filter"]]
        kept, split = np.flatnonzero(keep), _with_validation(photos, percent)
        in_two_splits = _rows_in_two_splits(photos, kept, split)
        manifest = Manifest(
            dataset=spec["name"],
            label_kind=spec["label_kind"],
            class_names=tuple(photos.class_names),
            samples=tuple(_samples(photos, kept, split, set(in_two_splits))),
            meta=manifest_meta(
                spec,
                sources=source_hashes(files, root),
                lists=list_entries,
                counts=_counts(photos, labelled, tagged),
                class_counts=_class_counts(photos, both),
                warnings=_warnings(photos, kept, in_two_splits),
            ),
            media_root=locate(root, spec["layout"]["image_root"], "the folder of images"),
            rows=() if keep.all() else tuple(kept.tolist()),
        )
        check_manifest(manifest, required_counts(spec))
        return manifest


def _samples(photos: Photos, kept: NDArray[np.int64], split: NDArray[np.int8], in_two_splits: set[int]) -> Iterator[Sample]:
    """Yield the samples of the kept rows. Photos in two splits belong to no group, because a group may not be divided."""
    for row in kept.tolist():
        path, photo_id = photos.paths[row], int(photos.photo_id[row])
        yield Sample(
            id=_SUFFIX.sub("", path),
            split=SPLITS[split[row]],
            media=Path(path),
            texts=tuple(photos.vocabulary[tag] for tag in photos.tags.row(row)),
            labels=tuple(photos.labels.row(row)),
            group=str(photo_id) if photo_id and photo_id not in in_two_splits else "",
        )


def _with_validation(photos: Photos, percent: int) -> NDArray[np.int8]:
    """Return the splits [N] after `percent` of the training photos, chosen by the SHA-256 of their ids, moved to validation."""
    split = photos.split.copy()
    for row in np.flatnonzero(split == _TRAIN).tolist() if percent else ():
        name = str(photos.photo_id[row]) if photos.photo_id[row] else photos.paths[row]
        if is_held_out(name, percent):
            split[row] = SPLITS.index("val")
    return split


def _rows_in_two_splits(photos: Photos, kept: NDArray[np.int64], split: NDArray[np.int8]) -> dict[int, list[int]]:
    """Return the rows of every photo id that the official lists have in more than one split."""
    ids = photos.photo_id[kept]
    known, counts = np.unique(ids[ids > 0], return_counts=True)
    rows_of_id: dict[int, list[int]] = {}
    for row in kept[np.isin(ids, known[counts > 1])].tolist():
        rows_of_id.setdefault(int(photos.photo_id[row]), []).append(row)
    return {photo_id: rows for photo_id, rows in rows_of_id.items() if len({int(split[row]) for row in rows}) > 1}


def _warnings(photos: Photos, kept: NDArray[np.int64], in_two_splits: dict[int, list[int]]) -> list[str]:
    """Return warnings about photos that occur in two folders, and about photos that occur in two splits."""
    ids = photos.photo_id[kept]
    num_repeated = int((ids > 0).sum()) - len(np.unique(ids[ids > 0]))
    if not num_repeated:
        return []
    pairs = "; ".join(" and ".join(photos.paths[row] for row in rows) for rows in in_two_splits.values())
    return [
        f"photos that stand in a second folder: {num_repeated}; they are kept apart, as their labels may differ",
        *([f"the same photo is in two splits, as in the official lists: {pairs}"] if pairs else []),
    ]


def _counts(photos: Photos, labelled: NDArray[np.bool_], tagged: NDArray[np.bool_]) -> dict[str, int]:
    """Count what the lists hold before the filter.

    Counted are all images, and those that are labelled, tagged or both, in all and for each split; and the numbers of labels,
    tags, tag names, folders and photo ids.
    """
    every_image = np.full_like(labelled, True)
    counts: dict[str, int] = {}
    for name, is_counted in (("images", every_image), ("labelled", labelled), ("tagged", tagged), ("both", labelled & tagged)):
        counts[name] = int(is_counted.sum())
        counts |= {f"{name}.{SPLITS[split]}": int((is_counted & (photos.split == split)).sum()) for split in (_TRAIN, _TEST)}
    return {
        **counts,
        "labels": len(photos.labels.values),
        "tags": len(photos.tags.values),
        "vocabulary": len(photos.vocabulary),
        "folders": len({path.rpartition("/")[0] for path in photos.paths}),
        "photo_ids": len(np.unique(photos.photo_id[photos.photo_id > 0])),
    }


def _class_counts(photos: Photos, both: NDArray[np.bool_]) -> dict[str, list[int]]:
    """Return the images of each class among those with a label and a tag; an exact check of the filter."""
    row = np.repeat(np.arange(len(photos.paths)), photos.labels.sizes())
    return {
        SPLITS[split]: np.bincount(
            photos.labels.values[(both & (photos.split == split))[row]], minlength=len(photos.class_names)
        ).tolist()
        for split in (_TRAIN, _TEST)
    }


def _read_official(layout: Mapping[str, Any], root: Path) -> tuple[Photos, list[dict[str, Any]], list[Path]]:
    """Return the photos of the official files, the entry of their image list, and all files that were read."""
    lists = locate(root, layout["imagelist_dir"], "the folder of image lists")
    whole_list, train, test = locate_all(
        lists, [[f"{name}list.txt"] for name in ("Image", "TrainImage", "TestImage")], "image lists"
    )
    concepts = locate(root, layout["concepts"], "the list of concepts")
    tag_dir = locate(root, layout["tags_dir"], "the folder of tags")
    vocabulary = locate(tag_dir, ["TagList1k.txt"], "the list of tags")
    class_names = read_names(concepts)
    label_dir = locate(root, layout["labels_dir"], "the folder AllLabels")
    label_files = locate_all(label_dir, [[f"Labels_{name}.txt"] for name in class_names], "label files")
    index, photo_ids = _read_image_list(whole_list)
    rows_of_split = {_TRAIN: _list_positions(train, index), _TEST: _list_positions(test, index)}
    tags, tag_files = _read_tags(tag_dir, len(read_names(vocabulary)), rows_of_split, len(index))
    photos = Photos(
        paths=list(index),
        split=_splits_of_rows(rows_of_split, whole_list, test, len(index)),
        photo_id=photo_ids,
        labels=_read_labels(label_files, len(index)),
        tags=tags,
        class_names=class_names,
        vocabulary=read_names(vocabulary),
    )
    files = [whole_list, train, test, concepts, vocabulary, *label_files, *tag_files]
    return photos, [list_entry(whole_list, root, len(index))], files


def _parse_path(text: str, path: Path, line: int) -> str:
    """Return a path relative to the image folder, without the prefixes of official and imported lists."""
    posix = text.replace("\\", "/")
    return parse_media_path(posix[match.end() :] if (match := _PREFIX.match(posix)) else posix, path, line)


def _read_image_list(path: Path) -> tuple[dict[str, int], NDArray[np.int64]]:
    """Return the row of every path, in the order of the file, and the photo ids [N]."""
    index: dict[str, int] = {}
    photo_ids = array("q")
    for line, text in stripped_lines(path):
        relative = _parse_path(text, path, line)
        match = _OFFICIAL_NAME.fullmatch(relative)
        if not match:
            raise line_error(path, line, f"{relative[:80]!r} is not folder/NNNN_photoid.jpg")
        if index.setdefault(relative, len(photo_ids)) != len(photo_ids):
            raise line_error(path, line, f"{relative} is already on line {index[relative] + 1}")
        photo_ids.append(int(match[1]))
    return index, np.frombuffer(photo_ids, np.int64)


def _list_positions(path: Path, index: Mapping[str, int]) -> NDArray[np.int64]:
    """Return, for each line of a split list, its row in the image list."""
    positions = array("q")
    seen = bytearray(len(index))
    for line, text in stripped_lines(path):
        relative = _parse_path(text, path, line)
        position = index.get(relative, -1)
        if position < 0 or seen[position]:
            raise line_error(path, line, f"{relative} is {'on this list twice' if position >= 0 else 'not on the image list'}")
        seen[position] = 1
        positions.append(position)
    return np.frombuffer(positions, np.int64)


def _splits_of_rows(
    rows_of_split: Mapping[int, NDArray[np.int64]], whole_list: Path, test: Path, num_rows: int
) -> NDArray[np.int8]:
    """Return the split of every row [N]; every image must be on exactly one split list."""
    split = np.full(num_rows, -1, np.int8)
    split[rows_of_split[_TRAIN]] = _TRAIN
    shared = np.flatnonzero(split[rows_of_split[_TEST]] >= 0)
    if len(shared):
        raise line_error(test, int(shared[0]) + 1, "this image is on the training list too")
    split[rows_of_split[_TEST]] = _TEST
    if (split < 0).any():
        raise line_error(whole_list, int(np.argmin(split)) + 1, "this image is on neither split list")
    return split


def _read_labels(files: Iterable[Path], num_rows: int) -> RaggedRows:
    """Return the labels of every row from one file of zeros and ones per class."""
    columns = [binary_column(path, num_rows) for path in files]
    classes = np.repeat(np.arange(len(columns), dtype=np.int32), [len(column) for column in columns])
    return RaggedRows.from_pairs(np.concatenate(columns), classes, num_rows)


def _read_tags(
    folder: Path, width: int, rows_of_split: Mapping[int, NDArray[np.int64]], num_rows: int
) -> tuple[RaggedRows, list[Path]]:
    """Return the tags of every row, and the files that were read.

    Tags are streamed from the files of the splits or, if these do not exist, from AllTags1k.txt.

    Args:
        folder: the folder of the tag files.
        width: the number of tags in the vocabulary.
        rows_of_split: the row in the image list of every line, for each split.
        num_rows: the number of rows N of the image list.
    """
    files = {_TRAIN: folder / "Train_Tags1k.dat", _TEST: folder / "Test_Tags1k.dat"}
    if not any(path.exists() for path in files.values()) and (folder / "AllTags1k.txt").exists():
        files, rows_of_split = {_TRAIN: folder / "AllTags1k.txt"}, {_TRAIN: np.arange(num_rows)}
    row_of: list[NDArray[np.int64]] = []
    values = array("i")
    for split, path in files.items():
        found = locate(folder, [path.name], "a file of tags")
        sizes = array("q")
        for positions in binary_rows(found, width):
            sizes.append(len(positions))
            values.extend(positions.tolist())
        if len(sizes) != len(rows_of_split[split]):
            raise line_error(
                found, len(sizes), f"the file ends after {len(sizes)} rows, the image list has {len(rows_of_split[split])}"
            )
        row_of.append(np.repeat(rows_of_split[split], np.frombuffer(sizes, np.int64)))
    return RaggedRows.from_pairs(np.concatenate(row_of), np.frombuffer(values, np.int32), num_rows), list(files.values())


def _read_import(spec: Mapping[str, Any], root: Path) -> tuple[Photos, list[dict[str, Any]], list[Path]]:
    """Return the photos of an import, the entries of its lists, and all files that were read.

    The tags are those of the official file All_Tags.txt, found by photo id.
    """
    options, kind = spec["variants"][spec["variant"]], spec["variant"]
    if kind == "csv":
        files = [locate(root, [options["file"]], "the CSV file")]
        class_names, lines = read_class_name_csv(files[0], options["splits"])
    else:
        lists = {split: locate(root, [name], "a label list") for split, name in options.items()}
        files = list(lists.values())
        class_names, lines = (read_indicator_lists if kind == "hashnet" else read_class_number_lists)(
            lists, spec["class_names"]
        )
    paths = [_parse_path(line.media, line.file, line.line) for line in lines]
    photo_id = np.array([int(match[1]) if (match := _IMPORTED_ID.search(path)) else 0 for path in paths], np.int64)
    vocabulary, tags, tag_files = _tags_by_id(spec, root, photo_id)
    label_rows = np.repeat(np.arange(len(lines)), [len(line.labels) for line in lines])
    label_values = np.array([label for line in lines for label in line.labels], np.int32)
    photos = Photos(
        paths=paths,
        split=np.array([SPLITS.index(line.split) for line in lines], np.int8),
        photo_id=photo_id,
        labels=RaggedRows.from_pairs(label_rows, label_values, len(lines)),
        tags=tags,
        class_names=class_names,
        vocabulary=vocabulary,
    )
    lines_of_file = [[line for line in lines if line.file == path] for path in files]
    list_entries = [
        list_entry(path, root, len(own), own[0].line) for path, own in zip(files, lines_of_file, strict=True) if own
    ]
    return photos, list_entries, [*files, *tag_files]


def _tags_by_id(spec: Mapping[str, Any], root: Path, photo_id: NDArray[np.int64]) -> tuple[list[str], RaggedRows, list[Path]]:
    """Return the vocabulary, the tags of every row, and the files that were read.

    If there is no file of tags, all three are empty.

    Raises:
        UserError: there is no file of tags, and the filter needs tags.
    """
    candidates = [f"{folder}/All_Tags.txt" for folder in spec["layout"]["tags_dir"]]
    try:
        tags_file = locate(root, candidates, "the file of tags")
    except UserError as error:
        if spec["filter"] == "label_and_tag":
            raise UserError(f"{error}; without it prepare with --set filter=label") from error
        return [], RaggedRows.from_pairs(np.zeros(0, np.int64), np.zeros(0, np.int32), len(photo_id)), []
    words_file = locate(tags_file.parent, ["TagList1k.txt"], "the list of tags")
    vocabulary = read_names(words_file)
    tags_of = read_tags_by_id(tags_file, vocabulary)
    tags = [tags_of.get(number, []) for number in photo_id.tolist()]
    row = np.repeat(np.arange(len(tags)), [len(own) for own in tags])
    return (
        vocabulary,
        RaggedRows.from_pairs(row, np.array([tag for own in tags for tag in own], np.int32), len(tags)),
        [tags_file, words_file],
    )
