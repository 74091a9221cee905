"""Runs of earlier versions: opened and evaluated under their old names, and named when a command makes other runs today."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_grids import short_grid
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings, train_tiny

from pipeline.evaluation.evaluate import evaluate, read_metrics
from pipeline.report.results import collect_results
from pipeline.runtime.files import write_atomic
from pipeline.runtime.runs import RunFolder
from pipeline.studies.grid import plan_grid
from pipeline.studies.runs import load_run
from pipeline.studies.sampler_curve import write_sampler_curve
from pipeline.training.earlier_runs import log_earlier_runs
from pipeline.training.heads import HeadPlan, plan_head, resolve_head_settings, train_head

# the small settings of MARNet, as an earlier version wrote all of its settings into config.json
OLD_SMALL = {
    "ce_min_step": 0.0, "draws": 1, "dropout_cdr": 0.0, "dropout_ema": 0.0, "eta": 0.0, "fusion": "concat", "hidden": 32,
    "label_loss": "softmax_kl", "learn_tau": False, "mse_reduction": "mean", "num_steps": 20, "regime": "staged",
    "sample_steps": 5, "sampler": "ddim", "scale": "per_dim", "schedule": "linear", "tau": 0.07, "train_min_step": 0.0,
    "w_ce_cdr": 1.0, "w_ce_ema": 1.0, "w_ita": 1.0, "w_mse": 1.0, "width": 16, "zero_start": False,
}  # fmt: skip


def as_old_run(run: RunFolder, home: Path, settings: Mapping[str, Any]) -> RunFolder:
    """Move a run to the folder that an earlier version gave it, with its config in the old form."""
    config = replace(run.config(), settings=settings, recipe=1)
    old = RunFolder.of(home, config, run.seed)
    old.path.parent.mkdir(parents=True)
    shutil.move(run.path, old.path)
    write_atomic(old.path / "config.json", json.dumps(config.as_json(), indent=1, sort_keys=True))
    return old


def plan(home: Path, method: str, **training: Any) -> HeadPlan:
    settings, config = resolve_head_settings("tiny", method, "head", small_settings(method), {**FAST_TRAINING, **training})
    return plan_head(home, "tiny", method, settings, config, 0, caches_by_key(home))


@pytest.fixture(autouse=True)
def propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the messages of this package reach `caplog`, even after a test that has run a command."""
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)


def test_an_old_run_is_evaluated_as_before_and_named(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train_tiny(home, "marnet")
    expected = {name: evaluate(home, run, "val", given)["metrics"] for name, given in (("own", {}), ("two", {"cdr.draws": 2}))}
    logits = np.load(run.path / "predictions-val.npz")["logits"]
    assert list(read_metrics(run)) == ["val", "val@draws=2"]  # as earlier versions call it
    old = as_old_run(run, home, OLD_SMALL)
    assert old.path.parent.name != run.path.parent.name

    for given in ({"draws": 2}, {"cdr.draws": 2}):
        assert evaluate(home, old, "val", given)["metrics"] == expected["two"]
    assert list(read_metrics(old)) == ["val", "val@draws=2"]  # nothing was computed again
    (old.path / "metrics.json").unlink()
    assert evaluate(home, old, "val", {})["metrics"] == expected["own"]
    np.testing.assert_array_equal(np.load(old.path / "predictions-val.npz")["logits"], logits)
    assert load_run(old.path).evaluate("val", draws=2) == expected["two"]
    with pytest.raises(ValueError, match=r"'ema\.width' is a setting of training"):
        evaluate(home, old, "val", {"width": 8})
    curve = write_sampler_curve(home, old, "val", {}, progress=False)
    assert set(curve.rows["steps"]) == {1, 2, 5, 10, 20}

    head = plan(home, "marnet")
    log_earlier_runs([head, head])
    assert len(caplog.messages) == 1
    assert str(old.path) in caplog.messages[0]
    assert caplog.messages[0].endswith(f"this command makes another run, {head.run.path}")
    caplog.clear()
    train_tiny(home, "marnet")  # the other run is there now, so there is nothing more to say
    log_earlier_runs([head])
    assert not caplog.messages
    evaluate(home, head.run, "val", {})
    labels = {" · ".join(row.label.split(" · ")[:2]) for row in collect_results(home, "tiny", "val").rows}
    names = [run.path.parent.name.removeprefix("marnet-")[:8] for run in (old, head.run)]
    assert labels == {f"marnet · {name}" for name in names}  # no setting differs, so the hash tells them apart


def test_other_settings_are_no_earlier_run(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_old_run(train_tiny(home, "marnet"), home, {**OLD_SMALL, "tau": 0.1})
    log_earlier_runs([plan(home, "marnet")])
    train_tiny(home, "cdr", training={"precision": "mixed"})
    log_earlier_runs([plan(home, "cdr")])
    assert not caplog.messages


def test_a_run_of_an_earlier_recipe_is_named_with_the_defaults_of_its_time(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, training = {**small_settings("seda"), "residual": "text"}, {**FAST_TRAINING, "precision": "mixed"}
    chosen = resolve_head_settings("tiny", "seda", "head", given, training)
    run = train_head(plan_head(home, "tiny", "seda", *chosen, 0, caches_by_key(home)), progress=False)
    head = plan(home, "seda")
    log_earlier_runs([head], "mixed")
    assert not caplog.messages  # it has today's recipe: its user chose these settings
    settings = {key: value for key, value in run.config().settings.items() if key != "residual"}
    old = as_old_run(run, home, {**settings, "residual": True})
    log_earlier_runs([head])
    assert not caplog.messages  # precision was given
    log_earlier_runs([head], "mixed")
    (message,) = caplog.messages
    assert str(old.path) in message
    assert "with other random numbers and its default residual=text, precision=mixed" in message
    assert "takes it" not in message
    caplog.clear()
    log_earlier_runs([plan(home, "seda", precision="mixed")])
    assert "its default residual=text)" in caplog.messages[0]


def test_a_grid_names_the_run_of_its_old_default_of_precision(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixed = short_grid(home, "cdr", ("T=20,30",), training={"precision": "mixed"})
    (old, _) = mixed.heads.values()
    train_tiny(home, "cdr", training={"precision": "mixed", "epochs": 2})
    assert old.run.is_done
    axes = mixed.axes
    assert not caplog.messages  # precision was given
    settings = {key: value for key, value in small_settings("cdr").items() if key not in axes}
    caches = caches_by_key(home)
    grid = plan_grid(
        home, "tiny", "cdr", axes, (0,), settings=settings, training={**FAST_TRAINING, "epochs": 2},
        image=caches["image"], text=caches["text"],
    )  # fmt: skip
    (message,) = caplog.messages
    assert str(old.run.path) in message
    assert "its precision is mixed, once the default here: --precision mixed takes it" in message
    assert message.endswith(str(grid.heads[0, 0].run.path))
