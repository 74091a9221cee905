"""Near duplicates across splits are those of brute force; they are searched once per cache, and again when features change."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from helpers.feature_caches import make_cache, make_manifest
from sklearn.metrics.pairwise import cosine_similarity

from pipeline.cache import near_duplicates
from pipeline.cache.near_duplicates import RECORD_NAME, WARNING_COSINE, find_near_duplicates, near_duplicate_warning
from pipeline.cache.reader import open_cache
from pipeline.data.manifest import Manifest
from pipeline.training.features import FeatureSet

NUM = 900


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the blocks so small that every cache has several."""
    monkeypatch.setattr("pipeline.cache.neighbours.PAIR_BLOCK_ROWS", 100)


def planted(manifest: Manifest) -> np.ndarray:
    """Return random features with copies, almost copies, and rows without a direction or not finite."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(len(manifest.samples), 12)).astype(np.float32)
    for start in range(0, 60, 2):
        features[start] = features[start + 1] * 3 + 0.01 * rng.normal(size=12)
    features[100:104] = 0.0
    features[104] = np.nan
    return features


def brute_force(manifest: Manifest, features: np.ndarray) -> dict[str, int]:
    """Return the number of near duplicates of training rows, by split."""
    splits = np.array([sample.split for sample in manifest.samples])
    rows = np.nan_to_num(features.astype(np.float16).astype(np.float64))
    nearest = cosine_similarity(rows, rows[splits == "train"]).max(axis=1)
    return {split: int((nearest[splits == split] >= WARNING_COSINE).sum()) for split in ("val", "test")}


def test_samples_that_look_like_a_training_sample_are_counted_by_split(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path, NUM)
    features = planted(manifest)
    cache = open_cache(make_cache(tmp_path, manifest, features))
    found, expected = find_near_duplicates(cache), brute_force(manifest, features)
    assert min(expected.values()) > 0
    assert found["near"] == expected
    assert found["checked"] == {split: len(manifest.split(split)) for split in ("val", "test")}
    split_of = {sample.id: sample.split for sample in manifest.samples}
    assert split_of[found["closest"]["train"]] == "train" != split_of[found["closest"]["other"]]
    warning = near_duplicate_warning(cache)
    assert f"{expected['val']} of {len(manifest.split('val'))} val and {expected['test']} of " in warning
    assert f"diffalign cache stats {cache.path} --threshold {WARNING_COSINE}" in warning


def test_they_are_searched_once_and_again_when_the_record_is_not_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_manifest(tmp_path, NUM)
    cache = open_cache(make_cache(tmp_path, manifest, planted(manifest)))
    searches: list[Path] = []
    search = near_duplicates._search
    monkeypatch.setattr(near_duplicates, "_search", lambda cache: searches.append(cache.path) or search(cache))
    first = find_near_duplicates(cache)
    assert find_near_duplicates(cache) == first
    assert len(searches) == 1
    record = cache.path / RECORD_NAME
    assert json.loads(record.read_text()) == first
    for broken in ("{", "[]", json.dumps({**first, "features": "others"}), json.dumps({**first, "cosine": 0.5})):
        record.write_text(broken)
        assert find_near_duplicates(cache) == first
    assert len(searches) == 5


def test_of_large_splits_every_nth_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_manifest(tmp_path, NUM)
    cache = open_cache(make_cache(tmp_path, manifest, planted(manifest)))
    num_others = NUM - len(manifest.split("train"))
    monkeypatch.setattr(near_duplicates, "MAX_PRODUCTS", len(manifest.split("train")) * num_others * 12 // 3)
    assert sum(find_near_duplicates(cache)["checked"].values()) == -(-num_others // 3)


def test_nothing_is_said_when_nothing_is_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = make_manifest(tmp_path, NUM)
    plain = open_cache(make_cache(tmp_path, manifest, np.random.default_rng(1).normal(size=(NUM, 64)).astype(np.float32)))
    twins = open_cache(make_cache(tmp_path, manifest, planted(manifest), name="twins"))
    with caplog.at_level(logging.WARNING):
        FeatureSet(home=tmp_path, manifest=manifest, caches={"image": plain}, aggregate="mean").warn_about_images()
        assert caplog.messages == []
        FeatureSet(home=tmp_path, manifest=manifest, caches={"image": twins}, aggregate="mean").warn_about_images()
    assert caplog.messages == [near_duplicate_warning(twins)]
