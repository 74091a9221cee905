"""Open Clip Art: a miniature package with the quirks of the real one; every expected row is counted by hand."""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from helpers.archives import deb, special_member, tar

from pipeline.data import fetch
from pipeline.data.datasets import openclipart
from pipeline.data.datasets.openclipart import OpenClipart
from pipeline.data.manifest import Manifest
from pipeline.data.spec import load_spec
from pipeline.types import SPLITS

FOLDER = "./usr/share/openclipart/svg"
DOCTYPE = '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.0//EN" "http://www.w3.org/TR/2001/REC-SVG-20010904/DTD/svg10.dtd">'
RDF = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/"'
CC = 'xmlns:cc="http://web.resource.org/cc/"'


def drawing(title: str, description: str, keywords: list[str], shape: str, head: str = DOCTYPE) -> bytes:
    """Return an SVG file with the RDF of the Open Clip Art Library; other titles surround the drawing's own title."""
    items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    return f"""<?xml version="1.0" encoding="UTF-8"?>{head}
<svg xmlns="http://www.w3.org/2000/svg" width="100" height="100"><title>not this</title><metadata><rdf:RDF {RDF} {CC}>
<cc:Work rdf:about=""><dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>An Author</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata>{shape}</svg>""".encode()


def circle(radius: int) -> str:
    return f'<circle cx="50" cy="50" r="{radius}"/>'


