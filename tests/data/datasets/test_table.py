"""Your own data: tables, imagefolders and folder trees give the expected rows."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.tables import WRITERS, Writer, build, make_empty_files, write_csv, write_jsonl

from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.data.prepare import prepare
from pipeline.data.spec import load_spec

RECORDS = [
    {"path": "a/1.jpg", "kind": "cat", "caption": "a cat, sleeping", "part": "train"},
    {"path": "a/2.jpg", "kind": "dog", "caption": '["a dog", "ein Hund"]', "part": "validation"},
    {"path": "b/1.jpg", "kind": "cat", "caption": "", "part": "test"},
]
OPTIONS = {"media_column": "path", "label_column": "kind", "text_column": "caption"}
ROWS = [
    ("a/1", "train", "a/1.jpg", ("a cat, sleeping",), ("cat",)),
    ("a/2", "val", "a/2.jpg", ("a dog", "ein Hund"), ("dog",)),
    ("b/1", "test", "b/1.jpg", (), ("cat",)),
]


def rows(manifest: Manifest) -> list[tuple[Any, ...]]:
    names = manifest.class_names
    return [(s.id, s.split, s.media.as_posix(), s.texts, tuple(names[label] for label in s.labels)) for s in manifest.samples]


@pytest.mark.parametrize(("name", "writer"), WRITERS.items())
def test_the_same_table_in_every_format(tmp_path: Path, name: str, writer: Writer) -> None:
    writer(tmp_path / name, [{**record, "split": record["part"]} for record in RECORDS])
    built = build(tmp_path, file=name, **OPTIONS)
    assert rows(built) == ROWS
    assert (built.class_names, built.label_kind, built.meta["media_type"]) == (("cat", "dog"), "single", "image")
    assert built.meta["sources"] == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
    assert built.meta["split_rule"] == "as given"


def test_default_columns_are_those_of_a_manifest(tmp_path: Path) -> None:
    record = {
        "sample_id": "007",
        "split": "train",
        "media_path": "x.mp4",
        "label_ids": "[1, 0]",
        "texts": '["t", "u"]',
        "group_id": "g",
    }
    write_csv(
        tmp_path / "m.csv", [record, {**record, "sample_id": "008", "media_path": "y.mp4", "label_ids": "[]", "texts": "[]"}]
    )
    built = build(tmp_path, file="m.csv")
    assert [(s.id, s.labels, s.texts, s.group) for s in built.samples] == [
        ("007", (0, 1), ("t", "u"), "g"),
        ("008", (), (), "g"),
    ]
    assert (built.label_kind, built.class_names, built.meta["media_type"]) == ("multi", ("0", "1"), "video")


@pytest.mark.parametrize(
    ("label", "options", "names", "expected"),
    [
        ("2", {}, ("0", "1", "2"), ("2",)),
        ("02", {}, ("02",), ("02",)),
        ("1", {"class_names": "names.txt"}, ("tree", "sea", "7"), ("sea",)),
        ("7", {"class_names": "names.txt"}, ("tree", "sea", "7"), ("7",)),
        ("sea;tree;sea", {"label_separator": ";"}, ("sea", "tree"), ("sea", "tree")),
        ("sea;tree", {}, ("sea;tree",), ("sea;tree",)),
        ('["b", "a"]', {}, ("a", "b"), ("a", "b")),
        ("", {"labels": "multi"}, (), ()),
    ],
)
def test_labels_are_names_or_ids(
    tmp_path: Path, label: str, options: dict[str, str], names: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    (tmp_path / "names.txt").write_text("tree\nsea\n7\n")
    write_csv(tmp_path / "m.csv", [{"file_name": "x.jpg", "label": label}])
    built = build(tmp_path, file="m.csv", **options)
    assert (built.class_names, rows(built)[0][-1]) == (names, expected)


def test_splits_that_are_not_given_follow_from_the_hash_of_the_group(tmp_path: Path) -> None:
    records = [{"file_name": f"{i}.jpg", "label": "x", "group_id": f"g{i // 4}"} for i in range(4000)]
    write_csv(tmp_path / "m.csv", records)
    built = build(tmp_path, file="m.csv")
    for sample in built.samples:
        share = int(hashlib.sha256(sample.group.encode()).hexdigest()[:16], 16) / 2**64 * 100
        assert sample.split == ("train" if share < 60 else "val" if share < 70 else "test")
    sizes = Counter(sample.split for sample in built.samples)
    assert abs(sizes["train"] - 2400) < 250
    assert abs(sizes["val"] - 400) < 150
    assert "SHA-256" in built.meta["split_rule"]


def test_the_percents_of_splits_can_be_set(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"file_name": f"{i}.jpg", "label": "x"} for i in range(2000)])
    built = build(tmp_path, file="m.csv", splits={"train": 80, "val": 20, "test": 0})
    sizes = Counter(sample.split for sample in built.samples)
    assert sizes["test"] == 0
    assert abs(sizes["val"] - 400) < 100
    with pytest.raises(ValueError, match="do not add up to 100 percent"):
        build(tmp_path, file="m.csv", splits={"train": 80, "val": 20, "test": 10})


def test_val_percent_moves_whole_groups_from_training_to_validation(tmp_path: Path) -> None:
    records = [
        {"file_name": f"{i}.jpg", "label": "x", "group_id": f"g{i // 3}", "split": "test" if i // 3 % 4 == 0 else "train"}
        for i in range(3000)
    ]
    write_csv(tmp_path / "m.csv", records)
    given, built = build(tmp_path, file="m.csv"), build(tmp_path, file="m.csv", val_percent=20)
    assert given.meta["val_remedy"] == "--set val_percent=10"
    assert Counter(sample.split for sample in given.samples) == {"train": 2250, "test": 750}
    for before, after in zip(given.samples, built.samples, strict=True):
        share = int(hashlib.sha256(after.group.encode()).hexdigest()[:16], 16) / 2**64 * 100
        assert after.split == ("val" if before.split == "train" and share < 20 else before.split)
    with pytest.raises(ValueError, match="val_percent is 100; it takes a whole number from 0 to 99"):
        build(tmp_path, file="m.csv", val_percent=100)


def test_every_column_can_be_named(tmp_path: Path) -> None:
    record = {"p": "x.jpg", "l": "a", "t": "words", "s": "valid", "i": "007", "g": "trip"}
    write_csv(tmp_path / "m.csv", [record, {**record, "p": "y.jpg", "i": "008", "g": ""}])
    roles = {"media": "p", "label": "l", "text": "t", "split": "s", "id": "i", "group": "g"}
    assert set(roles) == set(load_spec("table")["defaults"])
    built = build(tmp_path, file="m.csv", **{f"{role}_column": name for role, name in roles.items()})
    assert rows(built) == [
        ("007", "val", "x.jpg", ("words",), ("a",)),
        ("008", "val", "y.jpg", ("words",), ("a",)),
    ]
    assert [sample.group for sample in built.samples] == ["trip", ""]


def test_the_only_table_is_found_when_columns_are_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "photos.csv", RECORDS)
    assert [row[2:] for row in rows(build(tmp_path, **OPTIONS))] == [row[2:] for row in ROWS]
    write_csv(tmp_path / "more.CSV", RECORDS)
    with pytest.raises(ValueError, match=r"holds 2 tables \(more\.CSV, photos\.csv\); say where it is, --set file=NAME"):
        build(tmp_path, **OPTIONS)
    make_empty_files(tmp_path / "tree", "cat/1.jpg")
    with pytest.raises(ValueError, match=r"holds 0 tables \(no \.csv, \.jsonl or \.parquet\); say where"):
        build(tmp_path / "tree", label_column="kind")


def test_the_csv_and_the_parquet_file_of_a_manifest_are_tables(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    write_csv(tmp_path / "m.csv", [{**record, "split": record["part"]} for record in RECORDS])
    path = write_manifest(build(tmp_path, file="m.csv", **OPTIONS), tmp_path)
    for manifest_file in (path, path.with_suffix(".csv")):
        shutil.copy(manifest_file, tmp_path / f"copy{manifest_file.suffix}")
        built = build(tmp_path, file=f"copy{manifest_file.suffix}")
        assert [row[:4] for row in rows(built)] == [row[:4] for row in ROWS]
        assert [sample.labels for sample in built.samples] == [(0,), (1,), (0,)]


def test_media_can_be_in_another_folder(tmp_path: Path) -> None:
    make_empty_files(tmp_path / "photos", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    (tmp_path / "tables").mkdir()
    write_csv(tmp_path / "tables" / "m.csv", RECORDS)
    settings = {**OPTIONS, "file": "m.csv", "split_column": "part"}
    report = prepare("table", tmp_path / "tables", tmp_path, settings, image_root=tmp_path / "photos")
    assert report.missing == 0
    manifest = read_manifest(tmp_path, "table")
    assert rows(manifest) == ROWS
    assert manifest.media_root == tmp_path / "photos"
    assert rows(build(tmp_path / "tables", layout={"image_root": ["../photos"]}))[0][0] == "a/1"  # a folder of classes


def test_the_order_in_which_files_are_made_does_not_matter(tmp_path: Path) -> None:
    names = [f"{kind}/{i:02d}.jpg" for kind in ("b", "a", "é") for i in range(20)]
    for folder, order in (("one", names), ("two", names[::-1])):
        make_empty_files(tmp_path / folder, *order)
        prepare("table", tmp_path / folder, tmp_path / f"home {folder}", {})
    for kind in ("csv", "parquet", "meta.json"):
        one, two = ((tmp_path / f"home {folder}" / "manifests" / f"table.{kind}").read_bytes() for folder in ("one", "two"))
        assert one == two


def test_folders_are_classes(tmp_path: Path) -> None:
    make_empty_files(
        tmp_path, "cat/b.PNG", "cat/more/a.jpg", "dog/1.webp", "dog/.hidden.jpg", "dog/notes.txt", "empty/readme.md"
    )
    make_empty_files(tmp_path, ".thumbnails/1.jpg", "cat/.cache/1.jpg")
    built = build(tmp_path)
    assert [row[0] for row in rows(built)] == ["cat/b", "cat/more/a", "dog/1"]
    assert [row[-1] for row in rows(built)] == [("cat",), ("cat",), ("dog",)]


def test_folders_are_splits_and_classes(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "train/cat/1.mp4", "train/dog/1.mp4", "valid/cat/1.mp4", "Test/dog/1.mp4")
    built = build(tmp_path)
    assert sorted((row[1], row[-1][0]) for row in rows(built)) == [
        ("test", "dog"),
        ("train", "cat"),
        ("train", "dog"),
        ("val", "cat"),
    ]
    assert built.meta["media_type"] == "video"


def test_one_folder_may_be_called_train_but_a_mixture_is_refused(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "car/1.jpg", "train/1.jpg")
    assert build(tmp_path).class_names == ("car", "train")
    make_empty_files(tmp_path, "test/1.jpg")
    with pytest.raises(ValueError, match=r"holds split folders \(test, train\) and others \(car\)"):
        build(tmp_path)


@pytest.mark.parametrize(("name", "writer"), [("metadata.csv", write_csv), ("metadata.jsonl", write_jsonl)])
def test_an_imagefolder_with_one_table(tmp_path: Path, name: str, writer: Writer) -> None:
    writer(tmp_path / name, [{"file_name": "train/cat/1.png", "text": "one"}, {"file_name": "test/dog/1.png", "text": "two"}])
    expected = [
        ("train/cat/1", "train", "train/cat/1.png", ("one",), ("cat",)),
        ("test/dog/1", "test", "test/dog/1.png", ("two",), ("dog",)),
    ]
    assert rows(build(tmp_path)) == expected


def test_an_imagefolder_with_a_table_in_every_split(tmp_path: Path) -> None:
    for split, label in (("test", 0), ("train", 1), ("validation", 2)):
        (tmp_path / split).mkdir()
        write_jsonl(tmp_path / split / "metadata.jsonl", [{"file_name": "1.png", "label": label, "text": None}])
    built = build(tmp_path)
    assert [row[1:3] for row in rows(built)] == [("test", "test/1.png"), ("train", "train/1.png"), ("val", "validation/1.png")]
    assert [sample.labels for sample in built.samples] == [(0,), (1,), (2,)]
    assert [built.source_location(i) for i in range(3)] == [
        f"{split}/metadata.jsonl, line 1" for split in ("test", "train", "validation")
    ]


@pytest.mark.parametrize(
    ("labels", "options", "names"),
    [
        (["3.0", "0.0", "1", ""], {"labels": "multi"}, ("0", "1", "2", "3")),
        (["3.0", "3", "10.00"], {"numbers": "names"}, ("3", "10")),
        (["3.0", "3.5", "3"], {}, ("3", "3.0", "3.5")),
        (["3.0", "v3"], {}, ("3.0", "v3")),
        (["1.0", "2.0"], {"class_names": "names.txt"}, ("2.0", "1.0")),
        (["1.0|2.0", "0"], {"label_separator": "|"}, ("0", "1", "2")),
    ],
)
def test_labels_that_pandas_wrote_as_floats(
    tmp_path: Path, labels: list[str], options: dict[str, str], names: tuple[str, ...]
) -> None:
    """A number with .0 is the whole number if all labels are whole numbers, and a name otherwise."""
    (tmp_path / "names.txt").write_text("2.0\n1.0\n")
    write_csv(tmp_path / "m.csv", [{"file_name": f"{i}.jpg", "label": label} for i, label in enumerate(labels)])
    built = build(tmp_path, file="m.csv", **options)
    assert built.class_names == names
    separator = options.get("label_separator", "\n")
    for label, sample in zip(labels, built.samples, strict=True):
        expected = [part if part in names else str(int(float(part))) for part in label.split(separator) if part]
        assert sorted(names[i] for i in sample.labels) == expected


def test_a_negative_float_is_no_label(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"file_name": f"{i}.jpg", "label": label} for i, label in enumerate(["1.0", "-1.0"])])
    with pytest.raises(ValueError, match=r"m\.csv, line 3: '-1\.0' is negative"):
        build(tmp_path, file="m.csv")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_with_semicolons_or_tabs(tmp_path: Path, separator: str) -> None:
    lines = [["file_name", "label", "text"], ["1.jpg", "cat", '"a cat, and ""a""; b\tc"'], ["2.jpg", "dog", "1,5"]]
    (tmp_path / "m.csv").write_text("".join(separator.join(line) + "\r\n" for line in lines))
    assert [row[3:] for row in rows(build(tmp_path, file="m.csv"))] == [
        (('a cat, and "a"; b\tc',), ("cat",)),
        (("1,5",), ("dog",)),
    ]


@pytest.mark.parametrize(
    ("labels", "separator"),
    [(["a|b", "c"], "|"), (["a; b", "a"], ";"), (["a,b", "b"], ","), (["Paris, Texas", "Rome"], ""), (["|", "x"], "")],
)
def test_labels_that_look_like_several_are_asked_about(tmp_path: Path, labels: list[str], separator: str) -> None:
    write_csv(tmp_path / "m.csv", [{"file_name": f"{i}.jpg", "label": label} for i, label in enumerate(labels)])
    found = [warning for warning in build(tmp_path, file="m.csv").meta["warnings"] if "label_separator" in warning]
    assert len(found) == bool(separator)
    assert not found or f"1 of 2 class names contain {separator!r}, such as {labels[0]!r}" in found[0]
    if separator:
        names = build(tmp_path, file="m.csv", label_separator=separator).class_names
        assert set(names) == {part.strip() for label in labels for part in label.split(separator)}
