"""Training: resume is bitwise, selection is on validation, phases train what they say, and text never reaches a prediction."""

from __future__ import annotations

import json
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pipeline import plugins, train
from pipeline.cache import find_caches, open_cache
from pipeline.evaluate import evaluate, predict
from pipeline.heads import resolve, train_head
from pipeline.runs import Run
from pipeline.sources import Captions, load, shuffled
from pipeline.train import TrainConfig

SMALL: dict[str, dict[str, object]] = {
    "baseline": {},
    "ema": {"width": 16},
    "cdr": {"hidden": 32, "num_steps": 20, "sample_steps": 5},
    "marnet": {"width": 16, "hidden": 32, "num_steps": 20, "sample_steps": 5},
    "seda": {
        "width": 16,
        "num_tokens": 4,
        "token_width": 8,
        "num_heads": 2,
        "num_steps": 20,
        "stage_step": 5,
        "sample_steps": 5,
    },
}
FAST: dict[str, object] = {"epochs": 4, "batch_size": 8}


def caches_by_key(home: Path) -> dict[str, str]:
    """Folder names of the tiny dataset's caches by batch key."""
    return {open_cache(path).identity["encoder"]["modality"]: path.name for path in find_caches(home, "tiny")}


def train_tiny(home: Path, method: str, seed: int = 0, training: dict[str, object] | None = None) -> Run:
    """A small run of a method on the tiny dataset."""
    settings, config = resolve("tiny", method, "head", SMALL.get(method, {}), {**FAST, **(training or {})})
    return train_head(home, "tiny", method, settings, config, seed, caches_by_key(home), progress=False)


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """A copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def state_times(home: Path) -> set[int]:
    """When the resumable state of the home's only run was written; empty before the first time."""
    return {path.stat().st_mtime_ns for path in home.glob("runs/tiny/*/seed0/state.pt")}


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_a_run_leaves_everything_and_is_not_repeated(method: str, home: Path) -> None:
    run = train_tiny(home, method)
    names = {path.name for path in run.path.iterdir()}
    assert {"config.json", "history.csv", "checkpoint.safetensors", "done"} <= names
    assert "state.pt" not in names
    history = pd.read_csv(run.path / "history.csv")
    assert np.isfinite(history["loss"]).all()
    written = {path: path.stat().st_mtime_ns for path in run.path.iterdir()}
    assert train_tiny(home, method).path == run.path
    assert {path: path.stat().st_mtime_ns for path in run.path.iterdir()} == written


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_resume_is_bitwise(method: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = train_tiny(Path(shutil.copytree(home, tmp_path / "undisturbed")), method)
    monkeypatch.setattr(train, "STATE_SECONDS", -1.0)
    saves = 0
    save = train._save

    def save_and_die(*args: Any) -> None:
        nonlocal saves
        save(*args)
        saves += 1
        if saves % 2 == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "_save", save_and_die)
    while True:
        try:
            run = train_tiny(home, method)
            break
        except KeyboardInterrupt:
            continue
    assert saves >= 4
    ours, theirs = load_file(run.path / "checkpoint.safetensors"), load_file(undisturbed.path / "checkpoint.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (run.path / "history.csv").read_bytes() == (undisturbed.path / "history.csv").read_bytes()


def test_sigkill_ends_in_the_same_metrics(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long: dict[str, object] = {"epochs": 60}
    undisturbed = Path(shutil.copytree(home, tmp_path / "undisturbed"))
    expected = evaluate(undisturbed, train_tiny(undisturbed, "seda", training=long), "test", {})
    monkeypatch.setattr(train, "STATE_SECONDS", 0.0)
    for _ in range(5):
        process = get_context("fork").Process(target=train_tiny, args=(home, "seda", 0, long))
        saved = state_times(home)
        process.start()
        while state_times(home) in (saved, set()):
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run = train_tiny(home, "seda", training=long)
    assert evaluate(home, run, "test", {})["metrics"] == expected["metrics"]


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


def test_the_epoch_is_chosen_on_validation(home: Path) -> None:
    for select, best in (("metric", "max"), ("loss", "min")):
        run = train_tiny(home, "baseline", training={"select": select, "epochs": 6, "lr": 0.05})
        history = pd.read_csv(run.path / "history.csv")
        record = evaluate(home, run, "val", {})
        if best == "max":
            assert record["metrics"]["acc1"] == pytest.approx(history["val_metric"].max())
        else:
            best_epoch = int(history["val_loss"].to_numpy().argmin())
            assert record["metrics"]["acc1"] == pytest.approx(history["val_metric"].to_numpy()[best_epoch])


def test_every_read_of_the_test_split_is_logged(home: Path) -> None:
    run = train_tiny(home, "cdr")
    evaluate(home, run, "val", {})
    assert not (run.path / "test_reads.jsonl").exists()
    evaluate(home, run, "test", {})
    evaluate(home, run, "test", {})
    evaluate(home, run, "test", {"draws": "2"})
    lines = [json.loads(line) for line in (run.path / "test_reads.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in lines] == ["test", "test@draws=2"]


def test_an_override_that_changes_weights_is_refused(home: Path) -> None:
    run = train_tiny(home, "ema")
    with pytest.raises(ValueError, match="changes the weights"):
        evaluate(home, run, "val", {"width": "8"})


def test_a_diverging_loss_stops_with_its_place(home: Path) -> None:
    with pytest.raises(ValueError, match="not finite in epoch 0 of phase 'head'"):
        train_tiny(home, "baseline", training={"lr": 1e38, "grad_clip": 1e38, "epochs": 2})


def test_shuffling_is_named_by_seed_epoch_and_sample(tiny_home: Path) -> None:
    from pipeline import manifest as manifests

    manifest = manifests.read(tiny_home, "tiny")
    image = open_cache(tiny_home / "caches" / "tiny" / caches_by_key(tiny_home)["image"])
    table = load(manifest, {"image": image}, "train", torch.device("cpu"), "mean")
    epochs = {
        (seed, epoch): torch.cat([batch["key"] for batch in shuffled(table, 5, seed)(epoch)])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(len(set(keys.tolist())) == 20 for keys in epochs.values())  # 24 samples, batches of 5, the rest dropped
    assert len({tuple(keys.tolist()) for keys in epochs.values()}) == 4
    again = torch.cat([batch["key"] for batch in shuffled(table, 5, 0)(1)])
    assert torch.equal(again, epochs[0, 1])


def test_predictions_do_not_depend_on_batches(home: Path) -> None:
    from pipeline import manifest as manifests
    from pipeline.evaluate import load_method

    run = train_tiny(home, "seda")
    image = open_cache(home / "caches" / "tiny" / caches_by_key(home)["image"])
    table = load(manifests.read(home, "tiny"), {"image": image}, "test", torch.device("cpu"), "mean")
    method, _ = load_method(run, run.config(), {"draws": "2"})
    one, seven, all_rows = (predict(method, table, 0, batch_size=size) for size in (1, 7, 64))
    assert torch.allclose(one, all_rows, atol=1e-5)
    assert torch.allclose(seven, all_rows, atol=1e-5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="'lr' must be positive"):
        TrainConfig(lr=0.0)
    with pytest.raises(ValueError, match="unknown preset 'fast'; choose one of: paper, head, tuned"):
        resolve("tiny", "ema", "fast", {}, {})
    with pytest.raises(ValueError, match=r"unknown setting 'depth'; choose one of: denoiser, .*T \(= num_steps\)"):
        resolve("tiny", "cdr", "head", {"depth": 3}, {})


def test_random_captions_are_drawn_by_epoch_and_sample() -> None:
    features = torch.arange(12.0).reshape(6, 2)
    captions = Captions(features, torch.tensor([0, 3, 3, 6]))  # three texts, none, three texts
    rows, keys, mean = torch.tensor([2, 1, 0]), torch.tensor([30, 20, 10]), torch.full((3, 2), -1.0)
    draws = torch.stack([captions.draw(rows, keys, 0, epoch, mean) for epoch in range(300)])
    assert (draws[:, 1] == -1.0).all()  # no text: the mean stands in
    for position, own in ((0, features[3:]), (2, features[:3])):
        counts = [(draws[:, position] == text).all(dim=1).sum().item() for text in own]
        assert sum(counts) == 300
        assert all(70 <= count <= 130 for count in counts)  # 100 expected, standard deviation 8
    alone = captions.draw(rows[2:], keys[2:], 0, 7, mean[2:])
    assert torch.equal(alone[0], draws[7, 2])
