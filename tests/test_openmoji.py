"""The packaged emoji: counts, classes, names and the split that is fixed forever."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from pipeline import manifest as manifests
from pipeline.datasets import openmoji
from pipeline.manifest import Manifest

NAMES = """# emoji-test.txt
# group: Things

# subgroup: tools
1F528 ; fully-qualified # 🔨 E0.6 hammer
1FA93 ; fully-qualified # 🪓 E12.0 axe
26CF FE0F ; fully-qualified # ⛏️ E0.7 pick
26CF ; unqualified # ⛏ E0.7 pick
1F527 ; fully-qualified # 🔧 E0.6 wrench

# subgroup: rare
1F52D ; fully-qualified # 🔭 E1.0 telescope

# group: People
# subgroup: hands
1F44B ; fully-qualified # 👋 E0.6 waving hand
1F44B 1F3FB ; fully-qualified # 👋🏻 E1.0 waving hand: light skin tone

# group: Flags
# subgroup: flag
1F3C1 ; fully-qualified # 🏁 E0.6 chequered flag
"""


@pytest.fixture(scope="module")
def packaged() -> Manifest:
    return openmoji.build(manifests.load_spec("openmoji"), None)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A miniature of the official files; the wrench has no drawing."""
    (tmp_path / "svg").mkdir()
    (tmp_path / "emoji-test.txt").write_text(NAMES, encoding="utf-8")
    for name in ("1F528", "1FA93", "26CF", "1F52D", "1F44B", "1F44B-1F3FB", "1F3C1"):
        (tmp_path / "svg" / f"{name}.svg").write_text("<svg/>")
    return tmp_path


def spec(**changes: object) -> dict[str, object]:
    loaded = manifests.load_spec("openmoji")
    return {**loaded, "counts": {}, "select": {**loaded["select"], "min_class_size": 2}, **changes}


def test_packaged_counts(packaged: Manifest) -> None:
    assert (len(packaged.samples), len(packaged.class_names)) == (1501, 68)
    assert manifests.split_counts(packaged) == {"train": 899, "val": 154, "test": 448}
    assert min(Counter(sample.labels for sample in packaged.samples).values()) >= 8
    assert packaged.meta["missing_images"] == []
    assert len({(sample.labels, sample.split) for sample in packaged.samples}) == 3 * 68


def test_ids_texts_and_drawings_agree_with_unicode(packaged: Manifest) -> None:
    for sample in packaged.samples:
        points = sample.id.split("-")
        assert not {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"} & set(points)
        assert packaged.media_path(sample).is_file()
        assert sample.media.stem.replace("-FE0F", "") == sample.id.replace("-FE0F", "")
        assert len(sample.texts) == 1
    names = {sample.id: sample.texts[0] for sample in packaged.samples}
    characters = {point: unicodedata.name(chr(int(point, 16)), "") for point in names if len(point) == 5}
    agreeing = [point for point, name in characters.items() if name.lower() == names[point].lower()]
    assert len(agreeing) > 400  # CLDR names differ from Unicode's for many, never by accident


def test_split_is_fixed_forever(packaged: Manifest) -> None:
    split = {sample.id: sample.split for sample in packaged.samples}
    digest = hashlib.sha256("".join(f"{key} {split[key]}\n" for key in sorted(split)).encode()).hexdigest()
    assert digest == "568fdfe3c5bdf3ed9a4d188334ed6925e49d01f7fe8a3b366ec440938c6b5eb5"


def test_splits_are_stratified() -> None:
    for size in range(8, 120):
        ids = [f"id{number}" for number in range(size)]
        counts = Counter(openmoji.assign_splits(ids, {"train": 60, "val": 10, "test": 30}).values())
        assert sum(counts.values()) == size
        for split, share in (("train", 0.6), ("val", 0.1), ("test", 0.3)):
            assert counts[split] >= 1
            assert abs(counts[split] - share * size) <= 1


def test_split_does_not_depend_on_order() -> None:
    ids = [f"id{number}" for number in range(50)]
    percent = {"train": 60, "val": 10, "test": 30}
    assert openmoji.assign_splits(ids[::-1], percent) == openmoji.assign_splits(ids, percent)


def test_folder_of_official_files(official: Path) -> None:
    manifest = openmoji.build(spec(), official)
    assert manifest.class_names == ("tools",)
    rows = [(sample.id, sample.media.name, sample.texts[0]) for sample in manifest.samples]
    assert rows == [("1F528", "1F528.svg", "hammer"), ("1FA93", "1FA93.svg", "axe"), ("26CF-FE0F", "26CF.svg", "pick")]
    assert manifest.meta["missing_images"] == ["1F527"]
    assert manifest.meta["small_classes"] == {"rare": 1, "hands": 1}


def test_changed_drawings_change_their_digest(official: Path) -> None:
    before = openmoji.build(spec(), official)
    (official / "svg" / "1F528.svg").write_text("<svg></svg>")
    after = openmoji.build(spec(), official)
    assert after.fingerprint() == before.fingerprint()
    assert after.meta["media_sha256"] != before.meta["media_sha256"]


def test_faults_are_named(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 3 \(expected 1501\)"):
        openmoji.build(spec(counts={"all": 1501}), official)
    with pytest.raises(ValueError, match=r"must hold the file emoji-test\.txt and the folder svg"):
        openmoji.build(spec(), tmp_path / "nowhere")
    (official / "emoji-test.txt").write_text("# group: a\n# subgroup: b\n1F528 ; fully-qualified\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"emoji-test\.txt, line 3: "):
        openmoji.build(spec(), official)
