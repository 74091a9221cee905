"""A cache knows the contents of the media that it was made of: a replaced file is found, whatever its size and times."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash
from helpers.command_line import run
from helpers.fault_cases import extract_texts, write_texts
from PIL import Image

import pipeline.extraction.extract as extraction
from pipeline.cache import layout, verify
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.extraction.repair import repair
from pipeline.runtime.errors import UserError
from pipeline.types import Sample

QUIET = ExtractOptions(workers=0, progress=False, shard_rows=512, max_failures=0.1)


@pytest.fixture
def pictures(tiny_manifest: Manifest, tmp_path: Path) -> Manifest:
    """`tiny` with a copy of its media, of which one is damaged and one missing."""
    root = tmp_path / "media"
    shutil.copytree(tiny_manifest.media_root, root)
    (root / "red-1.png").write_bytes(b"no picture")
    (root / "blue-2.png").unlink()
    manifest = dataclasses.replace(tiny_manifest, media_root=root)
    write_manifest(manifest, tmp_path)
    return manifest


@pytest.fixture
def cache(pictures: Manifest, tmp_path: Path) -> Path:
    return extract(pictures, "random_projection", {}, tmp_path, options=QUIET)


def fill_up(picture: Path, other: Path, size: int) -> None:
    """Replace a picture by another one, with bytes after its end that make it as large as needed; its times stay."""
    before = picture.stat()
    data = other.read_bytes()
    picture.write_bytes(data + bytes(size - len(data)))
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_record_has_a_digest_of_each_file(cache: Path, pictures: Manifest) -> None:
    """In row order, zeros for what failed: another machine with the same files writes the same."""
    expected = [
        bytes(8)
        if sample.id in ("red-1", "blue-2")
        else xxhash.xxh3_64_digest((pictures.media_root / sample.media).read_bytes())
        for sample in pictures.samples
    ]
    commit = layout.read_commit(cache, 0)
    assert base64.b64decode(commit.media_digests) == b"".join(expected)
    assert commit.media_sizes == ""


def by_extract(manifest: Manifest, path: Path) -> object:
    return extract(manifest, "random_projection", {}, path.parents[2], options=QUIET)


def by_repair(manifest: Manifest, path: Path) -> object:
    return repair(path, QUIET)


def test_a_replacement_of_the_same_size_and_time_is_found(
    cache: Path, pictures: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smallest, *_, picture = sorted(pictures.media_root.glob("g*.png"), key=lambda path: path.stat().st_size)
    shard, data = layout.shard_path(cache, 0, 2).read_bytes(), picture.read_bytes()
    fill_up(picture, smallest, len(data))
    for redo in (by_extract, by_repair):
        with pytest.raises(ValueError, match=rf"media files have changed since .*: {picture.name}; bring the earlier"):
            redo(pictures, cache)
    (problem,) = verify(cache)
    assert f": {picture.name}; bring the earlier ones back" in problem
    assert run(["cache", "verify", str(cache)], monkeypatch) == 2
    assert picture.name in capsys.readouterr().err
    picture.write_bytes(data)
    assert verify(cache) == []
    by_extract(pictures, cache)
    assert layout.shard_path(cache, 0, 2).read_bytes() == shard
    assert run(["cache", "verify", str(cache)], monkeypatch) == 0


def test_media_that_change_while_they_are_read_are_not_recorded(
    pictures: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their digests would be those of the new contents, and the features those of the old ones."""
    encode_shards = extraction.encode_shards

    def replace_then_yield(*arguments: Any) -> Iterator[Any]:
        for shard in encode_shards(*arguments):
            shutil.copy(pictures.media_root / "grey-0.png", pictures.media_root / "grey-1.png")
            yield shard

    monkeypatch.setattr(extraction, "encode_shards", replace_then_yield)
    with pytest.raises(UserError, match="'red-0' to 'grey-9' were changed while they were read; run the same command again"):
        extract(pictures, "random_projection", {}, tmp_path, options=QUIET)
    monkeypatch.undo()
    assert verify(extract(pictures, "random_projection", {}, tmp_path, options=QUIET)) == []


def test_many_replaced_files_are_counted(cache: Path, pictures: Manifest) -> None:
    for number in range(10):
        for colour in ("red", "green"):
            shutil.copy(pictures.media_root / "grey-0.png", pictures.media_root / f"{colour}-{number}.png")
    assert "red-0.png, red-2.png, red-3.png" in verify(cache)[0]  # red-1.png had failed: there is no feature of it
    assert "green-0.png and 9 more; bring" in verify(cache)[0]


