"""Tar files in an object store, with bytes in memory in its place: what is read, in which requests."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data import remote_tars, tar_shards
from pipeline.data.remote_tars import ObjectFile, read_pieces
from pipeline.data.tar_members import Member
from pipeline.data.tar_shards import TarShards
from pipeline.runtime.places import Address, parse_place
from pipeline.runtime.stores import StoredObject

CONTENT = random.Random(0).randbytes(40_000)
PLACE = Address("s3://bucket", "a.tar")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (start, bytes) of every request; blocks are 100 bytes, and ranges at most 1000."""
    asked: list[tuple[int, int]] = []

    def read(place: Address, start: int, num_bytes: int, stamp: str) -> memoryview:
        assert (place, stamp) == (PLACE, "stamp")
        asked.append((start, num_bytes))
        return memoryview(CONTENT)[start : start + num_bytes]

    monkeypatch.setattr(remote_tars, "read_unchanged", read)
    sizes = {"BLOCK_BYTES": 100, "MAX_SKIPPED_BYTES": 400, "RANGE_BYTES": 1000, "MAX_GAP_BYTES": 50, "BYTES_AHEAD": 3000}
    for name, number in sizes.items():
        monkeypatch.setattr(remote_tars, name, number)
    return asked


def test_an_object_is_a_file(requests: list[tuple[int, int]]) -> None:
    rng = random.Random(1)
    with ThreadPoolExecutor(4) as threads:
        file = ObjectFile(PLACE, len(CONTENT), "stamp", threads)
        assert b"".join(iter(lambda: file.read(rng.choice([1, 99, 512, 2000])), b"")) == CONTENT
        assert sorted(requests) == [(start, 100) for start in range(0, len(CONTENT), 100)]  # each block once
        for _ in range(300):
            start, size = rng.randrange(len(CONTENT) + 50), rng.randrange(700)
            assert file.seek(start) == file.tell() == start
            assert file.read(size) == CONTENT[start : start + size]
        file.seek(-300, 2)
        assert file.read() == CONTENT[-300:]


def test_long_parts_are_left_out(requests: list[tuple[int, int]]) -> None:
    """A byte of every twentieth block: nothing else is read, but for what the first one takes ahead."""
    with ThreadPoolExecutor(4) as threads:
        file = ObjectFile(PLACE, len(CONTENT), "stamp", threads)
        for start in range(0, len(CONTENT), 2000):
            file.seek(start)
            assert file.read(1) == CONTENT[start : start + 1]
    ahead = [(100, 100)] if (100, 100) in requests else []  # it is called off if it has not begun
    assert sorted(requests) == [(0, 100), *ahead, *((start, 100) for start in range(2000, len(CONTENT), 2000))]


def test_neighbours_come_with_one_request(requests: list[tuple[int, int]]) -> None:
    rng = random.Random(2)
    members, offset = [], 0
    for _ in range(60):
        offset += rng.choice([0, 0, 10, 50, 51, 700])
        members.append(Member(str(PLACE), offset, rng.choice([0, 1, 90, 90, 90, 999, 2500]), ".png"))
        offset += members[-1].size
    members.append(members[0])  # back to the start
    found = [b""] * len(members)
    ended = []
    for number, piece, is_last in read_pieces(members, lambda _: "stamp", ""):
        found[number] += piece
        ended += [number] * is_last
    assert ended == list(range(len(members)))
    assert found == [CONTENT[member.offset : member.offset + member.size] for member in members]
    assert all(0 < size <= 1000 for _, size in requests)
    gaps = sum(max(0, size) for _, size in requests) - sum(member.size for member in members)
    assert 0 < gaps <= 50 * len(members)
    requests.clear()
    run = [Member(str(PLACE), start, 80, ".png") for start in range(0, 5000, 100)]
    assert sum(len(piece) for _, piece, _ in read_pieces(run, lambda _: "stamp", "")) == 80 * 50
    assert len(requests) == 5


@pytest.mark.parametrize(
    "pattern", ["**/*.tar", "*.tar", "a/*.tar", "a/**/?.tar", "**/b/*.tar", "*/*.tar", "a/.x/*.tar", "[ab]*/*.tar"]
)
def test_patterns_fit_objects_as_they_fit_files(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["1.tar", ".2.tar", "a/3.tar", "a/b/4.tar", "a/b/c/5.tar", "a/.x/6.tar", "ab/77.tar", "b/8.tar", "b/b/9.tar"]
    root = parse_place("s3://bucket/x")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    objects = {name: StoredObject(root / name, 0, 0.0, "0") for name in names}
    monkeypatch.setattr(tar_shards, "_find_objects", lambda *_: objects)
    assert TarShards.find(root, pattern).names == TarShards.find(tmp_path, pattern).names
