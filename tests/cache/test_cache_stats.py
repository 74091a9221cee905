"""Statistics and drift agree with brute force on the whole array, and need the same memory for any number of rows."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask.callbacks import Callback
from helpers.feature_caches import make_cache, make_manifest
from sklearn.metrics.pairwise import cosine_similarity

from pipeline.cache import layout
from pipeline.cache.drift import drift
from pipeline.cache.stats import stats
from pipeline.data.manifest import Manifest

NUM = 3000
DTYPE = "float16"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the blocks so small that every cache has several."""
    monkeypatch.setattr("pipeline.cache.stats.STATS_BLOCK_BYTES", 2**14)
    monkeypatch.setattr("pipeline.cache.neighbours.PAIR_BLOCK_ROWS", 300)


def as_stored(features: np.ndarray, dtype: str = DTYPE) -> np.ndarray:
    return layout.from_stored(layout.to_stored(features, dtype), dtype)


def clustered(manifest: Manifest, shape: tuple[int, ...], spread: float) -> np.ndarray:
    """Return features [N, *shape] around the centre of the first label of each sample."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(len(manifest.class_names), *shape)) + 0.5
    first_labels = [sample.labels[0] if sample.labels else 0 for sample in manifest.samples]
    return (centres[first_labels] + spread * rng.normal(size=(len(first_labels), *shape))).astype(np.float32)


def brute_force_classes(rows: np.ndarray, labels: Sequence[Sequence[int]]) -> tuple[float, float, set[int]]:
    """Return (within ÷ between, cosine of the nearest centres, their classes). A row counts once for each of its labels."""
    pairs = [(row, label) for row, row_labels in enumerate(labels) for label in row_labels]
    x, y = rows[[row for row, _ in pairs]].astype(np.float64), np.array([label for _, label in pairs], dtype=int)
    present = np.unique(y)
    centres = np.stack([x[y == label].mean(axis=0) for label in present])
    own_centres = centres[np.searchsorted(present, y)]
    within = np.square(x - own_centres).sum(axis=1).mean()
    between = np.square(own_centres - own_centres.mean(axis=0)).sum(axis=1).mean()
    cosines = cosine_similarity(centres)
    np.fill_diagonal(cosines, -2)
    nearest = divmod(int(cosines.argmax()), len(present))
    return within / between, float(cosines.max()), {int(present[index]) for index in nearest}


@pytest.mark.parametrize(("shape", "dtype"), [((8,), "float16"), ((2, 4), "float32"), ((8,), "bfloat16")])
def test_moments_classes_and_norms_are_those_of_the_whole_array(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    manifest = make_manifest(tmp_path, NUM)
    features = clustered(manifest, shape, 0.3)
    features[:, ..., -1] = 0.25
    features[[5, 700, 701]] = np.nan
    features[9].flat[0] = np.inf
    path = make_cache(tmp_path, manifest, features, store_dtype=dtype, shard_rows=1024)
    found = json.loads(json.dumps(stats(path)))
    stored = as_stored(features, dtype).reshape(NUM, -1)
    good: np.ndarray = np.all(np.isfinite(stored), axis=1)
    rows = stored[good].astype(np.float64)
    assert (found["rows"], found["failed_rows"]) == (NUM, 4)
    for name, values in (("mean", rows.mean(axis=0)), ("std", rows.std(axis=0)), ("norms", np.linalg.norm(rows, axis=1))):
        expected = [values.min(), values.mean(), values.max()]
        np.testing.assert_allclose([found[name][key] for key in ("min", "mean", "max")], expected, rtol=1e-6, atol=1e-9)
    assert found["std"]["constant_dimensions"] == (1 if len(shape) == 1 else 2)
    counts, edges = np.histogram(np.linalg.norm(rows, axis=1), 10)
    assert found["norms"]["histogram"]["counts"] == counts.tolist()
    np.testing.assert_allclose(found["norms"]["histogram"]["edges"], edges, rtol=1e-6)
    train = [row for row, sample in enumerate(manifest.samples) if sample.split == "train" and good[row]]
    ratio, cosine, nearest = brute_force_classes(stored[train], [manifest.samples[row].labels for row in train])
    assert found["classes"]["present"] == 5
    assert found["classes"]["within_between"] == pytest.approx(ratio, rel=1e-6)
    assert found["classes"]["nearest_cosine"] == pytest.approx(cosine, rel=1e-6)
    assert set(found["classes"]["nearest"]) == {manifest.class_names[label] for label in nearest}


def test_rows_of_several_labels_and_of_none_count_for_each_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = [tuple(sorted(rng.choice(4, rng.integers(0, 4), replace=False).tolist())) for _ in range(NUM)]
    manifest = make_manifest(tmp_path, NUM, labels)  # no sample has the fifth class
    features = clustered(manifest, (6,), 0.5)
    found = stats(make_cache(tmp_path, manifest, features))["classes"]
    train = [row for row, sample in enumerate(manifest.samples) if sample.split == "train"]
    ratio, cosine, nearest = brute_force_classes(as_stored(features)[train], [labels[row] for row in train])
    assert found["present"] == 4
    assert found["within_between"] == pytest.approx(ratio, rel=1e-6)
    assert found["nearest_cosine"] == pytest.approx(cosine, rel=1e-6)
    assert set(found["nearest"]) == {manifest.class_names[label] for label in nearest}


@pytest.mark.parametrize("ragged", [False, True])
def test_near_duplicates_are_those_of_the_whole_matrix(tmp_path: Path, ragged: bool) -> None:
    manifest, rng = make_manifest(tmp_path, NUM), np.random.default_rng(2)
    counts = rng.integers(0, 3, NUM) if ragged else np.ones(NUM, int)
    sample_of = np.repeat(np.arange(NUM), counts)
    features = rng.normal(size=(len(sample_of), 6)).astype(np.float32)
    features[rng.choice(len(features), 40)] = features[3] * 2  # the same direction, in all splits
    features[[17, 1900]] = np.nan
    features[2000:2010] = 0.0
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    path = make_cache(tmp_path, manifest, features, offsets=offsets if ragged else None, shard_rows=512)
    stored = as_stored(features)
    splits = np.array([manifest.samples[sample].split for sample in sample_of])
    good = np.isfinite(stored).all(axis=1)
    train, others = np.flatnonzero(good & (splits == "train")), np.flatnonzero(good & (splits != "train"))
    cosines = cosine_similarity(stored[train].astype(np.float64), stored[others].astype(np.float64))
    for threshold, top in ((0.95, 10), (0.999, 5000), (-1.0, 3)):
        found = stats(path, threshold, top)["near_duplicates"]
        assert abs(found["pairs"] - (cosines >= threshold).sum()) <= ((cosines - threshold) ** 2 < 4e-12).sum()
        expected = np.sort(cosines[cosines >= threshold])[::-1][:top]
        np.testing.assert_allclose([pair["cosine"] for pair in found["closest"]], expected, atol=1e-6)
    ids = [manifest.samples[sample].id for sample in sample_of]
    exact = {(ids[train[i]], ids[others[j]]) for i, j in zip(*np.nonzero(cosines > 1 - 1e-9), strict=True)}
    closest = stats(path, 1.0, 5000)["near_duplicates"]["closest"]
    assert exact
    assert {(pair["train"], pair["other"]) for pair in closest} == exact
    assert {pair["split"] for pair in closest} == {"val", "test"}


def test_neither_blocks_nor_peak_memory_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cache.neighbours.PAIR_BLOCK_ROWS", 512)
    monkeypatch.setattr(
        "pipeline.cache.stats.STATS_THREADS", 1
    )  # with more threads, the peak depends on which blocks are in memory together
    manifest = make_manifest(tmp_path, 200)
    largest: list[int] = []
    peaks: list[int] = []

    def record_size(_key: object, result: object, *_rest: object) -> None:
        if isinstance(result, np.ndarray):
            largest[-1] = max(largest[-1], result.nbytes)

    for texts in (1, 10, 40):  # texts per sample: 4 and 16 MiB as float32, after a first pass that imports modules
        features = np.random.default_rng(0).normal(size=(200 * texts, 512)).astype(np.float32)
        offsets = np.arange(0, 200 * texts + 1, texts)
        path = make_cache(tmp_path, manifest, features, offsets=offsets, name=f"toy{texts}")
        del features
        largest.append(0)
        tracemalloc.start()
        with Callback(posttask=record_size):
            stats(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert largest[1] == largest[2] == 512 * 512 * 4  # a chunk of rows as float32
    assert peaks[2] < 1.25 * peaks[1]


@pytest.mark.parametrize(("threshold", "top"), [(1.5, 10), (float("nan"), 10), (0.9, 0)])
def test_wrong_settings_are_refused(tmp_path: Path, threshold: float, top: int) -> None:
    path = make_cache(tmp_path, make_manifest(tmp_path, 50), np.ones((50, 2), np.float32))
    with pytest.raises(ValueError, match="the threshold is a cosine"):
        stats(path, threshold, top)


def test_a_cache_with_a_single_finite_row_has_statistics(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, 20, [(0,)] * 20)
    one = np.full((20, 2), np.nan, np.float32)
    one[[sample.split for sample in manifest.samples].index("train")] = 0.0
    found = stats(make_cache(tmp_path, manifest, one))
    assert found["norms"]["max"] == 0.0
    assert found["classes"] == {"present": 1, "nearest": [], "nearest_cosine": None, "within_between": None}
    assert found["near_duplicates"]["pairs"] == 0
    nothing = make_cache(tmp_path, manifest, np.full((20, 2), np.nan, np.float32), name="nothing")
    with pytest.raises(ValueError, match="the cache has no row whose features are finite"):
        stats(nothing)


def test_drift_is_the_cosine_of_the_same_sample(tmp_path: Path) -> None:
    home, other = tmp_path / "a", tmp_path / "b"
    old, new = make_manifest(home, 2500), make_manifest(other, 2300, seed=1)  # other splits, fewer samples
    rng = np.random.default_rng(3)
    first = rng.normal(size=(2500, 2, 3)).astype(np.float32)
    second = first[:2300] + 0.1 * rng.normal(size=(2300, 2, 3)).astype(np.float32)
    second[40] = -first[40]
    first[41], second[42], second[43] = np.nan, np.nan, 0.0
    found = drift(make_cache(home, old, first), make_cache(other, new, second, store_dtype="float32"), top=3)
    keep = np.setdiff1d(np.arange(2300), [41, 42, 43])
    a, b = as_stored(first)[keep].reshape(len(keep), -1).astype(np.float64), second[keep].reshape(len(keep), -1)
    expected = (a * b).sum(axis=1) / np.sqrt(np.square(a).sum(axis=1) * np.square(b.astype(np.float64)).sum(axis=1))
    assert {key: found[key] for key in ("samples", "without_direction", "only_in_first", "only_in_second")} == {
        "samples": 2297,
        "without_direction": 3,
        "only_in_first": 200,
        "only_in_second": 0,
    }
    np.testing.assert_allclose([found["mean"], found["min"], found["max"]], [expected.mean(), expected.min(), expected.max()])
    percentiles = {percent: np.percentile(expected, int(percent)) for percent in found["percentiles"]}
    assert found["percentiles"] == pytest.approx(percentiles)
    order = np.argsort(expected)[:3]
    assert [moved["id"] for moved in found["moved"]] == [old.samples[keep[row]].id for row in order]
    assert found["moved"][0]["id"] == old.samples[40].id
    assert found["moved"][0]["cosine"] == pytest.approx(-1.0, abs=1e-3)


def test_drift_refuses_caches_that_cannot_be_compared(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, 30)
    one: Any = np.ones((30, 2), np.float32)
    path = make_cache(tmp_path, manifest, one)
    with pytest.raises(ValueError, match=r"differ in feature shape: \[2\] and \[3\]"):
        drift(path, make_cache(tmp_path, manifest, np.ones((30, 3), np.float32), name="wide"))
    with pytest.raises(ValueError, match="no sample in common that has features in both"):
        drift(path, make_cache(tmp_path, manifest, one * np.nan, name="empty"))
    same = drift(path, path)
    assert (same["min"], same["mean"]) == pytest.approx((1.0, 1.0), abs=1e-12)