def test_what_is_gone_or_moved_is_no_other_file(cache: Path, pictures: Manifest, tmp_path: Path) -> None:
    (pictures.media_root / "grey-0.png").unlink()
    os.mkfifo(pictures.media_root / "grey-0.png")
    (pictures.media_root / "grey-1.png").unlink()
    assert verify(cache) == []
    by_extract(pictures, cache)
    moved = dataclasses.replace(pictures, media_root=pictures.media_root.rename(tmp_path / "elsewhere"))
    assert verify(cache) == []  # the folder is gone
    write_manifest(moved, tmp_path)
    assert verify(cache) == []
    shutil.copy(moved.media_root / "grey-2.png", moved.media_root / "grey-3.png")
    assert ": grey-3.png;" in verify(cache)[0]
    shutil.rmtree(tmp_path / "manifests")
    assert verify(cache) == []  # nobody knows which files they were


def test_clips_and_drawings_are_media_too(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (10, 200)]
    for name in ("a.gif", "b.webp", "c.png"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:], lossless=True)
    samples = tuple(Sample(path.stem, "train", Path(path.name), (), (0,), "") for path in sorted(root.iterdir()))
    meta = {"media_type": "video", "text": {"kind": "", "aggregate": "mean", "sep": ""}, "licence": "generated"}
    clips = Manifest("clips", "single", ("only",), samples, meta, root)
    write_manifest(clips, tmp_path)
    settings = {"encoder": "random_projection", "num_frames": "2"}
    path = extract(clips, "frames", settings, tmp_path, options=QUIET)
    assert verify(path) == []
    for name in ("a.gif", "b.webp", "c.png"):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert f": {name};" in verify(path)[0]
        (root / name).write_bytes(data)
    assert verify(path) == []


def test_texts_have_no_media(tmp_path: Path) -> None:
    path = extract_texts(write_texts(tmp_path, 6), tmp_path)
    assert layout.read_commit(path, 0).media_digests == ""
    assert verify(path) == []
    assert not (tmp_path / "media.sqlite").exists()


# --- records of older versions ---


def write_old_record(cache: Path, media_sizes: str) -> None:
    """Write the record of the first shard as it was before there were digests."""
    file = layout.commit_path(cache, 0)
    old = {key: value for key, value in layout.read_record(file).items() if key != "media_digests"}
    layout.write_record(file, {**old, "media_sizes": media_sizes})


def sizes_of(pictures: Manifest) -> str:
    kept = [sample.media for sample in pictures.samples if sample.id not in ("red-1", "blue-2")]
    return hashlib.sha256("".join(f"{(pictures.media_root / file).stat().st_size}\n" for file in kept).encode()).hexdigest()


@pytest.mark.parametrize("redo", [by_extract, by_repair])
def test_sizes_are_compared_and_become_digests(
    cache: Path, pictures: Manifest, redo: Callable[[Manifest, Path], object]
) -> None:
    new = layout.commit_path(cache, 0).read_bytes()
    write_old_record(cache, sizes_of(pictures))
    old = layout.commit_path(cache, 0).read_bytes()
    assert verify(cache) == []
    picture = pictures.media_root / "red-3.png"
    data = picture.read_bytes()
    picture.write_bytes(data + b"!")
    assert "to 'grey-9' have another size; bring the earlier ones back" in verify(cache)[0]
    with pytest.raises(ValueError, match="to 'grey-9' have another size; bring the earlier ones back"):
        redo(pictures, cache)
    picture.unlink()
    assert verify(cache) == []
    by_extract(pictures, cache)
    assert layout.commit_path(cache, 0).read_bytes() == old  # not all files are there to be compared
    picture.write_bytes(data)
    by_extract(pictures, cache)
    assert layout.commit_path(cache, 0).read_bytes() == new
    assert verify(cache) == []


def test_a_record_without_sizes_stays_as_it_is(cache: Path, pictures: Manifest) -> None:
    """Imported features, and the first caches of all."""
    write_old_record(cache, "")
    old = layout.commit_path(cache, 0).read_bytes()
    shutil.copy(pictures.media_root / "grey-0.png", pictures.media_root / "grey-1.png")
    assert verify(cache) == []
    by_extract(pictures, cache)
    assert layout.commit_path(cache, 0).read_bytes() == old
