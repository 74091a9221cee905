"""Caches in an object store have the objects that caches on a disk have as files, whatever is killed, lost or repeated."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.command_line import run
from helpers.fault_cases import cache_content, extract_texts, write_texts
from helpers.remote_caches import NUM_SHARDS, check_kills, content_of
from helpers.s3_endpoint import Endpoint, use_endpoint
from helpers.tiny_heads import train_tiny

from pipeline import Workspace
from pipeline.cache import find_caches, open_cache, shard_bytes, verify
from pipeline.cache.housekeeping import copy, rm
from pipeline.cache.layout import shard_path
from pipeline.cache.streaming import open_split
from pipeline.cache.writer import Writer
from pipeline.commands import app as cli
from pipeline.data.manifest import Manifest
from pipeline.extraction.extract import ExtractOptions
from pipeline.runtime.claims import hold
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place, caches_at, parse_place
from pipeline.runtime.stores import BucketStore, store_of

NUM_SAMPLES = 90
QUIET = ExtractOptions(workers=0, progress=False)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with use_endpoint() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_texts(tmp_path_factory.mktemp("texts"), NUM_SAMPLES)


@pytest.fixture(scope="module")
def on_disk(texts: Manifest) -> Place:
    return extract_texts(texts, texts.media_root)


@pytest.fixture(scope="module")
def remote(texts: Manifest, on_disk: Place, endpoint: Endpoint) -> Address:
    """The same cache, extracted into a bucket while a quarter of the requests is disturbed."""
    endpoint.disturb(0.25)
    with caches_at("s3://bucket/whole"):
        path = extract_texts(texts, texts.media_root, workers=1)
    endpoint.disturb(0)
    assert isinstance(path, Address)
    return path


def test_the_objects_are_the_files(remote: Address, on_disk: Path, tmp_path: Path) -> None:
    assert content_of(remote, tmp_path) == cache_content(on_disk)
    assert verify(remote) == []
    there = copy(on_disk, parse_place("s3://bucket/copied"))
    assert isinstance(there, Address)
    assert content_of(there, tmp_path / "again") == cache_content(on_disk)


def test_rows_are_read_in_ranges_and_kept_in_a_folder_with_a_limit(
    remote: Address, on_disk: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"s{number:03d}" for number in np.random.default_rng(0).permutation(NUM_SAMPLES).tolist()]
    expected = open_cache(on_disk).read(ids)
    np.testing.assert_array_equal(open_cache(remote).read(ids), expected)
    monkeypatch.setenv("DIFFALIGN_LOCAL_COPIES", str(tmp_path))
    cache = open_cache(remote)
    np.testing.assert_array_equal(cache.read(ids), expected)
    folder = tmp_path / "diffalign-copies"
    copies = sorted(folder.iterdir())
    assert len(copies) == NUM_SHARDS * 2  # the chunk and the index of each shard
    copies[0].write_bytes(copies[0].read_bytes()[:-1] + b"?")
    np.testing.assert_array_equal(open_cache(remote).read(ids), expected)
    copies[-1].unlink()
    kept = shard_bytes.LocalCopies(tmp_path, sum(file.stat().st_size for file in folder.iterdir()))
    assert bytes(kept.fetch(f"{'0' * 64}-0-999", lambda: memoryview(bytes(999)))) == bytes(999)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 0.9 * kept.max_bytes


def test_the_folder_of_copies_keeps_the_files_of_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "diffalign-copies"
    folder.mkdir()
    owned = [tmp_path / f"thesis_{number}.tex" for number in range(5)]
    owned += [folder / "notes.txt", folder / f"{'1' * 64}-0-9.bak"]
    for file in owned:
        file.write_bytes(bytes(300_000))
    elsewhere = folder / f"{'2' * 64}-0-9"
    elsewhere.symlink_to(owned[0])
    copies = shard_bytes.LocalCopies(tmp_path, 1_000_000)
    for start in range(4):
        copies.fetch(f"{'0' * 64}-{start}-{start + 300_000}", lambda: memoryview(bytes(300_000)))
    assert all(file.is_file() for file in [*owned, elsewhere])
    assert len(list(folder.glob(f"{'0' * 64}-*"))) == 2  # of four; 0.9 MB is the most that is left


def test_copies_of_several_processes_share_the_limit(tmp_path: Path) -> None:
    several = [shard_bytes.LocalCopies(tmp_path, 1_000_000) for _ in range(4)]
    for number in range(19):
        for process, copies in enumerate(several):
            copies.fetch(f"{process:064x}-{number}-{number + 50_000}", lambda: memoryview(bytes(50_000)))
    assert sum(file.stat().st_size for file in several[0].folder.iterdir()) <= 1_000_000


def test_settings_of_copies_are_no_damage(remote: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFALIGN_LOCAL_COPIES", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"DIFFALIGN_LOCAL_COPIES is '.*file', where no copies can be kept: Not a directory"):
        open_cache(remote).read(["s001"])
    for wrong in ("20GB", "inf"):
        monkeypatch.setenv("DIFFALIGN_LOCAL_COPIES_GIB", wrong)
        with pytest.raises(UserError, match=f"DIFFALIGN_LOCAL_COPIES_GIB must be a number of GiB, not '{wrong}'"):
            open_cache(remote).read(["s001"])


def test_a_store_that_does_not_answer_is_no_damage(remote: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(remote)

    def get_range(self: BucketStore, place: Address, start: int, num_bytes: int) -> memoryview:
        raise OSError(errno.EIO, "does the store answer?", str(place))

    monkeypatch.setattr(BucketStore, "get_range", get_range)
    with pytest.raises(OSError, match="does the store answer"):
        cache.read(["s001"])


def test_who_has_lost_the_claim_leaves_a_finished_cache_as_it_is(remote: Address) -> None:
    path = copy(remote, parse_place("s3://bucket/lost"))
    writer = Writer.attach(path)
    attributes = json.loads(writer.metadata)["attributes"]
    rows = np.zeros((len(writer.rows(0)), *writer.feature_shape), np.float32)
    before = store_of(path).list(path)
    with hold(path):
        (claim,) = store_of(path).list(path / "claims")
        store_of(path).delete(claim.place)  # as one does who takes over
        for act in (
            lambda: writer.commit(0, rows, [], seconds=1.0, batch_size=1, device="cpu"),
            lambda: writer.finish(writer.read_records()),
            lambda: Writer.open(path, ["other"], np.zeros(0, np.int64), (3,), attributes["identity"], writer.provenance),
        ):
            with pytest.raises(UserError, match="gave no sign of life"):
                act()
    assert store_of(path).list(path) == before  # also the times


def test_windows_over_a_bucket_are_those_over_a_disk(remote: Address, on_disk: Path, texts: Manifest) -> None:
    def tables(path: Place) -> list[dict[str, torch.Tensor]]:
        cache = open_cache(path)
        source = open_split(texts, {"image": cache, "text": cache}, "train", torch.device("cpu"), "mean", 16)
        return [dict(table.columns) for table in source.windows(4, seed=0, epoch=1)]

    for first, second in zip(tables(remote), tables(on_disk), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_head_trained_on_a_bucket_is_that_trained_on_a_disk(tiny_home: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    runs = []
    for name, caches in (("disk", ""), ("bucket", "s3://bucket/heads")):
        home = tmp_path / name
        shutil.copytree(tiny_home / "manifests", home / "manifests")
        for path in find_caches(tiny_home, "tiny"):
            copy(path, parse_place(caches) if caches else home / "caches")
        with caches_at(caches):
            runs.append(train_tiny(home, "ema", training={"window": 8}))
    first, second = (pd.read_csv(run.path / "history.csv").drop(columns="seconds", errors="ignore") for run in runs)
    pd.testing.assert_frame_equal(first, second)
    assert (runs[0].path / "config.json").read_bytes() == (runs[1].path / "config.json").read_bytes()


def test_cache_commands_work_on_a_bucket(
    remote: Address, on_disk: Path, texts: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(*arguments: str) -> Any:
        run([*arguments, "--json"], monkeypatch)
        return json.loads(capsys.readouterr().out)

    home = ["--home", str(texts.media_root)]
    place = str(copy(remote, parse_place("s3://bucket/other")))
    (line,) = ask("cache", "ls", *home, "--caches", "s3://bucket/other")
    assert (line["name"], line["complete"], line["rows"]) == (remote.name, True, 2160)
    facts = ask("cache", "info", place)
    assert facts["path"] == place
    name = f"texts/{remote.name}"
    for command in ("info", "rm"):  # this one only shows what it would remove
        assert ask("cache", command, name, *home, "--caches", "s3://bucket/other")["path"] == place
    assert ask("cache", "info", name, *home)["path"] == str(on_disk)
    assert not any(word in json.dumps(facts) for word in ("of-a-test", "127.0.0.1"))
    shard = shard_path(parse_place(place), 1, 2)
    store_of(shard).put(shard, b"lost")
    monkeypatch.setattr("sys.argv", ["diffalign", "cache", "verify", place, *home])
    with pytest.raises(SystemExit):
        cli.main()
    assert "features/c/1/0 has 4 bytes instead of" in capsys.readouterr().err
    assert len(ask("cache", "repair", place, "--workers", "0", *home)["mended"]) == 1
    assert verify(parse_place(place)) == []
    assert ask("cache", "stats", place, *home)["rows"] == 2160
    assert ask("cache", "rm", place, "--yes")["removed"]
    assert store_of(shard).list(parse_place("s3://bucket/other")) == []


def test_only_a_cache_is_removed_and_by_one_process(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    website = parse_place("s3://bucket/releases/website-3f2a9c1d0e4b")
    store_of(website).put(website / "index.html", b"a page")
    store_of(website).put(website / "commits" / "00000.json", b"{}")
    with pytest.raises(UserError, match="is not a feature cache"):
        rm(website)
    place = parse_place("s3://bucket/releases/clip-3f2a9c1d0e4b")
    for name in ("zarr.json", "features/c/0/0", "near_duplicates.json"):
        store_of(place).put(place / name, b"x")
    delete, seen = BucketStore.delete, []

    def delete_slowly(self: BucketStore, at: Address) -> None:
        """A claim that went before the rest would let other processes write here."""
        seen.append(len([found for found in store_of(place).list(place / "claims")]))
        delete(self, at)

    monkeypatch.setattr(BucketStore, "delete", delete_slowly)
    assert rm(place).files == 3
    assert seen == [1] * 4  # the claim itself is the last
    assert store_of(place).list(place) == []
    assert not caplog.records


def test_extractions_that_are_killed_end_in_the_same_objects(
    texts: Manifest, on_disk: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    check_kills(range(2), texts, on_disk, endpoint, tmp_path)


@pytest.mark.exhaustive
def test_twenty_extractions_that_are_killed_end_in_the_same_objects(
    texts: Manifest, on_disk: Path, endpoint: Endpoint, tmp_path: Path
) -> None:
    check_kills(range(2, 22), texts, on_disk, endpoint, tmp_path)


def test_a_home_stays_on_a_disk() -> None:
    with pytest.raises(UserError, match="caches alone may be in an object store: --caches s3://bucket/x"):
        Workspace("s3://bucket/x")
