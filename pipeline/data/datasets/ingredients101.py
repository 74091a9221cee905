"""Ingredients-101 on Food-101: pictures of 101 dishes. The text of a picture is the ingredient list of its dish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import (
    line_error,
    list_entry,
    locate,
    locate_all,
    parse_media_path,
    parse_whole_number,
    read_names,
    source_hashes,
    source_name,
    stripped_lines,
)
from pipeline.data.spec import manifest_meta, official_root, required_counts, target_splits
from pipeline.types import Sample

_SPLITS = ("train", "val", "test")
_LIST_KINDS = (("image", "img"), ("label", "label"))  # the lists are called <split>_images.txt, in some copies img_<split>.txt


class FoodPicture(NamedTuple):
    """A line of <split>_images.txt with the same line of <split>_labels.txt."""

    split: str
    name: str  # <class folder>/<number>, without suffix
    label: int


class Ingredients101(Dataset):
    """The lists of Ingredients-101, with the pictures of Food-101."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the official lists.

        Args:
            spec: the contents of ingredients101.yaml.
            root: the folder of the official files.

        Raises:
            UserError: a list is missing or faulty (the message names file and line), or the counts are not the expected ones.
        """
        layout, root = spec["layout"], official_root(spec, root)
        target = target_splits(spec, _SPLITS)
        folder = locate(root, layout["ann_dir"], "the folder of annotations")
        file_names = [["classes.txt"], [spec["ingredients"]]]
        file_names += [[f"{split}_{kind}s.txt", f"{short}_{split}.txt"] for kind, short in _LIST_KINDS for split in _SPLITS]
        classes, ingredients, *split_lists = locate_all(folder, file_names, "official lists")
        images, labels = (dict(zip(_SPLITS, own, strict=True)) for own in (split_lists[:3], split_lists[3:]))
        class_names = [name.lower().replace(" ", "_") for name in read_names(classes)]
        texts = _ingredients(ingredients, len(class_names))
        pictures = [each for split in _SPLITS for each in _pictures(split, images[split], labels[split], class_names)]
        sizes = Counter(picture.split for picture in pictures)
        media_root = locate(root, layout["image_root"], "the folder of images")
        per_class = Counter((picture.split, picture.label) for picture in pictures)
        manifest = Manifest(
            dataset=spec["name"],
            label_kind=spec["label_kind"],
            class_names=tuple(class_names),
            samples=tuple(
                Sample(
                    picture.name, target[picture.split], Path(f"{picture.name}.jpg"), texts[picture.label], (picture.label,), ""
                )
                for picture in pictures
            ),
            meta=manifest_meta(
                spec,
                sources=source_hashes([classes, ingredients, *images.values(), *labels.values()], root),
                lists=[list_entry(path, root, sizes[split]) for split, path in images.items()],
                counts={
                    "images": len(pictures),
                    **{f"images.{split}": sizes[split] for split in _SPLITS},
                    "vocabulary": len({word for text in texts for word in text}),
                },
                class_counts={split: [per_class[split, label] for label in range(len(class_names))] for split in _SPLITS},
                warnings=_compare_food101(layout["food101_meta"], root, pictures),
            ),
            media_root=media_root,
        )
        check_manifest(manifest, required_counts(spec))
        return manifest


def _ingredients(path: Path, num_classes: int) -> list[tuple[str, ...]]:
    """Return the ingredients of every class.

    Each line is one comma-separated list. Doubled commas leave empty names, which are skipped.
    """
    texts = [tuple(name for part in text.lower().split(",") if (name := part.strip())) for _, text in stripped_lines(path)]
    if len(texts) != num_classes:
        raise line_error(path, len(texts), f"the file ends after {len(texts)} lists, there are {num_classes} classes")
    return texts


def _pictures(split: str, images: Path, labels: Path, class_names: list[str]) -> list[FoodPicture]:
    """Return the pictures of a split.

    A label is the line number of its class, from 0, and must agree with the folder of the picture.
    """
    names_in, labels_in = list(stripped_lines(images)), list(stripped_lines(labels))
    if len(names_in) != len(labels_in):
        raise line_error(
            labels, len(labels_in), f"the file ends after {len(labels_in)} labels, {images.name} has {len(names_in)}"
        )
    pictures = []
    for (line, text), (_, label) in zip(names_in, labels_in, strict=True):
        name = parse_media_path(text.removeprefix("/").removesuffix(".jpg"), images, line)
        number = parse_whole_number(label, labels, line)
        if number >= len(class_names):
            raise line_error(labels, line, f"label {number} is outside 0..{len(class_names) - 1}")
        if name.partition("/")[0] != class_names[number]:
            raise line_error(images, line, f"{name} is not in the folder of its label {number}, {class_names[number]}")
        pictures.append(FoodPicture(split, name, number))
    return pictures


def _compare_food101(folders: list[str], root: Path, pictures: list[FoodPicture]) -> list[str]:
    """Return one warning for each Food-101 list that exists and holds other pictures than these splits.

    Args:
        folders: folders below `root` in which the lists train.txt and test.txt of Food-101 may be.
        root: the folder of the official files.
        pictures: the pictures of all splits.
    """
    warnings = []
    for file_name, splits in (("train.txt", ("train", "val")), ("test.txt", ("test",))):
        candidates = [f"{folder}/{file_name}" for folder in folders]
        if any((root / candidate).is_file() for candidate in candidates):
            path = locate(root, candidates, "a list of Food-101")
            food101_names = {text for _, text in stripped_lines(path)}
            names = {picture.name for picture in pictures if picture.split in splits}
            if food101_names != names:
                missing, extra = len(food101_names - names), len(names - food101_names)
                warnings.append(
                    f"{' + '.join(splits)} differ from {source_name(path, root)}: {missing} of its pictures are not "
                    f"in the lists, {extra} of the lists' are not in it"
                )
    return warnings
