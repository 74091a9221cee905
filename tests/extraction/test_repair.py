"""Any damage to a file of a cache is found by `verify` and repaired by `repair`, or refused with one line that says why."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from helpers.fault_cases import SHARD_ROWS, TEXT_SETTINGS, cache_content, write_texts

from pipeline.cache import open_cache, verify
from pipeline.cache.layout import StoreDtype
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.extraction.repair import repair

OPTIONS = ExtractOptions(workers=0, shard_rows=SHARD_ROWS, max_failures=0.2, progress=False)
NUM_DAMAGES = 100


@pytest.fixture(scope="module")
def caches(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Dense caches with failures, and ragged caches of two shards, in every store dtype."""
    home = tmp_path_factory.mktemp("caches")
    for sample in tiny_manifest.samples:
        shutil.copy(tiny_manifest.media_path(sample), home)
    for name in ("red-1.png", "grey-3.png"):
        (home / name).write_bytes((home / name).read_bytes()[:200])
    tiny = dataclasses.replace(tiny_manifest, media_root=home)
    write_manifest(tiny, home)
    texts = write_texts(home, 30)
    paths = []
    for dtype in get_args(StoreDtype):
        paths.append(extract(tiny, "random_projection", {"width": "8"}, home, store_dtype=dtype, options=OPTIONS))
        paths.append(extract(texts, "random_projection", TEXT_SETTINGS, home, store_dtype=dtype, options=OPTIONS))
    assert [open_cache(path).kind for path in paths] == ["dense", "ragged"] * 3
    assert [len(open_cache(path).failed_ids) for path in paths] == [2, 0] * 3
    return paths


def damage(file: Path, rng: random.Random) -> str:
    """Flip a bit of a file, cut its end off, or remove it; return which."""
    data = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "cut", "remove"])
    if kind == "remove":
        file.unlink()
        return kind
    if kind == "cut":
        del data[rng.choice([0, len(data) - 1, rng.randrange(len(data))]) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return kind


def test_every_damage_is_found_and_repaired(caches: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Only a cache whose zarr.json no longer holds its identity may be refused."""
    rng = random.Random(0)
    num_alarms = sum(len(verify(path)) for path in caches)
    kinds: Counter[str] = Counter()
    num_found, num_repaired = 0, 0
    refused: list[str] = []
    for trial in range(NUM_DAMAGES):
        path = caches[trial % len(caches)]
        expected = cache_content(path)
        name = rng.choice(sorted(expected))
        data = (path / name).read_bytes()
        kinds[damage(path / name, rng)] += 1
        num_found += bool(verify(path))
        try:
            assert repair(path, OPTIONS)
            num_repaired += cache_content(path) == expected and verify(path) == []
        except ValueError as error:
            assert name == "zarr.json"
            refused.append(str(error))
            (path / name).write_bytes(data)
    with capsys.disabled():
        print(f"\n{num_found} of {NUM_DAMAGES} damages found ({dict(kinds)})")
        print(f"{num_alarms} false alarms on {len(caches)} clean caches")
        print(f"{num_repaired} of {NUM_DAMAGES - len(refused)} mended to the same bytes, {len(refused)} refused: {refused[0]}")
    assert (num_found, num_alarms, num_repaired) == (NUM_DAMAGES, 0, NUM_DAMAGES - len(refused))
    assert min(kinds[kind] for kind in ("flip", "cut", "remove")) >= NUM_DAMAGES // 4
    assert all("\n" not in line and "diffalign extract" in line for line in refused)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("commits/00000.json", lambda record: record.removesuffix(b"\n")),
        ("commits/00000.json", lambda record: record.replace(b'"seconds": ', b'"seconds":  ')),
        ("commits/00000.json", lambda record: b"[1]\n"),
        ("commits/00000.json", lambda record: record + record),
        ("commits/arrays.json", lambda record: record.replace(b",\n", b",\n\n")),
        ("zarr.json", lambda metadata: metadata.replace(b"diffalign extract", b"diffalign  extract")),
        ("zarr.json", lambda metadata: metadata.replace(b'"attributes": {', b'"attributes": { ')),
    ],
)
def test_changes_that_mean_the_same_are_found(caches: list[Path], name: str, change: Callable[[bytes], bytes]) -> None:
    """The check is for equal bytes, not for equal meaning."""
    path = caches[1]
    expected, data = cache_content(path), (path / name).read_bytes()
    assert change(data) != data
    (path / name).write_bytes(change(data))
    assert len(verify(path)) == 1
    assert repair(path, OPTIONS)
    assert cache_content(path) == expected


def test_a_record_of_another_shard_is_found(caches: list[Path]) -> None:
    """The record itself is undamaged."""
    path = caches[1]
    expected = cache_content(path)
    shutil.copy(path / "commits" / "00000.json", path / "commits" / "00001.json")
    assert verify(path) == [f"{path / 'commits' / '00001.json'} is the record of shard 0"]
    assert repair(path, OPTIONS)
    assert cache_content(path) == expected


@pytest.mark.parametrize("key", ["settings", "shard_rows"])
def test_a_cache_that_does_not_say_how_it_was_made_is_refused(caches: list[Path], key: str) -> None:
    path = caches[1]
    data = (path / "zarr.json").read_bytes()
    (path / "zarr.json").write_bytes(data.replace(f'"{key}"'.encode(), f'"{key[:-1]}z"'.encode()))
    with pytest.raises(ValueError, match=r"zarr\.json is damaged .*; to make it again, run: diffalign extract texts --encoder"):
        repair(path, OPTIONS)
    (path / "zarr.json").write_bytes(data)
    assert verify(path) == []


def test_leftovers_of_a_killed_writer_are_removed(caches: list[Path]) -> None:
    path = caches[0]
    expected = cache_content(path)
    (path / "features" / "c" / "0" / ".0.12345678.tmp").write_bytes(b"half a shard")
    assert verify(path) == []
    assert repair(path, OPTIONS) == []
    assert cache_content(path) == expected
