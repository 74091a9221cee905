"""Splits larger than memory: read in windows, with the samples and columns of a table, and the same bits each time."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_heads import caches_by_key, small_settings

from pipeline.cache import Cache, streaming
from pipeline.cache.reader import find_cache
from pipeline.cache.streaming import StreamedFeatures, bytes_per_sample, open_split
from pipeline.cache.table import FeatureTable, load_split, ordered_batches, shuffled_batches
from pipeline.data.manifest import Manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime.executor import num_processes
from pipeline.runtime.runs import RunFolder
from pipeline.training.features import open_features
from pipeline.training.heads import plan_head, plan_head_on, resolve_head_settings, train_head
from pipeline.training.joint.finetune import resolve_joint_settings as resolve_joint
from pipeline.training.state import TrainState

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_caches(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, dict[str, Cache]]:
    """Return `tiny` and its caches: two texts per sample, one sample without text, and one image that cannot be decoded."""
    home, media = tmp_path_factory.mktemp("windows"), tmp_path_factory.mktemp("windows_media")
    for file in tiny_manifest.media_root.iterdir():
        (media / file.name).write_bytes(b"" if file.stem == "blue-2" else file.read_bytes())
    samples = tuple(
        replace(sample, texts=() if sample.id == "red-0" else (*sample.texts, f"another text of {sample.id}"))
        for sample in tiny_manifest.samples
    )
    manifest = replace(tiny_manifest, media_root=media, samples=samples)
    caches = {}
    for key, width in (("image", "16"), ("text", "12")):
        settings = {"modality": key, "width": width}
        path = extract(manifest, "random_projection", settings, home, options=ExtractOptions(progress=False, max_failures=0.5))
        caches[key] = find_cache(home, manifest, path.name)
    return manifest, caches


def windows_of(tiny_caches: tuple[Manifest, dict[str, Cache]], aggregate: str, window: int) -> StreamedFeatures:
    manifest, caches = tiny_caches
    source = open_split(manifest, caches, "train", CPU, aggregate, window)
    assert isinstance(source, StreamedFeatures)
    return source


def by_id(ids: dict[int, str], batches: list[dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for batch in batches:
        for row, key in enumerate(batch["key"].tolist()):
            assert ids[key] not in found
            found[ids[key]] = {name: column[row] for name, column in batch.items()}
    return found


@pytest.mark.parametrize("aggregate", ["mean", "first", "random"])
def test_a_window_of_the_whole_split_has_the_batches_of_a_table(tiny_caches: Any, aggregate: str) -> None:
    manifest, caches = tiny_caches
    table = load_split(manifest, caches, "train", CPU, aggregate)
    small = windows_of(tiny_caches, aggregate, 8)
    whole = replace(small, window=len(table))
    assert (whole.ids, whole.excluded) == (table.ids, table.excluded)
    assert torch.equal(whole.label, table.label)
    for epoch in range(3):
        expected = list(shuffled_batches(table, 5, seed=1)(epoch))
        found = list(shuffled_batches(whole, 5, seed=1)(epoch))
        assert len(found) == len(expected) == 4
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                torch.testing.assert_close(one[name], other[name], rtol=0, atol=0 if name != "text" else 1e-6)


@pytest.mark.parametrize("aggregate", ["mean", "random"])
@pytest.mark.parametrize("window", [4, 9, 16])
def test_an_epoch_has_every_sample_once_with_the_columns_of_a_table(tiny_caches: Any, aggregate: str, window: int) -> None:
    manifest, caches = tiny_caches
    table = load_split(manifest, caches, "train", CPU, aggregate)
    ids = dict(zip(table.columns["key"].tolist(), table.ids, strict=True))
    source = windows_of(tiny_caches, aggregate, window)
    orders = []
    for epoch in (0, 1, 0):
        batches = list(shuffled_batches(source, 4, seed=3)(epoch))
        assert [len(batch["key"]) for batch in batches] == [4] * (len(table) // 4)  # 23: the last three are left out
        expected = by_id(ids, list(shuffled_batches(table, 1, seed=3)(epoch)))
        for sample_id, columns in by_id(ids, batches).items():
            for name, value in columns.items():
                torch.testing.assert_close(value, expected[sample_id][name], rtol=0, atol=1e-6)
        orders.append([batch["key"].tolist() for batch in batches])
    assert orders[0] == orders[2] != orders[1]
    passes = [
        torch.cat([batch["key"] for batch in ordered_batches(features, seed=3, batch_size=3)()]) for features in (source, table)
    ]
    assert torch.equal(*passes)


def test_batches_mix_the_samples_of_a_window_and_no_others(tiny_caches: Any) -> None:
    manifest, caches = tiny_caches
    source = windows_of(tiny_caches, "mean", 8)
    tables = [table.ids for table in source.windows(2, seed=0, epoch=0)]
    assert sorted(sum(tables, ())) == sorted(source.ids)
    assert max(len(ids) for ids in tables) == 8
    position = {sample_id: number for number, sample_id in enumerate(source.ids)}
    positions_of_tables = [[position[sample_id] for sample_id in ids] for ids in tables]
    assert any(max(positions) - min(positions) > 8 for positions in positions_of_tables)
    table = load_split(manifest, caches, "train", CPU, "mean")
    ids = dict(zip(table.columns["key"].tolist(), table.ids, strict=True))
    batches = shuffled_batches(source, 2, seed=0)(0)
    for window in tables:
        seen = [ids[key] for _ in range(len(window) // 2) for key in next(batches)["key"].tolist()]
        assert set(seen) <= set(window)
        assert len(set(window) - set(seen)) == len(window) % 2
    assert next(batches, None) is None


def test_two_windows_are_in_memory_and_no_more(tiny_caches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    read_table = streaming.read_table

    def read_and_count(*arguments: Any) -> FeatureTable:
        table = read_table(*arguments)
        assert len(table) <= 4
        alive.add(table.columns["image"])
        return table

    source = windows_of(tiny_caches, "mean", 4)
    monkeypatch.setattr(streaming, "read_table", read_and_count)
    for batches in (shuffled_batches(source, 2, seed=0)(0), ordered_batches(source, seed=0)()):
        assert max(len(alive) for _ in batches) <= 2


def test_a_reader_that_fails_or_is_abandoned_ends(tiny_caches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = windows_of(tiny_caches, "mean", 4)
    next(shuffled_batches(source, 2, seed=0)(0))  # the rest is not read
    monkeypatch.setattr(streaming, "read_table", lambda *_: (_ for _ in ()).throw(ValueError("features is damaged")))
    with pytest.raises(ValueError, match="features is damaged"):
        list(shuffled_batches(source, 2, seed=0)(0))


def train(home: Path, method: str, **training: Any) -> RunFolder:
    settings, config = resolve_head_settings(
        "tiny", method, "head", small_settings(method), {"epochs": 3, "batch_size": 8, **training}
    )
    return train_head(plan_head(home, "tiny", method, settings, config, 0, caches_by_key(home)), progress=False)


def interrupt_after(save: Callable[[TrainState], None]) -> Callable[[TrainState], None]:
    """Return a `save` that raises KeyboardInterrupt after saving."""

    def save_and_stop(state: TrainState) -> None:
        save(state)
        raise KeyboardInterrupt

    return save_and_stop


@pytest.mark.parametrize("method", ["baseline", "ema", "seda"])
def test_runs_over_windows_repeat_their_bits_and_predict_as_a_table_does(
    tiny_home: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "one"))
    uninterrupted = train(home, method, window=9)
    home = Path(shutil.copytree(tiny_home, tmp_path / "other"))
    monkeypatch.setattr("pipeline.training.loop.STATE_SECONDS", -math.inf)
    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "save", interrupt_after(TrainState.save))
        with pytest.raises(KeyboardInterrupt):
            train(home, method, window=9)
    run = train(home, method, window=9)
    assert run.config().training["window"] == 9
    assert (run.path / "checkpoint.safetensors").read_bytes() == (uninterrupted.path / "checkpoint.safetensors").read_bytes()
    record = evaluate(home, run, "test", {})
    with np.load(run.path / "predictions-test.npz") as arrays:
        windowed = dict(arrays)
    (run.path / "metrics.json").unlink()
    monkeypatch.setattr("pipeline.evaluation.evaluate.open_split", lambda *arguments: load_split(*arguments[:5]))
    assert evaluate(home, run, "test", {})["metrics"] == pytest.approx(record["metrics"], rel=1e-6)
    with np.load(run.path / "predictions-test.npz") as arrays:
        for key, value in arrays.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(value, windowed[key], atol=1e-3 if key == "feature" else 1e-6)  # float16, float32
            else:
                np.testing.assert_array_equal(value, windowed[key])


def test_features_that_do_not_fit_are_read_in_windows(tiny_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = open_features(tiny_home, "tiny", "ema", caches_by_key(tiny_home))
    settings, training = resolve_head_settings("tiny", "ema", "head", {}, {"batch_size": 4})
    assert bytes_per_sample(features.caches, "mean") == 4 * (32 + 24)
    assert features.num_bytes == 40 * 4 * (32 + 24)
    assert bytes_per_sample(features.caches, "random") == 4 * (32 + 2 * 24)  # the mean, and every text: here one per sample
    assert plan_head_on(features, "ema", settings, training, 0).training.window == 0
    monkeypatch.setattr(streaming, "total_bytes", lambda device: 2 * features.num_bytes)
    assert plan_head_on(features, "ema", settings, training, 0).training.window == 0
    monkeypatch.setattr(streaming, "total_bytes", lambda device: 2 * features.num_bytes - 2)
    head = plan_head_on(features, "ema", settings, training, 0)
    assert head.training.window == 16  # a power of two; two windows are in memory, of 40 samples
    assert head.config.training["window"] == 16
    with pytest.raises(ValueError, match="a window of 16 samples holds no batch of 64: raise window, or lower batch_size"):
        plan_head_on(features, "ema", settings, replace(training, batch_size=64), 0)


def test_processes_are_as_many_as_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.executor.CPU_COUNT", 8)
    monkeypatch.setattr("pipeline.runtime.executor.total_bytes", lambda device: 20 * 2**30)
    assert [num_processes(-1, 100, gigabytes * 2**30) for gigabytes in (0, 1, 3, 7, 30)] == [8, 8, 4, 2, 0]
    assert num_processes(3, 100, 30 * 2**30) == 3


def test_joint_training_has_no_windows(tiny_home: Path, tmp_path: Path) -> None:
    run = train(Path(shutil.copytree(tiny_home, tmp_path / "home")), "baseline")
    with pytest.raises(ValueError, match="joint training keeps the features in memory: it takes no window"):
        resolve_joint(run, {"window": 4096})
    with pytest.raises(ValueError, match="nor a head that was trained with one"):
        resolve_joint(train(tmp_path / "home", "baseline", window=9), {})
