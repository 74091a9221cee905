"""Shards added to a begun cache must fit those that are there: the same libraries, media, batches and failures."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import run
from helpers.fault_cases import TEXT_SETTINGS, cache_content, extract_texts, write_texts
from torch import Tensor

from pipeline import Workspace
from pipeline.cache import info, layout, open_cache, provenance, verify
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.encoders.random_projection import RandomProjection
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.extraction.repair import repair
from pipeline.runtime import stores
from pipeline.runtime.files import write_atomic
from pipeline.types import Sample

QUIET = ExtractOptions(workers=0, progress=False)
Resume = Callable[[Manifest, Path], object]


def by_extract(manifest: Manifest, path: Path) -> object:
    settings = TEXT_SETTINGS if manifest.dataset == "texts" else {}
    return extract(manifest, "random_projection", settings, path.parents[2], options=QUIET)


def by_repair(manifest: Manifest, path: Path) -> object:
    return repair(path, QUIET)


by_both = pytest.mark.parametrize("resume", [by_extract, by_repair])


@pytest.fixture
def texts(tmp_path: Path) -> Manifest:
    """Texts that fill two shards."""
    return write_texts(tmp_path, 30)


@pytest.fixture
def pictures(tiny_manifest: Manifest, tmp_path: Path) -> Manifest:
    """`tiny` with a copy of its media, of which three are damaged or missing: more than may fail by default."""
    root = tmp_path / "media"
    shutil.copytree(tiny_manifest.media_root, root)
    for name in ("red-1.png", "grey-3.png"):
        (root / name).write_bytes((root / name).read_bytes()[:200])
    (root / "blue-2.png").unlink()
    manifest = dataclasses.replace(tiny_manifest, media_root=root)
    write_manifest(manifest, tmp_path)
    return manifest


@pytest.fixture
def flawed(pictures: Manifest, tmp_path: Path) -> Path:
    """The cache of `pictures`."""
    options = dataclasses.replace(QUIET, max_failures=0.1)
    return extract(pictures, "random_projection", {}, tmp_path, options=options)


def damage_shard(path: Path, shard: int = 0) -> None:
    """Damage a shard."""
    layout.shard_path(path, shard, 2).write_bytes(b"lost")


# --- libraries ---


@by_both
@pytest.mark.parametrize("name", ["zarr", "av", "pillow"])
def test_libraries_that_compute_no_such_features_may_change(
    resume: Resume,
    name: str,
    texts: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = extract_texts(texts, tmp_path)
    expected = cache_content(path)
    damage_shard(path)
    monkeypatch.setattr(provenance, "_versions", lambda: {**info(path)["provenance"]["versions"], name: "99.0"})
    resume(texts, path)
    assert cache_content(path) == expected
    assert capsys.readouterr().err == ""


@by_both
def test_a_patch_release_is_logged_and_another_release_refused(
    resume: Resume, texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = extract_texts(texts, tmp_path)
    expected, versions = cache_content(path), info(path)["provenance"]["versions"]
    damage_shard(path)
    major, minor, _ = versions["numpy"].split(".")
    other = f"{major}.{int(minor) + 1}.0"
    monkeypatch.setattr(provenance, "_versions", lambda: {**versions, "numpy": other})
    with pytest.raises(ValueError, match="one cache would hold features of two kinds") as raised:
        resume(texts, path)
    message = f"{path} was begun with numpy {versions['numpy']}; here is numpy {other}: "
    assert message in str(raised.value)
    assert f"run: pip install numpy=={versions['numpy']}, or remove it (diffalign cache rm {path})" in str(raised.value)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(provenance, "_versions", lambda: {**versions, "numpy": f"{major}.{minor}.999+local"})
    resume(texts, path)
    assert cache_content(path) == expected
    assert f"warning: {path} was begun with numpy {versions['numpy']}; here is numpy {major}.{minor}.999+local" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(provenance, "_versions", lambda: {**versions, "numpy": other, "tokenizers": "none"})
    resume(texts, path)  # nothing is left to do
    assert cache_content(path) == expected


def test_a_cache_without_shards_begins_anew(texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No feature was made with the options that it was begun with."""
    path = extract_texts(texts, tmp_path)
    expected = cache_content(path)
    for file in (path / "commits").glob("0*.json"):
        file.unlink()
    zarr = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(zarr.replace('"batch_size": 16', '"batch_size": 99'))
    layout.write_digests(path, "arrays", sorted(layout.read_record(path / "commits" / "arrays.json")))
    extract_texts(texts, tmp_path)
    assert cache_content(path) == expected


