"""VIREO Food-172: pictures of 172 Chinese dishes, each with the ingredients that can be seen in it, from the official lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.manifest import Manifest, check_manifest
from pipeline.data.readers import BLANK, fault, listing, locate, locate_all, media_path, read_names, rows, sources
from pipeline.data.spec import describe_spec, enforced_counts, official_root, target_splits
from pipeline.types import Sample


class Picture(NamedTuple):
    """A line of TR.txt, VAL.txt or TE.txt."""

    split: str  # of the official lists
    path: str  # <folder>/<file>.jpg
    label: int  # folder - 1


def build(spec: Mapping[str, Any], root: Path | None) -> Manifest:
    """The manifest of the official lists; `ValueError` with file and line for whatever is wrong in them."""
    layout, root = spec["layout"], official_root(spec, root)
    target = target_splits(spec, list(spec["lists"]))
    folder = locate(root, layout["lists_dir"], "the folder of lists")
    wanted = [*spec["lists"].values(), "FoodList.txt", "IngredientList.txt", "IngreLabel.txt"]
    *split_lists, dishes, vocabulary, marks = locate_all(folder, [[name] for name in wanted], "official lists")
    lists = dict(zip(spec["lists"], split_lists, strict=True))
    class_names, words = _distinct(read_names(dishes, strip=f"{BLANK};")), read_names(vocabulary)
    pictures = [picture for split, path in lists.items() for picture in _pictures(split, path, len(class_names))]
    ingredients = _ingredients(marks, len(words))
    _check_marks(pictures, lists, ingredients, marks)
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
        meta=describe_spec(
            spec,
            sources=sources([*lists.values(), dishes, vocabulary, marks], root),
            lists=[listing(path, root, counts[f"images.{split}"]) for split, path in lists.items()],
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
    check_manifest(manifest, enforced_counts(spec))
    return manifest


def _pictures(split: str, path: Path, num_classes: int) -> list[Picture]:
    """The pictures of a split list, whose lines are `/<folder from 1>/<file>.jpg`."""
    pictures = []
    for line, text in rows(path):
        relative = _relative(text, path, line)
        folder = relative.partition("/")[0]
        if not (folder.isascii() and folder.isdigit() and 1 <= int(folder) <= num_classes) or relative.count("/") != 1:
            raise fault(path, line, f"{text[:80]!r} is not /<folder 1..{num_classes}>/<file>.jpg")
        pictures.append(Picture(split, relative, int(folder) - 1))
    return pictures


def _relative(text: str, path: Path, line: int) -> str:
    """A path without the one slash that the official lists put before it: joined as it stands, it would drop the folder."""
    return media_path(text.removeprefix("/"), path, line)


def _ingredients(path: Path, width: int) -> dict[str, tuple[int, ...]]:
    """Columns marked 1 for every path of IngreLabel.txt: a line is a path and `width` marks, 1 present, -1 or 0 absent."""
    found: dict[str, tuple[int, ...]] = {}
    for line, text in rows(path):
        name, *marks = text.split()
        relative = _relative(name, path, line)
        if len(marks) != width:
            raise fault(path, line, f"{len(marks)} marks where {width} are due")
        if not {"1", "-1", "0"}.issuperset(marks):
            wrong = next(mark for mark in marks if mark not in ("1", "-1", "0"))
            raise fault(path, line, f"{wrong[:40]!r} is neither 1 nor -1 nor 0")
        if relative in found:
            raise fault(path, line, f"{relative} is on an earlier line too")
        found[relative] = tuple(column for column, mark in enumerate(marks) if mark == "1")
    return found


def _check_marks(
    pictures: list[Picture], lists: Mapping[str, Path], ingredients: Mapping[str, tuple[int, ...]], marks: Path
) -> None:
    line: Counter[str] = Counter()
    for picture in pictures:
        line[picture.split] += 1
        if picture.path not in ingredients:
            raise fault(lists[picture.split], line[picture.split], f"{picture.path} has no line in {marks.name}")


def _distinct(class_names: list[str]) -> list[str]:
    """The names, with the folder number added to those that come twice: classes are told apart by name."""
    counts = Counter(class_names)
    return [f"{name} ({folder})" if counts[name] > 1 else name for folder, name in enumerate(class_names, start=1)]


def _counts(pictures: list[Picture], splits: list[str]) -> dict[str, int]:
    sizes = Counter(picture.split for picture in pictures)
    return {"images": len(pictures), **{f"images.{split}": sizes[split] for split in splits}}


def _class_counts(pictures: list[Picture], splits: list[str], num_classes: int) -> dict[str, list[int]]:
    counts = Counter((picture.split, picture.label) for picture in pictures)
    return {split: [counts[split, label] for label in range(num_classes)] for split in splits}
