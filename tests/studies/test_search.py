"""Tests of running a grid: its runs equal heads that are trained alone.

That holds in this process, over dask, after a kill, and when another cell diverges.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers.pool_tasks import kill_first_attempt, square
from helpers.tiny_grids import short_grid
from helpers.tiny_heads import caches_by_key, papers_methods_or_all, train_tiny
from safetensors.torch import load_file

from pipeline.cache.table import load_split
from pipeline.commands import app as cli
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import sample_std
from pipeline.runtime import files, plugins
from pipeline.runtime.executor import local_cluster, open_executor
from pipeline.runtime.runs import RunFolder
from pipeline.studies.grid import Grid
from pipeline.studies.halving import HALVING_FACTOR, Halving
from pipeline.studies.search import run_grid
from pipeline.training.heads import plan_head_on, train_head
from pipeline.training.history import best_validation, read_validations

VALUES: dict[str, tuple[Any, ...]] = {
    "num_steps": (16, 20),
    "stage_step": (0, 7),
    "tau": (0.07, 0.2),
    "width": (8, 16),
    "dropout": (0.0, 0.5),
    "lr": (1e-3, 1e-2),
    "weight_decay": (0.0, 1e-2),
    "epochs": (1, 3),
    "batch_size": (6, 8),
    "precision": ("float32", "mixed"),
}
TRAINING_FIELDS = ("lr", "weight_decay", "epochs", "batch_size", "precision")


def axes_of(method: str) -> list[str]:
    """Return axes as --grid options, with two values each: fields of the method's grid and symbols, and some of training."""
    module = plugins.get("methods", method)
    fields = dict.fromkeys([*module.grid, *module.symbols.values(), *(TRAINING_FIELDS if method == "seda" else ())])
    values = {field: VALUES.get(field.rpartition(".")[2]) or module.grid.get(field, (0.3, 1.0))[:2] for field in fields}
    return [f"{field}={','.join(map(str, pair))}" for field, pair in values.items()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a dask cluster of two processes and yield its address."""
    with local_cluster([{}, {}]) as client:
        assert client.scheduler is not None
        yield str(client.scheduler.address)


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def results(home: Path) -> dict[str, bytes]:
    """Return the weights and the history of every finished run of a home, by path."""
    names = ("checkpoint.safetensors", "history.csv")
    folders = [done.parent for done in sorted(home.glob("runs/tiny/*/*/done"))]
    return {str((folder / name).relative_to(home)): (folder / name).read_bytes() for folder in folders for name in names}


def results_of_single_heads(grid: Grid, home: Path) -> dict[str, bytes]:
    """Train each head of the grid by itself in another home, and return the results."""
    features = replace(grid.features, home=home)
    for cell in grid.cells:
        for seed in grid.seeds:
            train_head(plan_head_on(features, grid.method, cell.settings, cell.training, seed), progress=False)
    return results(home)


@pytest.mark.slow
@pytest.mark.parametrize("method", papers_methods_or_all())
def test_every_method_and_field_over_dask_equals_the_heads_alone(method: str, home: Path, tmp_path: Path, address: str) -> None:
    expected: dict[str, bytes] = {}
    for pair in axes_of(method):
        grid = short_grid(home, method, (pair,))
        expected |= results_of_single_heads(grid, tmp_path / "alone")
        result = run_grid(grid, address)
        assert list(result.ranking["state"]) == ["done", "done"]
        _assert_same_predictions(grid, result.winner["runs"][0], tmp_path / "alone")
    assert results(home) == expected
    assert len(expected) >= 4


def test_over_dask_every_worker_trains_a_part_of_an_ensemble(
    home: Path, tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = short_grid(home, "ema", ("tau=0.07,0.2", "lr=1e-3,1e-2"))
    other = short_grid(Path(shutil.copytree(home, tmp_path / "other")), "ema", ("tau=0.07,0.2", "lr=1e-3,1e-2"))
    result, expected = run_grid(grid, address, strategy="stacked"), run_grid(other, address)
    logged = capsys.readouterr().err
    assert f"the 2 workers of {address}, runs of one structure as one model (--strategy stacked), " in logged
    assert f"the 2 workers of {address}, every run by itself (not all of them have a GPU), " in logged
    pd.testing.assert_frame_equal(result.ranking, expected.ranking, atol=1e-5)
    for head, apart in zip(grid.heads.values(), other.heads.values(), strict=True):
        ours, theirs = (load_file(each.run.path / "checkpoint.safetensors") for each in (head, apart))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def _assert_same_predictions(grid: Grid, run: str, other: Path) -> None:
    """Compare predictions on the test split of a run with those of the same run in another home with the same caches."""
    for name in ("caches", "manifests"):
        if not (other / name).exists():
            shutil.copytree(grid.features.home / name, other / name)
    evaluate(other, RunFolder.at(other / run), "test", {})
    ours, theirs = (np.load(home / run / "predictions-test.npz") for home in (grid.features.home, other))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ("ids", "logits", "feature"))


@pytest.mark.slow
def test_in_this_process_and_after_kills_the_results_are_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pipeline.training.loop.STATE_SECONDS", -math.inf
    )  # save the state after every epoch, also in phases without validation
    pairs = ("T=16,20", "lr=1e-3,1e-2")
    undisturbed = Path(shutil.copytree(home, tmp_path / "undisturbed"))
    expected = run_grid(short_grid(undisturbed, "seda", pairs, training={"epochs": 6}), workers=0)
    grid = short_grid(home, "seda", pairs, training={"epochs": 6})
    for wanted in (1, 2, 4):
        process = get_context("fork").Process(target=run_grid, args=(grid, "local", 0))
        process.start()
        while len(list(home.glob("runs/tiny/*/seed0/history.csv"))) < wanted:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    result = run_grid(grid, workers=0)
    assert results(home) == results(undisturbed)
    pd.testing.assert_frame_equal(result.ranking, expected.ranking)
    assert result.winner == expected.winner
    written = {path: path.stat().st_mtime_ns for path in home.glob("runs/**/[!.]*.*")}
    assert len(written) >= 4 * 3
    assert run_grid(grid, workers=0).winner == result.winner
    assert {path: path.stat().st_mtime_ns for path in home.glob("runs/**/[!.]*.*")} == written


@pytest.mark.slow
def test_the_processes_of_this_machine_have_one_thread_and_end(tmp_path: Path) -> None:
    with open_executor("local", 2) as executor:
        done = {number: get_result for number, get_result in executor.map(square, [3, -1, 5])}
        (value, worker, num_threads), (other, *_) = done[0](), done[2]()
        assert (value, other, num_threads) == (9, 25, "1")
        with pytest.raises(ValueError, match="-1 has no square here"):
            done[1]()
        ((_, get_result),) = executor.map(
            kill_first_attempt, [tmp_path / "died"]
        )  # the worker is killed, and another one does the job
        assert get_result() != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_cell_that_diverges_is_listed_and_does_not_change_others(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = caches_by_key(home)
    arguments = ["grid", "--dataset", "tiny", "--method", "baseline", "--home", str(home), "--image", caches["image"]]
    arguments += ["--grid", "lr=1e-3,1e30,1e-2", "--seeds", "0,1", "--train", "batch_size=8", "--train", "lr_step=1"]
    arguments += ["--train", "epochs=2", "--precision", "float32", "--workers", "0", "--text", caches["text"], "--json"]
    monkeypatch.setattr(sys, "argv", ["diffalign", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    printed = capsys.readouterr()
    assert "diffalign: 2 of 6 runs failed" in printed.err
    shown = json.loads(printed.out)
    assert [cell["lr"] for cell in shown["cells"]][-1] == 1e30
    assert "not finite" in shown["cells"][-1]["state"]
    rows = pd.read_csv(Path(shown["grid"]) / "cells.csv")
    assert list(rows["state"]) == ["done", "done", "failed", "failed", "done", "done"]
    assert rows["reason"].str.contains("not finite").sum() == 2
    grid = short_grid(home, "baseline", ("lr=1e-3,1e-2",), seeds=(0, 1))
    assert results(home) == results_of_single_heads(grid, tmp_path / "alone")


def test_the_test_split_is_read_once_and_for_the_winner_alone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = short_grid(home, "ema", ("w_ita=0.1,1", "lr=1e-3,1e-2"), seeds=(0, 1))
    untested = run_grid(grid, workers=0, read_test=False)
    assert untested.winner["test"] == {}
    assert not list(home.glob("runs/**/test_reads.jsonl"))
    for verb in ("is read once", "was read before"):
        result = run_grid(grid, workers=0)
        assert f"the test split {verb}, for the winner: " in capsys.readouterr().err
        reads = {str(path.parent.relative_to(home)): path.read_text() for path in home.glob("runs/**/test_reads.jsonl")}
        assert sorted(reads) == sorted(result.winner["runs"])
        assert all(text.count("\n") == 1 for text in reads.values())
    own = [evaluate(home, RunFolder.at(home / run), "test", {})["metrics"]["acc1"] for run in result.winner["runs"]]
    assert result.winner["test"]["acc1"]["values"] == own
    assert json.loads((result.folder / "winner.json").read_text()) == result.winner


def test_a_process_reads_the_features_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def load_and_count(manifest: Any, caches: Any, split: Any, *arguments: Any) -> Any:
        read.append(split)
        return load_split(manifest, caches, split, *arguments)

    monkeypatch.setattr("pipeline.training.features.load_split", load_and_count)
    for seeds in ((0, 1), (2,)):  # also for another grid
        run_grid(short_grid(home, "ema", ("tau=0.07,0.2",), seeds=seeds), workers=0, read_test=False)
    assert sorted(read) == ["train", "val"]


def test_the_command_prints_the_ranking_and_the_winner(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = caches_by_key(home)
    arguments = ["grid", "--dataset", "tiny", "--method", "ema", "--home", str(home), "--no-test", "--workers", "0"]
    arguments += ["--image", caches["image"], "--text", caches["text"], "--grid", "tau=0.07,0.2", "--train", "epochs=1"]
    monkeypatch.setattr(sys, "argv", ["diffalign", *arguments])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    printed = capsys.readouterr()
    header, *rows = printed.out.splitlines()
    assert header.split() == ["rank", "tau", "val_acc1", "std", "val_loss", "seeds", "state", "verdict"]
    assert [row.split()[0] for row in rows[:2]] == ["1", "2"]
    assert rows[2] == f"winner: tau={rows[0].split()[1]}"
    assert rows[4] == "test:   not read"
    assert Path(rows[5].removeprefix("files:  ")).is_dir()
    assert "2 cells × 3 seeds: this process alone, every run by itself (no GPU), " in printed.err
    assert "best acc1 " in printed.err


@pytest.mark.parametrize("select", ["metric", "loss", "last"])
def test_cells_are_ranked_by_their_evaluations(select: str, home: Path) -> None:
    grid = short_grid(home, "ema", ("w_ita=0.1,1", "lr=1e-3,3e-2"), seeds=(0, 1), training={"select": select, "epochs": 4})
    result = run_grid(grid, workers=0, read_test=False)
    rows = pd.read_csv(result.folder / "cells.csv")
    val = load_split(grid.features.manifest, {"image": grid.features.caches["image"]}, "val", torch.device("cpu"), "mean")
    for row in rows.to_dict("records"):
        run = RunFolder.at(home / str(row["run"]))
        assert evaluate(home, run, "val", {})["metrics"]["acc1"] == row["val_acc1"]
        logits = torch.from_numpy(np.load(run.path / "predictions-val.npz")["logits"])
        assert float(F.cross_entropy(logits, val.columns["label"])) == pytest.approx(row["val_loss"], rel=1e-5)
    groups = rows.groupby("cell")
    means = groups[["val_acc1", "val_loss"]].mean()
    order = sorted(means.index, key=lambda cell: (-means["val_acc1"][cell], means["val_loss"][cell], cell))
    best = grid.cells[order[0]]
    assert result.winner["cell"] == dict(best.point)
    assert [tuple(point) for point in result.ranking[["w_ita", "lr"]].to_numpy()] == [
        tuple(grid.cells[cell].point.values()) for cell in order
    ]
    assert result.winner["val"]["acc1"]["std"] == pytest.approx(groups["val_acc1"].std()[order[0]])
    assert np.isnan(sample_std(np.array([1.0])))


def test_a_stopped_run_goes_on_to_the_same_weights(home: Path, tmp_path: Path) -> None:
    grid = short_grid(home, "seda", ("lr=1e-2",), training={"epochs": 6})
    (head,) = grid.heads.values()
    epochs: list[int] = []

    def should_stop(epoch: int, metric: float) -> bool:
        epochs.append(epoch)
        return epoch >= limit

    for limit in (2, 2, 3):
        assert not train_head(head, progress=False, should_stop=should_stop).is_done
        assert [found.epoch for found in read_validations(head.run)] == list(range(1, limit + 1))
    assert epochs == [1, 2, 2, 2, 3]
    limit = 6
    train_head(head, progress=False, should_stop=should_stop)
    assert results(home) == results_of_single_heads(grid, tmp_path / "alone")


def test_successive_halving_prunes_the_same_cells_with_any_workers(home: Path, tmp_path: Path, address: str) -> None:
    options: dict[str, Any] = {"seeds": (0, 1), "search": "optuna", "training": {"epochs": 8}}
    pairs = ("lr=1e-2,1e-3,3e-3,1e-6", "weight_decay=0,1e-3")
    other = Path(shutil.copytree(home, tmp_path / "other"))
    everything = run_grid(short_grid(other, "ema", pairs, **{**options, "search": "all"}), address, read_test=False)
    grid = short_grid(home, "ema", pairs, **options)
    result = run_grid(grid, workers=0)
    rows = pd.read_csv(result.folder / "cells.csv")
    pruned = {int(cell): reason for cell, reason in rows[rows["state"] == "pruned"][["cell", "reason"]].to_numpy()}
    paths = [RunFolder.at(other / head.run.path.relative_to(home)) for (_, seed), head in grid.heads.items() if seed == 0]
    assert pruned == {
        cell: f"pruned at epoch {epoch}"
        for cell, epoch in _cells_pruned_by_halving([read_validations(run) for run in paths]).items()
    }
    assert 2 <= len(pruned) < 8
    assert not list(home.glob("runs/**/state.pt"))
    assert all((grid.heads[cell, 0].run.path / "history.csv").is_file() for cell in pruned)
    assert all(head.run.is_done == (cell not in pruned) for (cell, _), head in grid.heads.items())
    again = run_grid(short_grid(other, "ema", pairs, **options), address)  # in a home where all runs are finished
    pd.testing.assert_frame_equal(again.ranking, result.ranking)
    assert again.winner == result.winner
    run_grid(short_grid(home, "ema", pairs, **{**options, "search": "all"}), workers=0, read_test=False)
    assert results(home) == results(other)
    assert len(everything.ranking) == 8


def test_halving_leaves_out_a_cell_that_diverges(home: Path) -> None:
    grid = short_grid(home, "baseline", ("lr=1e30,1e-2",), seeds=(0, 1), search="optuna")
    result = run_grid(grid, workers=0)
    rows = pd.read_csv(result.folder / "cells.csv")
    assert list(rows["state"]) == ["failed", "pruned", "done", "done"]
    assert rows["reason"][1] == "seed 0 failed"
    assert result.winner["cell"] == {"lr": 0.01}
    assert list(result.failed) == [str(grid.heads[0, 0].run.path)]


def _cells_pruned_by_halving(validations: list[Any]) -> dict[int, int]:
    """Return the epoch at which each pruned cell is given up.

    Of 8 epochs, cells are judged after 1, 2 and 4. A cell goes on if it is in the better half of the cells judged until then.
    """
    pruned: dict[int, int] = {}
    for rung in (1, 2, 4):
        judged: list[float] = []
        for cell in (cell for cell in range(len(validations)) if cell not in pruned):
            value = validations[cell][rung - 1].metric
            judged.append(value)
            if value < sorted(judged, reverse=True)[max(len(judged) // HALVING_FACTOR, 1) - 1]:
                pruned[cell] = rung
    return pruned


def test_rungs_fit_the_epochs() -> None:
    assert Halving([20, 20]).rungs == [2, 4, 8, 16]
    assert Halving([8, 40]).rungs == [1, 2, 4, 8, 16, 32]
    assert Halving([1, 1]).rungs == []


def test_mixed_products_are_bfloat16_in_prediction_and_weights_are_not(home: Path) -> None:
    run = train_tiny(home, "baseline", training={"precision": "mixed"})
    weights = load_file(run.path / "checkpoint.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert not torch.equal(weights["classifier.weight"], weights["classifier.weight"].bfloat16().float())
    evaluate(home, run, "test", {})
    logits = np.load(run.path / "predictions-test.npz")["logits"]
    grid = short_grid(home, "baseline", ("dropout=0",))
    table = load_split(grid.features.manifest, grid.features.caches, "test", torch.device("cpu"), "mean")
    x = (table.columns["image"] - weights["scale.mean"]) / weights["scale.std"]
    half = [tensor.bfloat16() for tensor in (x, weights["classifier.weight"], weights["classifier.bias"])]
    assert np.array_equal(logits, F.linear(*half).float().numpy())
    exact = train_tiny(home, "baseline")
    difference = best_validation(read_validations(run), "metric").loss - best_validation(read_validations(exact), "metric").loss
    assert 0 < abs(difference) < 0.01


def test_two_trainings_of_one_run_take_turns(home: Path) -> None:
    grid = short_grid(home, "ema", ("tau=0.1",))
    (head,) = grid.heads.values()
    with files.lock(head.run.path):
        other = Thread(target=train_head, args=(head, False))
        other.start()
        time.sleep(0.3)
        assert other.is_alive()
        assert not (head.run.path / "history.csv").exists()
    other.join(60)
    assert head.run.is_done