# Kept keywords: bird, flag(s), ice cream in three drawings each; tree, glass(es) in two; the others in one.
FILES = {
    "birds/eagle_01.svg": drawing("The Eagles", "A BIRD of prey,", ["birds", "HASH(0x8a3ecd4)", "Prey"], circle(10)),
    "birds/eagle_02a.svg": drawing("Eagle", "see http://a.org/b or me@a.org", ["bird", "icons", "unsorted"], circle(11)),
    "copies/eagle_3.svg": drawing("", "", ["bird", "flag"], circle(12)),
    "flags/bird_flag.svg": drawing("Bird-flag 2005", "", ["Flags", "tree", "architetto francesco rollandin"], circle(13)),
    "flags/same_look.svg": drawing("Ice Cream and icecreams", "", ["ice_cream"], circle(13)),
    "flags/plain.svg": drawing("plain", "Plain", ["flag", "  flag ", "ice-cream, ice cream; tree"], circle(14)),
    "food/cone.svg": drawing("Cone", "", ["ICE CREAM", "11", "glass", "0x8863bcc"], circle(15)),
    "food/none.svg": drawing("No concept", "", ["glasses"], circle(16)),
    "shapes/star_1.svg": drawing("star", "", ["stars", "magick", "bird"], circle(17)),
    "special/gradient.svg": drawing("gradient", "", ["bird"], "<defs><linearGradient/></defs>"),
    "bad/photo.svg": drawing("photo", "", ["bird"], '<image href="file:///etc/passwd" width="9" height="9"/>'),
    "bad/broken.svg": b"<svg><g></svg>",
    "bad/bomb.svg": drawing("&b;", "", ["bird"], circle(18), '<!DOCTYPE svg [<!ENTITY a "xx"><!ENTITY b "&a;&a;">]>'),
    "bad/file.svg": drawing("&x;", "", ["bird"], circle(18), '<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
    "bad/long.svg": drawing("t" * 10_001, "", ["bird"], circle(18)),
    "readme.txt": b"no drawing",
}
EXPECTED = {
    "birds/eagle_01": (("bird",), ("The Eagles", "A of prey", "prey"), "birds/eagle_01"),
    "birds/eagle_02a": (("bird",), ("Eagle", "see or"), "birds/eagle_01"),
    "copies/eagle_3": (("bird", "flag"), (), "birds/eagle_01"),
    "flags/bird_flag": (("flag",), ("tree",), "flags/bird_flag"),
    "flags/plain": (("flag", "ice cream"), ("plain", "tree"), "flags/plain"),
    "flags/same_look": (("ice cream",), ("and",), "flags/bird_flag"),
    "food/cone": (("ice cream",), ("Cone", "glass"), "food/cone"),
}


def spec(**select: Any) -> dict[str, Any]:
    loaded = load_spec("openclipart")
    return {**loaded, "counts_profile": "fixture", "select": {**loaded["select"], "min_images": 3, **select}}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature, unpacked by `fetch`."""
    home = tmp_path_factory.mktemp("home")
    link = special_member(f"{FOLDER}/birds/again.svg", tarfile.SYMTYPE, "eagle_01.svg")
    archive = home / "openclipart-svg_0.18_all.deb"
    archive.write_bytes(deb(tar({f"{FOLDER}/{name}": data for name, data in FILES.items()}, [link])))
    return fetch.fetch("openclipart", home, archive)


@pytest.fixture(scope="module")
def mini(package: Path) -> Manifest:
    return OpenClipart().build(spec(), package)


def test_rows_are_those_counted_by_hand(mini: Manifest) -> None:
    assert mini.class_names == ("bird", "flag", "ice cream")
    found = {s.id: (tuple(mini.class_names[label] for label in s.labels), s.texts, s.group) for s in mini.samples}
    assert found == EXPECTED
    assert [s.id for s in mini.samples] == sorted(EXPECTED)
    assert all(s.media.as_posix() == f"{s.id}.svg" and mini.media_path(s).is_file() for s in mini.samples)


def test_drawings_that_are_left_out_are_counted(mini: Manifest, package: Path) -> None:
    assert mini.meta["left_out"] == {
        "links": 0,
        "unreadable": {
            "bad/bomb.svg": "it declares the entity 'a'; entities are not resolved",
            "bad/broken.svg": "broken XML: mismatched tag: line 1, column 10",
            "bad/file.svg": "it declares the entity 'x'; entities are not resolved",
            "bad/long.svg": "its title is longer than 10000 characters",
        },
        "series": 1,
        "undrawable": 1,
        "flat": 1,
        "no_concept": 1,
    }
    assert mini.meta["counts"] == {"drawings": 15, "groups": 4, "without_text": 1}
    assert fetch.read_archive_record(package)["links"] == 1
    digest = hashlib.sha256((package.parents[1] / "openclipart-svg_0.18_all.deb").read_bytes()).hexdigest()
    assert mini.meta["sources"] == {"openclipart-svg": digest}


def test_links_of_an_installed_package_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (folder / f"{name}.svg").write_bytes(drawing(name, "", ["bird"], circle(ord(name) - 80)))
    (folder / "d.svg").symlink_to("a.svg")
    (folder / "e.svg").symlink_to("/etc/passwd")
    built = OpenClipart().build(spec(), tmp_path)
    assert [sample.id for sample in built.samples] == ["a", "b", "c"]
    assert built.meta["left_out"]["links"] == 2
    assert built.meta["sources"] == {}


def test_concepts_are_cut_by_number_and_size(package: Path) -> None:
    assert OpenClipart().build(spec(max_concepts=2), package).class_names == ("bird", "flag")  # bird, flag, ice cream: 3 each
    assert OpenClipart().build(spec(min_images=2), package).class_names == ("bird", "flag", "glass", "ice cream", "tree")
    assert "icon" not in OpenClipart().build(spec(min_images=1), package).class_names


def test_the_split_is_decided_by_the_group(mini: Manifest) -> None:
    percent = {"train": 60, "val": 10, "test": 30}
    for sample in mini.samples:
        digest = hashlib.sha256(f"{spec()['split_seed']} {sample.group}".encode()).hexdigest()
        share = int(digest[:16], 16) / 2**64 * 100
        assert sample.split == SPLITS[(share >= percent["train"]) + (share >= percent["train"] + percent["val"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Road_Signs", ["road signs"]),
        ("mime-types", ["mimetypes"]),
        ("rome,italy; Capital.", ["rome", "italy", "capital"]),
        (" 'x' ", ["x"]),
        ("HASH(0x8a3ecd4)", []),
        ("2600", []),
        ("", []),
    ],
)
def test_keywords_are_cleaned(text: str, expected: list[str]) -> None:
    assert openclipart.split_keywords(text) == expected


def test_plurals_and_series() -> None:
    pairs = {"flags": ["flag"], "cities": ["city", "citi", "citie"], "boxes": ["box", "boxe"], "glass": [], "is": [], "gas": []}
    assert {word: list(openclipart.possible_singulars(word)) for word in pairs} == pairs
    names = {
        "a/flying_wasp_gerald_g._02.svg": "flying_wasp_gerald_g",
        "b/people_06c.svg": "people",
        "pen_width10.svg": "pen_width",
        "Nursery_1_2.svg": "nursery",
        "connector-ps2.svg": "connector-ps",
        "06.svg": "",
    }
    assert {path: openclipart.series_name(path) for path in names} == names


def test_concept_words_are_removed_from_texts_in_every_form() -> None:
    banned = frozenset({"ice", "cream", "icecream", "arrow", "house"})
    text = "IceCream ice-creams ICE 3 arrows, greenArrow; houses & warehouse d'or"
    assert openclipart.remove_banned_words(text, banned) == "green warehouse d'or"


@pytest.mark.parametrize("encoding", ["nonsense", "rot13", "utf-7"])
def test_encodings_that_do_not_exist_are_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.svg").write_text(f'<?xml version="1.0" encoding="{encoding}"?><svg/>')
    with pytest.raises(ValueError, match=r"broken XML|encoding"):
        openclipart.read_drawing(tmp_path / "a.svg", "a.svg")


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.svg")
    with pytest.raises(ValueError, match="not a regular file"):
        openclipart.read_drawing(tmp_path / "a.svg", "a.svg")


def test_missing_drawings_name_the_remedy(tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match="run: diffalign fetch openclipart"):
            OpenClipart().build(spec(), root)
