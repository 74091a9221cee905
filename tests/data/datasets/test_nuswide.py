"""NUS-WIDE: the miniature gives the rows that were counted by hand, its quirks are handled, and faults have file and line."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.make_fixtures import NUS_VOCABULARY, make_nuswide, make_nuswide_imports, write_text

from pipeline.data.datasets import nuswide
from pipeline.data.datasets.nuswide import NusWide
from pipeline.data.manifest import Manifest
from pipeline.data.spec import load_spec

# Of the 12 photos, 3 has no concept, 4 no tag and 7 neither: nine are left.
KEPT = [
    ("actor/0001_2124494179", "train", ("person", "sky"), ("sky", "people"), "2124494179"),
    ("actor/0002_174174086", "test", ("sky",), ("blue",), "174174086"),
    ("albatross/0213_10341804", "train", ("animal", "birds"), ("bird", "naïve"), "10341804"),
    ("cat/0001_300000003", "train", ("animal", "cat"), ("cat", "東京"), "300000003"),
    ("lake/0001_300000004", "train", ("lake", "water"), ("lake",), "300000004"),
    ("dog/0002_300000006", "test", ("dog",), ("null", "nan", "NA"), "300000006"),
    ("sun/0001_300000007", "train", ("sun", "sunset"), ("sun",), "300000007"),
    ("sunset/0001_300000008", "train", ("sunset",), ("lake", "sunset"), ""),
    ("water/0009_300000008", "test", ("reflection", "water"), ("lake", "sunset"), ""),
]
LISTS = Path("NUS-WIDE/ImageList")
LABELS = Path("NUS-WIDE/Groundtruth/AllLabels")
TAGS = Path("NUS_WID_Tags")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature; tests read it and never write to it."""
    return make_nuswide(tmp_path_factory.mktemp("nuswide"))


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature of the imports; tests read it and never write to it."""
    return make_nuswide_imports(tmp_path_factory.mktemp("nuswide_imports"))


def build(root: Path, layout: dict[str, Any] | None = None, **options: Any) -> Manifest:
    """Build the manifest of a miniature."""
    spec = {**load_spec("nuswide"), "counts_profile": "fixture", **options}
    return NusWide().build({**spec, "layout": {**spec["layout"], **(layout or {})}}, root)


def sample_rows(manifest: Manifest) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...], str]]:
    """Return the samples with class names instead of numbers."""
    return [
        (sample.id, sample.split, tuple(manifest.class_names[label] for label in sample.labels), sample.texts, sample.group)
        for sample in manifest.samples
    ]


def test_kept_rows(official: Path) -> None:
    manifest = build(official)
    assert sample_rows(manifest) == KEPT
    assert [row + 1 for row in manifest.rows] == [1, 2, 3, 6, 7, 9, 10, 11, 12]
    assert manifest.source_location(3).endswith("ImageList/Imagelist.txt, line 6")
    assert [sample.media.as_posix() for sample in manifest.samples] == [f"{row[0]}.jpg" for row in KEPT]
    assert manifest.media_root == official / "Flickr"


def test_counts(official: Path) -> None:
    counts = build(official).meta["counts"]
    assert {
        name: [counts[f"{name}{part}"] for part in ("", ".train", ".test")] for name in ("images", "labelled", "tagged", "both")
    } == {
        "images": [12, 7, 5],
        "labelled": [10, 6, 4],
        "tagged": [10, 7, 3],
        "both": [9, 6, 3],
    }
    others = {name: counts[name] for name in ("labels", "tags", "vocabulary", "folders", "photo_ids")}
    assert others == {"labels": 17, "tags": 17, "vocabulary": 1000, "folders": 9, "photo_ids": 11}


def test_class_counts_are_of_labelled_and_tagged_photos_with_any_filter(official: Path) -> None:
    names = load_spec("nuswide")["class_names"]
    for choice in nuswide.FILTERS:
        found = build(official, filter=choice).meta["class_counts"]
        positive = {split: {name: n for name, n in zip(names, found[split], strict=True) if n} for split in ("train", "test")}
        assert positive == {
            "train": {"animal": 2, "birds": 1, "cat": 1, "lake": 1, "person": 1, "sky": 1, "sun": 1, "sunset": 2, "water": 1},
            "test": {"dog": 1, "reflection": 1, "sky": 1, "water": 1},
        }


@pytest.mark.parametrize(("choice", "train", "test"), [("none", 7, 5), ("label", 6, 4), ("label_and_tag", 6, 3)])
def test_filters(official: Path, choice: str, train: int, test: int) -> None:
    manifest = build(official, filter=choice)
    assert [len(manifest.split("train")), len(manifest.split("test"))] == [train, test]


def test_classes_are_in_the_order_of_the_concept_list(official: Path) -> None:
    names = build(official).class_names
    assert names.index("sun") < names.index("sunset")
    assert names.index("water") < names.index("waterfall")


def test_photos_in_two_splits_give_a_warning(official: Path) -> None:
    warnings = build(official).meta["warnings"]
    assert warnings[0].startswith("photos that stand in a second folder: 1;")
    assert warnings[1].endswith("sunset/0001_300000008.jpg and water/0009_300000008.jpg")


def test_held_out_photos_come_from_training_by_their_id(official: Path) -> None:
    manifest = build(official, val_percent=40)
    again = build(official, val_percent=40, filter="label")
    held = {sample.id for sample in manifest.split("val")}
    assert held
    assert held == {sample.id for sample in again.split("val")} <= {row[0] for row in KEPT if row[1] == "train"}
    assert {sample.id for sample in manifest.split("test")} == {row[0] for row in KEPT if row[1] == "test"}
    for sample in manifest.samples:
        photo_id = sample.id.rpartition("_")[2]
        share = int(hashlib.sha256(photo_id.encode()).hexdigest()[:16], 16) / 2**64 * 100
        assert (sample.split == "val") == (share < 40 and sample.id in {row[0] for row in KEPT if row[1] == "train"})


def test_tags_of_all_images_replace_missing_files_of_the_splits(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official.parent, tmp_path / "copy")
    for split in ("Train", "Test"):
        (tmp_path / "copy" / TAGS / f"{split}_Tags1k.dat").unlink()
    assert build(tmp_path / "copy" / "NUS-WIDE").fingerprint() == build(official).fingerprint()


def test_parts_can_be_in_any_folder(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official, tmp_path / "labels", ignore=shutil.ignore_patterns("Flickr", "ImageList"))
    layout = {"tags_dir": official.parent / TAGS, "image_root": official / "Flickr", "imagelist_dir": official / "ImageList"}
    manifest = build(tmp_path / "labels", {key: [str(folder)] for key, folder in layout.items()})
    assert manifest.fingerprint() == build(official).fingerprint()
    assert not any(str(tmp_path) in name or str(official) in name for name in manifest.meta["sources"])


def test_irregular_spacing_of_tags_is_read(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official.parent, tmp_path / "copy")
    path = tmp_path / "copy" / TAGS / "Train_Tags1k.dat"
    path.write_text(path.read_text().replace("\t", "  ").replace(" \n", "\r\n"))
    assert build(tmp_path / "copy" / "NUS-WIDE").fingerprint() == build(official).fingerprint()


def test_csv_import(imports: Path) -> None:
    manifest = build(imports, {"image_root": ["."]}, variant="csv")
    assert [row[:4] for row in sample_rows(manifest)] == [row[:4] for row in KEPT]  # its classes are sorted, too
    assert len(build(imports, {"image_root": ["."]}, variant="csv", filter="label").samples) == 10
    assert manifest.source_location(0).endswith("nus_wid_data.csv, line 2")


@pytest.mark.parametrize("variant", ["hashnet", "mmcv"])
def test_list_imports(imports: Path, variant: str) -> None:
    layout = {"image_root": ["../images"], "tags_dir": [str(imports.parent / TAGS)]}
    manifest = build(imports / variant, layout, variant=variant)
    expected = [row for split in ("train", "test") for row in KEPT if row[1] == split]
    assert [row[1:] for row in sample_rows(manifest)] == [row[1:] for row in expected]
    assert manifest.source_location(6) == "test.txt, line 1"


def test_an_import_without_tags_says_so(imports: Path) -> None:
    with pytest.raises(ValueError, match=r"All_Tags.txt; without it prepare with --set filter=label"):
        build(imports / "mmcv", {"image_root": ["../images"]}, variant="mmcv")
    manifest = build(imports / "mmcv", {"image_root": ["../images"]}, variant="mmcv", filter="label")
    assert len(manifest.samples) == 10
    assert not any(sample.texts for sample in manifest.samples)


def test_all_tags_as_zeros_and_ones_is_refused(tmp_path: Path) -> None:
    folder = make_nuswide_imports(tmp_path)
    write_text(tmp_path / TAGS / "All_Tags.txt", ["0 1 0 0 1"] * 12)
    with pytest.raises(ValueError, match=r"All_Tags\.txt, line 1: zeros and ones where an id and its words are due"):
        build(folder, {"image_root": ["."]}, variant="csv", filter="label")


def test_the_21_classes_of_hashnet_are_named_by_number(tmp_path: Path) -> None:
    for split, path in (("train", "1_5_ab_m.jpg"), ("test", "2_6_ab_m.jpg")):
        write_text(tmp_path / f"{split}.txt", [f"./data/nuswide_21/images/{path} 0 1{' 0' * 19}"])
    manifest = build(tmp_path, {"image_root": ["."]}, variant="hashnet", filter="label")
    assert manifest.class_names[1] == "class 1"
    assert len(manifest.class_names) == 21


def replace_line(path: Path, line: int, text: str) -> None:
    """Change one line, counted from 1; "" removes it."""
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line - 1 : line] = [text] if text else []
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")


ROW = "0\t" * 999
FAULTS: list[tuple[Path, int, str, str]] = [
    (LISTS / "Imagelist.txt", 3, "..\\..\\etc\\passwd_1.jpg", "Imagelist.txt, line 3: the path"),
    (LISTS / "Imagelist.txt", 3, "/etc/passwd_1.jpg", "Imagelist.txt, line 3: the path '/etc/passwd_1.jpg' is absolute"),
    (LISTS / "Imagelist.txt", 3, "D:\\x\\0001_1.jpg", "Imagelist.txt, line 3: the path"),
    (
        LISTS / "Imagelist.txt",
        3,
        "albatross\\readme.txt",
        "Imagelist.txt, line 3: 'albatross/readme.txt' is not folder/NNNN_photoid.jpg",
    ),
    (
        LISTS / "Imagelist.txt",
        3,
        "actor\\0001_2124494179.jpg",
        "Imagelist.txt, line 3: actor/0001_2124494179.jpg is already on line 1",
    ),
    (LISTS / "Imagelist.txt", 3, " ", "Imagelist.txt, line 3: a blank line inside the list"),
    (LISTS / "Imagelist.txt", 13, "new\\0001_77.jpg", "Imagelist.txt, line 13: this image is on neither split list"),
    (
        LISTS / "TrainImagelist.txt",
        2,
        "new\\0001_77.jpg",
        "TrainImagelist.txt, line 2: new/0001_77.jpg is not on the image list",
    ),
    (
        LISTS / "TrainImagelist.txt",
        2,
        "actor\\0001_2124494179.jpg",
        "TrainImagelist.txt, line 2: actor/0001_2124494179.jpg is on this",
    ),
    (
        LISTS / "TestImagelist.txt",
        1,
        "actor\\0001_2124494179.jpg",
        "TestImagelist.txt, line 1: this image is on the training list",
    ),
    (LABELS / "Labels_lake.txt", 5, "-1130179", "Labels_lake.txt, line 5: '-1130179' is neither 0 nor 1"),
    (LABELS / "Labels_lake.txt", 5, "", "Labels_lake.txt, line 11: the file ends after 11 values, the image list has 12"),
    (TAGS / "Train_Tags1k.dat", 4, ROW, "Train_Tags1k.dat, line 4: 999 values where 1000 are due"),
    (TAGS / "Train_Tags1k.dat", 4, ROW + "2\t", "Train_Tags1k.dat, line 4: '2' is neither 0 nor 1"),
    (TAGS / "Test_Tags1k.dat", 4, "", "Test_Tags1k.dat, line 4: the file ends after 4 rows, the image list has 5"),
]


@pytest.mark.parametrize(("file", "line", "text", "fault"), FAULTS)
def test_faults_have_file_and_line(tmp_path: Path, file: Path, line: int, text: str, fault: str) -> None:
    root = make_nuswide(tmp_path)
    replace_line(tmp_path / file, line, text)
    with pytest.raises(ValueError, match="line") as raised:
        build(root)
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["a/0001_1.jpg,\"['sky']\",train,x"], "line 1: 4 cells where path, labels and split are due"),
        (["a/0001_1.jpg,\"['sky']\",train", 'a/0002_2.jpg,"[]",dev'], "line 2: unknown split 'dev'"),
        (["a/0001_1.jpg,__import__('os'),train"], "line 1: \"__import__('os')\" is no list of class names"),
        (["../x/0001_1.jpg,\"['sky']\",train"], "line 1: the path '../x/0001_1.jpg'"),
        ([f"{'x' * 10_000_000},\"['sky']\",train"], "line 1: the line is longer than 1048576 bytes"),
    ],
)
def test_faults_of_the_csv(tmp_path: Path, lines: list[str], fault: str) -> None:
    write_text(tmp_path / "nus_wid_data.csv", lines)
    with pytest.raises(ValueError, match="line") as raised:
        build(tmp_path, {"image_root": ["."]}, variant="csv", filter="label")
    assert f"nus_wid_data.csv, {fault}" in str(raised.value)


@pytest.mark.parametrize(
    ("variant", "line", "fault"),
    [
        ("hashnet", "images/1_1_ab_m.jpg 0 2 1", "'2' is neither 0 nor 1"),
        ("hashnet", "images/1_1_ab_m.jpg", "0 marks where some are due"),
        ("mmcv", "a/1_1.jpg 3 3", "the class numbers must be distinct and below 81"),
        ("mmcv", "a/1_1.jpg 81", "the class numbers must be distinct and below 81"),
        ("mmcv", "a/1_1.jpg -1", "'-1' is no whole number"),
        ("mmcv", "a/1_1.jpg" + " 0" * 81, "81 numbers for 81 classes: are these zeros and ones?"),
    ],
)
def test_faults_of_label_lists(tmp_path: Path, variant: str, line: str, fault: str) -> None:
    for split in ("train", "test"):
        write_text(tmp_path / f"{split}.txt", [line])
    with pytest.raises(ValueError, match=r"train\.txt, line 1") as raised:
        build(tmp_path, {"image_root": ["."]}, variant=variant, filter="label")
    assert fault in str(raised.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda root: shutil.rmtree(root / "Flickr"), "the folder of images is missing: looked for"),
        (lambda root: shutil.rmtree(root / "ImageList"), "TestImagelist|Imagelist.txt"),
        (lambda root: (root / "ConceptsList" / "Concepts81.txt").unlink(), "the list of concepts is missing"),
        (
            lambda root: [(root.parent / LABELS / f"Labels_{name}.txt").unlink() for name in ("sky", "zebra")],
            r"2 of 81 label files are missing in .*AllLabels: Labels_sky\.txt, Labels_zebra\.txt",
        ),
    ],
)
def test_missing_parts_are_named_with_the_expected_paths(tmp_path: Path, change: Callable[[Path], Any], fault: str) -> None:
    root = make_nuswide(tmp_path)
    change(root)
    with pytest.raises(ValueError, match=fault):
        build(root)


@pytest.mark.parametrize("options", [{"filter": "tag"}, {"variant": "coco"}, {"val_percent": 100}])
def test_unknown_options(official: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"choose one of|from 0 to 99"):
        build(official, **options)


def test_vocabulary_of_the_miniature() -> None:
    assert len(set(NUS_VOCABULARY)) == 1000
