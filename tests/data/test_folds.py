"""Tests of folds as datasets: they divide the training and validation samples, no group, and read the caches of the whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.feature_caches import make_cache, make_manifest

from pipeline.cache.reader import find_cache
from pipeline.cache.table import load_split
from pipeline.data.folds import fold_manifest, write_folds
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import load_dataset_spec, read_manifest, write_manifest
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.types import SPLITS


def grouped_manifest(home: Path) -> Manifest:
    """Return a manifest of 90 samples; in each split, three neighbours are one group."""
    manifest = make_manifest(home, 90)
    rank = {split: 0 for split in SPLITS}
    samples = []
    for sample in manifest.samples:
        samples.append(replace(sample, group=f"{sample.split}-{rank[sample.split] // 3}"))
        rank[sample.split] += 1
    grouped = replace(manifest, samples=tuple(samples), extra={samples[0].id: '{"a":1}'}, media_ok={samples[1].id: True})
    write_manifest(grouped, home)
    return grouped


def test_folds_divide_the_samples_that_are_not_test_and_no_group(tmp_path: Path) -> None:
    manifest = grouped_manifest(tmp_path)
    names = write_folds(tmp_path, "toy", 4)
    assert names == [f"toy.fold{fold}of4" for fold in range(4)]
    folds = [read_manifest(tmp_path, name) for name in names]
    held_out = [sample.id for fold in folds for sample in fold.split("val")]
    assert sorted(held_out) == sorted(sample.id for sample in manifest.samples if sample.split != "test")
    for fold in folds:
        assert not fold.split("test")
        assert {sample.id for sample in fold.samples} == set(held_out)
        train, val = ({sample.group for sample in fold.split(split)} for split in ("train", "val"))
        assert val
        assert not train & val
        assert (fold.class_names, fold.label_kind) == (manifest.class_names, manifest.label_kind)
    assert len({fold.fingerprint() for fold in [manifest, *folds]}) == 5


def test_a_fold_reads_the_features_of_the_whole(tmp_path: Path) -> None:
    manifest = grouped_manifest(tmp_path)
    features = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float16).astype(np.float32)
    path = make_cache(tmp_path, manifest, features)
    (name, _) = write_folds(tmp_path, "toy", 2)
    fold = read_manifest(tmp_path, name)
    cache = find_cache(tmp_path, fold, "toy")
    assert cache.path == path
    row = {sample.id: number for number, sample in enumerate(manifest.samples)}
    table = load_split(fold, {"image": cache}, "val", default_device(), "mean")
    np.testing.assert_array_equal(table.columns["image"].cpu(), features[[row[each] for each in table.ids]])
    assert table.label.tolist() == [manifest.samples[row[each]].labels[0] for each in table.ids]
    with pytest.raises(UserError, match=r"the test split of toy\.fold0of2 is empty"):
        load_split(fold, {"image": cache}, "test", default_device(), "mean")


def test_a_fold_has_the_encoders_of_its_plug_in(tmp_path: Path) -> None:
    manifest = replace(make_manifest(tmp_path, 40), dataset="openmoji")
    write_manifest(manifest, tmp_path)
    fold = fold_manifest(manifest, 1, 3)
    write_manifest(fold, tmp_path)
    assert load_dataset_spec(tmp_path, fold.dataset) == load_dataset_spec(tmp_path, "openmoji")


def test_another_manifest_of_the_dataset_is_another_one_for_its_folds(tmp_path: Path) -> None:
    """After `prepare` has changed the samples, the folds of the new manifest refuse the caches of the old one."""
    make_cache(tmp_path, make_manifest(tmp_path, 40), np.zeros((40, 3), np.float32))
    make_manifest(tmp_path, 50)
    (name, _) = write_folds(tmp_path, "toy", 2)
    with pytest.raises(UserError, match="manifest"):
        find_cache(tmp_path, read_manifest(tmp_path, name), "toy")
