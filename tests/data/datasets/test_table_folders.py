"""Class folders and the tables that lie beside or below them; media that are no files; the encoders of videos."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.tables import build, make_empty_files, write_csv, write_jsonl
from PIL import Image

from pipeline.data.manifest_files import read_manifest
from pipeline.data.prepare import prepare
from pipeline.extraction.inputs import default_encoders
from pipeline.training.features import cache_names

PICTURE_ENDINGS = ("avif", "jp2", "j2k", "jfif", "jpe", "apng", "mpo", "dib")


def test_class_folders_take_every_kind_of_picture_that_is_read(tmp_path: Path) -> None:
    make_empty_files(tmp_path, *(f"cat/{ending}.{ending}" for ending in PICTURE_ENDINGS), "dog/LICENSE", "dog/notes")
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"):  # without an ending: by the first bytes
        Image.new("RGB", (4, 4)).save(tmp_path / "dog" / form, form)
    make_empty_files(tmp_path, "dog/raw.heic", "dog/b.heic", "dog/Thumbs.db", "dog/README.md", "dog/.DS_Store", "classes.csv")
    built = build(tmp_path)
    assert Counter(built.class_names[sample.labels[0]] for sample in built.samples) == {"cat": len(PICTURE_ENDINGS), "dog": 8}
    (warning,) = built.meta["warnings"]
    assert warning.startswith("4 files below")
    assert warning.endswith("videos: classes.csv, dog/b.heic, dog/notes …")


def test_folders_of_files_that_are_not_read_say_so(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "cat/1.heic", "dog/1.heic")
    with pytest.raises(ValueError, match=r"has no rows \(2 files below .* are left out, .*: cat/1\.heic …\)"):
        build(tmp_path)


def test_ordinary_folders_give_the_same_manifest_as_ever(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "cat/1.jpg", "cat/2.PNG", "dog/1.webp", "dog/1.jpg", "dog/readme.txt")
    rows = [(f"{s.id}", s.split, s.media.as_posix(), s.labels, s.texts, s.group) for s in build(tmp_path).samples]
    assert [row[:1] + row[2:4] for row in rows] == [
        ("cat/1", "cat/1.jpg", (0,)),
        ("cat/2", "cat/2.PNG", (0,)),
        ("dog/1.jpg", "dog/1.jpg", (1,)),
        ("dog/1.webp", "dog/1.webp", (1,)),
    ]
    before = build(tmp_path)
    make_empty_files(tmp_path, "classes.csv", "cat/boxes.csv", "dog/1.heic")
    assert build(tmp_path).fingerprint() == before.fingerprint()


@pytest.mark.parametrize("folder", ["data", "data/train"])
def test_an_imagefolder_in_a_cache_of_the_hub_is_named(tmp_path: Path, folder: str) -> None:
    data = tmp_path / "datasets--x--y" / "snapshots" / "0a1b" / folder
    data.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(data / "0.png")
    write_jsonl(data / "metadata.jsonl", [{"file_name": "0.png", "label": "cat", "text": "t"}])
    Image.new("RGB", (4, 4)).save(tmp_path / "datasets--x--y" / "0", "PNG")
    make_empty_files(tmp_path / "datasets--x--y", "refs/main", "blobs/0")
    (tmp_path / "datasets--x--y" / "0").rename(tmp_path / "datasets--x--y" / "blobs" / "0")
    for root in (tmp_path, tmp_path / "datasets--x--y"):
        with pytest.raises(ValueError, match=r"one class folder '\S+'; .* give --root \S+/0a1b/data \(its metadata\.jsonl\)"):
            build(root)
    assert build(tmp_path, folder_labels=True).class_names == ("datasets--x--y",)
    assert build(tmp_path / "datasets--x--y" / "snapshots" / "0a1b" / "data").class_names == ("cat",)


def test_a_table_beside_a_single_folder_is_named(tmp_path: Path) -> None:
    make_empty_files(tmp_path, "pics/1.jpg", "pics/2.jpg")
    write_csv(tmp_path / "photos.csv", [{"file_name": f"pics/{n}.jpg", "label": n} for n in (1, 2)])
    with pytest.raises(ValueError, match=r"in the one class folder 'pics'; .* --set file=photos\.csv; .*folder_labels=true"):
        build(tmp_path)
    assert len(build(tmp_path, file="photos.csv").samples) == 2
    assert build(tmp_path, folder_labels=True).class_names == ("pics",)
    make_empty_files(tmp_path, "other/1.jpg")
    assert build(tmp_path).class_names == ("other", "pics")


def test_media_that_are_pipes_or_folders_are_not_called_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, kind in (("pipe.jpg", "a pipe, socket or device"), ("folder.jpg", "a folder")):
        write_csv(tmp_path / "m.csv", [{"file_name": name, "label": "a"}])
        with pytest.raises(ValueError, match=rf"no regular files, .*line 2: .*{name} is {kind}; .*--allow-missing"):
            prepare("table", tmp_path, tmp_path / "home", {"file": "m.csv"})


def test_the_default_encoders_of_videos_are_those_of_clips(tmp_path: Path) -> None:
    for ending, image in (("mp4", "frames"), ("jpg", "efficientnet_lite")):
        root, name = tmp_path / ending, f"own_{ending}"
        make_empty_files(root, f"cat/1.{ending}", f"dog/1.{ending}")
        prepare("table", root, tmp_path, {}, name=name)
        assert default_encoders(tmp_path, read_manifest(tmp_path, name)) == [image]
        write_csv(root / "m.csv", [{"file_name": f"{kind}/1.{ending}", "label": kind, "text": kind} for kind in ("cat", "dog")])
        prepare("table", root, tmp_path, {"file": "m.csv"}, name=name, overwrite=True)
        assert default_encoders(tmp_path, read_manifest(tmp_path, name)) == [image, "transformers_text"]
        assert cache_names(tmp_path, name, "", "") == {"image": image, "text": "transformers_text"}
