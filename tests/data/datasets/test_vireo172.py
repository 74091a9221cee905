"""VIREO Food-172: the miniature gives the rows that were counted by hand, and every fault is reported with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.make_fixtures import make_vireo172, write_text

from pipeline.data.datasets.vireo172 import Vireo172
from pipeline.data.manifest import Manifest
from pipeline.data.media import open_image
from pipeline.data.spec import load_spec

LISTS = "SplitAndIngreLabel"
EXPECTED = [  # id, split, class from 0, ingredients
    ("1/4_41", "train", 0, ("minced thing 0", "minced thing 5")),
    ("172/3_7", "train", 171, ("minced thing 352",)),
    ("2/1_2", "train", 1, ("minced thing 1", "minced thing 5", "minced thing 200")),
    ("1/5_5", "train", 0, ()),
    ("2/9_9", "val", 1, ("minced thing 5",)),
    ("1/1_2", "test", 0, ("minced thing 0",)),
    ("172/8_1", "test", 171, ("minced thing 351", "minced thing 352")),
]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature; tests read it and never write to it."""
    return make_vireo172(tmp_path_factory.mktemp("vireo172"))


def build(root: Path, **options: Any) -> Manifest:
    """Build the manifest of a miniature."""
    return Vireo172().build({**load_spec("vireo172"), "counts_profile": "fixture", **options}, root)


def test_rows(official: Path) -> None:
    manifest = build(official)
    assert [(sample.id, sample.split, *sample.labels, sample.texts) for sample in manifest.samples] == EXPECTED
    assert [manifest.source_location(position) for position in (0, 4, 6)] == [
        f"{LISTS}/TR.txt, line 1",
        f"{LISTS}/VAL.txt, line 1",
        f"{LISTS}/TE.txt, line 2",
    ]


def test_class_names_lose_semicolons_and_keep_accents(official: Path) -> None:
    names = build(official).class_names
    assert (names[0], names[1], names[171]) == ("Braised Pork", "Sauteed Crème Fraîche", "Rice Soup")


def test_counts(official: Path) -> None:
    assert build(official).meta["counts"] == {
        "images": 7,
        "images.train": 4,
        "images.val": 1,
        "images.test": 2,
        "vocabulary": 353,
        "ingredient_rows": 7,
        "without_text": 1,
    }
    per_class = build(official).meta["class_counts"]
    assert [(per_class["train"][label], per_class["test"][label]) for label in (0, 1, 2, 171)] == [
        (2, 1),
        (1, 0),
        (0, 0),
        (1, 1),
    ]


def test_train_splits(official: Path) -> None:
    manifest = build(official, train_splits=["train", "val"])
    assert [len(manifest.split(split)) for split in ("train", "val", "test")] == [5, 0, 2]
    assert manifest.meta["counts"]["images.val"] == 1
    for wrong in (["val"], ["train", "test"]):
        with pytest.raises(ValueError, match=r"choose \[train\] or \[train, val\]"):
            build(official, train_splits=wrong)


def test_cmyk_and_grey_pictures_open_as_rgb(official: Path) -> None:
    manifest = build(official)
    for sample in manifest.samples:
        assert open_image(manifest.media_path(sample), 24).mode == "RGB"


def test_class_names_that_occur_twice_get_a_number(tmp_path: Path) -> None:
    root = make_vireo172(tmp_path)
    write_text(root / LISTS / "FoodList.txt", ["Soup", "Soup;", *(f"Dish {number}" for number in range(170))])
    assert build(root).class_names[:3] == ("Soup (1)", "Soup (2)", "Dish 0")


MARKS = " ".join(["-1"] * 353)
FAULTS = [
    ("TR.txt", ["/1/4_41.jpg", "/173/1_1.jpg"], "TR.txt, line 2: '/173/1_1.jpg' is not /<folder 1..172>/<file>.jpg"),
    ("TR.txt", ["/0/4_41.jpg"], "TR.txt, line 1: '/0/4_41.jpg' is not"),
    ("TR.txt", ["/1/../../4_41.jpg"], "TR.txt, line 1: the path '1/../../4_41.jpg' holds '..'"),
    ("TR.txt", ["//etc/passwd"], "TR.txt, line 1: the path '/etc/passwd' is absolute"),
    ("TR.txt", ["/1/5_5.jpg", "/1/new.jpg"], "TR.txt, line 2: 1/new.jpg has no line in IngreLabel.txt"),
    ("TE.txt", ["/1/4_41.jpg"], "TE.txt, line 1, sample '1/4_41': repeats the id of SplitAndIngreLabel/TR.txt, line 1"),
    ("IngreLabel.txt", [f"/1/4_41.jpg {MARKS} 1"], "IngreLabel.txt, line 1: 354 marks where 353 are due"),
    ("IngreLabel.txt", [f"/1/4_41.jpg {MARKS[:-2]}2"], "IngreLabel.txt, line 1: '2' is neither 1 nor -1 nor 0"),
    ("IngreLabel.txt", [f"/1/4_41.jpg {MARKS}"] * 2, "IngreLabel.txt, line 2: 1/4_41.jpg is on an earlier line too"),
    ("FoodList.txt", ["Soup"], "TR.txt, line 2: '/172/3_7.jpg' is not /<folder 1..1>/<file>.jpg"),
]


@pytest.mark.parametrize(("file", "lines", "fault"), FAULTS)
def test_faults_have_file_and_line(tmp_path: Path, file: str, lines: list[str], fault: str) -> None:
    root = make_vireo172(tmp_path)
    write_text(root / LISTS / file, lines)
    with pytest.raises(ValueError, match="line") as raised:
        build(root)
    assert fault in str(raised.value)


def test_official_counts_are_enforced(official: Path) -> None:
    with pytest.raises(ValueError, match=r"images 7 \(expected 110241\), images.train 4 \(expected 66071\)"):
        build(official, counts_profile="official")


def test_all_missing_lists_are_named_at_once(tmp_path: Path) -> None:
    root = make_vireo172(tmp_path)
    for name in ("VAL.txt", "FoodList.txt"):
        (root / LISTS / name).unlink()
    with pytest.raises(ValueError, match=r"2 of 6 official lists are missing in .*SplitAndIngreLabel: VAL\.txt, FoodList\.txt"):
        build(root)