# --- media ---


@pytest.fixture
def many(tmp_path: Path, tiny_manifest: Manifest) -> Manifest:
    """Pictures that fill two shards."""
    root = tmp_path / "pictures"
    shutil.copytree(tiny_manifest.media_root, root)
    files = [sample.media for sample in tiny_manifest.samples]
    samples = tuple(Sample(f"{row}", "train", files[row % 10 + 20 * (row >= 512)], (), (0,), "") for row in range(600))
    manifest = Manifest("many", "single", ("only",), samples, tiny_manifest.meta, root)
    write_manifest(manifest, tmp_path)
    return manifest


@by_both
@pytest.mark.parametrize("lost", [0, 1])
def test_replaced_media_are_noticed(resume: Resume, lost: int, many: Manifest, tmp_path: Path) -> None:
    """The replaced file is noticed in a shard that is encoded again, and in any other."""
    path = extract(many, "random_projection", {}, tmp_path, options=dataclasses.replace(QUIET, shard_rows=512))
    expected = cache_content(path)
    damage_shard(path, lost)
    picture = many.media_root / "blue-3.png"  # of the second shard
    data = picture.read_bytes()
    shutil.copy(many.media_root / "red-1.png", picture)
    with pytest.raises(ValueError, match=r"media files have changed since .*: blue-3\.png; bring"):
        resume(many, path)
    picture.write_bytes(data)
    resume(many, path)
    assert cache_content(path) == expected


def test_a_complete_cache_of_replaced_media_is_not_taken_for_done(many: Manifest, tmp_path: Path) -> None:
    path = extract(many, "random_projection", {}, tmp_path, options=QUIET)
    (many.media_root / "red-1.png").write_bytes(b"another picture")
    with pytest.raises(ValueError, match=r"media files have changed since .*: red-1\.png; bring"):
        by_extract(many, path)
    (many.media_root / "red-1.png").unlink()  # pictures that are encoded may be removed
    by_extract(many, path)


# --- batches ---


