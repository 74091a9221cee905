"""Manifests are stored without loss, as the same bytes on every machine; faulty ones are refused, with the row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.data.manifest import Manifest, check_counts, check_manifest
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.data.spec import load_spec
from pipeline.types import Sample

META = {"media_type": "image", "text": {"kind": "tags", "aggregate": "join", "sep": " "}}
AWKWARD = ('say "hi", ok', "line\nbreak", "日本 🐵 ’", "-1+1", "null", "")


def small_manifest(tmp_path: Path, **changes: Any) -> Manifest:
    """Return a manifest of four multi-label samples in a mixed order of splits, with awkward texts and leading zeros."""
    samples = (
        Sample("007", "test", Path("a/007.jpg"), AWKWARD, (0, 2), ""),
        Sample("008", "train", Path("a/008.jpg"), (), (1,), "g1"),
        Sample("009", "val", Path("b/009.jpg"), ("x",), (), ""),
        Sample("010", "train", Path("b/010.jpg"), ("NA",), (0, 1, 2), "g1"),
    )
    fields: dict[str, Any] = {
        "dataset": "small",
        "label_kind": "multi",
        "class_names": ("sky", "sea", "sun"),
        "samples": samples,
        "meta": META,
        "media_root": tmp_path,
    }
    return Manifest(**{**fields, **changes})


def change_row(manifest: Manifest, row: int, **changes: Any) -> Manifest:
    """Return the manifest with one row changed."""
    samples = list(manifest.samples)
    samples[row] = dataclasses.replace(samples[row], **changes)
    return dataclasses.replace(manifest, samples=tuple(samples))


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    manifest = small_manifest(tmp_path)
    write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path, "small") == manifest


def test_files_are_byte_stable_and_say_nothing_about_the_machine(tmp_path: Path) -> None:
    for home, root in (("one", "here"), ("two", "there")):
        (tmp_path / root).mkdir()
        write_manifest(small_manifest(tmp_path / root), tmp_path / home)
    for suffix in ("parquet", "csv", "meta.json"):
        first, second = ((tmp_path / home / "manifests" / f"small.{suffix}").read_bytes() for home in ("one", "two"))
        assert first == second
        assert str(tmp_path).encode() not in first
    location = json.loads((tmp_path / "two" / "manifests" / "small.location.json").read_text())
    assert location == {"media_root": str(tmp_path / "there")}


def test_csv_holds_the_same_table_without_loss(tmp_path: Path) -> None:
    path = write_manifest(small_manifest(tmp_path), tmp_path)
    table = pd.read_parquet(path)
    csv_table = pd.read_csv(path.with_suffix(".csv"), dtype=str, keep_default_na=False, na_values=[])
    assert list(csv_table.columns) == list(table.columns)
    for name in ("label_ids", "texts"):
        assert [json.loads(cell) for cell in csv_table[name]] == [list(cell) for cell in table[name]]
    for name in ("dataset", "sample_id", "split", "media_type", "media_path", "source_row", "extra"):
        assert csv_table[name].tolist() == table[name].astype(str).tolist()
    assert csv_table["group_id"].tolist() == table["group_id"].fillna("").tolist() == ["g1", "g1", "", ""]
    assert table["split"].tolist() == ["train", "train", "val", "test"]
    assert table["source_row"].tolist() == [1, 3, 2, 0]


def test_sidecar_counts(tmp_path: Path) -> None:
    write_manifest(small_manifest(tmp_path), tmp_path)
    sidecar = json.loads((tmp_path / "manifests" / "small.meta.json").read_text())
    assert sidecar["counts"] == {"train": 2, "val": 1, "test": 1}
    assert sidecar["class_counts"]["train"] == {"sky": 1, "sea": 2, "sun": 1}
    assert sidecar["num_classes"] == 3


def test_fingerprint_depends_on_the_meaning_alone(tmp_path: Path) -> None:
    manifest = small_manifest(tmp_path)
    same = [
        dataclasses.replace(manifest, media_root=tmp_path / "elsewhere"),
        dataclasses.replace(manifest, meta={**META, "licence": "other"}),
    ]
    assert {other.fingerprint() for other in same} == {manifest.fingerprint()}
    changes: list[dict[str, Any]] = [
        {"id": "07"},
        {"split": "val"},
        {"media": Path("a/7.jpg")},
        {"texts": AWKWARD[:-1]},
        {"labels": (0,)},
        {"group": "g"},
    ]
    others = [change_row(manifest, 0, **change) for change in changes]
    others.append(dataclasses.replace(manifest, class_names=("sky", "sea", "star")))
    others.append(dataclasses.replace(manifest, label_kind="single"))
    assert len({other.fingerprint() for other in [manifest, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"id": ""}, "row 1, sample '': the id is empty"),
        ({"id": "007"}, "row 1, sample '007': repeats the id of row 0"),
        ({"split": "valid"}, "row 1, sample '008': unknown split 'valid'; choose one of: train, val, test"),
        ({"media": Path("/etc/passwd")}, "row 1, sample '008': media path '/etc/passwd' must be relative"),
        ({"media": Path("a/../../b.jpg")}, "row 1, sample '008': media path"),
        ({"media": Path("a\\b.jpg")}, "row 1, sample '008': media path"),
        ({"labels": (3,)}, "row 1, sample '008': label 3 is outside 0..2"),
        ({"labels": (-1,)}, "row 1, sample '008': label -1 is outside 0..2"),
        ({"labels": (1, 0)}, "row 1, sample '008': labels [1, 0] must be sorted and unique"),
        ({"split": "test"}, "row 3, sample '010': group 'g1' is in train, but sample '008' of it is in test"),
        ({"media": Path("a/007.jpg")}, "row 1, sample '008': media file 'a/007.jpg' is in train, but sample '007' of it is in"),
    ],
)
def test_faults_are_named_by_row(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match="dataset 'small', ") as raised:
        write_manifest(change_row(small_manifest(tmp_path), 1, **change), tmp_path)
    assert fault in str(raised.value)
    assert not (tmp_path / "manifests").exists()


def test_faults_of_the_whole_manifest(tmp_path: Path) -> None:
    for change, fault in (
        ({"samples": ()}, "no samples"),
        ({"class_names": ("a", "b", "a")}, "names the class 'a' more than once"),
        ({"dataset": "../x"}, "dataset name"),
        ({"label_kind": "single"}, "exactly one label, found 2"),
    ):
        with pytest.raises(ValueError, match=fault):
            check_manifest(small_manifest(tmp_path, **change))


def test_counts_are_enforced(tmp_path: Path) -> None:
    check_counts(small_manifest(tmp_path), {"all": 4, "train": 2, "val": 1, "test": 1, "classes": 3})
    with pytest.raises(ValueError, match=r"train 2 \(expected 5\), classes 3 \(expected 81\)"):
        check_counts(small_manifest(tmp_path), {"all": 4, "train": 5, "classes": 81})


def test_split_selects_in_order(tmp_path: Path) -> None:
    assert [sample.id for sample in small_manifest(tmp_path).split("train")] == ["008", "010"]
    with pytest.raises(ValueError, match="unknown split 'dev'; choose one of: train, val, test"):
        small_manifest(tmp_path).split("dev")


def test_missing_torn_and_edited_files_name_the_remedy(tmp_path: Path) -> None:
    manifest = small_manifest(tmp_path)
    for suffix in ("parquet", "meta.json", "location.json"):
        path = write_manifest(manifest, tmp_path).with_name(f"small.{suffix}")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="run: diffalign prepare small"):
            read_manifest(tmp_path, "small")
        path.unlink()
        with pytest.raises(ValueError, match=f"{suffix} is missing; run: diffalign prepare small"):
            read_manifest(tmp_path, "small")
    write_manifest(change_row(manifest, 0, split="train"), tmp_path / "other")
    write_manifest(manifest, tmp_path)
    shutil.copy(tmp_path / "other" / "manifests" / "small.parquet", tmp_path / "manifests")
    with pytest.raises(ValueError, match="changed or half written; run: diffalign prepare small"):
        read_manifest(tmp_path, "small")


def test_media_stay_inside_their_root(tmp_path: Path) -> None:
    root = tmp_path / "media"
    (root / "a").mkdir(parents=True)
    (root / "a" / "real.jpg").touch()
    (tmp_path / "outside.jpg").touch()
    (root / "a" / "inside.jpg").symlink_to("real.jpg")
    (root / "a" / "leak.jpg").symlink_to(tmp_path / "outside.jpg")
    manifest = small_manifest(root)
    sample = manifest.samples[0]
    assert manifest.media_path(dataclasses.replace(sample, media=Path("a/inside.jpg"))) == root / "a" / "real.jpg"
    for media in ("a/leak.jpg", "../outside.jpg", str(tmp_path / "outside.jpg")):
        with pytest.raises(ValueError, match="leads out of the media folder"):
            manifest.media_path(dataclasses.replace(sample, media=Path(media)))


def test_specs_are_found_by_name() -> None:
    assert load_spec("openmoji")["name"] == "openmoji"
    for name in ("nonsense", "../pyproject", ""):
        with pytest.raises(ValueError, match=r"unknown dataset .*; choose one of: .*openmoji"):
            load_spec(name)
