"""The results table of the report: numbers, intervals, verdicts and labels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.report_home import ReportHome, make_home
from scipy import stats

from pipeline.report import results_frame, results_table

CLASSES = [f"class {k}" for k in range(8)]


def rows_by_label(home: ReportHome) -> dict[str, pd.Series]:
    """Return the rows of the results by label."""
    frame = results_frame(home.path, "toy")
    return {str(row["method"]): row for _, row in frame.iterrows()}


def add_runs(home: ReportHome, method: str, strength: float, seeds: int = 3, image: str = "image", **settings: object) -> None:
    """Write trained and evaluated runs of a method; a higher strength is right more often."""
    for seed in range(seeds):
        run = home.train(home.config(method, settings, image), seed)
        home.evaluate(run, home.logits(strength, seed + 10 * len(method)))


def test_means_and_spreads_are_those_of_the_seeds(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    accuracies = []
    for seed in range(3):
        logits = home.logits(1.0, seed)
        home.evaluate(home.train(home.config("baseline", {}), seed), logits)
        accuracies.append(100.0 * np.mean(logits.argmax(axis=1) == home.label))
    row = rows_by_label(home)["baseline"]
    assert row["acc1"] == pytest.approx(np.mean(accuracies))
    assert row["acc1_std"] == pytest.approx(stats.tstd(accuracies))
    assert (row["seeds"], row["train_seconds"], row["verdict"]) == (3, 3.0, "the baseline")
    assert np.isnan(row["acc1_vs_baseline"])


def test_interval_is_the_paired_bootstrap_of_terms_averaged_over_seeds(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    terms: dict[str, list[np.ndarray]] = {"baseline": [], "ema": []}
    for method, strength in (("baseline", 1.0), ("ema", 1.6)):
        for seed in range(2):
            logits = home.logits(strength, seed + len(method))
            home.evaluate(home.train(home.config(method, {}), seed), logits)
            terms[method].append(100.0 * (logits.argmax(axis=1) == home.label))
    above = np.mean(terms["ema"], axis=0) - np.mean(terms["baseline"], axis=0)
    oracle = stats.bootstrap((above,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1))
    row = rows_by_label(home)["ema"]
    assert row["acc1_vs_baseline"] == pytest.approx(above.mean())
    assert row["acc1_low"] == pytest.approx(oracle.confidence_interval.low, abs=0.7)
    assert row["acc1_high"] == pytest.approx(oracle.confidence_interval.high, abs=0.7)


def test_verdict_follows_the_interval(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    for method, strength in (("baseline", 1.5), ("better", 4.0), ("same", 1.5), ("worse", 0.0)):
        add_runs(home, method, strength)
    rows = rows_by_label(home)
    assert rows["better"]["verdict"] == "beats the baseline"
    assert rows["better"]["acc1_low"] > 0
    assert rows["same"]["verdict"] == "not distinguishable"
    assert rows["same"]["acc1_low"] < 0 < rows["same"]["acc1_high"]
    assert rows["worse"]["verdict"] == "falls below the baseline"
    assert rows["worse"]["acc1_high"] < 0


def test_samples_are_paired_by_id_not_by_position(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    logits = home.logits(1.0, 0)
    home.evaluate(home.train(home.config("baseline", {}), 0), logits)
    run = home.train(home.config("ema", {}), 0)
    home.evaluate(run, logits)
    path = run.path / "predictions-test.npz"
    with np.load(path) as arrays:
        np.savez_compressed(path, **{name: arrays[name][::-1] for name in arrays.files})
    row = rows_by_label(home)["ema"]
    assert (row["acc1_vs_baseline"], row["acc1_low"], row["acc1_high"]) == (0.0, 0.0, 0.0)


def test_no_interval_when_the_samples_differ(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0, seeds=1)
    add_runs(home, "ema", 1.0, seeds=1)
    (path,) = tmp_path.glob("runs/toy/ema-*/seed0/predictions-test.npz")
    with np.load(path) as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed["ids"] = np.array([f"other {k}" for k in range(len(changed["ids"]))])
    np.savez_compressed(path, **changed)
    row = rows_by_label(home)["ema"]
    assert row["reason"] == "it was not evaluated on the same examples as the baseline"
    assert np.isnan(row["acc1_low"])


def test_configurations_and_overrides_are_rows_of_their_own(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0, seeds=1, scale="per_dim")
    add_runs(home, "seda", 1.0, seeds=2, num_steps=1000, gamma=1.0)
    add_runs(home, "seda", 1.2, seeds=1, num_steps=1000, gamma=1.5)
    run = home.train(home.config("ema", {"tau": 0.1}), 0)
    home.evaluate(run, home.logits(1.0, 1))
    home.evaluate(run, home.logits(1.0, 2), name="test@draws=8,num_steps=4")
    assert {label: row["seeds"] for label, row in rows_by_label(home).items()} == {
        "baseline": 1,
        "ema": 1,
        "ema · draws=8, num_steps=4": 1,
        "seda · gamma=1.0": 2,
        "seda · gamma=1.5": 1,
    }


def test_text_only_run_is_a_diagnostic_and_no_baseline(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 4.0, image="text")
    add_runs(home, "ema", 1.0)
    rows = rows_by_label(home)
    label = "text only (diagnostic: reads test text)"
    assert (rows[label]["kind"], rows[label]["verdict"]) == ("text", "no claim")
    assert list(rows) == ["ema", label]
    command = "diffalign train-head --dataset toy --method baseline"
    assert rows["ema"]["reason"] == f"no baseline on these features; train one with: {command}"


def test_runs_whose_image_cache_is_gone_make_no_claim(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    add_runs(home, "baseline", 0.0)
    add_runs(home, "ema", 4.0)
    shutil.rmtree(tmp_path / "caches")
    assert {row["kind"] for row in rows_by_label(home).values()} == {"unknown"}
    assert {row["verdict"] for row in rows_by_label(home).values()} == {"no claim"}


def test_the_baseline_that_others_are_compared_with_is_best_on_validation(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    for dropout, strength, scores in ((0.0, 4.0, (10.0, 20.0)), (0.5, 1.0, (30.0, 60.0))):
        run = home.train(home.config("baseline", {"dropout": dropout}), 0, scores)
        home.evaluate(run, home.logits(strength, 1))
    rows = rows_by_label(home)
    assert rows["baseline · dropout=0.5"]["verdict"] == "the baseline"
    assert rows["baseline · dropout=0.0"]["verdict"] == "beats the baseline"


def test_unfinished_and_unevaluated_runs_are_left_out(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0, seeds=2)
    (tmp_path / "runs" / "toy").mkdir(exist_ok=True)
    home.train(home.config("ema", {}), 0)
    home.train(home.config("baseline", {}), 2).path.joinpath("done").unlink()
    assert {label: row["seeds"] for label, row in rows_by_label(home).items()} == {"baseline": 2}
    assert results_table(tmp_path, "toy", "val").empty


def test_no_runs_is_an_error_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no runs; train one with: diffalign train-head --dataset toy --method baseline"):
        results_table(tmp_path, "toy")


def test_predictions_that_do_not_fit_the_record_are_refused(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0, seeds=1)
    add_runs(home, "ema", 1.0, seeds=1)
    (path,) = tmp_path.glob("runs/toy/ema-*/seed0/predictions-test.npz")
    with np.load(path) as arrays:
        np.savez_compressed(path, **{**arrays, "acc1": arrays["acc1"] / 100.0})
    with pytest.raises(ValueError, match=r"predictions-test\.npz does not fit metrics\.json \(acc1\)"):
        results_table(tmp_path, "toy")
    path.unlink()
    with pytest.raises(ValueError, match=r"predictions-test\.npz is missing"):
        results_table(tmp_path, "toy")


def test_table_shows_spread_only_where_there_is_one(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0, seeds=1)
    add_runs(home, "ema", 1.0, seeds=2)
    shown = results_table(tmp_path, "toy")
    assert list(shown) == ["method", "seeds", "Acc-1", "Acc-1 vs baseline", "Acc-5", "Acc-5 vs baseline", "train s", "verdict"]
    assert "±" not in shown["Acc-1"][0]
    assert "±" in shown["Acc-1"][1]
    assert shown["Acc-1 vs baseline"][0] == "-"
    assert " to " in shown["Acc-1 vs baseline"][1]


def test_a_baseline_that_is_not_evaluated_on_the_split_is_named_with_the_command(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    trained = home.train(home.config("baseline", {}), 0)
    add_runs(home, "ema", 1.0)
    command = f"diffalign evaluate {trained.path.parent} --split test"
    assert rows_by_label(home)["ema"]["reason"] == (
        f"the baseline on these features is not evaluated on test; do it with: {command}"
    )