@by_both
def test_missing_shards_use_the_batch_size_of_the_cache(
    resume: Resume, texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The features of this encoder show the size of their batch."""
    forward = RandomProjection.forward
    monkeypatch.setattr(RandomProjection, "forward", lambda self, items: forward(self, items) + len(items))
    options = dataclasses.replace(QUIET, shard_rows=512, batch_size=7)
    path = extract(texts, "random_projection", TEXT_SETTINGS, tmp_path, options=options)
    expected = cache_content(path)
    layout.commit_path(path, 1).unlink()
    if resume is by_extract:
        extract(texts, "random_projection", TEXT_SETTINGS, tmp_path, options=dataclasses.replace(QUIET, batch_size=3))
        assert capsys.readouterr().err == f"warning: {path} was begun with --batch-size 7, and goes on with it\n"
    else:
        resume(texts, path)
    assert cache_content(path) == expected
    damage_shard(path)
    resume(texts, path)
    assert cache_content(path) == expected
    assert layout.read_commit(path, 0).batch_size == 7


# --- failures ---


def test_shards_with_unchecked_failures_are_no_cache(flawed: Path, pictures: Manifest, tmp_path: Path) -> None:
    """Workers on several machines may together commit more failures than each of them knows."""
    expected = cache_content(flawed)
    (flawed / "commits" / "failures.json").unlink()
    with pytest.raises(ValueError, match=r"is incomplete: 1 of 1 shards are complete \(commits/failures.json is missing\)"):
        open_cache(flawed)
    assert not info(flawed)["complete"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"3 of 40 items failed, more than --max-failures 0\.05 allows"):
            extract(pictures, "random_projection", {}, tmp_path, options=QUIET)
    extract(pictures, "random_projection", {}, tmp_path, options=dataclasses.replace(QUIET, max_failures=0.1))
    assert cache_content(flawed) == expected
    extract(pictures, "random_projection", {}, tmp_path, options=QUIET)  # the failures were accepted once: that is enough


@pytest.mark.parametrize("is_complete", [False, True])
def test_samples_that_failed_are_told(
    is_complete: bool,
    pictures: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By each extraction, also one that finds everything done, and by the commands that list and check caches."""
    if is_complete:
        extract(pictures, "random_projection", {}, tmp_path, options=dataclasses.replace(QUIET, max_failures=0.1))
    path = Workspace(tmp_path).extract("tiny", "random_projection", workers=0, max_failures=0.1)["random_projection"].path
    told = f"3 of 40 samples failed and have no features: {path / 'failures.parquet'}; the first: red-1: "
    assert told in caplog.text
    assert run(["cache", "verify", str(path)], monkeypatch) == 0
    assert told in capsys.readouterr().out
    assert run(["cache", "ls", "--home", str(tmp_path)], monkeypatch) == 0
    assert " failed " in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("lost", ["features/c/0/0", "commits/00000.json", "failures.parquet"])
def test_old_failures_may_be_repaired_and_new_ones_may_not(lost: str, flawed: Path, pictures: Manifest) -> None:
    expected = cache_content(flawed)
    (flawed / lost).unlink()
    assert repair(flawed, QUIET)
    assert cache_content(flawed) == expected
    (flawed / lost).unlink()
    for number in range(4, 7):
        (pictures.media_root / f"red-{number}.png").unlink()
    if lost == "failures.parquet":
        assert repair(flawed, QUIET)
    else:
        with pytest.raises(
            ValueError, match=r"3 of 40 items failed, more than --max-failures 0\.05 allows; the last one: .*red"
        ):
            repair(flawed, QUIET)


def test_an_error_without_message_is_a_failure(
    tiny_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = RandomProjection.prepare

    def fail_without_message(self: RandomProjection, raw: Path | str) -> Tensor:
        if str(raw).startswith("a red"):
            raise ValueError
        return prepare(self, raw)

    monkeypatch.setattr(RandomProjection, "prepare", fail_without_message)
    options = dataclasses.replace(QUIET, max_failures=0.25)
    path = extract(tiny_manifest, "random_projection", {"modality": "text"}, tmp_path, options=options)
    assert open_cache(path).failed_ids == {f"red-{number}" for number in range(10)}
    assert {failure.error for failure in layout.read_commit(path, 0).failures} == {"ValueError"}


# --- locations ---


def test_a_cache_in_another_folder_is_not_repaired(texts: Manifest, tmp_path: Path) -> None:
    path = extract_texts(texts, tmp_path)
    for name in (f"copy-{path.name[-12:]}", f"../other/{path.name}"):
        elsewhere = shutil.copytree(path, path.parent / name)
        damage_shard(elsewhere)
        with pytest.raises(ValueError, match=rf"cannot be mended: a cache of its identity belongs to {path}; move it there"):
            repair(elsewhere, QUIET)
    assert verify(path) == []


def test_the_working_directory_can_be_the_cache(texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = extract_texts(texts, tmp_path)
    expected = cache_content(path)
    monkeypatch.chdir(path)
    assert verify(Path()) == []
    assert open_cache(Path()).ids == [sample.id for sample in texts.samples]
    damage_shard(path)
    assert len(repair(Path(), QUIET)) == 1
    assert cache_content(path) == expected


def test_a_repair_that_does_not_last_is_an_error(texts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk does not keep what is written to it."""
    path = extract_texts(texts, tmp_path)
    damage_shard(path)

    def write_empty(file: Path, data: bytes) -> None:
        write_atomic(file, data)
        if file.name == "0":
            file.write_bytes(b"")

    monkeypatch.setattr(stores, "write_atomic", write_empty)
    with pytest.raises(ValueError, match=r"was extracted again, and still: .*; is the disk sound\?"):
        repair(path, QUIET)


@pytest.mark.parametrize("name", ["features/zarr.json", "zarr.json"])
def test_missing_metadata_is_restored_exactly_or_not_at_all(name: str, texts: Manifest, tmp_path: Path) -> None:
    path = extract_texts(texts, tmp_path)
    expected = cache_content(path)
    (path / name).unlink()
    other_options = dataclasses.replace(QUIET, shard_rows=1024, batch_size=3)
    with pytest.raises(ValueError, match=rf"{name} is missing, and these options and libraries do not make it again as it was"):
        extract(texts, "random_projection", TEXT_SETTINGS, tmp_path, options=other_options)
    assert not (path / name).exists()
    extract_texts(texts, tmp_path)
    assert cache_content(path) == expected
