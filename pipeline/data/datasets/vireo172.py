"""VIREO Food-172: pictures of 172 Chinese dishes, each with the ingredients that are visible in it, from the official lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.dataset import Dataset
from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import (
    WHITE_SPACE,
    line_error,
    list_entry,
    locate,
    locate_all,
    parse_media_path,
    read_names,
    source_hashes,
    stripped_lines,
)
from pipeline.data.spec import manifest_meta, official_root, required_counts, target_splits
from pipeline.types import Sample


class DishPicture(NamedTuple):
    """A line of TR.txt, VAL.txt or TE.txt."""

    split: str  # name of the official split
    path: str  # <folder>/<file>.jpg
    label: int  # number of the folder - 1


class Vireo172(Dataset):
    """The official lists of pictures and ingredients."""

    def build(self, spec: Mapping[str, Any], root: Path | None) -> Manifest:
        """Build the manifest from the official lists.

        Args:
            spec: the contents of vireo172.yaml.
            root: the folder of the official files.

        Raises:
            UserError: a list is missing or faulty (the message names file and line), or the counts are not the expected ones.
        """
        layout, root = spec["layout"], official_root(spec, root)
        target = target_splits(spec, list(spec["lists"]))
        folder = locate(root, layout["lists_dir"], "the folder of lists")
        file_names = [*spec["lists"].values(), "FoodList.txt", "IngredientList.txt", "IngreLabel.txt"]
        *split_lists, dishes, vocabulary, marks = locate_all(folder, [[name] for name in file_names], "official lists")
        lists = dict(zip(spec["lists"], split_lists, strict=True))
        class_names, words = _distinct_names(read_names(dishes, strip=f"{WHITE_SPACE};")), read_names(vocabulary)
        pictures = [picture for split, path in lists.items() for picture in _pictures(split, path, len(class_names))]
        ingredients = _ingredients(marks, len(words))
        _check_ingredients_listed(pictures, lists, ingredients, marks)
        texts = {path: tuple(words[column] for column in columns) for path, columns in ingredients.items()}
        counts = _counts(pictures, list(lists))
        manifest = Manifest(
            dataset=spec["name"],
            label_kind=spec["label_kind"],
            class_names=tuple(class_names),
            samples=tuple(
                Sample(each.path.removesuffix(".jpg"), target[each.split], Path(each.path), texts[each.path], (each.label,), "")
                for each in pictures
            ),
            meta=manifest_meta(
                spec,
                sources=source_hashes([*lists.values(), dishes, vocabulary, marks], root),
                lists=[list_entry(path, root, counts[f"images.{split}"]) for split, path in lists.items()],
                counts={
                    **counts,
                    "vocabulary": len(words),
                    "ingredient_rows": len(ingredients),
                    "without_text": sum(not texts[picture.path] for picture in pictures),
                },
                class_counts=_class_counts(pictures, list(lists), len(class_names)),
            ),
            media_root=locate(root, layout["image_root"], "the folder of images"),
        )
        check_manifest(manifest, required_counts(spec))
        return manifest


def _pictures(split: str, path: Path, num_classes: int) -> list[DishPicture]:
    """Return the pictures of a split list; its lines are `/<folder from 1>/<file>.jpg`."""
    pictures = []
    for line, text in stripped_lines(path):
        relative = _parse_path(text, path, line)
        folder = relative.partition("/")[0]
        if not (folder.isascii() and folder.isdigit() and 1 <= int(folder) <= num_classes) or relative.count("/") != 1:
            raise line_error(path, line, f"{text[:80]!r} is not /<folder 1..{num_classes}>/<file>.jpg")
        pictures.append(DishPicture(split, relative, int(folder) - 1))
    return pictures


def _parse_path(text: str, path: Path, line: int) -> str:
    """Return a media path without the slash that the official lists put before it; with the slash it would be absolute."""
    return parse_media_path(text.removeprefix("/"), path, line)


def _ingredients(path: Path, width: int) -> dict[str, tuple[int, ...]]:
    """Return, for each path in IngreLabel.txt, the columns that are marked 1.

    A line is a path and `width` marks: 1 is present, -1 or 0 is absent.
    """
    found: dict[str, tuple[int, ...]] = {}
    for line, text in stripped_lines(path):
        name, *marks = text.split()
        relative = _parse_path(name, path, line)
        if len(marks) != width:
            raise line_error(path, line, f"{len(marks)} marks where {width} are due")
        if not {"1", "-1", "0"}.issuperset(marks):
            wrong = next(mark for mark in marks if mark not in ("1", "-1", "0"))
            raise line_error(path, line, f"{wrong[:40]!r} is neither 1 nor -1 nor 0")
        if relative in found:
            raise line_error(path, line, f"{relative} is on an earlier line too")
        found[relative] = tuple(column for column, mark in enumerate(marks) if mark == "1")
    return found


def _check_ingredients_listed(
    pictures: list[DishPicture], lists: Mapping[str, Path], ingredients: Mapping[str, tuple[int, ...]], marks: Path
) -> None:
    """Raise `UserError`, with the line of the picture, if a picture has no line of ingredients."""
    lines: Counter[str] = Counter()  # number of the current line in the list of each split
    for picture in pictures:
        lines[picture.split] += 1
        if picture.path not in ingredients:
            raise line_error(lists[picture.split], lines[picture.split], f"{picture.path} has no line in {marks.name}")


def _distinct_names(class_names: list[str]) -> list[str]:
    """Return the class names; a name that occurs twice gets its folder number, because classes are told apart by name."""
    counts = Counter(class_names)
    return [f"{name} ({folder})" if counts[name] > 1 else name for folder, name in enumerate(class_names, start=1)]


def _counts(pictures: list[DishPicture], splits: list[str]) -> dict[str, int]:
    """Return the number of images, in all and for each split."""
    sizes = Counter(picture.split for picture in pictures)
    return {"images": len(pictures), **{f"images.{split}": sizes[split] for split in splits}}


def _class_counts(pictures: list[DishPicture], splits: list[str], num_classes: int) -> dict[str, list[int]]:
    """Return the number of images of every class, for each split."""
    counts = Counter((picture.split, picture.label) for picture in pictures)
    return {split: [counts[split, label] for label in range(num_classes)] for split in splits}
