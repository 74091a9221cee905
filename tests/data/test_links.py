"""Symbolic links in a user's own folders are followed, as the hub, DVC and git-annex make them; those in downloads are not."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from helpers.make_fixtures import make_vireo172
from helpers.tables import make_empty_files, write_jsonl
from PIL import Image

from pipeline.data.fetch import download_folder, unpack
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.data.media import open_image
from pipeline.data.prepare import prepare
from pipeline.data.readers import find_missing_media, locate

FIXTURE = {"counts_profile": "fixture"}
COLOURS = {"cat/1.png": (255, 0, 0), "cat/2.png": (0, 255, 0), "dog/1.svg": (0, 0, 255)}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" fill="#00f"/></svg>'


def picture_bytes(name: str) -> bytes:
    if name.endswith(".svg"):
        return SVG.encode()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS[name]).save(buffer, "PNG")
    return buffer.getvalue()


def link(path: Path, content: bytes, store: Path) -> None:
    """Put contents into a store, and a link to them, relative as the tools make it, at a path."""
    store.parent.mkdir(parents=True, exist_ok=True)
    store.write_bytes(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(Path(*[".."] * len(path.parent.relative_to(store.anchor).parts), *store.parts[1:]))


def shown_colours(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The colour of every picture, decoded as extraction does it."""
    found: dict[str, tuple[int, ...]] = {}
    for sample in manifest.samples:
        pixel = open_image(manifest.media_path(sample), 8).getpixel((4, 4))
        assert isinstance(pixel, tuple)
        found[sample.media.as_posix()] = pixel
    return found


@pytest.mark.parametrize("store", ["hub/blobs/{}", "repo/.dvc/cache/files/md5/0{}/ab", "repo/.git/annex/objects/{}/SHA256E-{}"])
def test_snapshots_dvc_and_annex_are_read_as_the_files_they_are(tmp_path: Path, store: str) -> None:
    for number, name in enumerate(COLOURS):
        link(tmp_path / "photos" / name, picture_bytes(name), tmp_path / store.format(number, number))
    manifest = read_manifest(tmp_path, prepare("table", tmp_path / "photos", tmp_path, {}).path.stem)
    assert shown_colours(manifest) == COLOURS
    assert manifest.class_names == ("cat", "dog")


def test_a_snapshot_whose_table_is_a_link_too(tmp_path: Path) -> None:
    for number, name in enumerate(COLOURS):
        link(tmp_path / "snapshots" / "a1" / name, picture_bytes(name), tmp_path / "blobs" / str(number))
    write_jsonl(tmp_path / "records", [{"file_name": name, "label": name[:3], "text": name} for name in COLOURS])
    link(tmp_path / "snapshots" / "a1" / "metadata.jsonl", (tmp_path / "records").read_bytes(), tmp_path / "blobs" / "t")
    report = prepare("table", tmp_path / "snapshots" / "a1", tmp_path, {}, verify_media=True)
    assert (report.missing, report.undecodable) == (0, ())
    manifest = read_manifest(tmp_path, "table")
    assert shown_colours(manifest) == COLOURS
    assert [sample.texts for sample in manifest.samples] == [(name,) for name in COLOURS]


def test_folders_that_are_links_are_classes_and_splits(tmp_path: Path) -> None:
    make_empty_files(tmp_path / "disk", "cats/1.jpg", "dogs/1.jpg")
    for split in ("train", "test"):
        (tmp_path / "root" / split).mkdir(parents=True)
        for kind in ("cats", "dogs"):
            (tmp_path / "root" / split / kind).symlink_to(tmp_path / "disk" / kind)
    (tmp_path / "root" / "train" / "cats" / "2.jpg").touch()
    manifest = read_manifest(tmp_path, prepare("table", tmp_path / "root", tmp_path, {}).path.stem)
    assert [(s.split, s.media.as_posix()) for s in manifest.samples if s.labels == (0,)] == [
        (split, f"{split}/cats/{number}.jpg") for split in ("test", "train") for number in (1, 2)
    ]


@pytest.mark.parametrize("target", [".", "..", "../dog"])
def test_links_that_lead_round_in_a_circle_are_named(tmp_path: Path, target: str) -> None:
    make_empty_files(tmp_path / "root", "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "root" / "dog" / "again").symlink_to("../cat")
    (tmp_path / "root" / "cat" / "again").symlink_to(target)
    with pytest.raises(ValueError, match=r"again is a symbolic link to a folder that it lies in"):
        prepare("table", tmp_path / "root", tmp_path, {})


def test_links_to_files_that_are_not_there_yet_are_missing_media_with_the_remedy(tmp_path: Path) -> None:
    make_empty_files(tmp_path / "root", "cat/1.jpg", "dog/1.jpg")
    (tmp_path / "root" / "dog" / "2.jpg").symlink_to("../.git/annex/objects/gone")
    with pytest.raises(ValueError, match=r"1 of 3 media files .* 1 of them links to nothing \(get the files: git annex get"):
        prepare("table", tmp_path / "root", tmp_path, {})
    assert prepare("table", tmp_path / "root", tmp_path, {"allow_missing": "true"}).missing == 1


def test_official_files_may_be_links_to_another_disk(tmp_path: Path) -> None:
    root = make_vireo172(tmp_path / "official")
    plain = prepare("vireo172", root, tmp_path / "plain", FIXTURE).fingerprint
    for name in ("ready_chinese_food/172", "ready_chinese_food/2/1_2.jpg", "SplitAndIngreLabel/TR.txt"):
        target = tmp_path / "disk" / name.replace("/", "-")
        target.parent.mkdir(exist_ok=True)
        (root / name).rename(target)
        (root / name).symlink_to(target)
    assert prepare("vireo172", root, tmp_path, FIXTURE, verify_media=True).undecodable == ()
    manifest = read_manifest(tmp_path, "vireo172")
    assert manifest.fingerprint() == plain
    assert all(manifest.media_path(sample).is_file() for sample in manifest.samples)
    assert locate(tmp_path, ["official/SplitAndIngreLabel/TR.txt"], "the list").is_file()


def test_links_in_downloads_are_not_followed(tmp_path: Path) -> None:
    """Unpacking leaves them out; one that is put there later leads nowhere."""
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name, target in (("holds/leak.jpg", "../../../secret.jpg"), ("holds/real.jpg", "")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = (tarfile.SYMTYPE, target) if target else (tarfile.REGTYPE, "")
            tar.addfile(entry, None if target else io.BytesIO())
    assert unpack(tmp_path / "a.tgz", tmp_path / "unpacked", 10, 100_000) == {"files": 1, "links": 1}
    assert not (tmp_path / "unpacked" / "holds" / "leak.jpg").is_symlink()
    make_vireo172(download_folder("vireo172", tmp_path))
    picture = download_folder("vireo172", tmp_path) / "ready_chinese_food" / "2" / "1_2.jpg"
    picture.rename(tmp_path / "secret.jpg")
    picture.symlink_to(tmp_path / "secret.jpg")
    refused = r"TR\.txt, line 3: 2/1_2\.jpg is a symbolic link that leads out of the media folder"
    with pytest.raises(ValueError, match=refused):
        prepare("vireo172", download_folder("vireo172", tmp_path), tmp_path, FIXTURE)
    with pytest.raises(ValueError, match="line 0: 2/1_2"):
        find_missing_media(picture.parents[1], ["2/1_2.jpg"], lambda position: f"line {position}")
