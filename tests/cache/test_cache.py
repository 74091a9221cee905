"""The cache joins by id and is plain Zarr v3. Wrong, incomplete and damaged caches are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from pipeline.cache import Writer, find_caches, info, layout, open_cache, verify
from pipeline.cache.layout import Failure
from pipeline.runtime.files import lock

COMMAND = "diffalign extract toy --encoder toy"


def make_identity(**changes: Any) -> dict[str, Any]:
    encoder = {"name": "toy", "width": 3, "compute_dtype": "float32"}
    return {"dataset": "toy", "encoder": encoder, "store_dtype": "float16", **changes}


def write(
    home: Path,
    features: np.ndarray,
    ids: Sequence[str],
    offsets: np.ndarray | None = None,
    failures: Sequence[Failure] = (),
    shards: Sequence[int] | None = None,
    **changes: Any,
) -> Path:
    """Write a cache of these features: all shards, or only the given ones."""
    identity = make_identity(**changes)
    path = layout.cache_path(home, "toy", "toy", identity)
    with lock(path):
        offsets = np.zeros(0, np.int64) if offsets is None else offsets
        writer = Writer.open(path, ids, offsets, features.shape[1:], identity, {"command": COMMAND})
        for shard in range(writer.num_shards) if shards is None else shards:
            rows = writer.rows(shard)
            failed = [failure for failure in failures if failure.row in rows]
            writer.commit(shard, features[rows.start : rows.stop], failed, seconds=1.0, batch_size=8, device="cpu")
        if shards is None:
            writer.finish(writer.verified_commits())
    return path


@pytest.fixture
def features() -> np.ndarray:
    """Three shards of float16 numbers, so that storing them loses nothing."""
    return np.random.default_rng(0).normal(size=(20_000, 3)).astype(np.float16).astype(np.float32)


@pytest.fixture
def ids(features: np.ndarray) -> list[str]:
    return [f"{row:05d}/ü" for row in range(len(features))]


@pytest.fixture
def path(tmp_path: Path, features: np.ndarray, ids: list[str]) -> Path:
    return write(tmp_path, features, ids)


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def test_join_is_by_id(path: Path, features: np.ndarray, ids: list[str]) -> None:
    cache = open_cache(path)
    order = np.random.default_rng(1).integers(0, len(ids), 5_000)  # shuffled, with repeats
    np.testing.assert_array_equal(cache.read([ids[row] for row in order]), features[order])
    assert cache.ids == ids
    assert (cache.kind, cache.feature_shape, cache.failed_ids) == ("dense", (3,), frozenset())
    assert cache.read([]).shape == (0, 3)
    with pytest.raises(ValueError, match=r"2 ids are not in .*, the first: 'x', 'y'"):
        cache.read([ids[0], "x", "y"])


def test_any_zarr_client_reads_it(path: Path, features: np.ndarray, ids: list[str]) -> None:
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(zarr.open_array(path / "features", mode="r")[:], features)
    assert np.asarray(zarr.open_array(path / "ids", mode="r")[:]).tolist() == ids
    assert group.attrs["identity"] == make_identity()
    metadata = json.loads((path / "features" / "zarr.json").read_text())
    assert metadata["zarr_format"] == 3
    assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [8192, 3]


def test_shard_bytes_follow_the_zarr_specification(path: Path, features: np.ndarray) -> None:
    data = (path / "features" / "c" / "1" / "0").read_bytes()
    index = np.frombuffer(data[-16 * 16 - 4 : -4], "<u8").reshape(16, 2)  # (offset, bytes) of 16 chunks, then its crc32c
    for chunk, (offset, num_bytes) in enumerate(index.tolist()):
        assert num_bytes == 512 * 3 * 2 + 4  # rows, then their crc32c
        rows = np.frombuffer(data[offset : offset + num_bytes - 4], "<f2").reshape(512, 3)
        np.testing.assert_array_equal(rows, features[8192 + chunk * 512 :][:512].astype(np.float16))


def test_ragged_rows_are_aggregated(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(0, 5, 6_000)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    features = rng.normal(size=(offsets[-1], 2)).astype(np.float16).astype(np.float32)
    ids = [str(row) for row in range(len(counts))]
    cache = open_cache(write(tmp_path, features, ids, offsets))
    assert cache.kind == "ragged"
    picked = rng.permutation(len(ids))[:2_000]
    for aggregate in ("mean", "first"):
        found = cache.read([ids[row] for row in picked], aggregate)
        for row, vector in zip(picked, found, strict=True):
            sample_rows = features[offsets[row] : offsets[row + 1]]
            if not len(sample_rows):
                assert np.isnan(vector).all()
            else:
                expected = sample_rows.mean(axis=0) if aggregate == "mean" else sample_rows[0]
                np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", layout.STORE_DTYPES)
def test_store_dtypes_round_as_torch_does(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(3).normal(size=(700, 2, 5)).astype(np.float32) * np.float32(100)
    values[0, 0, 0] = 1.0 + 2**-8  # half way between two numbers of bfloat16
    path = write(tmp_path, values, [str(row) for row in range(len(values))], store_dtype=dtype)
    cache = open_cache(path)
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    np.testing.assert_array_equal(cache.read(cache.ids), expected)
    assert cache.feature_shape == (2, 5)
    assert verify(path) == []


@pytest.mark.parametrize("dtype", layout.STORE_DTYPES)
def test_failed_rows_are_nan_and_listed(tmp_path: Path, features: np.ndarray, ids: list[str], dtype: str) -> None:
    failed = [3, *range(8192, 16384)]  # one item, and a whole shard
    features[failed] = np.nan
    failures = [Failure(row, ids[row], "prepare", f"{row}.png: broken") for row in failed]
    path = write(tmp_path, features, ids, failures=failures, store_dtype=dtype)
    cache = open_cache(path)
    assert cache.failed_ids == {ids[row] for row in failed}
    assert np.flatnonzero(np.isnan(cache.read(ids)).any(axis=1)).tolist() == failed
    table = pd.read_parquet(path / "failures.parquet")
    assert list(table.itertuples(index=False, name=None)) == [(f.id, f.stage, f.error) for f in failures]
    assert verify(path) == []
    assert info(path)["failed"] == len(failed)


def test_another_identity_is_refused_by_field(path: Path) -> None:
    identity = make_identity()
    assert open_cache(path, identity).identity == identity
    assert open_cache(path, {"encoder": {"name": "toy"}}).path == path
    for expected, field in (
        ({"encoder": {"compute_dtype": "bfloat16"}}, "encoder.compute_dtype = 'float32', but 'bfloat16'"),
        ({"manifest": "abc"}, "manifest = 'nothing', but 'abc'"),
    ):
        with pytest.raises(ValueError, match=field):
            open_cache(path, expected)


def test_incomplete_cache_names_the_command(tmp_path: Path, features: np.ndarray, ids: list[str]) -> None:
    path = write(tmp_path, features, ids, shards=[0, 2])
    with pytest.raises(ValueError, match=r"incomplete: 2 of 3 shards .*00001.json is missing.* run: " + COMMAND):
        open_cache(path)
    assert info(path)["shards"] == {"committed": 2, "total": 3}
    assert verify(path)[0] == "commits/00001.json is missing"
    assert find_caches(tmp_path, "toy") == [path]


def test_missing_cut_and_damaged_shards_are_named(path: Path) -> None:
    file = path / "features" / "c" / "1" / "0"
    whole = file.read_bytes()
    cache = open_cache(path)
    flip(file, 1000)
    with pytest.raises(ValueError, match=r"features/c/1/0 is damaged or missing \(.*checksum.*; to redo it, run: " + COMMAND):
        cache.read(cache.ids)
    cache.read(cache.ids[:8192])  # other shards can still be read
    for change in (file.unlink, lambda: file.write_bytes(whole[:-1])):
        change()
        with pytest.raises(ValueError, match=r"features/c/1/0 (is missing|has \d+ bytes)"):
            open_cache(path)
        with pytest.raises(ValueError, match="features/c/1/0 is damaged or missing"):
            cache.read(cache.ids)


def test_wrong_folders_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a feature cache"):
        open_cache(tmp_path / "toy-0123456789ab")
    renamed = path.rename(path.with_name("toy-0123456789ab"))
    with pytest.raises(ValueError, match="does not fit its identity"):
        open_cache(renamed)


def test_verify_finds_every_flipped_bit(path: Path) -> None:
    assert verify(path) == []
    rng = np.random.default_rng(4)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    assert len(files) == 13
    for file in files:
        size = file.stat().st_size
        for position in {0, size - 1, *rng.integers(0, size, 6).tolist()}:
            bit = int(rng.integers(0, 8))
            flip(file, position, bit)
            assert verify(path), f"bit {bit} of byte {position} of {file}"
            flip(file, position, bit)
    assert verify(path) == []


def test_damage_is_repaired_by_writing_again(path: Path, tmp_path: Path, features: np.ndarray, ids: list[str]) -> None:
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    (path / "ids" / "c" / "0").unlink()
    flip(path / "features" / "c" / "2" / "0", 7)
    flip(path / "commits" / "00000.json", 40)
    (path / "features" / "c" / "1" / ".0.77.tmp").write_bytes(b"half")
    with lock(path):
        writer = Writer.open(path, ids, np.zeros(0, np.int64), (3,), make_identity(), {"command": COMMAND})
        assert sorted(writer.verified_commits()) == [1]
    write(tmp_path, features, ids)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from pipeline.runtime.files import lock
with lock(Path({str(tmp_path)!r})):
    print(1, flush=True)
    input()
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(ValueError, match="another process is writing"), lock(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with lock(tmp_path):
        pass
