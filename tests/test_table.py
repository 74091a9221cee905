"""Your own data: tables, imagefolders and folder trees give the rows that a person reads in them; hostile ones are refused."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasets import table
from pipeline.manifest import Manifest, load_spec

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


def build(root: Path, **options: Any) -> Manifest:
    return table.build({**load_spec("table"), "texts_recur": True, **options}, root)


def rows(manifest: Manifest) -> list[tuple[Any, ...]]:
    names = manifest.class_names
    return [(s.id, s.split, s.media.as_posix(), s.texts, tuple(names[label] for label in s.labels)) for s in manifest.samples]


def write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n", encoding="utf-8")


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(records), path)


WRITERS = {"data.csv": write_csv, "data.jsonl": write_jsonl, "data.parquet": write_parquet}
Writer = Callable[[Path, list[dict[str, Any]]], None]


def media(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.mark.parametrize(("name", "writer"), WRITERS.items())
def test_the_same_table_in_every_format(tmp_path: Path, name: str, writer: Writer) -> None:
    writer(tmp_path / name, [{**record, "split": record["part"]} for record in RECORDS])
    built = build(tmp_path, file=name, **OPTIONS)
    assert rows(built) == ROWS
    assert (built.class_names, built.label_kind, built.meta["media_type"]) == (("cat", "dog"), "single", "image")
    assert built.meta["sources"] == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
    assert built.meta["splits"] == "as given"


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


def test_splits_that_nobody_gives_are_by_hash_of_the_group(tmp_path: Path) -> None:
    records = [{"file_name": f"{i}.jpg", "label": "x", "group_id": f"g{i // 4}"} for i in range(4000)]
    write_csv(tmp_path / "m.csv", records)
    built = build(tmp_path, file="m.csv")
    for sample in built.samples:
        share = int(hashlib.sha256(sample.group.encode()).hexdigest()[:16], 16) / 2**64 * 100
        assert sample.split == ("train" if share < 60 else "val" if share < 70 else "test")
    sizes = Counter(sample.split for sample in built.samples)
    assert abs(sizes["train"] - 2400) < 250
    assert abs(sizes["val"] - 400) < 150
    assert "SHA-256" in built.meta["splits"]


def test_folders_are_classes(tmp_path: Path) -> None:
    media(tmp_path, "cat/b.PNG", "cat/more/a.jpg", "dog/1.webp", "dog/.hidden.jpg", "dog/notes.txt", "empty/readme.md")
    built = build(tmp_path)
    assert [row[0] for row in rows(built)] == ["cat/b", "cat/more/a", "dog/1"]
    assert [row[-1] for row in rows(built)] == [("cat",), ("cat",), ("dog",)]


def test_folders_are_splits_and_classes(tmp_path: Path) -> None:
    media(tmp_path, "train/cat/1.mp4", "train/dog/1.mp4", "valid/cat/1.mp4", "Test/dog/1.mp4")
    built = build(tmp_path)
    assert sorted((row[1], row[-1][0]) for row in rows(built)) == [
        ("test", "dog"),
        ("train", "cat"),
        ("train", "dog"),
        ("val", "cat"),
    ]
    assert built.meta["media_type"] == "video"


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
    assert [built.where(i) for i in range(3)] == [
        f"{split}/metadata.jsonl, line 1" for split in ("test", "train", "validation")
    ]


GOOD = {"file_name": "x.jpg", "label": "a", "text": "t"}
HOSTILE = {
    "a path upwards": ({"file_name": "../x.jpg"}, "holds '..'"),
    "an absolute path": ({"file_name": "/etc/passwd"}, "absolute"),
    "a drive": ({"file_name": "C:\\x.jpg"}, "absolute"),
    "an empty path": ({"file_name": ""}, "is empty"),
    "a formula as path": ({"file_name": "=cmd|' /C calc'!A0"}, "formula"),
    "a formula as label": ({"label": "@SUM(1)"}, "formula"),
    "a control character": ({"label": "a\u0007"}, "control characters"),
    "no label": ({"label": ""}, "0 labels where one is due"),
    "an unknown split": ({"split": "holdout"}, "unknown split 'holdout'; choose one of: train"),
    "a broken list": ({"label": "[1, 2"}, "no JSON list"),
    "a huge path": ({"file_name": "x" * 2000}, "longer than 1024"),
    "a huge text": ({"text": "x" * 10_000_000}, "longer than|more than"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("file", "writer"), WRITERS.items())
def test_hostile_rows_are_refused_with_file_and_line(tmp_path: Path, name: str, file: str, writer: Writer) -> None:
    change, reason = HOSTILE[name]
    good = {**GOOD, "split": "train"}
    writer(tmp_path / file, [good, {**good, "file_name": "y.jpg", **change}])
    line = {"data.csv": 3, "data.jsonl": 2, "data.parquet": 2}[file]
    with pytest.raises(ValueError, match=rf"{file}, line {line}: .*({reason})"):
        build(tmp_path, file=file, labels="single")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("m.csv", "file_name,label\nx.jpg,a\ny.jpg\n", r"line 3: 1 cells where the header has 2"),
        ("m.csv", "file_name,file_name\nx.jpg,a\n", r"line 1: two columns have the same name"),
        ("m.csv", 'file_name,label\n"x.jpg,a\n', r"line 2: unexpected end of data"),
        ("m.csv", "file_name,label\nx.jpg,=1+1\n", r"line 2: .*formula"),
        ("m.csv", "name,label\nx.jpg,a\n", r"no column media_path or file_name; choose one of: name, label"),
        ("m.csv", "file_name\nx.jpg\n", r"line 2: there is neither a label column nor a class folder"),
        ("m.csv", "file_name,label\n", r"has no rows"),
        ("m.csv", 'file_name,label,text\nx.jpg,a,"t\nt"\n\nx.jpg,a,\n', r"m\.csv, line 5.*repeats the id of m\.csv, line 3"),
        ("m.csv", "file_name,label\nx.jpg,99999999\n", r"above 99999"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": true}\n', r"line 1: True is no text"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": 1.5}\n', r"line 1: 1\.5 is no text"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": -1}\n', r"line 1: '-1' is negative"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": "a", "text": 7}\n', r"line 1: a text is no text"),
        ("m.jsonl", '\n["x.jpg"]\n', r"line 2: it is no JSON object"),
        ("m.jsonl", "[" * 100_000, r"line 1: broken JSON"),
        ("m.parquet", "PAR1", r"damaged or no Parquet file"),
        ("m.xlsx", "", r"none of: \.csv, \.jsonl, \.parquet"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, file: str, content: str, reason: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=reason):
        build(tmp_path, file=file)


def test_latin_1_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("file_name,label\nx.jpg,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"m\.csv, line 2: not UTF-8"):
        build(tmp_path, file="m.csv")


def test_options_are_checked(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [GOOD])
    (tmp_path / "names.txt").write_text("b\n")
    cases = {
        ("labels", "both"): "choose one of: auto, single, multi",
        ("media", "audio"): "choose one of: auto, image, video",
        ("label_column", "kind"): "no column kind; choose one of: file_name, label, text",
        ("class_names", "names.txt"): "line 2: the label 'a' is none of the 1 class names",
        ("class_names", "absent.txt"): "the list of class names is missing",
    }
    for (key, value), reason in cases.items():
        with pytest.raises(ValueError, match=reason):
            build(tmp_path, file="m.csv", **{key: value})
    with pytest.raises(ValueError, match="is no folder; --root"):
        build(tmp_path / "nothing")


def test_links_to_folders_and_stray_files_are_refused(tmp_path: Path) -> None:
    media(tmp_path / "outside", "1.jpg")
    media(tmp_path / "root", "cat/1.jpg")
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"dog is a symbolic link to a folder"):
        build(tmp_path / "root")
    (tmp_path / "root" / "dog").unlink()
    media(tmp_path / "root", "stray.jpg")
    with pytest.raises(ValueError, match=r"stray\.jpg is in no class folder"):
        build(tmp_path / "root")
