"""OpenMoji: counts, classes, names and the split of the packaged emoji, which never changes."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from pipeline.data import splits
from pipeline.data.annotations import Emoji, package_path, read_emoji_list
from pipeline.data.datasets.openmoji import OpenMoji
from pipeline.data.manifest import Manifest, split_counts
from pipeline.data.spec import load_spec

PERCENT = {"train": 60, "val": 10, "test": 30}

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
def packaged_manifest() -> Manifest:
    return OpenMoji().build(load_spec("openmoji"), None)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A miniature of the official files; the wrench has no drawing."""
    (tmp_path / "svg").mkdir()
    (tmp_path / "emoji-test.txt").write_text(NAMES, encoding="utf-8")
    for name in ("1F528", "1FA93", "26CF", "1F52D", "1F44B", "1F44B-1F3FB", "1F3C1"):
        (tmp_path / "svg" / f"{name}.svg").write_text("<svg/>")
    return tmp_path


def spec(**changes: object) -> dict[str, object]:
    loaded = load_spec("openmoji")
    select = {**loaded["select"], "min_class_size": 2, "min_class_groups": 2}
    return {**loaded, "counts": {}, "select": select, **changes}


def test_packaged_counts(packaged_manifest: Manifest) -> None:
    assert (len(packaged_manifest.samples), len(packaged_manifest.class_names)) == (1473, 67)
    assert split_counts(packaged_manifest) == {"train": 885, "val": 170, "test": 418}
    assert min(Counter(sample.labels for sample in packaged_manifest.samples).values()) >= 8
    assert packaged_manifest.meta["missing_images"] == []
    assert len({(sample.labels, sample.split) for sample in packaged_manifest.samples}) == 3 * 67


