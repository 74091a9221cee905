"""Whatever happens to a file of a cache, verify finds it and repair mends it, or says in one line why it cannot."""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from helpers.fault_cases import SHARD_ROWS, TEXT, content, write_texts

from pipeline.cache import open_cache, verify
from pipeline.cache.layout import StoreDtype
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.extraction.repair import repair

EFFORT = ExtractOptions(workers=0, shard_rows=SHARD_ROWS, max_failures=0.2, progress=False)
NUM_DAMAGES = 100


@pytest.fixture(scope="module")
def caches(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Dense caches with failures, and ragged ones of two shards, in every number format."""
    home = tmp_path_factory.mktemp("caches")
    for sample in tiny_manifest.samples:
        shutil.copy(tiny_manifest.media_path(sample), home)
    for name in ("red-1.png", "grey-3.png"):
        (home / name).write_bytes((home / name).read_bytes()[:200])
    tiny = dataclasses.replace(tiny_manifest, media_root=home)
    manifests.write_manifest(tiny, home)
    texts = write_texts(home, 30)
    paths = []
    for dtype in get_args(StoreDtype):
        paths.append(extract(tiny, "random_projection", {"width": "8"}, home, store_dtype=dtype, effort=EFFORT))
        paths.append(extract(texts, "random_projection", TEXT, home, store_dtype=dtype, effort=EFFORT))
    assert [open_cache(path).kind for path in paths] == ["dense", "ragged"] * 3
    assert [len(open_cache(path).failed_ids) for path in paths] == [2, 0] * 3
    return paths


def damage(file: Path, rng: random.Random) -> str:
    """Flip a bit of a file, cut its end off, or remove it; says which."""
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


def test_every_damage_is_found_and_mended(caches: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Only a cache whose zarr.json no longer says what it is made of may be refused."""
    rng = random.Random(0)
    alarms = sum(len(verify(path)) for path in caches)
    kinds: Counter[str] = Counter()
    found, mended = 0, 0
    refused: list[str] = []
    for trial in range(NUM_DAMAGES):
        path = caches[trial % len(caches)]
        expected = content(path)
        name = rng.choice(sorted(expected))
        data = (path / name).read_bytes()
        kinds[damage(path / name, rng)] += 1
        found += bool(verify(path))
        try:
            assert repair(path, EFFORT)
            mended += content(path) == expected and verify(path) == []
        except ValueError as error:
            assert name == "zarr.json"
            refused.append(str(error))
            (path / name).write_bytes(data)
    with capsys.disabled():
        print(f"\n{found} of {NUM_DAMAGES} damages found ({dict(kinds)}); {alarms} false alarms on {len(caches)} clean caches")
        print(f"{mended} of {NUM_DAMAGES - len(refused)} mended to the same bytes, {len(refused)} refused: {refused[0]}")
    assert (found, alarms, mended) == (NUM_DAMAGES, 0, NUM_DAMAGES - len(refused))
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
    """Byte-identical is more than equal."""
    path = caches[1]
    expected, data = content(path), (path / name).read_bytes()
    assert change(data) != data
    (path / name).write_bytes(change(data))
    assert len(verify(path)) == 1
    assert repair(path, EFFORT)
    assert content(path) == expected


def test_a_record_in_the_place_of_another_is_found(caches: list[Path]) -> None:
    """Every byte of it is right."""
    path = caches[1]
    expected = content(path)
    shutil.copy(path / "commits" / "00000.json", path / "commits" / "00001.json")
    assert verify(path) == [f"{path / 'commits' / '00001.json'} is the record of shard 0"]
    assert repair(path, EFFORT)
    assert content(path) == expected


@pytest.mark.parametrize("key", ["settings", "shard_rows"])
def test_a_cache_that_does_not_say_how_it_was_made_is_refused(caches: list[Path], key: str) -> None:
    path = caches[1]
    data = (path / "zarr.json").read_bytes()
    (path / "zarr.json").write_bytes(data.replace(f'"{key}"'.encode(), f'"{key[:-1]}z"'.encode()))
    with pytest.raises(ValueError, match=r"zarr\.json is damaged .*; to make it again, run: diffalign extract texts --encoder"):
        repair(path, EFFORT)
    (path / "zarr.json").write_bytes(data)
    assert verify(path) == []


def test_leftovers_of_a_killed_writer_go(caches: list[Path]) -> None:
    path = caches[0]
    expected = content(path)
    (path / "features" / "c" / "0" / ".0.12345678.tmp").write_bytes(b"half a shard")
    assert verify(path) == []
    assert repair(path, EFFORT) == []
    assert content(path) == expected
