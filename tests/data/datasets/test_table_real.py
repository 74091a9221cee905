"""Tables and folders as real people have them: never silently another data set than was meant."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.tables import WRITERS, Writer, build, make_empty_files, write_csv, write_jsonl

from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.data.prepare import prepare

CAPTIONS = [{"file_name": "0.png", "text": "a red square"}, {"file_name": "1.png", "text": "a blue square"}]


def labels(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    return {s.media.as_posix(): tuple(manifest.class_names[label] for label in s.labels) for s in manifest.samples}


@pytest.mark.parametrize(("file", "writer"), WRITERS.items())
def test_split_folders_are_never_classes(tmp_path: Path, file: str, writer: Writer) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        writer(tmp_path / split / f"metadata{Path(file).suffix}", CAPTIONS)
    refused = r"(line|row) \d: 'test' is a split folder and no class, .*columns are: file_name, text; .*--label-column"
    with pytest.raises(ValueError, match=refused):
        build(tmp_path)
    paths = [{**each, "file_name": f"cat/{split}/{each['file_name']}"} for split in ("train", "val") for each in CAPTIONS]
    writer(tmp_path / file, paths)  # the splits are inside of the classes
    with pytest.raises(ValueError, match="'train' is a split folder and no class"):
        build(tmp_path, file=file)


@pytest.mark.parametrize("folders", [("images", "images"), ("train2017", "val2017"), ("training_set", "test_set")])
def test_folders_that_hold_everything_or_look_like_splits_are_no_classes_of_a_table(
    tmp_path: Path, folders: tuple[str, str]
) -> None:
    rows = [{**each, "file_name": f"{folder}/{each['file_name']}"} for folder, each in zip(folders, CAPTIONS, strict=True)]
    write_csv(tmp_path / "m.csv", rows)
    with pytest.raises(ValueError, match=r"m\.csv, line 3: the folders of the media are .*, no classes, and the table has no"):
        build(tmp_path, file="m.csv")
    assert set(build(tmp_path, file="m.csv", folder_labels=True).class_names) == set(folders)


def test_a_label_column_of_another_name_is_asked_for(tmp_path: Path) -> None:
    rows = [{"file_name": f"{kind}s/0.png", "category": kind, "text": "t"} for kind in ("cat", "dog")]
    write_csv(tmp_path / "metadata.csv", rows)
    with pytest.raises(ValueError, match=r"no label column \(label_ids or labels or label\); .* file_name, category, text; .*"):
        build(tmp_path)
    assert labels(build(tmp_path, label_column="category")) == {"cats/0.png": ("cat",), "dogs/0.png": ("dog",)}
    assert build(tmp_path, folder_labels=True).class_names == ("cats", "dogs")
    write_csv(tmp_path / "metadata.csv", [{"Unnamed: 0": i, **row, "label": "x"} for i, row in enumerate(rows)])
    assert build(tmp_path).class_names == ("x",)


def test_what_is_taken_for_labels_or_left_out_is_said(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "cat/0.png", "dog/0.png")
    write_csv(tmp_path / "metadata.csv", [{"file_name": f"{kind}/0.png", "text": kind} for kind in ("cat", "dog")])
    warnings = prepare("table", tmp_path, tmp_path / "home", {}).warnings
    assert "the table has no label column: the labels are the 2 folders of the media: cat, dog" in warnings
    rows = [{"file_name": f"{kind}/0.png", "label": "x", "caption": kind} for kind in ("cat", "dog")]
    write_csv(tmp_path / "metadata.csv", rows)
    warnings = prepare("table", tmp_path, tmp_path / "home", {}).warnings
    assert "metadata.csv has no column of texts (texts, text); if one of caption is it, say --text-column" in warnings
    assert "all samples are of one class, 'x': a head has nothing to learn" in warnings
    names = ["cat", "dog", "Cat", "nan"]
    make_empty_files(tmp_path, *(f"{row}.png" for row in range(4)))
    write_csv(tmp_path / "metadata.csv", [{"file_name": f"{row}.png", "label": name} for row, name in enumerate(names)])
    warnings = prepare("table", tmp_path, tmp_path / "home", {}, overwrite=True).warnings
    assert "1 of 4 class names are another one in other capital letters, such as 'Cat' and 'cat'" in warnings
    assert "the class 'nan' looks like a missing label: is it one? Then leave its rows out" in warnings


@pytest.mark.parametrize(
    "folders", [("training_set", "test_set"), ("seg_train", "seg_test", "seg_pred"), ("train2017", "val2017")]
)
def test_folders_that_look_like_splits_are_no_classes_of_a_tree(tmp_path: Path, folders: tuple[str, ...]) -> None:
    make_empty_files(tmp_path, *(f"{folder}/{kind}/{i}.jpg" for folder in folders for kind in ("a", "b") for i in range(2)))
    with pytest.raises(ValueError, match="look like splits and not like classes: call the splits train, val and test"):
        build(tmp_path)
    assert set(build(tmp_path, folder_labels=True).class_names) == set(folders)


@pytest.mark.parametrize("names", [("training", "testing"), ("Train", "Valid", "Test"), ("TRAIN", "dev")])
def test_more_names_of_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    make_empty_files(tmp_path, *(f"{name}/{kind}/1.png" for name in names for kind in ("0", "1")))
    built = build(tmp_path)
    assert built.class_names == ("0", "1")
    expected = {"training": "train", "testing": "test", "valid": "val", "dev": "val"}
    assert {s.media.parts[0]: s.split for s in built.samples} == {n: expected.get(n.lower(), n.lower()) for n in names}


def test_a_folder_above_the_classes_and_folders_of_operating_systems(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "images/cat/1.jpg", "images/dog/1.jpg", "labels/notes.txt")
    with pytest.raises(ValueError, match=r"are in the one class folder 'images'; .*\(cat, dog …\), give --root .*images"):
        build(tmp_path)
    assert build(tmp_path, folder_labels=True).class_names == ("images",)
    make_empty_files(tmp_path / "images", "__MACOSX/cat/1.jpg", "dog/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "lost+found/1.jpg")
    make_empty_files(tmp_path / "images", "cat/.1.jpg", ".ipynb_checkpoints/1.jpg")
    assert labels(build(tmp_path / "images")) == {"cat/1.jpg": ("cat",), "dog/1.jpg": ("dog",)}


def test_captions_ids_and_file_names_may_begin_with_any_sign(tmp_path: Path) -> None:
    names = ["0.png", "-_hbPLsZvvo.png", "@me.png", "=1+1.png", "+.png", "'=x.png"]
    texts = ["@user look", "- a dog runs", "= sign", "+1 for this", "\tx", "'tis"]
    make_empty_files(tmp_path, *names)
    rows = [
        {"file_name": name, "label": sign, "text": text, "sample_id": f"{sign}id{i}", "group_id": f"{sign}g"}
        for i, (name, text, sign) in enumerate(zip(names, texts, "a-@=+'", strict=True))
    ]
    for file, writer in WRITERS.items():
        writer(tmp_path / file, rows)
        path = prepare("table", tmp_path, tmp_path / file.replace(".", "-"), {"file": file}).path
        manifest = read_manifest(tmp_path / file.replace(".", "-"), "table")
        assert [(s.media.name, s.texts, s.id, s.group) for s in manifest.samples] == [
            (row["file_name"], (row["text"],), row["sample_id"], row["group_id"]) for row in rows
        ]
        assert labels(manifest) == {row["file_name"]: (row["label"],) for row in rows}
        with path.with_suffix(".csv").open(newline="", encoding="utf-8") as written:  # as a spreadsheet reads it
            assert not [cell for line in csv.reader(written) for cell in line if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
        (tmp_path / "copy.csv").write_bytes(path.with_suffix(".csv").read_bytes())
        copies = {sample.id: sample for sample in build(tmp_path, file="copy.csv").samples}
        assert copies == {sample.id: sample for sample in manifest.samples}  # without loss


def test_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "Crème Brûlée") for form in ("NFC", "NFD"))
    assert nfc != nfd
    mixed = nfc[:5] + nfd[6:]  # one accent of each form
    make_empty_files(tmp_path / "media" / nfd, f"{nfd}.jpg", "plain.jpg", f"{mixed}-2.jpg")
    rows = [
        {"file_name": f"{nfc}/{nfc}.jpg", "catégorie": nfc, "group_id": nfc},
        {"file_name": f"{nfd}/plain.jpg", "catégorie": nfd, "group_id": nfd},
        {"file_name": f"{nfc}/{nfc}-2.jpg", "catégorie": "other", "group_id": ""},
    ]
    for form in ("NFC", "NFD"):
        column = unicodedata.normalize(form, "catégorie")
        write_csv(tmp_path / "media" / "m.csv", [{column if k == "catégorie" else k: v for k, v in r.items()} for r in rows])
        report = prepare("table", tmp_path / "media", tmp_path / form, {"file": "m.csv", "label_column": "catégorie"})
        manifest = read_manifest(tmp_path / form, "table")
        assert (report.missing, manifest.class_names) == (0, (nfc, "other"))
        assert len({sample.group for sample in manifest.samples if sample.group}) == 1
        found = [manifest.media_path(sample) for sample in manifest.samples]
        assert [path.name for path in found] == [f"{nfd}.jpg", "plain.jpg", f"{mixed}-2.jpg"]
        assert all(path.is_file() for path in found)
    (tmp_path / "names.txt").write_text(f"other\n{nfd}\n", encoding="utf-8")
    (tmp_path / "media" / "m.csv").rename(tmp_path / "media" / f"{nfd}.csv")
    built = build(tmp_path / "media", file=f"{nfc}.csv", label_column="catégorie", class_names="../names.txt")
    assert [sample.labels for sample in built.samples] == [(1,), (1,), (0,)]


def test_class_folders_of_both_unicode_forms_are_one_class(tmp_path: Path) -> None:
    for number, form in enumerate(("NFC", "NFD")):
        make_empty_files(tmp_path, f"{unicodedata.normalize(form, 'café')}/{number}.jpg", f"thé/{number}.jpg")
    if len(os.listdir(tmp_path)) == 3:  # a file system that keeps both
        built = build(tmp_path)
        assert built.class_names == ("café", "thé")
        assert all((tmp_path / sample.media).is_file() for sample in built.samples)


@pytest.mark.parametrize(
    ("media", "ids"),
    [
        (["1.png", "1.jpg"], ["1.png", "1.jpg"]),
        (["img.0001", "img.0002"], ["img.0001", "img.0002"]),
        (["a/v1.0.png", "a/v1.1.png", "b/v1.png"], ["a/v1.0", "a/v1.1", "b/v1"]),
        (["x", "x.png", "x.png.jpg", "y.jpg"], ["x", "x.png", "x.png.jpg", "y"]),
        (["1.jpg", "2.png"], ["1", "2"]),
        (["clip.mp4", "clip.MP4"], ["clip.mp4", "clip.MP4"]),
        ([".jpg", "a/.jpg"], [".jpg", "a/.jpg"]),
    ],
)
def test_ids_tell_files_apart(tmp_path: Path, media: list[str], ids: list[str]) -> None:
    write_csv(tmp_path / "m.csv", [{"file_name": name, "label": "x", "text": name} for name in media])
    built = build(tmp_path, file="m.csv", media="image")
    assert [(sample.id, sample.texts) for sample in built.samples] == [
        (id, (name,)) for id, name in zip(ids, media, strict=True)
    ]
    make_empty_files(tmp_path / "tree", *(f"{kind}/{name}" for kind in ("p", "q") for name in ("1.png", "1.jpg", "2.png")))
    assert [sample.id for sample in build(tmp_path / "tree").samples if sample.labels == (0,)] == ["p/1.jpg", "p/1.png", "p/2"]


@pytest.mark.parametrize(("file", "writer"), WRITERS.items())
def test_rows_of_one_file_become_one_sample_with_all_texts(tmp_path: Path, file: str, writer: Writer) -> None:
    captions = {"1.jpg": ["a cat", "a grey cat", "a cat"], "2.jpg": ["a dog"], "1.png": ["a fish", "fin"]}
    rows = [
        {"file_name": name, "label": name[0], "text": text, "split": "val" if name == "2.jpg" else "train"}
        for i in range(3)
        for name, texts in captions.items()
        for text in texts[i : i + 1]
    ]
    writer(tmp_path / file, rows)
    first = 2 if file.endswith(".csv") else 1
    unit = "row" if file.endswith(".parquet") else "line"
    refused = rf"{file}, {unit} {first + 3}: '1.jpg' repeats the id of {file}, {unit} {first}; .* --set merge_rows=true"
    with pytest.raises(ValueError, match=refused):
        build(tmp_path, file=file)
    built = build(tmp_path, file=file, merge_rows=True)
    assert [(s.id, s.texts, s.split) for s in built.samples] == [
        ("1.jpg", ("a cat", "a grey cat"), "train"),
        ("2", ("a dog",), "val"),
        ("1.png", ("a fish", "fin"), "train"),
    ]
    assert [built.source_location(i).split(" ")[-1] for i in range(3)] == [str(first), str(first + 1), str(first + 2)]


def test_samples_of_one_file_with_other_labels_are_named(tmp_path: Path) -> None:
    names = ["0.png", "1.png", "0.png", "1.png", "1.png", "1.png", "2.png"]
    rows = [
        {"file_name": name, "sample_id": f"s{row}", "label": "aababbb"[row], "split": "train"} for row, name in enumerate(names)
    ]
    write_csv(tmp_path / "m.csv", rows)
    make_empty_files(tmp_path, *names)
    warnings = prepare("table", tmp_path, tmp_path / "home", {"file": "m.csv"}).warnings
    (warning,) = (warning for warning in warnings if "other labels" in warning)
    assert warning.startswith(
        "3 samples have the file of an earlier sample, and other labels, the first: 's2' (m.csv, line 4) has"
    )
    assert "the file of 's0' (m.csv, line 2)" in warning
    write_csv(tmp_path / "m.csv", [{**row, "label": row["file_name"]} for row in rows])
    assert "other labels" not in str(prepare("table", tmp_path, tmp_path / "home", {"file": "m.csv"}).warnings)


def test_rows_of_one_sample_must_agree(tmp_path: Path) -> None:
    row = {"file_name": "1.jpg", "label": "a", "text": "one", "split": "train", "sample_id": "s", "group_id": "g"}
    changes = {"label": "b", "split": "test", "group_id": "h", "file_name": "2.jpg"}
    for column, value in changes.items():
        write_csv(tmp_path / "m.csv", [row, {**row, "text": "two", column: value}])
        with pytest.raises(
            ValueError, match=r"m\.csv, line 3: has the (labels|split|group|file) .*, but m\.csv, line 2, of the"
        ):
            build(tmp_path, file="m.csv", merge_rows=True)
    write_csv(tmp_path / "m.csv", [row, {**row, "label": "b"}, {**row, "label": "a"}])  # one row per label
    with pytest.raises(ValueError, match="several labels of one sample: --set labels=multi"):
        build(tmp_path, file="m.csv", merge_rows=True)
    built = build(tmp_path, file="m.csv", merge_rows=True, labels="multi")
    assert [(s.texts, s.labels) for s in built.samples] == [(("one",), (0, 1))]
    write_csv(tmp_path / "m.csv", [row, {**row, "file_name": "2.jpg"}])
    with pytest.raises(ValueError, match=r"'s' repeats the id of .*another file has it; name a column .* --set id_column=NAME"):
        build(tmp_path, file="m.csv")


@pytest.mark.parametrize(
    ("written", "num_classes"),
    [((0, 1, 2), 3), ((1, 2, 3), 4), ((2,), 3), ((0, 11), 12), ((*range(80), 90), 91), ((5, 10), 11)],
)
def test_numbers_with_small_gaps_are_ids(tmp_path: Path, written: tuple[int, ...], num_classes: int) -> None:
    write_csv(tmp_path / "m.csv", [{"file_name": f"{i}.jpg", "label": i} for i in written])
    built = build(tmp_path, file="m.csv")
    assert built.class_names == tuple(map(str, range(num_classes)))
    assert [sample.labels for sample in built.samples] == [(i,) for i in written]
    empty = num_classes - len(written)
    assert any(w.startswith(f"{empty} of {num_classes} classes have no sample") for w in built.meta["warnings"]) == bool(empty)


@pytest.mark.parametrize("written", [(45_678, 3, 17), (100, 200, 300), (1990, 1991, 2020), (1, 14)])
def test_numbers_with_huge_gaps_are_asked_about(tmp_path: Path, written: tuple[int, ...]) -> None:
    make_empty_files(tmp_path / "tree", *(f"{i}/1.jpg" for i in written))
    write_csv(tmp_path / "m.csv", [{"file_name": f"{i}.jpg", "label": i} for i in written])
    asked = rf"up to {max(written)}, which make {max(written) + 1} classes, {max(written) + 1 - len(written)} .*numbers=names"
    for root, options in ((tmp_path, {"file": "m.csv"}), (tmp_path / "tree", {})):
        with pytest.raises(ValueError, match=asked):
            build(root, **options)
        built = build(root, numbers="names", **options)
        assert built.class_names == tuple(map(str, sorted(written)))
        assert {name for (name,) in labels(built).values()} == set(map(str, written))
        assert len(build(root, numbers="ids", **options).class_names) == max(written) + 1
    with pytest.raises(ValueError, match="numbers is 'both'; choose one of: auto, ids, names"):
        build(tmp_path, file="m.csv", numbers="both")


def test_zeros_and_ones_of_all_classes_are_not_taken_for_ids(tmp_path: Path) -> None:
    marks = np.random.default_rng(0).integers(0, 2, (6, 5))
    pd.DataFrame({"file_name": [f"{i}.jpg" for i in range(6)], "label": list(marks)}).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(
        ValueError, match=r"m\.csv, line 2: the labels [01, ]+ are zeros and ones of all classes; write the ids"
    ):
        build(tmp_path, file="m.csv", labels="multi")
    ids = [np.flatnonzero(row).tolist() for row in marks]
    pd.DataFrame({"file_name": [f"{i}.jpg" for i in range(6)], "label": ids}).to_csv(tmp_path / "m.csv", index=False)
    assert [list(sample.labels) for sample in build(tmp_path, file="m.csv", labels="multi").samples] == ids


def test_whole_floats_of_pandas_are_ids(tmp_path: Path) -> None:
    frame = pd.DataFrame({"file_name": ["a.jpg", "b.jpg", "c.jpg"], "label": [2, None, 0], "text": [["x", "y"], None, ["z"]]})
    assert frame["label"].dtype == float
    frame.to_parquet(tmp_path / "m.parquet")
    frame.to_json(tmp_path / "m.jsonl", orient="records", lines=True)
    for file in ("m.parquet", "m.jsonl"):
        built = build(tmp_path, file=file, labels="multi")
        assert [sample.labels for sample in built.samples] == [(2,), (), (0,)]
        assert [sample.texts for sample in built.samples] == [("x", "y"), (), ("z",)]


def test_texts_that_recur_are_a_warning_of_a_table_and_refused_on_demand(tmp_path: Path) -> None:
    rows = [
        {"file_name": f"{split}.jpg", "label": split, "text": "a photo", "split": split} for split in ("train", "val", "test")
    ]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    make_empty_files(tmp_path, *(row["file_name"] for row in rows))
    report = prepare("table", tmp_path, tmp_path / "home", {})
    assert any(warning.startswith("1 of 1 test samples have the texts of a training sample") for warning in report.warnings)
    with pytest.raises(ValueError, match="test texts leak into training"):
        prepare("table", tmp_path, tmp_path / "home", {"texts_recur": "false"})


@pytest.mark.parametrize("percent", [10, 50])
def test_val_percent_holds_out_of_dealt_training_samples_too(tmp_path: Path, percent: int) -> None:
    rows = [{"file_name": f"{i}.jpg", "label": "x", "group_id": f"g{i // 2}"} for i in range(4000)]
    write_csv(tmp_path / "m.csv", rows)
    splits: dict[str, Any] = {"splits": {"train": 80, "val": 0, "test": 20}}
    for options in ({}, splits):
        dealt, built = build(tmp_path, file="m.csv", **options), build(tmp_path, file="m.csv", val_percent=percent, **options)
        moved = Counter((a.split, b.split) for a, b in zip(dealt.samples, built.samples, strict=True) if a.split != b.split)
        assert set(moved) == {("train", "val")}
        num_train = sum(sample.split == "train" for sample in dealt.samples)
        assert abs(moved["train", "val"] / num_train - percent / 100) < 0.06  # 4 standard deviations of 1,200 groups
        splits_of_group: dict[str, set[str]] = {}
        for before, after in zip(dealt.samples, built.samples, strict=True):
            splits_of_group.setdefault(after.group, set()).add(after.split)
            share = int(hashlib.sha256(f"held out: {after.group}".encode()).hexdigest()[:16], 16) / 2**64 * 100
            assert after.split == ("val" if before.split == "train" and share < percent else before.split)
        assert all(len(found) == 1 for found in splits_of_group.values())


def test_the_case_of_a_json_list_in_a_csv_of_a_spreadsheet(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "0.png", "1.png")
    texts = [["a cat", "a sleeping cat"], ["a dog"]]
    frame = pd.DataFrame({"media_path": ["0.png", "1.png"], "label": ["cat", "dog"], "texts": texts})
    for how in (list, np.array, json.dumps):
        frame["texts"] = pd.Series(list(map(how, texts)))
        frame.to_csv(tmp_path / "m.csv")  # with pandas' column of row numbers
        assert [sample.texts for sample in build(tmp_path, file="m.csv").samples] == [tuple(each) for each in texts]
