"""Ingredients-101: the miniature gives the rows that were counted by hand, and every fault is reported with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.make_fixtures import make_ingredients101, write_text

from pipeline.data.datasets.ingredients101 import Ingredients101
from pipeline.data.manifest import Manifest
from pipeline.data.media import open_image
from pipeline.data.spec import load_spec

LISTS = Path("Ingredients101/annotations")
APPLE, RIBS, WAFFLES = ("butter", "flour", "brown sugar"), ("pork", "salt"), ("flour", "egg")
EXPECTED = [
    ("waffles/10", "train", 100, WAFFLES),
    ("apple_pie/1005649", "train", 0, APPLE),
    ("baby_back_ribs/7", "train", 1, RIBS),
    ("apple_pie/134", "train", 0, APPLE),
    ("baby_back_ribs/8", "val", 1, RIBS),
    ("apple_pie/2", "test", 0, APPLE),
    ("waffles/11", "test", 100, WAFFLES),
]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature; tests read it and never write to it."""
    return make_ingredients101(tmp_path_factory.mktemp("ingredients101"))


def build(root: Path, **options: Any) -> Manifest:
    """Build the manifest of a miniature."""
    return Ingredients101().build({**load_spec("ingredients101"), "counts_profile": "fixture", **options}, root)


def test_rows(official: Path) -> None:
    manifest = build(official)
    assert [(sample.id, sample.split, *sample.labels, sample.texts) for sample in manifest.samples] == EXPECTED
    assert manifest.samples[0].media == Path("waffles/10.jpg")
    assert manifest.class_names[:2] == ("apple_pie", "baby_back_ribs")
    assert manifest.source_location(4) == "Ingredients101/annotations/val_images.txt, line 1"


def test_counts(official: Path) -> None:
    manifest = build(official)
    assert manifest.meta["counts"] == {
        "images": 7,
        "images.train": 4,
        "images.val": 1,
        "images.test": 2,
        "vocabulary": 7,  # water, butter, flour, brown sugar, pork, salt, egg: no empty name
    }
    assert [manifest.meta["class_counts"]["train"][label] for label in (0, 1, 2, 100)] == [2, 1, 0, 1]
    assert manifest.meta["warnings"] == []


@pytest.mark.parametrize("folder", ["Annotations", "ANNOTATIONS"])
def test_folder_in_any_case_of_letters(official: Path, tmp_path: Path, folder: str) -> None:
    assert build(make_ingredients101(tmp_path, folder)).fingerprint() == build(official).fingerprint()


def test_simplified_ingredients_and_train_splits(official: Path) -> None:
    manifest = build(official, ingredients="ingredients_simplified.txt", train_splits=["train", "val"])
    assert [len(manifest.split(split)) for split in ("train", "val", "test")] == [5, 0, 2]
    assert {sample.texts for sample in manifest.samples} == {("butter",), ("pork",), ("flour",)}


def test_renamed_lists_and_suffixes_are_read(official: Path, tmp_path: Path) -> None:
    root = make_ingredients101(tmp_path)
    for split in ("train", "val", "test"):
        (root / LISTS / f"{split}_labels.txt").rename(root / LISTS / f"label_{split}.txt")
        path = root / LISTS / f"{split}_images.txt"
        write_text(root / LISTS / f"img_{split}.txt", (f"/{line}.jpg" for line in path.read_text().split()))
        path.unlink()
    assert build(root).fingerprint() == build(official).fingerprint()


def test_grey_pictures_open_as_rgb(official: Path) -> None:
    manifest = build(official)
    assert {open_image(manifest.media_path(sample), 24).mode for sample in manifest.samples} == {"RGB"}


def test_lists_that_differ_from_those_of_food101_give_a_warning(tmp_path: Path) -> None:
    root = make_ingredients101(tmp_path)
    write_text(root / "food-101" / "meta" / "test.txt", ["apple_pie/2", "apple_pie/3", "apple_pie/4"])
    assert build(root).meta["warnings"] == [
        "test differ from food-101/meta/test.txt: 2 of its pictures are not in the lists, 1 of the lists' are not in it"
    ]


FAULTS = [
    ("val_labels.txt", ["101"], "val_labels.txt, line 1: label 101 is outside 0..100"),
    ("val_labels.txt", ["-1"], "val_labels.txt, line 1: '-1' is no whole number"),
    ("val_labels.txt", ["1", "1"], "val_labels.txt, line 2: the file ends after 2 labels, val_images.txt has 1"),
    ("val_labels.txt", ["0"], "val_images.txt, line 1: baby_back_ribs/8 is not in the folder of its label 0, apple_pie"),
    ("val_images.txt", ["../baby_back_ribs/8"], "val_images.txt, line 1: the path"),
    ("val_images.txt", ["//baby_back_ribs/8"], "val_images.txt, line 1: the path '/baby_back_ribs/8' is absolute"),
    ("val_images.txt", ["baby_back_ribs/7"], "val_images.txt, line 1, sample 'baby_back_ribs/7': repeats the id of"),
    ("ingredients.txt", ["salt"] * 100, "ingredients.txt, line 100: the file ends after 100 lists, there are 101 classes"),
    ("ingredients.txt", ["salt"] * 50 + [""] + ["salt"] * 51, "ingredients.txt, line 51: a blank line inside the list"),
]


@pytest.mark.parametrize(("file", "lines", "fault"), FAULTS)
def test_faults_have_file_and_line(tmp_path: Path, file: str, lines: list[str], fault: str) -> None:
    root = make_ingredients101(tmp_path)
    write_text(root / LISTS / file, lines)
    with pytest.raises(ValueError, match="line") as raised:
        build(root)
    assert fault in str(raised.value)


def test_official_counts_are_enforced(official: Path) -> None:
    with pytest.raises(ValueError, match=r"images 7 \(expected 101000\)"):
        build(official, counts_profile="official")


def test_all_missing_lists_are_named_at_once(tmp_path: Path) -> None:
    root = make_ingredients101(tmp_path)
    for name in ("classes.txt", "val_labels.txt"):
        (root / LISTS / name).unlink()
    with pytest.raises(
        ValueError, match=r"2 of 8 official lists are missing .*: classes\.txt, val_labels\.txt or label_val\.txt"
    ):
        build(root)
