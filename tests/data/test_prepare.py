"""`prepare` compares counts with published ones, lists missing files, and writes the same bytes on every machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from helpers.make_fixtures import make_ingredients101, make_msrvtt, make_nuswide, make_vireo172

from pipeline.data.manifest import has_text
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.data.prepare import apply_settings, changeable_settings, prepare
from pipeline.data.spec import load_spec

MAKERS: dict[str, Callable[[Path], Path]] = {
    "nuswide": make_nuswide,
    "vireo172": make_vireo172,
    "ingredients101": make_ingredients101,
    "msrvtt": make_msrvtt,
}
FIXTURE = {"counts_profile": "fixture"}
# SHA-256 of <dataset>.csv, built from the fixture of the dataset: the same on every machine.
CSV_SHA256 = {
    "nuswide": "f543787ac0abdb1dfb083a67b980dd39097114b2f6b3f0d013c1391e6990ac9c",
    "vireo172": "336a348e9cf96946e31aace0d78540504a429e602c208b62588530b70a085b88",
    "ingredients101": "6b53e535a310c04c9f5005cc50eab07fc3cfdfef75a3124e46d11702b92bf6de",
    "msrvtt": "a5ae51628094e3c57c2eeef81dbf8090b3029fcfe50c111132fc5fd89387b291",
}
PREPARE = """
import json, pathlib, sys
from pipeline.data.prepare import prepare
for name, root, settings in json.loads(sys.argv[1]):
    prepare(name, pathlib.Path(root), pathlib.Path("home"), settings)
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of the fixture (a small imitation of the official files) of each dataset; tests only read it."""
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


def settings_of(name: str) -> dict[str, str]:
    """Return the settings that are needed to prepare the fixture of a dataset."""
    return {**FIXTURE, "allow_missing": "true"} if name == "nuswide" else FIXTURE


def test_bytes_are_the_same_everywhere(official: dict[str, Path], tmp_path: Path) -> None:
    here, there, requests = tmp_path / "here", tmp_path / "there", []
    for name, root in official.items():
        path = prepare(name, root, here, settings_of(name)).path
        assert hashlib.sha256(path.with_suffix(".csv").read_bytes()).hexdigest() == CSV_SHA256[name]
        whole = root.parent if name == "nuswide" else root
        shutil.copytree(whole, there / name)
        requests.append((name, str(there / name / root.relative_to(whole)), settings_of(name)))
    environment = {**os.environ, "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONUTF8": "0", "TZ": "Asia/Tokyo"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", PREPARE, json.dumps(requests)], cwd=there, env=environment, check=True)
    for name in official:
        for kind in ("parquet", "csv", "meta.json"):
            file = f"manifests/{name}.{kind}"
            assert (there / "home" / file).read_bytes() == (here / file).read_bytes()


@pytest.mark.parametrize("name", MAKERS)
def test_manifests_read_back_and_the_csv_file_holds_the_same_table(
    official: dict[str, Path], tmp_path: Path, name: str
) -> None:
    report = prepare(name, official[name], tmp_path, settings_of(name))
    manifest = read_manifest(tmp_path, name)
    assert manifest.fingerprint() == report.fingerprint
    table = pd.read_parquet(report.path)
    csv_table = pd.read_csv(report.path.with_suffix(".csv"), dtype=str, keep_default_na=False, na_values=[])
    assert [json.loads(cell) for cell in csv_table["texts"]] == [list(cell) for cell in table["texts"]]
    assert [json.loads(cell) for cell in csv_table["label_ids"]] == [list(cell) for cell in table["label_ids"]]
    for column in ("sample_id", "split", "media_path", "source_row", "extra"):
        assert csv_table[column].tolist() == table[column].astype(str).tolist()
    assert csv_table["group_id"].tolist() == table["group_id"].fillna("").tolist()
    write_manifest(manifest, tmp_path / "again")
    assert (tmp_path / "again" / "manifests" / f"{name}.parquet").read_bytes() == report.path.read_bytes()


def test_source_rows_are_rows_of_the_official_list(official: dict[str, Path], tmp_path: Path) -> None:
    table = pd.read_parquet(prepare("nuswide", official["nuswide"], tmp_path, settings_of("nuswide")).path)
    assert dict(zip(table["sample_id"], table["source_row"], strict=True))["lake/0001_300000004"] == 6
    assert table["source_row"].tolist() == [0, 2, 5, 6, 10, 1, 8, 11]  # train, then test; row 9 has no file


def test_missing_files_are_listed_and_refused_unless_allowed(official: dict[str, Path], tmp_path: Path) -> None:
    listed = tmp_path / "manifests" / "nuswide.missing.txt"
    with pytest.raises(ValueError, match=r"1 of 9 media files of nuswide are missing below .*--image-root.*--allow-missing"):
        prepare("nuswide", official["nuswide"], tmp_path, FIXTURE)
    assert listed.read_text() == "ImageList/Imagelist.txt, line 10: sun/0001_300000007.jpg\n"
    assert not (tmp_path / "manifests" / "nuswide.parquet").exists()
    report = prepare("nuswide", official["nuswide"], tmp_path, settings_of("nuswide"))
    assert (report.missing, report.missing_list) == (1, str(listed))
    manifest = read_manifest(tmp_path, "nuswide")
    assert len(manifest.samples) == 8
    assert manifest.meta["missing_media"] == ["sun/0001_300000007"]
    found = {row["count"]: row["found"] for row in report.counts}
    assert (found["all"], found["both"]) == (9, 9)  # counts of the lists, before samples are left out
    assert (found["without media, left out"], found["all with media"]) == (1, 8)
    assert [found[f"{split} with media"] for split in ("train", "val", "test")] == [5, 0, 3]


def test_a_partial_collection_elsewhere_is_counted(official: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "few" / "cat").mkdir(parents=True)
    shutil.copy(official["nuswide"] / "Flickr" / "cat" / "0001_300000003.jpg", tmp_path / "few" / "cat")
    settings = settings_of("nuswide")
    report = prepare("nuswide", official["nuswide"], tmp_path, settings, image_root=tmp_path / "few")
    assert report.missing == 8
    assert [sample.id for sample in read_manifest(tmp_path, "nuswide").samples] == ["cat/0001_300000003"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="there is nothing to prepare"):
        prepare("nuswide", official["nuswide"], tmp_path, settings, image_root=tmp_path / "none")


def test_a_list_of_missing_files_goes_when_nothing_is_missing(official: dict[str, Path], tmp_path: Path) -> None:
    listed = tmp_path / "manifests" / "vireo172.missing.txt"
    listed.parent.mkdir()
    listed.write_text("old")
    assert prepare("vireo172", official["vireo172"], tmp_path, FIXTURE).missing_list == ""
    assert not listed.exists()


@pytest.mark.parametrize(("name", "bad"), [("vireo172", []), ("ingredients101", []), ("msrvtt", ["video1"])])
def test_media_that_cannot_be_decoded_are_marked(official: dict[str, Path], tmp_path: Path, name: str, bad: list[str]) -> None:
    report = prepare(name, official[name], tmp_path, FIXTURE, verify_media=True)
    assert [line.split(": ")[1] for line in report.undecodable] == [f"{name}.mp4" for name in bad]
    table = pd.read_parquet(report.path)
    assert table.loc[~table["media_ok"].astype(bool), "sample_id"].tolist() == bad
    assert prepare(name, official[name], tmp_path, FIXTURE).fingerprint == report.fingerprint


def test_a_truncated_image_is_reported_and_a_png_named_jpg_is_not(tmp_path: Path) -> None:
    root = make_nuswide(tmp_path)
    path = root / "Flickr" / "actor" / "0001_2124494179.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    (reported,) = prepare("nuswide", root, tmp_path, settings_of("nuswide"), verify_media=True).undecodable
    assert reported.startswith("'actor/0001_2124494179' (ImageList/Imagelist.txt, line 1): 0001_2124494179.jpg: ")


def test_a_playlist_named_like_a_video_opens_no_other_file(official: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(official["msrvtt"], tmp_path / "root")
    secret = shutil.copy(root / "TestVideo" / "video7010.mp4", tmp_path / "secret.mp4")
    lists = {
        "video0": f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "video6513": f"ffconcat version 1.0\nfile '{secret}'\n",
    }
    for name, text in lists.items():
        (root / "TrainValVideo" / f"{name}.mp4").write_text(text)
    reported = prepare("msrvtt", root, tmp_path, FIXTURE, verify_media=True).undecodable
    assert [line.split(": ")[0] for line in reported] == [
        f"'{id}' (train_val_videodatainfo.json, video {number})"
        for number, id in enumerate(("video0", "video1", "video6513"), 1)
    ]


def make_spec_folder(folder: Path, name: str, **changes: object) -> Path:
    """Make a folder of specs that contains one spec, with some keys changed."""
    folder.mkdir()
    (folder / f"{name}.yaml").write_text(json.dumps({**load_spec(name), **changes}))
    return folder


def test_counts_are_compared_with_the_published_ones(
    official: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_class = {"train": [0] * 172, "test": [1] + [0] * 170 + [1]}
    per_class["train"][:2] = [2, 5]
    per_class["train"][171] = 1
    specs = make_spec_folder(
        tmp_path / "specs",
        "vireo172",
        counts={"images": 7, "classes": 172},
        counts_warn={"train": 4, "test": 3},
        class_counts=per_class,
    )
    monkeypatch.setattr("pipeline.data.spec.SPEC_FOLDER", specs)
    report = prepare("vireo172", official["vireo172"], tmp_path, {})
    verdicts = {row["count"]: (row["found"], row["expected"], row["verdict"]) for row in report.counts if row["verdict"]}
    assert verdicts == {
        "train": (4, 4, "same"),
        "test": (2, 3, "differs"),
        "classes": (172, 172, "same"),
        "images": (7, 7, "same"),
        "classes of train": (171, 172, "differs"),
        "classes of test": (172, 172, "same"),
    }
    assert report.warnings == (
        "test: 2, published 3",
        "train: 1 classes differ from the published counts: Sauteed Crème Fraîche 1 (published 5)",
        "2 media files of val and test have the same bytes as one of train, the first: '2/9_9' of val and '2/1_2'; leave them "
        "out, or put them in one group",
    )


@pytest.mark.parametrize("name", MAKERS)
def test_a_fixture_is_not_taken_for_the_official_files(official: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"has unexpected counts: .*; are .* complete\?"):
        prepare(name, official[name], tmp_path, {})


@pytest.mark.parametrize(
    ("split", "key", "total"),
    [("train", "nuswide", 294_977), ("test", "nuswide", 198_162), ("train", "vireo172", 66_071), ("test", "vireo172", 33_154)]
    + [(split, "msrvtt", total) for split, total in (("train", 6_513), ("validate", 497), ("test", 2_990))],
)
def test_published_class_counts_add_up(split: str, key: str, total: int) -> None:
    spec = load_spec(key)
    assert sum(spec["class_counts"][split]) == total
    assert len(spec["class_counts"][split]) == spec["counts"]["classes"]


REMEDIES = [
    ("nuswide", {}, "--set val_percent=10", {"val_percent": "40"}),
    ("msrvtt", {}, "--set train_splits=train", {"train_splits": "train"}),
    ("vireo172", {"train_splits": "train,val"}, "--set train_splits=train", {"train_splits": "train"}),
    ("ingredients101", {"train_splits": "train,val"}, "--set train_splits=train", {"train_splits": "train"}),
]


@pytest.mark.parametrize(("name", "settings", "remedy", "filled"), REMEDIES)
def test_the_remedy_for_a_missing_validation_split_helps(
    official: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, str], remedy: str, filled: dict[str, str]
) -> None:
    report = prepare(name, official[name], tmp_path, {**settings_of(name), **settings})
    assert f"the val split is empty, and heads are selected on it; prepare with {remedy}" in report.warnings
    assert read_manifest(tmp_path, name).meta["val_remedy"] == remedy
    report = prepare(name, official[name], tmp_path, {**settings_of(name), **filled})
    assert not any("val split" in warning for warning in report.warnings)
    assert read_manifest(tmp_path, name).split("val")


# Counted by hand: row 11 of NUS-WIDE has the tags of row 10; both test dishes of Ingredients-101 are also training dishes.
@pytest.mark.parametrize(("name", "shared"), [("nuswide", 1), ("vireo172", 0), ("ingredients101", 2), ("msrvtt", 0)])
def test_texts_that_recur_are_counted_and_reported(official: dict[str, Path], tmp_path: Path, name: str, shared: int) -> None:
    report = prepare(name, official[name], tmp_path, settings_of(name))
    assert {row["count"]: row["found"] for row in report.counts}["test texts in train"] == shared
    assert any(f"{shared} of " in warning and "texts_recur: true" in warning for warning in report.warnings) == bool(shared)


def test_training_samples_with_a_text_are_counted_and_blank_texts_are_none(tmp_path: Path) -> None:
    texts = ["a cup", " \t", "\u200b\ufeff", "", "\u200ba"]
    rows = [f"{k}.png,{'ab'[k % 2]},train,{text}" for k, text in enumerate(texts)] + ["9.png,a,test,a plate", "8.png,a,val,a"]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label,split,text", *rows, ""]), encoding="utf-8")
    for row in rows:
        (tmp_path / row.partition(",")[0]).write_bytes(b"")
    report = prepare("table", tmp_path, tmp_path / "home", {"texts_recur": "true"})
    found = {row["count"]: row["found"] for row in report.counts}
    assert (found["train"], found["train with text"]) == (5, 2)
    read = {sample.id: has_text(sample) for sample in read_manifest(tmp_path / "home", "table").split("train")}
    assert list(read.values()) == [True, False, False, False, True]


@pytest.mark.parametrize(("name", "shared"), [("nuswide", True), ("ingredients101", True), ("vireo172", False)])
def test_texts_that_recur_may_be_refused(official: dict[str, Path], tmp_path: Path, name: str, shared: bool) -> None:
    settings = {**settings_of(name), "texts_recur": "false"}
    if not shared:
        assert prepare(name, official[name], tmp_path, settings).missing == 0
        return
    with pytest.raises(ValueError, match=r"line \d+, sample .*: has the texts of .*, line \d+: test texts leak into training"):
        prepare(name, official[name], tmp_path, settings)


def test_texts_recur_only_where_it_is_said_why() -> None:
    recurring = {name for name in ("openmoji", "openclipart", "animoji", "table", *MAKERS) if load_spec(name)["texts_recur"]}
    assert recurring == {"nuswide", "vireo172", "ingredients101", "openclipart", "table"}


def test_samples_without_label_are_reported(official: dict[str, Path], tmp_path: Path) -> None:
    report = prepare("nuswide", official["nuswide"], tmp_path, {**settings_of("nuswide"), "filter": "none"})
    assert any(
        w == "2 samples have no label, and heads cannot be scored on them; leave them out with --set filter=label"
        for w in report.warnings
    )


def test_how_texts_become_one_vector_can_be_set(official: dict[str, Path], tmp_path: Path) -> None:
    settings = {**FIXTURE, "aggregate": "mean", "sep": "; ", "empty": "no ingredients"}
    prepare("vireo172", official["vireo172"], tmp_path, settings)
    text = read_manifest(tmp_path, "vireo172").meta["text"]
    assert text == {"kind": "ingredients", "aggregate": "mean", "sep": "; ", "empty": "no ingredients"}
    with pytest.raises(ValueError, match="aggregate is 'median'; choose one of: join, mean, first, random"):
        prepare("vireo172", official["vireo172"], tmp_path, {**FIXTURE, "aggregate": "median"})


def test_every_plain_key_can_be_set() -> None:
    for name in (*MAKERS, "table", "openclipart", "animoji", "openmoji"):
        spec = load_spec(name)
        settings = changeable_settings(spec)
        assert {"allow_missing", "counts_profile", "texts_recur", "aggregate", "sep", "empty"} <= set(settings)
        for key, value in settings.items():
            text = ",".join(
                map(str, value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value])
            )
            assert changeable_settings(apply_settings(spec, {key: text}))[key] == value


def test_settings_take_the_type_of_what_they_change() -> None:
    spec = apply_settings(
        load_spec("nuswide"),
        {"val_percent": "10", "allow_missing": "True", "filter": "label", "tags_dir": "/a, b"},
    )
    assert (spec["val_percent"], spec["allow_missing"], spec["filter"]) == (10, True, "label")
    assert spec["layout"]["tags_dir"] == ["/a", "b"]
    assert load_spec("nuswide")["layout"]["tags_dir"][0] == "NUS_WID_Tags"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"fliter": "label"}, "unknown setting 'fliter' of nuswide; choose one of: variant, filter, val_percent"),
        ({"name": "x"}, "unknown setting 'name'"),
        ({"counts": "x"}, "unknown setting 'counts'"),
        ({"allow_missing": "1"}, "it takes true or false"),
        ({"val_percent": "ten"}, "it takes a whole number"),
        ({"val_percent": "10,20"}, "it takes a whole number"),
        ({"counts_profile": "mini"}, "choose one of: official, fixture"),
    ],
)
def test_faulty_settings_are_refused(official: dict[str, Path], tmp_path: Path, settings: dict[str, str], fault: str) -> None:
    with pytest.raises(ValueError, match="'") as raised:
        prepare("nuswide", official["nuswide"], tmp_path, settings)
    assert fault in str(raised.value)


def test_percents_of_splits_are_checked() -> None:
    assert apply_settings(load_spec("table"), {"splits": "80, 20,0"})["splits"] == {"train": 80, "val": 20, "test": 0}
    for wrong in ("80", "80,10,ten", "80,10,5,5", "80;10;10"):
        with pytest.raises(ValueError, match="it takes a whole number for train, val, test, parted by commas"):
            apply_settings(load_spec("table"), {"splits": wrong})


def test_the_root_may_be_the_working_folder(official: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(official["nuswide"])  # its tags are in a folder beside it
    assert prepare("nuswide", Path(), tmp_path, settings_of("nuswide")).missing == 1


def test_faulty_folders_are_refused(official: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        prepare("nuswide", official["nuswide"], tmp_path, FIXTURE, image_root=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"--image-root s3://bucket/x: media are read from a folder; .*prepare webdataset --root s3"
    ):
        prepare("nuswide", official["nuswide"], tmp_path, FIXTURE, image_root=Path("s3://bucket/x"))
    with pytest.raises(ValueError, match="openmoji finds its media by itself"):
        prepare("openmoji", None, tmp_path, {}, image_root=tmp_path)
    with pytest.raises(ValueError, match="vireo172 is built from its official files: give their folder, --root DIR"):
        prepare("vireo172", None, tmp_path, FIXTURE)


def test_datasets_of_packages_are_prepared_too(tmp_path: Path) -> None:
    report = prepare("openmoji", None, tmp_path, {})
    assert {row["count"]: row["verdict"] for row in report.counts if row["verdict"]} == dict.fromkeys(
        ("all", "classes", "train", "val", "test", "groups"), "same"
    )
    assert report.missing == 0


def test_media_of_other_splits_with_the_bytes_of_training_media_are_named(tmp_path: Path) -> None:
    """Two of the pictures of val and test are copies of training pictures; one has the size of one, and other bytes."""
    contents = {"a": b"one", "b": b"two", "c": b"three", "d": b"one", "e": b"three", "f": b"six"}
    splits = {"a": "train", "b": "train", "c": "train", "d": "val", "e": "test", "f": "test"}
    for name, content in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    lines = ["path,kind,caption,split"] + [f"{name}.png,k,text of {name},{split}" for name, split in splits.items()]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    columns = {"media_column": "path", "label_column": "kind", "text_column": "caption"}
    report = prepare("table", tmp_path, tmp_path / "home", columns)
    (warning,) = [each for each in report.warnings if "same bytes" in each]
    assert warning.startswith("2 media files of val and test have the same bytes as one of train, the first: 'd")
