"""Trackers are told the rows of history.csv, whatever interrupts the run; those that fail are left out."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder
from pipeline.studies.runs import Run
from pipeline.training.heads import HeadPlan, plan_head, resolve_head_settings, train_head
from pipeline.training.tracking import MakeTracker, TensorBoard, find_tracker
from pipeline.workspace import Workspace

EXAMPLES = Path(__file__).parents[2] / "examples" / "trackers.py"


class Listener:
    """Keeps what it is told, by run."""

    told: list[Any] = []  # noqa: RUF012 - one list for all

    def __init__(self, run: RunFolder) -> None:
        self.told.append(f"start {run.config().method} {run.seed}")

    def log(self, epoch: int, row: Mapping[str, Any]) -> None:
        self.told.append((epoch, dict(row)))

    def close(self, results: Mapping[str, float]) -> None:
        self.told.append(dict(results))


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> type[Listener]:
    monkeypatch.setattr(Listener, "told", [])
    return Listener


def plan(home: Path, method: str, seed: int) -> HeadPlan:
    settings, training = resolve_head_settings("tiny", method, "head", small_settings(method), FAST_TRAINING)
    return plan_head(home, "tiny", method, settings, training, seed, caches_by_key(home))


def rows_of(run: RunFolder) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.dropna().items()} for _, row in pd.read_csv(run.path / "history.csv").iterrows()]


def test_a_tracker_is_told_every_row_once_it_is_complete(home: Path, listener: type[Listener]) -> None:
    run = train_head(plan(home, "cdr", 31), False, trackers=[listener])
    start, *rows, results = listener.told
    assert start == "start cdr 31"
    assert [epoch for epoch, _ in rows] == list(range(1, len(rows) + 1))
    expected = rows_of(run)
    assert len(rows) == len(expected)
    for (_, row), stored in zip(rows, expected, strict=True):
        assert row == pytest.approx(stored)
    assert results["val_metric"] == max(row["val_metric"] for row in expected if "val_metric" in row)
    assert results["text_cos"] == run.read_alignment()["text_cos"]
    listener.told.clear()
    train_head(plan(home, "cdr", 31), False, trackers=[listener])  # finished: all at once
    assert listener.told[0] == start
    assert listener.told[-1] == results
    assert [row["loss"] for _, row in listener.told[1:-1]] == [row["loss"] for _, row in rows]


def test_a_resumed_run_tells_all_rows_from_the_first(home: Path, listener: type[Listener]) -> None:
    train_head(plan(home, "baseline", 32), False, lambda epoch, _: epoch == 2, trackers=[listener])
    assert listener.told[-1] == {}
    assert [epoch for epoch, _ in listener.told[1:-1]] == [1, 2]
    listener.told.clear()
    train_head(plan(home, "baseline", 32), False, trackers=[listener])
    assert [epoch for epoch, _ in listener.told[1:-1]] == [1, 2, 3, 4]
    assert listener.told[-1]["seconds"] > 0


@pytest.mark.parametrize("moment", ["__init__", "log", "close"])
def test_a_tracker_that_fails_costs_nothing_but_itself(
    home: Path, listener: type[Listener], moment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ConnectionError("no network")

    failing = type("Failing", (Listener,), {moment: fail})
    seed = 33 + ["__init__", "log", "close"].index(moment)
    run = train_head(plan(home, "baseline", seed), False, trackers=[failing, listener])
    assert run.is_done
    assert capsys.readouterr().err.count("the tracker Failing has failed (ConnectionError: no network); training goes on") == 1
    assert listener.told[-1]["val_metric"] > 0


def test_ctrl_c_ends_the_trackers_and_changes_no_bit(
    home: Path, listener: type[Listener], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Listener, epoch: int, row: Mapping[str, Any]) -> None:
        self.told.append(epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Listener, "log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_head(plan(home, "baseline", 39), False, trackers=[listener])
    assert listener.told == ["start baseline 39", 1, 2, {}]
    tracked = train_head(plan(home, "baseline", 39), False, trackers=[listener]).read_checkpoint()
    alone = Path(shutil.copytree(home, home.with_name("alone"), ignore=shutil.ignore_patterns("runs")))
    assert train_head(plan(alone, "baseline", 39), False).read_checkpoint() == tracked


def test_tensorboard_has_each_epoch_once_after_an_interruption(home: Path) -> None:
    trackers: list[MakeTracker] = [find_tracker("tensorboard")]
    assert trackers == [TensorBoard]
    train_head(plan(home, "ema", 34), False, lambda epoch, _: epoch == 2, trackers=trackers)
    run = train_head(plan(home, "ema", 34), False, trackers=trackers)
    read = EventAccumulator(str(run.path)).Reload()
    expected = rows_of(run)
    for tag, name in (("train/loss", "loss"), ("val/metric", "val_metric"), ("train/lr", "lr")):
        assert [event.value for event in read.Scalars(tag)] == pytest.approx([row[name] for row in expected], rel=1e-6)
        assert [event.step for event in read.Scalars(tag)] == [1, 2, 3, 4]
    assert len(list(run.path.glob("events.*"))) == 1


def test_trackers_are_found_by_name_or_file(tmp_path: Path) -> None:
    assert find_tracker(f"{EXAMPLES}:MLflow").__name__ == "MLflow"
    for word, complaint in (
        ("tensorbord", "unknown tracker 'tensorbord'; choose one of: tensorboard .*did you mean 'tensorboard'"),
        (f"{EXAMPLES}:Nothing", "has no class 'Nothing'"),
        (f"{tmp_path}/none.py:MLflow", "is not there"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_tracker(word)


class MlflowStandIn:
    """The calls of `mlflow.MlflowClient` that the example makes, with their signatures in MLflow 3; it keeps runs in memory."""

    def __init__(self, runs: dict[str, dict[str, Any]]) -> None:
        self.runs = runs

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name) if any(run["experiment"] == name for run in self.runs.values()) else None

    def create_experiment(self, name: str) -> str:
        return name

    def search_runs(self, experiment_ids: list[str], filter_string: str = "") -> list[Any]:
        (wanted,) = re.findall(r"^tags\.diffalign = '([^']+)'$", filter_string)
        found = [key for key, run in self.runs.items() if run["experiment"] in experiment_ids and run["tag"] == wanted]
        return [SimpleNamespace(info=SimpleNamespace(run_id=key)) for key in found]

    def delete_run(self, run_id: str) -> None:
        del self.runs[run_id]

    def create_run(self, experiment_id: str, *, tags: Mapping[str, str], run_name: str) -> Any:
        key = f"{run_name} {len(self.runs)}"
        self.runs[key] = {"experiment": experiment_id, "tag": tags["diffalign"], "params": {}, "metrics": {}}
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        assert key not in self.runs[run_id]["params"]  # MLflow refuses another value
        self.runs[run_id]["params"][key] = str(value)

    def log_metric(self, run_id: str, key: str, value: float, *, step: int = 0) -> None:
        self.runs[run_id]["metrics"].setdefault(key, []).append((step, value))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status


def test_mlflow_has_the_run_of_the_example(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: dict[str, dict[str, Any]] = {}
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: MlflowStandIn(runs)))
    tracker = find_tracker(f"{EXAMPLES}:MLflow")
    train_head(plan(home, "baseline", 36), False, lambda epoch, _: epoch == 2, trackers=[tracker])
    assert [each["status"] for each in runs.values()] == ["FAILED"]
    run = train_head(plan(home, "baseline", 36), False, trackers=[tracker])
    (found,) = runs.values()
    assert (found["experiment"], found["status"], found["params"]["method"]) == ("tiny", "FINISHED", "baseline")
    expected = rows_of(run)
    assert [step for step, _ in found["metrics"]["loss"]] == [1, 2, 3, 4]
    assert [value for _, value in found["metrics"]["loss"]] == pytest.approx([row["loss"] for row in expected])


def test_weights_and_biases_has_the_run_of_the_example(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for `wandb.init`, with the arguments and methods that it has in W&B 0.31."""
    told: list[Any] = []

    def init(*, project: str, group: str, id: str, resume: str, config: Mapping[str, Any]) -> Any:
        told.append((project, group, id, resume, config["settings"], config["seed"]))
        return SimpleNamespace(
            log=lambda data, *, step: told.append((step, data)),
            summary=SimpleNamespace(update=lambda values: told.append(values)),
            finish=lambda *, exit_code: told.append(exit_code),
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = train_head(plan(home, "baseline", 37), False, trackers=[find_tracker(f"{EXAMPLES}:WeightsAndBiases")])
    head = run.path.parent.name
    first, *rows, results, exit_code = told
    assert first == ("tiny", head, f"{head}-seed37", "allow", run.config().settings, 37)
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    assert [row["val_metric"] for _, row in rows] == pytest.approx([row["val_metric"] for row in rows_of(run)])
    assert (results["val_metric"], exit_code) == (max(row["val_metric"] for _, row in rows), 0)


def test_the_workspace_names_a_head_and_logs_it(home: Path, listener: type[Listener]) -> None:
    ws, caches = Workspace(home), caches_by_key(home)
    options: dict[str, Any] = {"train": FAST_TRAINING, **caches}
    first = ws.train_head("tiny", "baseline", seed=38, name="first", log=[listener], **options)
    assert listener.told[0] == "start baseline 38"
    assert ws.run("first/seed38") == first == Run(ws.home, first.path)
    with pytest.raises(UserError, match=r"has the name 'first' already"):
        ws.train_head("tiny", "ema", seed=0, name="first", settings=small_settings("ema"), **options)
    assert not [run for run in ws.runs("tiny") if run.config.method == "ema" and run.seed == 0]
