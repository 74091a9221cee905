"""Export and import need the same memory for any number of rows, and survive a full disk."""

from __future__ import annotations

import gc
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.feature_caches import assert_same_cache, make_cache, make_manifest

from pipeline.cache import info
from pipeline.cache.reader import find_cache
from pipeline.cache.transfer import export_cache, import_features

SUFFIXES = (".h5", ".npy", ".parquet", ".safetensors")


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the largest number of bytes that Python, NumPy and Arrow hold while a function runs.

    Garbage that other tests have left is not counted.
    """
    gc.collect()
    gc.freeze()
    pool, default_pool = pa.proxy_memory_pool(pa.system_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    function()
    traced_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pa.set_memory_pool(default_pool)
    gc.unfreeze()
    return traced_peak + (pool.max_memory() or 0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cache.exchange.EXCHANGE_BLOCK_BYTES", 2**19)
    manifest = make_manifest(tmp_path, 200)
    peaks = []
    for texts in (10, 40):  # texts per sample: 2 and 8 MiB of features
        features = np.random.default_rng(0).normal(size=(200 * texts, 512)).astype(np.float32)
        offsets = np.arange(0, 200 * texts + 1, texts)
        path = make_cache(tmp_path, manifest, features, offsets=offsets, name=f"toy{texts}", shard_rows=512)
        file = tmp_path / f"{texts}{suffix}"
        peaks.append(
            (peak_bytes(partial(export_cache, path, file)), peak_bytes(partial(import_features, file, tmp_path / "other")))
        )
    for few, many in zip(*peaks, strict=True):
        assert many < few + 2**20


def test_joining_by_id_needs_no_memory_for_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cache.exchange.EXCHANGE_BLOCK_BYTES", 2**20)
    monkeypatch.setattr("pipeline.cache.layout.SHARD_ROWS", 512)
    peaks = []
    for num in (1_000, 4_000):
        home = tmp_path / f"{num}"
        manifest = make_manifest(home, num)
        order = np.random.default_rng(1).permutation(num)
        features = np.random.default_rng(0).normal(size=(num, 1024)).astype(np.float32)
        np.save(tmp_path / "theirs.npy", features[order])
        (tmp_path / "theirs.txt").write_text("\n".join(manifest.samples[row].id for row in order))
        peaks.append(peak_bytes(partial(import_features, tmp_path / "theirs.npy", home, dataset="toy", name="x")))
        cache = find_cache(home, manifest, "x")
        np.testing.assert_array_equal(cache.read([sample.id for sample in manifest.samples]), features)
    assert peaks[1] - peaks[0] < 3_000 * 1024  # a quarter of the additional features; ids and the manifest need it


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond this size."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, suffix: str) -> None:
    manifest = make_manifest(tmp_path / "home", 1300)
    features = np.random.default_rng(7).normal(size=(1300, 128)).astype(np.float32)
    path = make_cache(tmp_path / "home", manifest, features, shard_rows=1024)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match=r"File too large|Input/output") as error, full_disk(200_000):
        export_cache(path, tmp_path / "out" / f"out{suffix}")
    assert "\n" not in str(error.value.strerror)
    assert not list((tmp_path / "out").iterdir())
    file = export_cache(path, tmp_path / "out" / f"out{suffix}")
    with pytest.raises(OSError, match="File too large"), full_disk(200_000):
        import_features(file, tmp_path / "other")
    begun = next((tmp_path / "other" / "caches" / "toy").iterdir())
    assert info(begun)["shards"]["committed"] == 0
    import_features(file, tmp_path / "other")
    assert_same_cache(path, begun)
