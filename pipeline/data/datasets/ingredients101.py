"""Ingredients-101 on Food-101: pictures of 101 dishes; the text of a picture is the ingredient list of its dish."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import (
    fault,
    listing,
    locate,
    locate_all,
    media_path,
    read_names,
    rows,
    source_name,
    sources,
    whole_number,
)
from pipeline.data.spec import describe_spec, enforced_counts, official_root, target_splits
from pipeline.types import Sample

SPLIT_NAMES = ("train", "val", "test")
LIST_NAMES = (("image", "img"), ("label", "label"))  # <split>_images.txt, in some copies img_<split>.txt


class Picture(NamedTuple):
    """A line of <split>_images.txt with its line of <split>_labels.txt."""

    split: str
    name: str  # <class folder>/<number>, without suffix
    label: int


def build(spec: Mapping[str, Any], root: Path | None) -> Manifest:
    """The manifest of the official lists; `ValueError` with file and line for whatever is wrong in them."""
    layout, root = spec["layout"], official_root(spec, root)
    target = target_splits(spec, SPLIT_NAMES)
    folder = locate(root, layout["ann_dir"], "the folder of annotations")
    wanted = [["classes.txt"], [spec["ingredients"]]]
    wanted += [[f"{split}_{kind}s.txt", f"{short}_{split}.txt"] for kind, short in LIST_NAMES for split in SPLIT_NAMES]
    classes, ingredients, *split_lists = locate_all(folder, wanted, "official lists")
    images, labels = (dict(zip(SPLIT_NAMES, own, strict=True)) for own in (split_lists[:3], split_lists[3:]))
    class_names = [name.lower().replace(" ", "_") for name in read_names(classes)]
    texts = _ingredients(ingredients, len(class_names))
    pictures = [each for split in SPLIT_NAMES for each in _pictures(split, images[split], labels[split], class_names)]
    sizes = Counter(picture.split for picture in pictures)
    media_root = locate(root, layout["image_root"], "the folder of images")
    per_class = Counter((picture.split, picture.label) for picture in pictures)
    manifest = Manifest(
        dataset=spec["name"],
        label_kind=spec["label_kind"],
        class_names=tuple(class_names),
        samples=tuple(
            Sample(picture.name, target[picture.split], Path(f"{picture.name}.jpg"), texts[picture.label], (picture.label,), "")
            for picture in pictures
        ),
        meta=describe_spec(
            spec,
            sources=sources([classes, ingredients, *images.values(), *labels.values()], root),
            lists=[listing(path, root, sizes[split]) for split, path in images.items()],
            counts={
                "images": len(pictures),
                **{f"images.{split}": sizes[split] for split in SPLIT_NAMES},
                "vocabulary": len({word for text in texts for word in text}),
            },
            class_counts={split: [per_class[split, label] for label in range(len(class_names))] for split in SPLIT_NAMES},
            warnings=_compare_food101(layout["food101_meta"], root, pictures),
        ),
        media_root=media_root,
    )
    check_manifest(manifest, enforced_counts(spec))
    return manifest


def _ingredients(path: Path, num_classes: int) -> list[tuple[str, ...]]:
    """The ingredients of every class: one comma-separated line each; empty names, left by doubled commas, are no names."""
    texts = [tuple(name for part in text.lower().split(",") if (name := part.strip())) for _, text in rows(path)]
    if len(texts) != num_classes:
        raise fault(path, len(texts), f"the file ends after {len(texts)} lists, there are {num_classes} classes")
    return texts


def _pictures(split: str, images: Path, labels: Path, class_names: list[str]) -> list[Picture]:
    """The pictures of a split; the label is the line number of the class, from 0, and must agree with the picture's folder."""
    names_in, labels_in = list(rows(images)), list(rows(labels))
    if len(names_in) != len(labels_in):
        raise fault(labels, len(labels_in), f"the file ends after {len(labels_in)} labels, {images.name} has {len(names_in)}")
    pictures = []
    for (line, text), (_, label) in zip(names_in, labels_in, strict=True):
        name = media_path(text.removeprefix("/").removesuffix(".jpg"), images, line)
        number = whole_number(label, labels, line)
        if number >= len(class_names):
            raise fault(labels, line, f"label {number} is outside 0..{len(class_names) - 1}")
        if name.partition("/")[0] != class_names[number]:
            raise fault(images, line, f"{name} is not in the folder of its label {number}, {class_names[number]}")
        pictures.append(Picture(split, name, number))
    return pictures


def _compare_food101(places: list[str], root: Path, pictures: list[Picture]) -> list[str]:
    """One warning for each Food-101 list that exists and holds other pictures than these splits."""
    warnings = []
    for file_name, splits in (("train.txt", ("train", "val")), ("test.txt", ("test",))):
        candidates = [f"{place}/{file_name}" for place in places]
        if any((root / candidate).is_file() for candidate in candidates):
            path = locate(root, candidates, "a list of Food-101")
            theirs = {text for _, text in rows(path)}
            ours = {picture.name for picture in pictures if picture.split in splits}
            if theirs != ours:
                missing, extra = len(theirs - ours), len(ours - theirs)
                warnings.append(
                    f"{' + '.join(splits)} differ from {source_name(path, root)}: {missing} of its pictures are not "
                    f"in the lists, {extra} of the lists' are not in it"
                )
    return warnings
