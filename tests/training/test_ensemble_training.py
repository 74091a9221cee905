"""A head trained in an ensemble equals the head trained alone, up to rounding, and a failed head does not disturb others."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.method_cases import another_value, changeable, trained_phases, with_settings
from helpers.tiny_grids import tiny_grid
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, papers_methods_or_all, small_settings
from torch._dynamo.utils import counters

from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime import files, plugins
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import field_types, name_settings
from pipeline.studies.search import run_grid
from pipeline.training import heads as heads_module
from pipeline.training.ensemble import structure_key
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.heads import HeadPlan, head_capacity, plan_head_on, resolve_head_settings, train_head, train_heads
from pipeline.training.history import read_validations
from pipeline.training.state import TrainState

# Products of stacked matrices are summed in another order. Over all heads of these tests, the float32 logits differ by up to
# 9e-7. With bfloat16 products they differ by up to 0.05, those of momke, trained with a large learning rate, by 0.13. For
# comparison: logits of a single head with bfloat16 products differ from those with float32 products by 0.03, of momke by 0.10.
TOLERANCE = {"float32": 1e-5, "mixed": 0.1}
MIXED_TOLERANCE_OF_MOMKE = 0.15
# Tolerance of a metric in percentage points. A product that is rounded to bfloat16 may turn a near tie of one sample of four.
POINTS = {"float32": 0.1, "mixed": 25.0}
OTHER_TRAINING: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 1e-2,
    "lr_step": 2,
    "lr_gamma": 0.3,
    "grad_clip": 0.01,
    "select": "last",
    "weight_average": 0.9,
}
AXES = ("T=16,20", "t=0,5", "lr=1e-3,1e-2")


@pytest.fixture
def other_home(tiny_home: Path, tmp_path: Path) -> Path:
    """Another copy of the tiny home, in which heads are trained alone."""
    return Path(shutil.copytree(tiny_home, tmp_path / "other"))


def opened(home: Path, method: str) -> FeatureSet:
    return open_features(home, "tiny", method, caches_by_key(home))


def planned(
    features: FeatureSet, method: str, changes: Mapping[str, Any], training: Mapping[str, Any], seed: int = 0
) -> HeadPlan:
    """The plan of a small head with some settings changed."""
    config_type = plugins.get("methods", method).Config
    given = name_settings(config_type, small_settings(method)) | name_settings(config_type, changes)
    settings, config = resolve_head_settings("tiny", method, "head", given, {**FAST_TRAINING, **training})
    return plan_head_on(features, method, settings, config, seed)


def evaluated(home: Path, run_path: Path) -> tuple[np.ndarray, dict[str, float]]:
    """Logits [N,C] and metrics of a run on the test split; `run_path` is relative to the home."""
    metrics = evaluate(home, RunFolder.at(home / run_path), "test", {})["metrics"]
    return np.load(home / run_path / "predictions-test.npz")["logits"], metrics


def assert_same(head: HeadPlan, home: Path, other_home: Path) -> None:
    """Check that a run has the same predictions, metrics and history in both homes."""
    run_path = head.run.path.relative_to(head.features.home)
    tolerance = TOLERANCE[head.training.precision]
    if head.training.precision == "mixed" and run_path.parent.name.startswith("momke-"):
        tolerance = MIXED_TOLERANCE_OF_MOMKE
    (ours, our_metrics), (theirs, their_metrics) = evaluated(home, run_path), evaluated(other_home, run_path)
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
    points = POINTS[head.training.precision]
    assert our_metrics == pytest.approx(their_metrics, abs=points)
    first, second = (pd.read_csv(each / run_path / "history.csv") for each in (home, other_home))
    np.testing.assert_allclose(first.pop("val_metric"), second.pop("val_metric"), atol=points, rtol=0)
    pd.testing.assert_frame_equal(first, second, atol=tolerance, rtol=tolerance)
    assert not (home / run_path / "state.pt").exists()


def variations(features: FeatureSet, method: str, training: Mapping[str, Any]) -> list[HeadPlan]:
    """Plans of heads with equal structure: the default, each possible change, all changes at once, and other training."""
    module = plugins.get("methods", method)
    # without dropout a head has another structure, so all of them have some
    base = {name: 0.1 for name in field_types(module.Config) if name.endswith("dropout")}
    default = planned(features, method, base, training)
    known = structure_key(module(default.settings, features.shapes))
    changes: dict[str, Any] = {}
    for field, hint in changeable(default.settings).items():
        value = another_value(default.settings, field, hint)
        if structure_key(module(with_settings(default.settings, **{field: value}), features.shapes)) == known:
            changes[field] = value
    heads = [planned(features, method, base | {field: value}, training) for field, value in changes.items()]
    mixed = planned(features, method, base | changes, {**training, **OTHER_TRAINING})
    return [default, *heads, mixed, planned(features, method, base, {**training, "lr": 1e-2, "weight_decay": 0.0})]


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("method", plugins.names("methods"))
def test_heads_trained_together_are_those_trained_alone(method: str, precision: str, home: Path, other_home: Path) -> None:
    features, other_features = opened(home, method), opened(other_home, method)
    heads = variations(features, method, {"precision": precision})
    assert len(heads) >= 4
    assert train_heads(heads, progress=False) == {}
    for head in heads:
        train_head(plan_head_on(other_features, method, head.settings, head.training, 0), progress=False)
        assert_same(head, home, other_home)


@pytest.mark.parametrize("training", [{"validate_every": 3, "select": "loss"}, {"epochs": 5, "lr_step": 2}, {"batch_size": 6}])
def test_shared_settings_may_have_any_value(training: dict[str, Any], home: Path, other_home: Path) -> None:
    features, other_features = opened(home, "marnet"), opened(other_home, "marnet")
    for weight, seed in ((0.3, 0), (1.0, 0), (0.3, 1), (1.0, 1)):
        train_head(planned(other_features, "marnet", {"w_ita": weight}, training, seed), progress=False)
    for seed in (0, 1):
        heads = [planned(features, "marnet", {"w_ita": weight}, training, seed) for weight in (0.3, 1.0)]
        assert train_heads(heads, progress=False) == {}
        for head in heads:
            assert_same(head, home, other_home)


def test_a_head_that_diverges_fails_as_it_does_alone_and_disturbs_no_other(home: Path, other_home: Path) -> None:
    features, other_features = opened(home, "seda"), opened(other_home, "seda")
    heads = [planned(features, "seda", {}, {"lr": rate, "grad_clip": 1e30}) for rate in (1e-3, 1e30, 3e-3, 1e-2)]
    writable: list[list[bool]] = []

    def should_stop(epoch: int, metric: float) -> bool:
        writable.append([is_free(head.run) for head in heads])
        return False

    failed = train_heads(heads, False, should_stop)
    assert list(failed) == [heads[1].run]
    assert writable[-1] == [False, True, False, False]  # a run that fails releases its folder at once
    with pytest.raises(ValueError, match="not finite") as alone:
        train_head(planned(other_features, "seda", {}, {"lr": 1e30, "grad_clip": 1e30}), progress=False)
    assert str(failed[heads[1].run]) == str(alone.value)
    assert not heads[1].run.is_done
    for head in (heads[0], *heads[2:]):
        train_head(plan_head_on(other_features, "seda", head.settings, head.training, 0), progress=False)
        assert_same(head, home, other_home)
    assert all(is_free(head.run) for head in heads)


@pytest.mark.parametrize("method", ["baseline", "ema", "cdr"])
def test_a_prediction_that_diverges_disturbs_no_other_head(method: str, home: Path) -> None:
    features = opened(home, method)
    heads = [planned(features, method, {}, {"lr": rate, "grad_clip": 1e30}) for rate in (1e-3, 1e30, 3e-3)]
    failed = train_heads(heads, progress=False)
    assert [head.run.is_done for head in heads] == [True, False, True]
    assert list(failed) == [heads[1].run]
    assert "not finite" in str(failed[heads[1].run])


def test_a_run_that_another_process_has_finished_is_released(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = opened(home, "ema")
    heads = [planned(features, "ema", {"tau": tau}, {}) for tau in (0.07, 0.2)]
    first, second = sorted((head.run for head in heads), key=lambda run: run.path)
    build, free = heads_module._build_method, []

    def finish_first_run(head: HeadPlan, device: torch.device) -> Any:
        if head.run == first:
            first.path.mkdir(parents=True)
            (first.path / "done").write_text("{}")
        return build(head, device)

    def should_stop(epoch: int, metric: float) -> bool:
        free.append((is_free(first), is_free(second)))
        return False

    monkeypatch.setattr("pipeline.training.heads._build_method", finish_first_run)
    assert train_heads(heads, False, should_stop) == {}
    assert set(free) == {(True, False)}


@pytest.mark.parametrize("strategy", ["stacked", "processes"])
def test_an_error_of_torch_fails_its_run_alone(strategy: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = tiny_grid(home, "ema", ("tau=0.07,0.1,0.2,0.3",))
    failing_run = grid.heads[2, 0].run

    def limited(heads: list[HeadPlan], *arguments: Any, **options: Any) -> Any:
        if any(head.run == failing_run for head in heads):
            raise RuntimeError("did not converge\nat all")
        return train_heads(heads, *arguments, **options)

    monkeypatch.setattr("pipeline.studies.search_worker.train_heads", limited)
    result = run_grid(grid, workers=0, strategy=strategy)
    traceback_file = failing_run.path / "error.txt"
    reason = f"RuntimeError: did not converge; a bug, its traceback is in {traceback_file}"
    assert result.failed == {str(failing_run.path): reason}
    assert result.bugs == set(result.failed)
    assert [head.run.is_done for head in grid.heads.values()] == [True, True, False, True]


def is_free(run: RunFolder) -> bool:
    """Whether no process holds the lock of a run."""
    try:
        with files.lock(run.path):
            return True
    except ValueError:
        return False


def test_heads_join_and_leave_an_ensemble(home: Path, other_home: Path) -> None:
    features, other_features = opened(home, "seda"), opened(other_home, "seda")
    heads = [planned(features, "seda", {"w_mse": weight}, {"epochs": 6, "lr_step": 2}) for weight in (0.1, 0.3, 1.0, 3.0)]
    train_head(heads[0], False, lambda epoch, metric: epoch >= 3)  # has finished more epochs than the others
    train_head(heads[1], progress=False)  # is finished already
    done = (heads[1].run.path / "done").stat().st_mtime_ns
    assert train_heads(heads, False, lambda epoch, metric: epoch >= 4) == {}
    assert [head.run.is_done for head in heads] == [False, True, False, False]
    assert [read_validations(head.run)[-1].epoch for head in heads] == [4, 6, 4, 4]
    train_head(heads[2], progress=False)  # resumes alone; the others resume together
    assert train_heads(heads, progress=False) == {}
    assert (heads[1].run.path / "done").stat().st_mtime_ns == done
    for head in heads:
        train_head(plan_head_on(other_features, "seda", head.settings, head.training, 0), progress=False)
        assert_same(head, home, other_home)


def test_an_ensemble_that_is_interrupted_during_a_save_catches_up(
    home: Path, other_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, other_features = opened(home, "marnet"), opened(other_home, "marnet")
    heads = [planned(features, "marnet", {"w_ita": weight}, {}) for weight in (0.1, 0.3, 1.0, 3.0)]
    save, saves = TrainState.save, 0

    def interrupted_save(state: TrainState) -> None:
        nonlocal saves
        saves += 1
        if saves in interrupted:
            raise KeyboardInterrupt
        save(state)

    monkeypatch.setattr("pipeline.training.loop.STATE_SECONDS", -math.inf)
    monkeypatch.setattr(TrainState, "save", interrupted_save)
    interrupted = (7, 8, 19)  # afterwards some heads of the ensemble are one epoch ahead of the others
    for _ in interrupted:
        with pytest.raises(KeyboardInterrupt):
            train_heads(heads, progress=False)
    assert train_heads(heads, progress=False) == {}
    for head in heads:
        train_head(plan_head_on(other_features, "marnet", head.settings, head.training, 0), progress=False)
        assert_same(head, home, other_home)


def test_a_killed_ensemble_resumes_alone_or_together(home: Path, other_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.loop.STATE_SECONDS", -math.inf)
    training = {"epochs": 12}
    grid = tiny_grid(home, pairs=AXES[:2], training=training)
    heads = list(grid.heads.values())
    process = get_context("fork").Process(target=run_grid, args=(grid, "local", 0, False, "stacked"))
    process.start()
    while len(list(home.glob("runs/tiny/*/seed0/state.pt"))) < len(heads):
        assert process.is_alive()
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not any(head.run.is_done for head in heads)
    train_head(heads[0], progress=False)
    result = run_grid(grid, workers=0, strategy="stacked")
    assert list(result.ranking["state"]) == ["done"] * 4
    alone = tiny_grid(other_home, pairs=AXES[:2], training=training)
    run_grid(alone, workers=0, strategy="processes")
    for head in heads:
        assert_same(head, home, other_home)


def record_ensemble_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many heads each call of `train_heads` by a grid trains together, in this process."""
    sizes: list[int] = []

    def recorded(heads: list[HeadPlan], *arguments: Any, **options: Any) -> Any:
        sizes.append(len(heads))
        return train_heads(heads, *arguments, **options)

    monkeypatch.setattr("pipeline.studies.search_worker.train_heads", recorded)
    return sizes


