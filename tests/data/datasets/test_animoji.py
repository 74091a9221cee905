"""Animated emoji: a miniature package with the quirks of the real one; every expected row is written by hand."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.archives import tar, tgz
from PIL import Image

from pipeline.data import fetch, splits
from pipeline.data.datasets.animoji import Animoji
from pipeline.data.manifest import Manifest
from pipeline.data.spec import load_spec


def webp(num_frames: int) -> bytes:
    """Return a clip of different frames; one frame is a still picture."""
    frames = [Image.new("RGBA", (8, 8), (40 * i, 90, 200, 255)) for i in range(num_frames)]
    data = io.BytesIO()
    frames[0].save(data, "WEBP", save_all=True, append_images=frames[1:], duration=40, lossless=True)
    return data.getvalue()


ROLES = ("1f373", "1f393", "1f3a4")  # cook, student, singer
CLIPS = [
    *(f"{who}-{tone}200d-{role}" for role in ROLES for who in ("1f468", "1f469") for tone in ("", "1f3fb-", "1f3ff-")),
    "1f400",  # rat, mouse, ox, water buffalo: four groups of one
    "1f401",
    "1f402",
    "1f403",
    "1f441-fe0f",  # eye: a class of one is too small
]
STATIC = ["0023-fe0f-20e3", "1f404"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, unpacked by `fetch`."""
    home = tmp_path_factory.mktemp("home")
    files = {f"package/assets/{name}.webp": webp(3) for name in CLIPS}
    files |= {f"package/assets/{name}.webp": webp(1) for name in STATIC}
    files |= {"package/assets/.gitkeep": b"", "package/package.json": b"{}"}
    archive = home / "anim.tgz"
    archive.write_bytes(tgz(tar(files)))
    return fetch.fetch("animoji", home, archive)


def spec(**select: Any) -> dict[str, Any]:
    loaded = load_spec("animoji")
    return {**loaded, "counts_profile": "fixture", "select": {**loaded["select"], "min_class_size": 4, **select}}


@pytest.fixture(scope="module")
def mini(package: Path) -> Manifest:
    return Animoji().build(spec(), package)


def test_clips_classes_and_groups(mini: Manifest) -> None:
    assert mini.class_names == ("person-role", "animal-mammal")
    assert Counter(sample.labels for sample in mini.samples) == {(0,): 18, (1,): 4}
    assert mini.meta["counts"] == {"pictures": 25, "animated": 23, "groups": 7}
    assert mini.meta["left_out"] == {"small_classes": {"body-parts": 1}}
    groups = Counter(sample.group for sample in mini.samples)
    roles = {f"person-role/{role.upper()}": 6 for role in ROLES}
    assert groups == roles | {f"animal-mammal/1F40{i}": 1 for i in range(4)}
    assert all(mini.media_path(sample).is_file() for sample in mini.samples)


def test_texts_are_names_in_many_languages(mini: Manifest) -> None:
    by_id = {sample.id: sample for sample in mini.samples}
    texts = by_id["1F469-1F3FB-200D-1F373"].texts
    assert texts[0] == "woman cook: light skin tone"
    assert {"köchin helle hautfarbe", "cuisinière peau claire", "女コック 薄い肌色"} & set(texts)
    rat = by_id["1F400"].texts
    assert rat[0] == "rat"
    assert {"rata", "ratte", "ネズミ"} <= set(rat)
    assert len(set(rat)) == len(rat) >= 10
    assert not any("_" in text or ":" in text for sample in mini.samples for text in sample.texts[1:])


def test_variants_of_one_emoji_share_a_split_and_every_split_has_every_class(mini: Manifest) -> None:
    split_of = {sample.group: sample.split for sample in mini.samples}
    assert all(sample.split == split_of[sample.group] for sample in mini.samples)
    assert {(sample.split, sample.labels) for sample in mini.samples} == {
        (split, (label,)) for split in ("train", "val", "test") for label in (0, 1)
    }


def test_without_languages_the_only_text_is_the_english_name(package: Path) -> None:
    built = Animoji().build({**spec(), "languages": []}, package)
    assert all(len(sample.texts) == 1 for sample in built.samples)


def test_thresholds_of_frames_class_sizes_and_groups(package: Path) -> None:
    assert "body-parts" not in Animoji().build(spec(min_class_size=1), package).class_names  # one group is too few
    assert "body-parts" in Animoji().build(spec(min_class_size=1, min_class_groups=1), package).class_names
    with pytest.raises(ValueError, match="no samples"):
        Animoji().build(spec(min_frames=4), package)


def test_faults_are_named(tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match="run: diffalign fetch animoji"):
            Animoji().build(spec(), root)
    folder = tmp_path / "package" / "assets"
    folder.mkdir(parents=True)
    (folder / "1f400.webp").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1f400\.webp: not a picture"):
        Animoji().build(spec(), tmp_path)
    (folder / "1f400.webp").write_bytes(webp(2))
    (folder / "hello.webp").write_bytes(webp(2))
    with pytest.raises(ValueError, match=r"hello\.webp: its name is no emoji"):
        Animoji().build(spec(), tmp_path)
    (folder / "hello.webp").rename(folder / "1f400-fe0f.webp")
    with pytest.raises(ValueError, match=r"shows the same emoji as 1f400-fe0f\.webp"):
        Animoji().build(spec(), tmp_path)


def test_unknown_languages_are_named(package: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown language 'xx'; choose among: .*de"):
        Animoji().build({**spec(), "languages": ["de", "xx"]}, package)


def test_no_test_clip_has_the_names_of_a_training_clip(mini: Manifest) -> None:
    trained, tested = ({frozenset(sample.texts) for sample in mini.split(split)} for split in ("train", "test"))
    assert not trained & tested
    assert not mini.meta["texts_recur"]  # so the texts of the real package are checked, too


@pytest.mark.parametrize(
    ("size", "expected"), [(1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (8, (5, 1, 2)), (10, (6, 1, 3)), (41, (25, 4, 12))]
)
def test_splits_by_rank_are_cut_at_the_percentages(size: int, expected: tuple[int, int, int]) -> None:
    found = Counter(splits.by_rank([f"group {i}" for i in range(size)], {"train": 60, "val": 10, "test": 30}).values())
    assert (found["train"], found["val"], found["test"]) == expected


def test_splits_by_hash_have_their_shares() -> None:
    percent = {"train": 60, "val": 10, "test": 30}
    found = Counter(splits.by_hash(f"group {i}", percent) for i in range(20_000))
    for split, part in percent.items():
        assert abs(found[split] / 200 - part) < 1.5  # four standard deviations
    for wrong in ({"train": 1}, {"train": 60, "test": 60}):
        with pytest.raises(ValueError, match="do not add up to 100 percent"):
            splits.by_hash("a group", wrong)
    held = [i for i in range(20_000) if splits.is_held_out(f"group {i}", 10)]
    assert abs(len(held) / 200 - 10) < 1
    assert set(held) < {i for i in range(20_000) if splits.is_held_out(f"group {i}", 20)}
    with pytest.raises(ValueError, match="do not add up to 100 percent"):
        splits.by_rank(["a"], {"train": 60})
