"""Finished runs: their files, damage to them, and evaluation, which text can never influence."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings, train_tiny

from pipeline.cache import open_cache
from pipeline.cache.reader import find_cache
from pipeline.cache.table import load_split
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.evaluation.evaluate import apply_overrides, evaluate, load_method, predict, read_metrics
from pipeline.runtime import files, plugins
from pipeline.runtime.errors import UserError
from pipeline.training import features
from pipeline.training.config import TrainConfig
from pipeline.training.heads import plan_head, resolve_head_settings, train_heads


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_a_run_leaves_everything_and_is_not_repeated(method: str, home: Path) -> None:
    run = train_tiny(home, method)
    names = {path.name for path in run.path.iterdir()}
    assert {"config.json", "history.csv", "checkpoint.safetensors", "done"} <= names
    assert "state.pt" not in names
    history = pd.read_csv(run.path / "history.csv")
    is_trained = history["candidate"].isna() if "candidate" in history else np.full(len(history), True)
    assert np.isfinite(history["loss"][is_trained]).all()
    assert np.isfinite(history[["val_metric", "val_loss"]][~is_trained]).all(axis=None)
    written = {path: path.stat().st_mtime_ns for path in run.path.iterdir()}
    assert train_tiny(home, method).path == run.path
    assert {path: path.stat().st_mtime_ns for path in run.path.iterdir()} == written


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", '{"dataset": "tiny"}', "config.json is damaged"),
        ("config.json", None, "does not hash to the name of its folder"),
        ("checkpoint.safetensors", "", "checkpoint.safetensors is damaged"),
        ("done", "", "done is damaged"),
        ("metrics.json", "[1]", "metrics.json is damaged"),
    ],
)
def test_damaged_runs_are_named_with_the_remedy(name: str, damage: str | None, message: str, home: Path) -> None:
    run = train_tiny(home, "ema")
    evaluate(home, run, "val", {})
    path = run.path / name
    path.write_text(path.read_text().replace("per_dim", "l2sqrtd") if damage is None else damage)
    with pytest.raises(ValueError, match=message):
        evaluate(home, run, "test", {})


@pytest.mark.parametrize(
    "state", [b"nonsense", {}, [], {"state": {"colour": 1}}, {"state": {}, "method": {}}, {"state": {"phase": 9}}]
)
def test_a_damaged_state_is_named_with_the_remedy(state: Any, home: Path) -> None:
    run = train_tiny(home, "ema")
    (run.path / "done").unlink()
    if isinstance(state, bytes):
        (run.path / "state.pt").write_bytes(state)
    else:
        torch.save(state, run.path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt is damaged; delete "):
        train_tiny(home, "ema")


def test_one_run_has_one_writer(home: Path) -> None:
    run = train_tiny(home, "ema")
    with files.lock(run.path):
        other = Thread(target=evaluate, args=(home, run, "val", {}))
        other.start()
        time.sleep(0.3)
        assert other.is_alive()
        assert not read_metrics(run)
    other.join(60)
    assert list(read_metrics(run)) == ["val"]


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_text_cannot_reach_a_prediction(method: str, home: Path) -> None:
    run = train_tiny(home, method)
    before = evaluate(home, run, "test", {})
    logits = np.load(run.path / "predictions-test.npz")["logits"]
    text_cache = home / "caches" / "tiny" / caches_by_key(home)["text"]
    for shard in (text_cache / "features").rglob("*"):
        if shard.is_file() and shard.name != "zarr.json":
            shard.write_bytes(np.full(shard.stat().st_size // 2, np.nan, dtype=np.float16).tobytes())
    (run.path / "metrics.json").unlink()
    assert evaluate(home, run, "test", {})["metrics"] == before["metrics"]
    assert np.array_equal(np.load(run.path / "predictions-test.npz")["logits"], logits)


def test_predictions_do_not_depend_on_batches(home: Path) -> None:
    run = train_tiny(home, "seda")
    image = open_cache(home / "caches" / "tiny" / caches_by_key(home)["image"])
    table = load_split(read_manifest(home, "tiny"), {"image": image}, "test", torch.device("cpu"), "mean")
    settings, changes = apply_overrides(run.config(), {"draws": "2"})
    assert changes == {"draws": 2}
    method = load_method(run, run.config(), settings)
    one, seven, all_rows = (predict(method, table, 0, batch_size=size) for size in (1, 7, 64))
    assert torch.allclose(one, all_rows, atol=1e-5)
    assert torch.allclose(seven, all_rows, atol=1e-5)


def test_every_read_of_the_test_split_is_logged(home: Path) -> None:
    run = train_tiny(home, "cdr")
    evaluate(home, run, "val", {})
    assert not (run.path / "test_reads.jsonl").exists()
    evaluate(home, run, "test", {})
    evaluate(home, run, "test", {})
    evaluate(home, run, "test", {"draws": "2"})
    lines = [json.loads(line) for line in (run.path / "test_reads.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in lines] == ["test", "test@draws=2"]


def test_a_run_on_samples_that_were_prepared_anew_is_to_be_trained_again(home: Path) -> None:
    run, manifest = train_tiny(home, "baseline"), read_manifest(home, "tiny")
    caches = caches_by_key(home)
    write_manifest(replace(manifest, samples=manifest.samples[:-1]), home)
    with pytest.raises(UserError, match=r"seed0 was trained on other samples of tiny .* --dataset tiny --method baseline"):
        evaluate(home, run, "test", {})
    with pytest.raises(UserError, match=rf"{caches['image']} has features of other samples .*: diffalign extract tiny"):
        find_cache(home, read_manifest(home, "tiny"), caches["image"])


def test_only_settings_of_prediction_can_be_overridden(home: Path) -> None:
    run = train_tiny(home, "cdr")
    for key in ("hidden", "scale", "dropout", "T", "w_ce"):
        with pytest.raises(ValueError, match="is a setting of training"):
            evaluate(home, run, "val", {key: "global" if key == "scale" else "8"})
    with pytest.raises(ValueError, match="prediction can change nothing of ema"):
        evaluate(home, train_tiny(home, "ema"), "val", {"width": "8"})
    with pytest.raises(ValueError, match="'draws' is a setting of methods that sample: prediction can change nothing of ema"):
        evaluate(home, train_tiny(home, "ema"), "val", {"draws": "8"})
    evaluate(
        home, run, "val", {"draws": "1", "sample_steps": "5"}
    )  # equal to the settings of the run, so this is the same evaluation
    evaluate(home, run, "val", {"draws": "2", "eta": "0.0"})
    assert list(read_metrics(run)) == ["val", "val@draws=2"]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="'lr' must be positive"):
        TrainConfig(lr=0.0)
    with pytest.raises(ValueError, match="unknown preset 'fast'; choose one of: paper, head, tuned"):
        resolve_head_settings("tiny", "ema", "fast", {}, {})
    with pytest.raises(ValueError, match=r"unknown setting 'depth'; choose one of: num_steps, .*T \(= num_steps\)"):
        resolve_head_settings("tiny", "cdr", "head", {"depth": 3}, {})


def test_plans_of_one_run_are_trained_once(home: Path) -> None:
    """Where all steps are trained, `chain_steps` changes nothing: both plans have one folder."""
    heads = []
    for steps in ("trained", "all"):
        settings, config = resolve_head_settings(
            "tiny", "cdr", "head", {**small_settings("cdr"), "chain_steps": steps}, FAST_TRAINING
        )
        heads.append(plan_head(home, "tiny", "cdr", settings, config, 0, caches_by_key(home)))
    assert heads[0].run == heads[1].run
    assert train_heads(heads, progress=False) == {}
    assert heads[0].run.is_done


def test_texts_that_a_dataset_joins_are_read_like_one_text(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a grid names the aggregate of the features, which then is that of the dataset."""
    manifest = read_manifest(home, "tiny")
    joined = replace(manifest, meta={**manifest.meta, "text": {**manifest.meta["text"], "aggregate": "join"}})
    monkeypatch.setattr(features, "read_manifest", lambda *_: joined)
    opened = features.open_features(home, "tiny", "ema", caches_by_key(home), "join")
    expected = load_split(manifest, opened.caches, "train", torch.device("cpu"), "mean").columns["text"]
    assert torch.equal(opened.train.columns["text"].cpu(), expected)