def test_ids_texts_and_drawings_agree_with_unicode(packaged_manifest: Manifest) -> None:
    for sample in packaged_manifest.samples:
        points = sample.id.split("-")
        assert not {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"} & set(points)
        assert packaged_manifest.media_path(sample).is_file()
        assert sample.media.stem.replace("-FE0F", "") == sample.id.replace("-FE0F", "")
        assert len(sample.texts) == 1
    names = {sample.id: sample.texts[0] for sample in packaged_manifest.samples}
    characters = {point: unicodedata.name(chr(int(point, 16)), "") for point in names if len(point) == 5}
    agreeing = [point for point, name in characters.items() if name.lower() == names[point].lower()]
    assert len(agreeing) > 400  # CLDR names differ from Unicode's for many, never by accident


def test_split_never_changes(packaged_manifest: Manifest) -> None:
    split = {sample.id: sample.split for sample in packaged_manifest.samples}
    digest = hashlib.sha256("".join(f"{key} {split[key]}\n" for key in sorted(split)).encode()).hexdigest()
    assert digest == "320822fc14dfd28be4573a4f8bbe96c049894a6a665e35b14f9c485df0a12bd5"


def test_no_man_woman_or_person_has_a_variant_in_another_split(packaged_manifest: Manifest) -> None:
    """The oracle knows code points, not names: man, woman, person, their signs, the joiner and the selector are left out."""
    split_of: dict[tuple[object, ...], set[str]] = {}
    shown = {"1F468", "1F469", "1F9D1", "2640", "2642", "200D", "FE0F"}
    for sample in packaged_manifest.samples:
        base = tuple(point for point in sample.id.split("-") if point not in shown)
        split_of.setdefault((sample.labels, base), set()).add(sample.split)
    assert all(len(found) == 1 for found in split_of.values())
    assert len(split_of) > len({sample.group for sample in packaged_manifest.samples})  # ours also knows colours, ages, clocks


def test_splits_are_stratified() -> None:
    for size in range(8, 120):
        counts = Counter(splits.by_rank([f"id{number}" for number in range(size)], PERCENT).values())
        assert sum(counts.values()) == size
        for split, share in (("train", 0.6), ("val", 0.1), ("test", 0.3)):
            assert counts[split] >= 1
            assert abs(counts[split] - share * size) <= 1


def test_the_split_is_the_documented_rule(packaged_manifest: Manifest) -> None:
    for label in range(len(packaged_manifest.class_names)):
        own = {sample.group: sample.split for sample in packaged_manifest.samples if sample.labels == (label,)}
        ordered = sorted(own, key=lambda group: hashlib.sha256(group.encode()).hexdigest())
        first, second = (int(share * len(ordered) / 10 + 0.5) for share in (6, 7))
        expected = ["train"] * first + ["val"] * (second - first) + ["test"] * (len(ordered) - second)
        assert [own[group] for group in ordered] == expected


def test_split_does_not_depend_on_order() -> None:
    ids = [f"id{number}" for number in range(50)]
    assert splits.by_rank(ids[::-1], PERCENT) == splits.by_rank(ids, PERCENT)


def test_folder_of_official_files(official: Path) -> None:
    manifest = OpenMoji().build(spec(), official)
    assert manifest.class_names == ("tools",)
    rows = [(sample.id, sample.media.name, sample.texts[0]) for sample in manifest.samples]
    assert rows == [("1F528", "1F528.svg", "hammer"), ("1FA93", "1FA93.svg", "axe"), ("26CF-FE0F", "26CF.svg", "pick")]
    assert manifest.meta["missing_images"] == ["1F527"]
    assert manifest.meta["small_classes"] == {"rare": 1, "hands": 1}


def test_changed_drawings_change_their_digest(official: Path) -> None:
    before = OpenMoji().build(spec(), official)
    (official / "svg" / "1F528.svg").write_text("<svg></svg>")
    after = OpenMoji().build(spec(), official)
    assert after.fingerprint() == before.fingerprint()
    assert after.meta["media_sha256"] != before.meta["media_sha256"]


def test_faults_are_named(official: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all 3 \(expected 1473\)"):
        OpenMoji().build(spec(counts={"all": 1473}), official)
    with pytest.raises(ValueError, match=r"must hold the file emoji-test\.txt and the folder svg"):
        OpenMoji().build(spec(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"all 3 \(expected 1473\), classes 1 \(expected 67\)"):
        OpenMoji().build({**spec(), "counts": load_spec("openmoji")["counts"]}, official)
    OpenMoji().build({**spec(), "counts": {"all": 1473}, "counts_profile": "fixture"}, official)
    (official / "emoji-test.txt").write_text("# group: a\n# subgroup: b\n1F528 ; fully-qualified\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"emoji-test\.txt, line 3: "):
        OpenMoji().build(spec(), official)


GOOD = "# group: g\n# subgroup: eyes\n\n1F441 FE0F   ; fully-qualified # 👁️ E0.7 eye: #1\n1F441 ; unqualified # 👁 E0.7 eye\n"


def test_lists_of_emoji_are_read(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(GOOD, encoding="utf-8")
    assert list(read_emoji_list(path)) == [
        Emoji(("1F441", "FE0F"), "fully-qualified", "👁️", "eye: #1", "g", "eyes"),
        Emoji(("1F441",), "unqualified", "👁", "eye", "g", "eyes"),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("1F442 fully-qualified", "line 6: '1F442 fully-qualified' is not 'points ; status"),
        ("1f442 ; fully-qualified # x E1.0 ear", "line 6: '1f442 ; "),
        ("# group: next\n1F442 ; fully-qualified # x E1.0 ear", "line 7: '1F442 ; fully-qualified # x E1.0 ear' is not"),
        ("x" * 10_000_000, "line 6: the line is longer than"),
    ],
)
def test_faults_of_lists_of_emoji_have_file_and_line(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(GOOD + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line") as raised:
        list(read_emoji_list(path))
    assert f"emoji-test.txt, {fault}" in str(raised.value)
    path.write_bytes(GOOD.encode() + b"\xff\n")
    with pytest.raises(ValueError, match=r"emoji-test\.txt, line 6: not UTF-8"):
        list(read_emoji_list(path))


def test_a_package_that_is_missing_is_named_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r'the package no_such_package is missing; run: pip install "diffalign\[demo\]"'):
        package_path("no_such_package", "x")
