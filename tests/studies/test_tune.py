"""Tests of the search of settings: equal budgets, ordinary runs, validation alone, every trial kept, and a score that holds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.command_line import run
from helpers.feature_caches import make_cache, make_manifest
from helpers.tiny_heads import caches_by_key, small_settings

from pipeline.data.folds import write_folds
from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import flatten
from pipeline.runtime.version import code_version
from pipeline.studies import search
from pipeline.studies.grid import plan_grid, read_axes, read_cells
from pipeline.studies.tune import Budget, TuneResult, _trial_table, tune
from pipeline.studies.tuning_space import DEFAULT_SPACE, TuningSpace, read_space
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.tuned import write_tuned
from pipeline.types import Shapes

LARGEST_SHAPES: Shapes = {"image": (1280,), "text": (384,), "label": (), "classes": (80,)}  # of the packaged encoders
METHODS = ("baseline", "seda", "own_method")


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


@pytest.fixture
def space(tmp_path: Path) -> TuningSpace:
    """Return small spaces; own_method, the method from outside, has no entry."""
    return read_space(write_space(tmp_path / "space.yaml"))


def write_space(path: Path, **training: list[Any]) -> Path:
    """Write spaces of small heads, and return the file; training replaces its settings of training."""
    methods: dict[str, Any] = {
        method: {key: [value] for key, value in flatten(small_settings(method)).items()}
        for method in plugins.names("methods")
        if method != "own_method"
    }
    methods["baseline"] |= {"dropout": [0.0, 0.5]}
    methods["seda"] |= {"w_sc": [0.1, 1.0], "dropout": [0.0, 0.3]}
    shared = {"lr": [0.001, 0.01, 0.1], "weight_decay": [0.0, 0.01], "epochs": [3], "batch_size": [8], **training}
    content = {"training": shared, "newcomers": {"dropout": [0.0, 0.2], "tau": [0.1]}, "methods": methods}
    path.write_text(yaml.safe_dump(content))
    return path


def tune_tiny(home: Path, space: TuningSpace, methods: Sequence[str] = METHODS, **budget: Any) -> TuneResult:
    caches = caches_by_key(home)
    full = Budget(**{"points": 4, "seeds": (0,), **budget})
    return tune(home, "tiny", methods, space, full, workers=0, image=caches["image"], text=caches["text"])


def scores_of_single_heads(home: Path, dataset: str, method: str, settings: Sequence[str], seeds: Sequence[int]) -> list[float]:
    """Train each point by itself and return its mean accuracy on validation, as `evaluate` computes it."""
    fields = plugins.get("methods", method).Config.__dataclass_fields__
    scores = []
    for point in map(json.loads, settings):
        own = {field: value for field, value in point.items() if field in fields}
        training = {field: value for field, value in point.items() if field not in fields}
        config, train_config = resolve_head_settings(dataset, method, "head", own, training)
        caches = caches_by_key(home)
        runs = [
            train_head(plan_head(home, dataset, method, config, train_config, seed, caches), progress=False) for seed in seeds
        ]
        scores.append(float(np.mean([evaluate(home, each, "val", {})["metrics"]["acc1"] for each in runs])))
    return scores


@pytest.mark.slow
def test_all_methods_get_the_same_budget_and_the_best_point_on_validation_wins(
    home: Path, tiny_home: Path, space: TuningSpace, tmp_path: Path
) -> None:
    result = tune_tiny(home, space, seeds=(0, 1))
    trials = pd.read_csv(result.trials)
    assert trials.groupby("method").size().to_dict() == dict.fromkeys(METHODS, 4 * 2)
    assert set(trials["state"]) == {"done"}
    assert set(trials["code"]) == {code_version()}
    alone = Path(shutil.copytree(tiny_home, tmp_path / "alone"))
    for method in METHODS:
        points = trials[trials["method"] == method].drop_duplicates("point").sort_values("point")["settings"].tolist()
        assert len(set(points)) == 4
        assert {json.loads(point)["epochs"] for point in points} == {3}
        expected = scores_of_single_heads(alone, "tiny", method, points, (0, 1))
        found = trials[trials["method"] == method].groupby("point")["score"].mean()
        np.testing.assert_allclose(found, expected, atol=1e-4)  # metrics are float32 means
        entry = result.entries[method]
        assert entry["selection"]["score"] == pytest.approx(max(expected), abs=1e-4)
        best = [point for point, score in zip(points, expected, strict=True) if score == max(expected)]
        assert {**entry["settings"], **entry["training"]} in map(json.loads, best)
    assert not list(home.rglob("test_reads.jsonl"))


@pytest.mark.slow
def test_a_search_that_was_interrupted_ends_as_if_it_was_not(
    home: Path, tiny_home: Path, space: TuningSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def interrupted(job: Any) -> Any:
        calls.append(job)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return train_group(job)

    train_group = search.train_group
    monkeypatch.setattr(search, "train_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_tiny(home, space)
    monkeypatch.undo()
    before = {done: done.stat().st_mtime_ns for done in home.glob("runs/tiny/*/seed0/done")}
    assert len(before) == 5
    resumed = tune_tiny(home, space)
    whole = tune_tiny(Path(shutil.copytree(tiny_home, tmp_path / "whole")), space)
    assert resumed.entries == whole.entries
    assert {done: done.stat().st_mtime_ns for done in before} == before
    tables = [pd.read_csv(each.trials).drop(columns="seconds") for each in (resumed, whole)]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    again = tune_tiny(home, space)
    assert again.trials.read_bytes() == resumed.trials.read_bytes()


def test_the_first_point_is_the_defaults_within_the_budget(home: Path, space: TuningSpace) -> None:
    trials = pd.read_csv(tune_tiny(home, space, ("baseline", "seda"), points=2).trials)
    for method, own in trials.groupby("method"):
        config, training = resolve_head_settings("tiny", str(method), "head", {}, {})
        defaults = {**vars(config), **vars(training)}
        first = json.loads(own.loc[own["point"] == 0, "settings"].item())
        searched = {field for field, values in space.axes(str(method)).items() if len(values) > 1}
        assert {field: first[field] for field in searched} == {field: defaults[field] for field in searched}
        assert all(first[field] == values[0] for field, values in space.axes(str(method)).items() if field not in searched)


def test_more_points_include_fewer_and_small_spaces_are_tried_whole(home: Path, space: TuningSpace) -> None:
    few, many, all_of_them = (
        set(pd.read_csv(tune_tiny(home, space, ("baseline",), points=points).trials)["settings"]) for points in (2, 5, 99)
    )
    assert few < many < all_of_them
    assert len(all_of_them) == 1 + 3 * 2 * 2  # the defaults, lr=0.001 among them, are not in the space


@pytest.mark.slow
def test_folds_score_every_training_and_validation_sample_once(home: Path, space: TuningSpace) -> None:
    result = tune_tiny(home, space, ("baseline", "ema"), folds=3)
    trials = pd.read_csv(result.trials)
    assert set(trials["split"]) == {f"tiny.fold{fold}of3" for fold in range(3)}
    for method, entry in result.entries.items():
        own = trials[trials["method"] == method]
        assert len(own) == 4 * 3
        points = own.drop_duplicates("point").sort_values("point")["settings"].tolist()
        per_fold = [scores_of_single_heads(home, name, method, points, (0,)) for name in sorted(set(trials["split"]))]
        np.testing.assert_allclose(own.groupby("point")["score"].mean(), np.mean(per_fold, axis=0), atol=1e-4)
        assert entry["selection"]["score"] == pytest.approx(np.mean(per_fold, axis=0).max(), abs=1e-4)
    assert not list(home.rglob("test_reads.jsonl"))
    assert not list(home.glob("runs/tiny/*"))  # the reports on the dataset do not mix the folds' runs with its own


@pytest.mark.parametrize("folds", [0, 2])
def test_features_of_the_test_split_change_nothing(folds: int, tmp_path: Path) -> None:
    """Poison: in the second home, the features of all test samples, of images and of texts, are NaN."""
    results = []
    features = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
    for name in ("healthy", "poisoned"):
        manifest = make_manifest(tmp_path / name, 80)
        if name == "poisoned":
            features[[sample.split == "test" for sample in manifest.samples]] = np.nan
        make_cache(tmp_path / name, manifest, features)
        space = read_space(write_space(tmp_path / f"{name}.yaml"))
        budget = Budget(points=3, seeds=(0,), folds=folds)
        results.append(tune(tmp_path / name, "toy", ("baseline", "ema"), space, budget, image="toy", text="toy", workers=0))
        assert not list((tmp_path / name).rglob("test_reads.jsonl"))
    tables = [pd.read_csv(result.trials)[["method", "point", "split", "score", "loss"]] for result in results]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert tables[0]["score"].notna().all()


def test_halving_lists_the_points_that_it_gave_up(home: Path, tmp_path: Path) -> None:
    space = read_space(write_space(tmp_path / "long.yaml", epochs=[8], lr=[0.01, 1e-6, 1e-7]))
    result = tune_tiny(home, space, ("baseline",), points=8, search="optuna", folds=2)
    trials = pd.read_csv(result.trials)
    first, second = (trials[trials["split"] == f"tiny.fold{fold}of2"] for fold in range(2))
    assert len(first) == 8
    assert set(first["state"]) == {"done", "pruned"}
    assert set(second["point"]) == set(first[first["state"] == "done"]["point"])
    means = trials[trials["state"] == "done"].groupby("point")["score"].mean()
    assert result.entries["baseline"]["selection"]["score"] == means.max()


@pytest.mark.slow
@pytest.mark.parametrize("folds", [0, 3])
def test_the_code_as_it_stands_reproduces_the_score_of_tuned_settings(
    folds: int, home: Path, tiny_home: Path, space: TuningSpace, tmp_path: Path
) -> None:
    """A home without runs takes the tuned file of another one, trains with --preset tuned, and gets the same score.

    Every method with text has settings of its own to be written and read; folds are the same for all.
    """
    methods = [name for name in plugins.names("methods") if "text" in plugins.get("methods", name).needs or name == "baseline"]
    methods = ["baseline", "ema", "seda"] if folds else methods
    result = tune_tiny(home, space, methods, points=2, folds=folds)
    other = Path(shutil.copytree(tiny_home, tmp_path / "other"))
    write_tuned(other, "tiny", yaml.safe_load(result.tuned_file.read_text())["tuned"])
    names = write_folds(other, "tiny", folds) if folds else ["tiny"]
    for method in methods:
        settings, training = resolve_head_settings("tiny", method, "tuned", {}, {}, other)
        scores = []
        for name in names:
            plan = plan_head(other, name, method, settings, training, 0, caches_by_key(other))
            assert not plan.run.is_done
            scores.append(evaluate(other, train_head(plan, progress=False), "val", {})["metrics"]["acc1"])
        assert np.mean(scores) == pytest.approx(result.entries[method]["selection"]["score"], abs=1e-4), method


@pytest.mark.slow
@pytest.mark.parametrize("folds", [0, 2])
def test_the_check_trains_again_and_refuses_a_score_that_does_not_hold(
    folds: int, home: Path, space: TuningSpace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tune_tiny(home, space, ("baseline", "seda"), points=2, seeds=(0, 1), folds=folds)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    command = ["tune", "tiny", "--methods", "baseline,seda", "--check", "--json", "--home", str(home), "--workers", "0"]
    assert run(command, monkeypatch) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in rows] == ["baseline", "seda"]
    for row in rows:
        assert row["today"] == pytest.approx(row["recorded"]) == result.entries[row["method"]]["selection"]["score"]
        assert row["code"] == code_version()
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()} == before
    stale = dict(result.entries["seda"])
    stale["selection"] = {**stale["selection"], "score": stale["selection"]["score"] - 1.2}
    write_tuned(home, "tiny", {"seda": stale})
    assert run(command, monkeypatch) == 2
    assert "does not reproduce the recorded score of seda" in capsys.readouterr().err


def test_trials_of_other_code_are_counted(home: Path, space: TuningSpace, caplog: pytest.LogCaptureFixture) -> None:
    first = pd.read_csv(tune_tiny(home, space, ("baseline",)).trials)
    assert "other code" not in caplog.text
    done = home / first["run"].iloc[0] / "done"
    done.write_text(json.dumps({**json.loads(done.read_text()), "code": "0.0.1 abc"}))
    trials = pd.read_csv(tune_tiny(home, space, ("baseline",)).trials)
    assert "baseline: 1 of 4 trials were trained by other code" in caplog.text
    assert trials["code"].iloc[0] == "0.0.1 abc"


@pytest.mark.parametrize("method", read_space(DEFAULT_SPACE).methods)
def test_the_shipped_spaces_hold_nothing_impossible(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda _: None)  # random numbers take most of the time
    space = read_space(DEFAULT_SPACE)
    axes = space.axes(method)
    cells = read_cells("openmoji", method, "head", axes, {}, {}, min(500, int(np.prod([len(each) for each in axes.values()]))))
    corners = {tuple(axes[field]) for field in axes}
    assert all(len(set(values)) == len(values) for values in corners)
    for cell in cells[:: max(1, len(cells) // 8)]:
        plugins.get("methods", method)(cell.settings, LARGEST_SHAPES)


def test_pairs_of_values_of_seda_that_could_contradict_each_other_do_not() -> None:
    axes = read_space(DEFAULT_SPACE).axes("seda")
    related = {
        field: axes[field] for field in ("stages", "stage_order", "num_steps", "stage_step", "train_min_step", "sample_steps")
    }
    assert len(read_cells("openmoji", "seda", "head", related, {}, {})) == np.prod([len(values) for values in related.values()])
    build = plugins.get("methods", "seda")
    for interaction, residual, adapter, width in product(
        *(axes[key] for key in ("interaction", "residual", "adapter", "width"))
    ):
        build(build.Config(interaction=interaction, residual=residual, adapter=adapter, width=width), LARGEST_SHAPES)


def test_a_method_without_an_entry_gets_its_grid_and_the_usual_settings(space: TuningSpace) -> None:
    assert "own_method" not in space.methods
    assert space.axes("own_method") == {
        "lr": (0.001, 0.01, 0.1),
        "weight_decay": (0.0, 0.01),
        "epochs": (3,),
        "batch_size": (8,),
        "dropout": (0.0, 0.2),  # not tau, which it does not have
        "w_text": (0.1, 0.3, 1.0, 3.0),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: {}", "unknown part 'method'; .*did you mean 'methods'"),
        ("training: [lr]", "training must be a mapping"),
        ("methods: {ema: 3}", "ema must be a mapping"),
        ("training: {epochs: [20, 40]}", "give one number of epochs, under training"),
        ("methods: {ema: {epochs: [40]}}", "give one number of epochs, under training"),
        ("methods: {ema: {taus: [0.1]}}", r"space\.yaml, ema: unknown grid field 'taus'"),
        ("training: {lr: [fast]}", r"space\.yaml, ema: setting 'lr' is 'fast'"),
    ],
)
def test_a_faulty_space_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_space(tmp_path / "space.yaml").axes("ema")


@pytest.mark.parametrize("folds", [1, 99])
def test_impossible_numbers_of_folds_are_refused(folds: int, home: Path, space: TuningSpace) -> None:
    with pytest.raises(UserError, match=r"--folds must be in 2\.\.28"):
        tune_tiny(home, space, folds=folds)


def test_the_command_prints_what_the_file_of_the_home_holds(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = caches_by_key(home)
    command = [
        "tune",
        "tiny",
        "--methods",
        "baseline,own_method",
        "--points",
        "2",
        "--space",
        str(write_space(tmp_path / "s.yaml")),
    ]
    command += ["--home", str(home), "--workers", "0", "--image", caches["image"], "--text", caches["text"]]
    assert run(command, monkeypatch) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == yaml.safe_load((home / "tuned" / "tiny.yaml").read_text())
    assert run([*command, "--json"], monkeypatch) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tuned"] == yaml.safe_load(printed)["tuned"]
    markdown = Path(shown["trials"]).with_suffix(".md").read_text()
    assert "Trials of baseline" in markdown
    assert "the test split was not read" in markdown


def test_trials_that_fail_are_listed_and_end_the_command_with_an_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = caches_by_key(home)
    space = write_space(tmp_path / "s.yaml", lr=[0.01, 1e30], weight_decay=[1.0])
    command = ["tune", "tiny", "--methods", "baseline", "--points", "99", "--space", str(space), "--home", str(home)]
    assert run([*command, "--workers", "0", "--image", caches["image"], "--text", caches["text"]], monkeypatch) == 2
    printed = capsys.readouterr()
    assert "2 trials failed, the first is" in printed.err
    assert yaml.safe_load(printed.out)["tuned"]["baseline"]["training"]["lr"] == 0.01
    (table,) = (home / "reports" / "tiny").glob("tune-*.csv")
    assert pd.read_csv(table)["state"].value_counts().to_dict() == {"done": 3, "failed": 2}


def test_a_trial_that_cannot_begin_is_a_row_without_code(home: Path) -> None:
    """Its folder does not exist; the other rows and the reasons are still written."""
    axes = read_axes("baseline", {"lr": [1e-3, 1e-2]})
    image = caches_by_key(home)["image"]
    grid = plan_grid(home, "tiny", "baseline", axes, (0,), settings={}, training={"epochs": 1}, image=image, text="none")
    cells = pd.DataFrame(
        {"cell": [0, 1], "seed": [0, 0], "state": ["failed", "failed"], "val_acc1": [math.nan] * 2, "val_loss": [math.nan] * 2}
        | {
            "seconds": [math.nan] * 2,
            "reason": ["no cache"] * 2,
            "run": ["runs/tiny/baseline-0/seed0", "runs/tiny/baseline-1/seed0"],
        }
    )
    table = _trial_table(grid, cells, [0, 1])
    assert table["code"].tolist() == ["", ""]
    assert table["reason"].tolist() == ["no cache"] * 2
