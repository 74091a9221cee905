"""MSR-VTT: the miniature gives the rows that were counted by hand, and every fault is reported with file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.make_fixtures import MSRVTT_CLIPS, clip_records, make_msrvtt, write_text

from pipeline.data.datasets.msrvtt import MsrVtt
from pipeline.data.manifest import Manifest
from pipeline.data.spec import load_spec

TRAIN_VAL, TEST = "train_val_videodatainfo.json", "test_videodatainfo.json"
EXPECTED = [
    ("video0", "train", 9, ("a man drives a car", "a car is shown"), "TrainValVideo/video0.mp4"),
    ("video1", "train", 16, ("someone eats",), "TrainValVideo/video1.mp4"),
    ("video6513", "train", 9, ("a red truck", "a red truck", "a truck"), "TrainValVideo/video6513.mp4"),
    ("video7010", "test", 14, ("kids in a garden", "children play"), "TestVideo/video7010.mp4"),
    ("video7011", "test", 0, ("a song",), "TestVideo/video7011.webm"),
]


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature; tests read it and never write to it."""
    return make_msrvtt(tmp_path_factory.mktemp("msrvtt"))


def build(root: Path, **options: Any) -> Manifest:
    """Build the manifest of a miniature."""
    return MsrVtt().build({**load_spec("msrvtt"), "counts_profile": "fixture", **options}, root)


def sample_rows(manifest: Manifest) -> list[tuple[Any, ...]]:
    """Return the samples in the form of `EXPECTED`."""
    return [(sample.id, sample.split, *sample.labels, sample.texts, sample.media.as_posix()) for sample in manifest.samples]


def test_rows(official: Path) -> None:
    manifest = build(official)
    assert sample_rows(manifest) == EXPECTED
    assert manifest.class_names[9] == "vehicles/autos"
    assert manifest.samples[0].group == "youtube:-00000000xY"
    assert json.loads(manifest.extra["video6513"]) == {
        "url": "https://www.youtube.com/watch?v=-00006513xY",
        "start time": 1.5,
        "end time": 11.5,
        "source_split": "validate",
    }


def test_counts(official: Path) -> None:
    manifest = build(official)
    assert manifest.meta["counts"] == {
        "clips": 5,
        "clips.train": 2,
        "clips.validate": 1,
        "clips.test": 2,
        "captions": 9,
        "without_text": 0,
    }
    assert [manifest.meta["class_counts"][split][9] for split in ("train", "validate", "test")] == [1, 1, 0]


def test_validation_clips_can_stay_in_the_validation_split(official: Path) -> None:
    manifest = build(official, train_splits=["train"])
    assert [sample.split for sample in manifest.samples] == ["train", "train", "val", "test", "test"]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_other_names_of_validate(official: Path, tmp_path: Path, name: str) -> None:
    assert build(make_msrvtt(tmp_path, name)).fingerprint() == build(official).fingerprint()


def test_category_names_are_known_without_their_file(official: Path, tmp_path: Path) -> None:
    root = make_msrvtt(tmp_path)
    (root / "category.txt").unlink()
    manifest = build(root)
    assert manifest.fingerprint() == build(official).fingerprint()
    assert "category.txt" not in manifest.meta["sources"]


def test_one_file_of_a_mirror_with_one_folder_of_videos(official: Path, tmp_path: Path) -> None:
    (tmp_path / "msrvtt_data").mkdir()
    (tmp_path / "msrvtt_data" / "MSRVTT_data.json").write_text(json.dumps(clip_records(MSRVTT_CLIPS), indent=1))
    for number, *_, file in MSRVTT_CLIPS:
        path = tmp_path / "videos" / "all" / f"video{number}{Path(file).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(tmp_path / "videos" / "all" / "x")
    manifest = build(tmp_path)
    assert [row[:4] for row in sample_rows(manifest)] == [row[:4] for row in EXPECTED]
    assert manifest.samples[4].media.as_posix() == "videos/all/video7011.webm"


def test_test_files_without_sentences(official: Path, tmp_path: Path) -> None:
    root = make_msrvtt(tmp_path)
    records = {"videos": json.loads((root / TEST).read_text())["videos"]}
    (root / "test_videodatainfo_nosen.json").write_text(json.dumps(records))
    (root / TEST).unlink()
    assert [sample.texts for sample in build(root).split("test")] == [(), ()]


def test_equal_captions_of_a_clip_may_be_merged(official: Path) -> None:
    assert build(official, dedup_captions=True).samples[2].texts == ("a red truck", "a truck")


def test_official_counts_are_enforced(official: Path) -> None:
    with pytest.raises(ValueError, match=r"clips 5 \(expected 10000\), clips.train 2 \(expected 6513\)"):
        build(official, counts_profile="official")


Records = dict[str, list[dict[str, Any]]]


