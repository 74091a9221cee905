"""Tar files of samples in a bucket: media are copied here in batches, and features are those of the same files on a disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.command_line import run
from helpers.fault_cases import cache_content
from helpers.remote_caches import content_of, fresh_processes, run_command
from helpers.s3_endpoint import Endpoint, use_endpoint
from helpers.tar_files import picture, sample, write_tar

from pipeline.cache import verify
from pipeline.commands.doctor import run_checks
from pipeline.data import media_copies, remote_tars
from pipeline.data.manifest_files import read_manifest
from pipeline.data.media import open_image
from pipeline.data.media_copies import MediaCopies, changed_tars, copied_media
from pipeline.data.prepare import prepare
from pipeline.data.tar_members import local_file
from pipeline.data.tar_shards import TarShards
from pipeline.extraction.extract import ExtractOptions, extract, plan_extraction
from pipeline.extraction.inputs import EncoderInputs
from pipeline.extraction.workers import item_bytes
from pipeline.runtime import connections
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, parse_place
from pipeline.runtime.stores import read_unchanged, store_of

QUIET = ExtractOptions(workers=0, progress=False)
SHARD_SETTINGS = ["--set", "shards=part-{0..2}.tar", "--set", "class_names=names.txt", "--name", "shards"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with use_endpoint() as endpoint:
        yield endpoint


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


def test_only_what_a_pattern_needs_is_listed(endpoint: Endpoint) -> None:
    root = parse_place("s3://bucket/odd")
    for key in ("a-0.tar", "a-1.tar", "b/b-0.tar", "b//notes.txt"):  # no address can be like the last one
        endpoint.ask("PUT", f"/bucket/odd/{key}")
    assert TarShards.find(root, "{./,}{a-0,a-1,b//b-0}.tar").names == ["a-0.tar", "a-1.tar", "b/b-0.tar"]
    assert list(TarShards.find(root, "a-*.tar").stamps) == ["a-0.tar", "a-1.tar"]
    with pytest.raises(UserError, match=r"1 of 3 shards are missing, the first: a-2.tar; bring them there"):
        TarShards.find(root, "a-{0..2}.tar")
    with pytest.raises(OSError, match="has no bucket s3://absent"):
        TarShards.find(parse_place("s3://absent/odd"), "a-{0..2}.tar")
    with pytest.raises(UserError, match=r'"odd/b//notes.txt".*rename or remove it, or say in shards'):
        TarShards.find(root, "**/a-*.tar")


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


@pytest.mark.parametrize(("free", "most"), [(2**40, 16), (0, 4)])
def test_media_are_read_ahead_while_the_disk_has_room(
    free: int, most: int, shard_homes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has none, one batch is copied at a time."""
    manifest, options = read_manifest(shard_homes[1], "shards"), ExtractOptions(workers=2, batch_size=4, progress=False)
    held: list[int] = []
    wait = MediaCopies.wait

    def wait_and_count(self: MediaCopies, batch: int) -> None:
        wait(self, batch)
        held.append(len(list(copies_of(Path(tempfile.gettempdir())))))

    monkeypatch.setattr(MediaCopies, "wait", wait_and_count)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    path = extract(manifest, "random_projection", {"width": most}, shard_homes[1], options=options)
    assert max(held) == most
    assert verify(path) == []
    assert not list(tmp_path.iterdir())


def copies_of(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("diffalign-*/**/*") if file.is_file())


def test_a_full_disk_of_the_copies_is_named(shard_homes: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_copies, "_beside", lambda _: Path("/dev/full"))
    with pytest.raises(UserError, match=rf"no space is left in {tempfile.gettempdir()}, .* let TMPDIR name a folder"):
        extract(read_manifest(shard_homes[1], "shards"), "random_projection", {"width": 28}, shard_homes[1], options=QUIET)


def extract_slowly(arguments: list[str], environment: dict[str, str]) -> None:
    """What a child process does that is to end while it has copies."""
    EncoderInputs.prepare = lambda *_: time.sleep(60)  # pyright: ignore[reportAttributeAccessIssue]
    run_command(arguments, environment)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_job_that_is_asked_to_end_leaves_no_copies(
    workers: str, shard_homes: tuple[Path, Path], endpoint: Endpoint, tmp_path: Path
) -> None:
    command = ["extract", "shards", "--encoder", "random_projection", "--set", "width=12", "--workers", workers]
    environment = {**endpoint.environment, "TMPDIR": str(tmp_path)}
    child = fresh_processes().Process(target=extract_slowly, args=([*command, "--home", str(shard_homes[1])], environment))
    child.start()
    while not list(copies_of(tmp_path)):
        assert child.is_alive()
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    child.join(20)
    assert child.exitcode == 130
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(TimeoutError, match=r"127\.0\.0\.1:9 does not answer") as caught:
        extract(manifest, "random_projection", {"width": 24}, home, options=QUIET)
    assert str(caught.value.filename).startswith("s3://bucket/shards")
    findings = [str(each) for each in run_checks(home, "shards")]
    assert any(re.search("BAD  the media of shards in .* cannot be read: s3://.*does not answer", line) for line in findings)
    with pytest.raises(TimeoutError, match="does not answer"):
        item_bytes(plan_extraction(manifest, "random_projection", {}, home, "float16", False, QUIET).inputs)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 does not answer"):
        manifest.media_path(manifest.samples[0])
