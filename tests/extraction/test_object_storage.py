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
from helpers.remote_caches import NUM_SHARDS, check_kills, content_of, fresh_processes, run_command
from helpers.s3_endpoint import Endpoint, use_endpoint
from helpers.tar_files import picture, sample, write_tar
from helpers.tiny_heads import train_tiny

from pipeline import Workspace
from pipeline.cache import find_caches, open_cache, shard_bytes, verify
from pipeline.cache.housekeeping import copy, rm
from pipeline.cache.layout import shard_path
from pipeline.cache.streaming import open_split
from pipeline.cache.writer import Writer
from pipeline.commands import app as cli
from pipeline.data import remote_tars
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.data.media import open_image
from pipeline.data.media_copies import changed_tars, copied_media
from pipeline.data.prepare import prepare
from pipeline.data.tar_members import local_file
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import connections
from pipeline.runtime.claims import hold
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place, caches_at, parse_place
from pipeline.runtime.stores import BucketStore, read_unchanged, store_of

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
    remote: Address, texts: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, endpoint: Endpoint) -> Path:
    """A folder with tar files of samples, which are also at s3://bucket/shards; one of them is cut short."""
    root = tmp_path_factory.mktemp("shards")
    for shard in range(3):
        members = [each for key in range(30) for each in sample(f"{key:03d}", 30 * shard + key)]
        write_tar(root / f"part-{shard}.tar", members)
    (root / "part-2.tar").write_bytes((root / "part-2.tar").read_bytes()[:-20_000])
    (root / "names.txt").write_text("even\nodd\n")
    for file in root.iterdir():
        store_of(place := parse_place("s3://bucket/shards")).put(place / file.name, file.read_bytes())
    return root


SHARD_SETTINGS = ["--set", "shards=part-{0..2}.tar", "--set", "class_names=names.txt", "--name", "shards"]


@pytest.fixture(scope="module")
def shard_homes(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The homes in which the tar files of the folder and those of the bucket are prepared."""
    homes = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for home, root in zip(homes, (str(shards), "s3://bucket/shards"), strict=True):
            assert run(["prepare", "webdataset", "--root", root, "--home", str(home), *SHARD_SETTINGS], monkeypatch) == 0
    return homes


def test_shards_in_a_bucket_give_the_manifest_and_the_features_of_those_on_a_disk(
    shard_homes: tuple[Path, Path], endpoint: Endpoint, tmp_path: Path
) -> None:
    """The command starts decoding processes after it has used the bucket, for the cache."""
    for name in ("parquet", "csv", "meta.json"):
        first, second = ((home / "manifests" / f"shards.{name}").read_bytes() for home in shard_homes)
        assert first == second, name
    location = (shard_homes[1] / "manifests" / "shards.location.json").read_text()
    assert "s3://bucket/shards" in location
    assert not any(word in location for word in ("of-a-test", "127.0.0.1"))
    on_disk = extract(read_manifest(shard_homes[0], "shards"), "random_projection", {}, shard_homes[0], options=QUIET)
    endpoint.disturb(0.2)
    command = ["extract", "shards", "--encoder", "random_projection", "--workers", "2"]
    options = ["--home", str(shard_homes[1]), "--caches", "s3://bucket/of-shards"]
    child = fresh_processes().Process(target=run_command, args=([*command, *options], dict(endpoint.environment)))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    endpoint.disturb(0)
    remote = parse_place(f"s3://bucket/of-shards/shards/{on_disk.name}")
    assert isinstance(remote, Address)
    assert content_of(remote, tmp_path) == cache_content(on_disk)  # also the digests of the media


def test_batches_that_come_again_find_their_copies(shard_homes: tuple[Path, Path]) -> None:
    on_disk, manifest = (read_manifest(home, "shards") for home in shard_homes)
    expected: list[bytes] = []
    for each in on_disk.samples[:4]:
        with local_file(on_disk.media_path(each)) as file:
            expected.append(file.read_bytes())
    media = [[each.media for each in manifest.samples[start : start + 2]] for start in (0, 2)] * 3
    with copied_media(manifest, [2] * 6, lambda batch: media[batch]) as (here, copies):
        folder = here.media_root
        assert isinstance(folder, Path)
        for number, own in enumerate(media):
            copies.wait(min(number + 3, 5))  # batches that are ahead
            assert [(folder / name).read_bytes() for name in own] == (expected * 3)[2 * number : 2 * number + 2]
            copies.drop(number)
        assert not [file for file in folder.rglob("*") if file.is_file()]


def test_each_run_of_neighbours_is_read_once(shard_homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Extraction reads each shard with one request; its digests are then known, and `verify` reads none again."""
    asked: list[str] = []

    def read(place: Address, *arguments: Any) -> memoryview:
        asked.append(place.name)
        return read_unchanged(place, *arguments)

    monkeypatch.setattr(remote_tars, "read_unchanged", read)
    manifest = read_manifest(shard_homes[1], "shards")
    path = extract(manifest, "random_projection", {"width": 8}, shard_homes[1], options=QUIET)
    assert asked == ["part-0.tar", "part-1.tar", "part-2.tar"]
    assert verify(path) == []
    assert len(asked) == 3
    (shard_homes[1] / "media.sqlite").unlink()
    assert verify(path) == []
    assert len(asked) == 6
    assert open_image(manifest.media_path(manifest.samples[40]), 8).size == (8, 8)


def test_shards_that_changed_or_are_gone_are_named(
    shard_homes: tuple[Path, Path], shards: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, place = shard_homes[1], parse_place("s3://bucket/shards/part-1.tar")
    manifest = read_manifest(home, "shards")
    path = extract(manifest, "random_projection", {"width": 16}, home, options=QUIET)
    content = store_of(place).get(place)
    again = r"run: diffalign prepare webdataset --name shards"
    manifest_remedy = f"run: {manifest.prepare_command}"
    at = content.index(picture(31))
    store_of(place).put(place, content[:at] + picture(32) + content[at + len(picture(32)) :])
    with pytest.raises(UserError, match=rf"s3://bucket/shards/part-1.tar was changed since it was prepared; {again}"):
        extract(manifest, "random_projection", {"width": 24}, home, options=QUIET)
    (problem,) = verify(path)
    assert "media files have changed" in problem
    assert problem.endswith(f"bring the earlier ones back, or {manifest_remedy}; features of the new ones are another cache")
    assert f"part-1.tar/{at}+{len(picture(31))}.png" in problem
    store_of(place).delete(place)
    with pytest.raises(UserError, match=rf"part-1.tar is gone; bring it back, or {again}"):
        extract(manifest, "random_projection", {"width": 24}, home, options=QUIET)
    assert changed_tars(manifest) == [str(place)]
    with pytest.raises(UserError, match=r"1 of 3 shards are missing, the first: part-1.tar"):
        prepare("webdataset", place.parent, home, {"shards": "part-{0..2}.tar"}, name="shards")
    with pytest.raises(UserError, match=r"table is read from a folder; .* or mount the bucket"):
        prepare("table", place.parent, home, {})
    store_of(place).put(place, content)
    prepare("shards", None, home, {})  # from where it was
    assert verify(path) == []
    monkeypatch.setattr(connections, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="does the store answer") as caught:
        extract(manifest, "random_projection", {"width": 24}, home, options=QUIET)
    assert str(caught.value.filename).startswith("s3://bucket/shards")
    with pytest.raises(UserError, match="does the store answer"):
        manifest.media_path(manifest.samples[0])