def test_a_stacked_grid_has_the_same_results(
    home: Path, other_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = record_ensemble_sizes(monkeypatch)
    expected = run_grid(tiny_grid(other_home, pairs=AXES, seeds=(0, 1)), workers=0)
    assert sizes == [1] * 16
    assert "this process alone, every run by itself (no GPU), float32 products" in capsys.readouterr().err
    grid = tiny_grid(home, pairs=AXES, seeds=(0, 1))
    result = run_grid(grid, workers=0, strategy="stacked", max_ensemble_size=5)
    assert sizes[16:] == [4, 4, 4, 4]  # eight cells and two seeds
    log = capsys.readouterr().err
    assert "this process alone, runs of one structure as one model (--strategy stacked), float32 products" in log
    pd.testing.assert_frame_equal(result.ranking, expected.ranking, atol=1e-4)
    assert result.winner["cell"] == expected.winner["cell"]
    for head in grid.heads.values():
        assert_same(head, home, other_home)


def test_a_grid_is_stacked_if_there_is_a_gpu(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = record_ensemble_sizes(monkeypatch)
    monkeypatch.setattr("pipeline.runtime.executor._has_gpu", lambda: True)
    run_grid(tiny_grid(home, "ema", ("tau=0.07,0.2",)), workers=0)
    assert sizes == [2]
    assert "2 cells × 1 seeds: this process alone, runs of one structure as one model (on the GPU), " in capsys.readouterr().err


def test_different_structures_are_not_stacked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = record_ensemble_sizes(monkeypatch)
    grid = tiny_grid(home, "ema", ("width=8,16", "tau=0.07,0.2,0.5", "batch_size=6,8"))
    result = run_grid(grid, workers=0, strategy="stacked")
    assert sizes == [3] * 4
    assert list(result.ranking["state"]) == ["done"] * 12


def test_cells_with_a_structure_of_their_own_equal_single_heads_bit_for_bit(home: Path, other_home: Path) -> None:
    pairs = ("num_tokens=2,4", "residual=visual,text")
    result = run_grid(tiny_grid(home, pairs=pairs), workers=0, strategy="stacked")
    run_grid(tiny_grid(other_home, pairs=pairs), workers=0)
    assert len(result.ranking) == 4
    for run in home.glob("runs/tiny/*/seed0"):
        for name in ("checkpoint.safetensors", "history.csv"):
            assert (run / name).read_bytes() == (other_home / run.relative_to(home) / name).read_bytes()


def test_halving_prunes_the_same_cells_of_an_ensemble(home: Path, other_home: Path) -> None:
    options: dict[str, Any] = {"seeds": (0, 1), "search": "optuna", "training": {"epochs": 8}}
    pairs = ("lr=1e-2,1e-3,3e-3,1e-6", "weight_decay=0,1e-3")
    expected = run_grid(tiny_grid(other_home, "ema", pairs, **options), workers=0)
    result = run_grid(tiny_grid(home, "ema", pairs, **options), workers=0, strategy="stacked")
    pd.testing.assert_frame_equal(result.ranking, expected.ranking, atol=1e-4)
    assert result.ranking["state"].str.startswith("pruned").sum() >= 2


def test_the_size_of_an_ensemble_is_limited_by_memory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = record_ensemble_sizes(monkeypatch)
    grid = tiny_grid(home, "ema", ("tau=0.07,0.2,0.3,0.4,0.5",))
    monkeypatch.setattr("pipeline.training.heads.free_bytes", lambda device: 2**40)
    each = 0.8 * 2**40 / head_capacity(grid.heads[0, 0])
    monkeypatch.setattr("pipeline.training.heads.free_bytes", lambda device: int(2.5 * each / 0.8))
    assert head_capacity(grid.heads[0, 0]) == 2
    run_grid(grid, workers=0, strategy="stacked", read_test=False)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr("pipeline.training.heads.free_bytes", lambda device: 1)
    assert head_capacity(grid.heads[0, 0]) == 1


def test_an_ensemble_that_does_not_fit_in_memory_is_halved(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def out_of_memory(heads: list[HeadPlan], *arguments: Any, **options: Any) -> Any:
        sizes.append(len(heads))
        if len(heads) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")  # the error that a GPU raises
        return train_heads(heads, *arguments, **options)

    grid = tiny_grid(home, "ema", ("tau=0.07,0.2",))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.studies.search_worker.train_heads", out_of_memory)
        assert not run_grid(grid, workers=0, strategy="stacked").failed
    assert sizes == [2, 1, 1]
    assert all(head.run.is_done for head in grid.heads.values())


@pytest.mark.parametrize("method", papers_methods_or_all())
def test_a_compiled_loss_equals_the_loss(method: str, home: Path, other_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is one graph, compiled once for all steps. The backend here uses torch's kernels and needs no C++ compiler."""
    monkeypatch.setattr("pipeline.training.compiled.COMPILE_BACKEND", "aot_eager")
    plain = [planned(opened(other_home, method), method, {}, {"lr": lr, "epochs": 2}) for lr in (1e-3, 1e-2)]
    compiled = [planned(opened(home, method), method, {}, {"lr": lr, "epochs": 2, "compiled": True}) for lr in (1e-3, 1e-2)]
    for head in plain:
        train_head(head, progress=False)
    counters.clear()
    assert not train_heads(compiled, progress=False)
    phases = trained_phases(plugins.get("methods", method)(plain[0].settings, plain[0].features.shapes))
    assert counters["stats"]["unique_graphs"] == len(phases)
    for pair in zip(compiled, plain, strict=True):
        (ours, our_metrics), (theirs, their_metrics) = (
            evaluated(head.features.home, head.run.path.relative_to(head.features.home)) for head in pair
        )
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE["float32"], rtol=0)
        assert our_metrics == pytest.approx(their_metrics, abs=POINTS["float32"])
