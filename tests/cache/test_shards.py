"""Shards have the bytes that Zarr writes, and are read as Zarr reads them: whole, in parts, in any order, and never damaged."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from google_crc32c import value as crc32c
from helpers.feature_caches import make_cache, make_manifest, stored_numbers

from pipeline.cache import Cache, layout, open_cache, shards, verify
from pipeline.cache.writer import hash_beside

SHAPES = {"pooled": (1300, 7), "pieces": (1100, 5, 160)}  # a chunk of the second has several pieces


def make(home: Path, shape: tuple[int, ...], dtype: str) -> tuple[Cache, np.ndarray]:
    """Return a cache with shards of 1,024 rows and a row that failed, and its features, float32."""
    features = stored_numbers(np.random.default_rng(0), shape, dtype)
    return open_cache(
        make_cache(home, make_manifest(home, len(features)), features, store_dtype=dtype, shard_rows=1024)
    ), features


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", layout.STORE_DTYPES)
def test_the_bytes_are_those_of_zarr(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 2**17)
    cache, features = make(tmp_path, SHAPES[kind], dtype)
    source = cache.path / "features"
    copy = tmp_path / "zarr"
    copy.mkdir()
    (copy / "zarr.json").write_bytes((source / "zarr.json").read_bytes())
    array = zarr.open_array(copy, mode="r+")
    array[:] = layout.to_stored(features, dtype)
    files = sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(copy) for file in copy.rglob("*") if file.is_file())
    for file in files:
        assert (source / file).read_bytes() == (copy / file).read_bytes(), file
    assert verify(cache.path) == []


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", layout.STORE_DTYPES)
def test_rows_are_read_as_zarr_reads_them(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 2**17)
    cache, features = make(tmp_path, SHAPES[kind], dtype)
    stored = np.asarray(zarr.open_array(cache.path / "features", mode="r")[:])
    rng, count = np.random.default_rng(1), len(features)
    for rows in (
        np.arange(count),
        np.arange(300, 1090),
        np.flatnonzero(rng.random(count) < 0.6),
        np.sort(rng.integers(0, count, 500)),  # with repeats
        rng.permutation(count),
        np.array([1, 1, 3]),  # as far apart as a run
        np.array([*range(600, 900), *range(100, 500), 3, 3, 5]),  # blocks, as windows have them
        np.array([*range(600, 700), 2, 1, 1, 0]),
        np.array([count - 1]),
        np.zeros(0, np.int64),
    ):
        found = cache.stored.read(rows)
        assert found.dtype == stored.dtype
        assert found.tobytes() == stored[rows].tobytes()
        np.testing.assert_array_equal(cache.stored.read_float32(rows), features[rows])


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    cache, features = make(tmp_path, SHAPES["pooled"], "float16")
    file = layout.shard_path(cache.path, 0, 2)
    whole = file.read_bytes()
    index = np.frombuffer(whole[-36:-4], "<u8").copy()
    assert index.tolist() == [0, 7172, 7172, 7172]
    index[3] = shards.NO_CHUNK
    without_chunk = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    for data, reason in (
        (whole[:7171] + bytes([whole[7171] ^ 1]) + whole[7172:], "a checksum does not fit"),  # crc32c of chunk 0
        (whole[:-1] + bytes([whole[-1] ^ 1]), "a checksum does not fit"),  # crc32c of the index
        (whole[:-36] + without_chunk, "a chunk is not there"),
        (whole[7172:], "it is cut off"),  # chunk 1 is behind the end
        (b"", "it is cut off"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"c/0/0 is damaged or missing \({reason}\); to redo it, run: diffalign"):
            cache.stored.read(np.arange(1024))
        np.testing.assert_array_equal(cache.stored.read_float32(np.arange(1024, 1300)), features[1024:])
        assert verify(cache.path)
    file.unlink()
    with pytest.raises(ValueError, match=r"damaged or missing \(No such file or directory\)"):
        cache.stored.read(np.array([5]))
    file.write_bytes(whole)
    assert verify(cache.path) == []


def test_ids_are_read_late_and_join_alike(tmp_path: Path) -> None:
    cache, features = make(tmp_path, SHAPES["pooled"], "float16")
    assert not {"ids", "_ids", "_id_index"} & set(vars(cache))
    ids = [sample.id for sample in make_manifest(tmp_path, len(features)).samples]
    order = np.random.default_rng(2).integers(0, len(ids), 700).tolist()
    np.testing.assert_array_equal(cache.read([ids[row] for row in order]), features[order])
    assert cache.ids == ids
    assert all(type(sample_id) is str for sample_id in cache.ids)
    for unknown in ("", "nan", "None", "ä/00001 "):
        with pytest.raises(ValueError, match="1 ids are not in"):
            cache.read([ids[1], unknown])


class SlowDigest:
    """Stands in for a hash that takes longer than everything else; it remembers what it was given."""

    def __init__(self) -> None:
        self.data = b""

    def update(self, piece: bytes | memoryview) -> None:
        time.sleep(0.001)
        self.data += piece


def test_a_piece_is_hashed_before_it_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PIECE_BYTES", 2**10)
    cache, features = make(tmp_path, SHAPES["pooled"], "float32")
    digest: Any = SlowDigest()

    def fill_rows(rows: slice, stored: np.ndarray) -> None:
        stored[:] = features[rows]

    written = b"".join(map(bytes, hash_beside(cache.stored.encode_shard(1024, fill_rows), digest)))
    assert digest.data == written == layout.shard_path(cache.path, 0, 2).read_bytes()
    assert cache.stored.shard_bytes(1024) == len(written)


@pytest.mark.parametrize("dtype", layout.STORE_DTYPES)
def test_features_are_the_same_where_torch_is_not_loaded(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = layout.to_stored(stored_numbers(np.random.default_rng(1), (30, 4), dtype), dtype)[::2]
    with_torch = layout.from_stored(stored, dtype)
    monkeypatch.delitem(sys.modules, "torch")
    np.testing.assert_array_equal(layout.from_stored(stored, dtype), with_torch)
    assert "torch" not in sys.modules
