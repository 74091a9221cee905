"""Digests of media files follow the contents alone; what is remembered of a file saves reading it, and is never wrong."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from pipeline.data import media_digests as digests
from pipeline.data.media_digests import NO_DIGEST, STORE_NAME, media_digests

XXH3_OF_NOTHING = bytes.fromhex("2d06800538d394c2")  # published with the algorithm


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Forty files of 0 to 300,000 bytes, of which some are equal."""
    (tmp_path / "media").mkdir()
    paths = [tmp_path / "media" / f"ä {number}.bin" for number in range(40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number % 7]) * (number % 5) * 75_000)
    return [str(path) for path in paths]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, so that tests need not wait."""
    monkeypatch.setattr(digests, "SETTLING_NS", -(10**18))


@pytest.fixture
def num_reads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns how many files were read since it was last called."""
    reads: list[int] = []

    def counted() -> xxhash.xxh3_64:
        reads.append(1)
        return xxhash.xxh3_64()

    monkeypatch.setattr(digests, "xxhash", type("counting", (), {"xxh3_64": counted}))
    return lambda: (len(reads), reads.clear())[0]


def stored(home: Path) -> dict[bytes, bytes]:
    with sqlite3.connect(home / STORE_NAME) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return dict(connection.execute("SELECT path, digest FROM digests"))


def whole(files: list[str]) -> list[bytes]:
    """The digests of whole files in memory."""
    return [xxhash.xxh3_64_digest(Path(file).read_bytes()) for file in files]


def replace_keeping_size_and_time(path: Path, data: bytes) -> None:
    """Write other contents of the same size and set the time of the content back, as `tar x` and `rsync -t` do."""
    before = path.stat()
    assert len(data) == before.st_size
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of the disk has ticks
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_digests_are_those_of_the_contents(files: list[str], tmp_path: Path) -> None:
    found = media_digests([*files, files[3], ""], tmp_path)
    assert found == [*whole(files), whole(files)[3], NO_DIGEST]
    assert found[0] == XXH3_OF_NOTHING
    assert media_digests([], tmp_path) == []
    assert not (tmp_path / STORE_NAME).exists()  # they have just been written


def test_a_known_file_is_not_read_again_until_it_changes(
    files: list[str], tmp_path: Path, settled: None, num_reads: Callable[[], int]
) -> None:
    first = media_digests(files, tmp_path)
    assert num_reads() == 40
    assert media_digests(files[::-1], tmp_path) == first[::-1]
    assert num_reads() == 0
    replace_keeping_size_and_time(Path(files[1]), b"x" * 75_000)
    Path(files[2]).unlink()
    again = media_digests(files, tmp_path)
    assert num_reads() == 1
    assert again[1] == xxhash.xxh3_64_digest(b"x" * 75_000) != first[1]
    assert again == [first[0], again[1], NO_DIGEST, *first[3:]]
    expected = [*again[:2], first[2], *first[3:]]  # what was known of the file that is gone does no harm
    assert stored(tmp_path) == dict(zip(map(os.fsencode, files), expected, strict=True))


def test_what_has_just_changed_is_read_again(files: list[str], tmp_path: Path, num_reads: Callable[[], int]) -> None:
    """A second change within one tick of the disk's clock would not show in the times."""
    for file in files[1:]:
        os.utime(file, (0, 0))  # the time of the inode is now, all the same
    media_digests(files, tmp_path)
    media_digests(files, tmp_path)
    assert num_reads() == 80
    hours_ahead = time.time() + 7200
    os.utime(files[0], (hours_ahead, hours_ahead))
    assert media_digests(files, tmp_path) == whole(files)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("loop")
    (tmp_path / "loop").symlink_to("link")
    odd = [str(tmp_path / name) for name in ("pipe", "link", "missing", "x" * 300)]
    assert media_digests([*odd, str(tmp_path), "/dev/zero"], tmp_path) == [NO_DIGEST] * 6


def test_a_name_that_is_no_text(tmp_path: Path, settled: None) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.jpg"
    Path(os.fsdecode(path)).write_bytes(b"picture")
    assert media_digests([os.fsdecode(path)], tmp_path) == [xxhash.xxh3_64_digest(b"picture")]
    assert list(stored(tmp_path)) == [path]


@pytest.mark.parametrize("damage", ["rubbish", "cut", "folder", "other"])
def test_a_store_that_is_of_no_use_does_no_harm(files: list[str], tmp_path: Path, settled: None, damage: str) -> None:
    expected, store = whole(files), tmp_path / STORE_NAME
    if damage == "rubbish":
        store.write_bytes(b"rubbish" * 1000)
    if damage == "cut":
        media_digests(files, tmp_path)
        store.write_bytes(store.read_bytes()[:5000])
    if damage == "folder":
        store.mkdir()
    if damage == "other":
        with sqlite3.connect(store) as connection:
            connection.execute("CREATE TABLE digests (name TEXT)")
    assert media_digests(files, tmp_path) == expected
    assert media_digests(files, tmp_path) == expected
    if damage in ("rubbish", "cut"):
        assert len(stored(tmp_path)) == 40


def digest_in_turns(files: list[str], home: Path) -> None:
    """Digest the files five times, in parts; the process fails if a digest is wrong."""
    digests.SETTLING_NS = -(10**18)
    for start in range(5):
        part = files[start::5]
        assert media_digests(part, home) == whole(part)


def test_processes_share_a_store(files: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=digest_in_turns, args=(files[number:] + files[:number], tmp_path)) for number in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert stored(tmp_path) == dict(zip(map(os.fsencode, files), whole(files), strict=True))