def change(key: str, position: int, **values: Any) -> Callable[[Records], Any]:
    """Return a function that changes one record."""
    return lambda records: records[key][position].update(values)


FAULTS: list[tuple[str, Callable[[Records], Any], str]] = [
    (TRAIN_VAL, change("videos", 1, split="dev"), "line 12: video1: unknown split 'dev'; choose one of: train, validate"),
    (TRAIN_VAL, change("videos", 1, category=20), "line 12: video1: category 20 is outside 0..19"),
    (TRAIN_VAL, change("videos", 1, category="9"), "line 12: video1: category '9' is outside 0..19"),
    (TRAIN_VAL, change("videos", 1, video_id="video0"), "line 12: video0 is listed twice"),
    (TRAIN_VAL, change("videos", 1, video_id="../video1"), "line 12: video_id '../video1' is not video<number>"),
    (TRAIN_VAL, change("videos", 1, split="test"), "line 12: video1 is in test, which has 7010..9999"),
    (TRAIN_VAL, change("videos", 1, url="x" * 10_000_000), "line 12: the field 'url' has more than 1048576 characters"),
    (TRAIN_VAL, change("videos", 1, url=["x" * 10_000_000]), "line 12: the entry has more than 1048576 characters"),
    (TRAIN_VAL, change("videos", 1, url=["x"]), "line 12: video1: 'url' is neither a text nor a number"),
    (TRAIN_VAL, change("videos", 1, **{"end time": None}), "line 12: video1: 'end time' is neither a text nor a number"),
    (TRAIN_VAL, change("videos", 1, **{"end time": math.nan}), "line 12: broken JSON: NaN is no number"),
    (TEST, change("videos", 0, video_id="video0", split="train"), "line 3: video0 is listed twice"),
    (
        TRAIN_VAL,
        change("sentences", 0, video_id="video7010"),
        "line 32: a sentence of 'video7010', which is not among the videos",
    ),
    (TRAIN_VAL, change("sentences", 0, sen_id="1"), "line 32: a sentence of video6513 without caption or sen_id"),
    (TRAIN_VAL, change("sentences", 0, caption="x" * 10_000_000), "line 32: the field 'caption' has more than 1048576"),
]


@pytest.mark.parametrize(("file", "edit", "fault"), FAULTS)
def test_faults_have_file_and_line(tmp_path: Path, file: str, edit: Callable[[Records], Any], fault: str) -> None:
    root = make_msrvtt(tmp_path)
    records = {key: value for key, value in json.loads((root / file).read_text()).items() if key != "info"}
    edit(records)
    (root / file).write_text(json.dumps(records, indent=1))
    with pytest.raises(ValueError, match="line") as raised:
        build(root)
    assert f"{file}, {fault}" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"videos": [\n{"video_id": }]}', "line 2: broken JSON: Expecting value"),
        ('{"videos": [\n1]}', "line 2: '1' is no object with keys"),
        ('{"videos": [\n' + "[" * 100_000, "line 2: the JSON is nested too deeply"),
        ('{"videos": [\n{}', "line 2: "),
        ("\n[]", "line 2: broken JSON: '[' where '{' is due"),
    ],
)
def test_broken_json_has_file_and_line(tmp_path: Path, text: str, fault: str) -> None:
    root = make_msrvtt(tmp_path)
    (root / TEST).write_text(text)
    with pytest.raises(ValueError, match="line") as raised:
        build(root)
    assert f"{TEST}, {fault}" in str(raised.value)


@pytest.mark.parametrize("lines", [["music 0"], ["music\t0", "people\t0"], ["music\tzero"]])
def test_faults_of_the_categories(tmp_path: Path, lines: list[str]) -> None:
    root = make_msrvtt(tmp_path)
    write_text(root / "category.txt", lines)
    with pytest.raises(ValueError, match=r"category.txt, line [12]: "):
        build(root)


def test_a_youtube_video_in_two_splits_is_refused(tmp_path: Path) -> None:
    root = make_msrvtt(tmp_path)
    records = json.loads((root / TEST).read_text())
    records["videos"][0]["url"] = "https://www.youtube.com/watch?v=-00000000xY"
    (root / TEST).write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"test_videodatainfo.json, video 1, sample 'video7010': group 'youtube:-00000000xY'"):
        build(root)


def test_captions_of_a_training_clip_in_another_order_are_a_leak(tmp_path: Path) -> None:
    root = make_msrvtt(tmp_path)
    text = (
        (root / TEST).read_text().replace("kids in a garden", "A car is  shown").replace("children play", "a man drives a car")
    )
    (root / TEST).write_text(text)
    with pytest.raises(
        ValueError, match=r"test_videodatainfo\.json, video 1, sample 'video7010': has the texts of .*, video 1"
    ):
        build(root)


def test_a_folder_without_annotations_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for train_val_videodatainfo.json and test_videodatainfo.json; or"):
        build(tmp_path)
