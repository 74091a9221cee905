"""The results table of the report: numbers, intervals, verdicts and labels."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.report_home import ReportHome, make_home
from scipy import stats

from pipeline.cache import open_cache
from pipeline.cache.transfer import import_features
from pipeline.data.manifest_files import write_manifest
from pipeline.report import results_frame, results_table
from pipeline.report.figure_blocks import choose_shown_heads
from pipeline.report.results import TEXT_ONLY_LABEL, collect_results

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


def test_interval_is_that_of_the_seeds_of_both_methods_on_samples_paired_by_id(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    terms: dict[str, list[np.ndarray]] = {"baseline": [], "ema": []}
    for method, strength in (("baseline", 1.0), ("ema", 1.6)):
        for seed in range(3):
            logits = home.logits(strength, seed + len(method))
            home.evaluate(home.train(home.config(method, {}), seed), logits)
            terms[method].append(100.0 * (logits.argmax(axis=1) == home.label))
    above = np.array(terms["ema"]) - np.array(terms["baseline"])
    row = rows_by_label(home)["ema"]
    assert row["acc1_vs_baseline"] == pytest.approx(above.mean())
    # Closed form: the variance over samples, and the t-interval over three seeds.
    half = np.hypot(1.96 * stats.sem(above.mean(axis=0)), stats.t.ppf(0.975, 2) * stats.sem(above.mean(axis=1)))
    assert (row["acc1_high"] - row["acc1_low"]) / 2 == pytest.approx(half, rel=0.1)


def test_samples_of_a_group_are_drawn_together(tmp_path: Path) -> None:
    widths = []
    for name in ("alone", "grouped"):
        home = make_home(tmp_path / name, CLASSES, num_test=120)
        if name == "grouped":  # ten series of twelve samples, all right or all wrong
            samples = [
                dataclasses.replace(each, group=f"series {k % 10}") for k, each in enumerate(home.manifest.samples[:120])
            ]
            write_manifest(dataclasses.replace(home.manifest, samples=(*samples, *home.manifest.samples[120:])), home.path)
        for method in ("baseline", "ema"):
            for seed in range(3):
                is_right = np.arange(120) % 10 < (5 if method == "ema" else 3)
                logits = np.where(is_right[:, None], 1, -1) * np.eye(8)[home.label]
                home.evaluate(home.train(home.config(method, {}), seed), logits)
        row = rows_by_label(home)["ema"]
        widths.append(row["acc1_high"] - row["acc1_low"])
    assert widths[1] == pytest.approx(np.sqrt(12) * widths[0], rel=0.15)


def test_verdict_follows_the_interval(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    for method, strength in (("baseline", 1.5), ("better", 4.0), ("same", 1.5), ("worse", 0.0)):
        add_runs(home, method, strength, seeds=5)
    rows = rows_by_label(home)
    assert rows["better"]["verdict"] == "beats the baseline"
    assert rows["better"]["acc1_low"] > 0
    assert rows["same"]["verdict"] == "not distinguishable"
    assert rows["same"]["acc1_low"] < 0 < rows["same"]["acc1_high"]
    assert rows["worse"]["verdict"] == "falls below the baseline"
    assert rows["worse"]["acc1_high"] < 0


def test_a_verdict_takes_five_seeds_and_an_interval_three(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    for method, seeds in (("baseline", 6), ("one", 1), ("three", 3), ("five", 5)):
        add_runs(home, method, 1.0 if method == "baseline" else 4.0, seeds=seeds)
    rows = rows_by_label(home)
    assert [rows[name]["verdict"] for name in ("one", "three", "five")] == [
        "1 of 5 seeds",
        "3 of 5 seeds",
        "beats the baseline",
    ]
    assert [np.isnan(float(rows[name]["acc1_low"])) for name in ("one", "three", "five")] == [True, False, False]
    assert rows["three"]["reason"] == "it has 3 of 5 seeds that a verdict takes"
    assert [np.isnan(float(rows[name]["p_holm"])) for name in ("one", "three", "five")] == [True, True, False]


def test_p_values_are_adjusted_for_all_rows_that_get_a_verdict(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, num_test=120)
    add_runs(home, "baseline", 1.0, seeds=5)
    add_runs(home, "ema", 4.0, seeds=5)
    smallest = rows_by_label(home)["ema"]["p_holm"]
    assert smallest == pytest.approx(2 / 10_001)
    for number in range(9):  # nine rows more, which differ in a setting of prediction
        for path in tmp_path.glob("runs/toy/ema-*/seed*"):
            (path / f"predictions-test@k={number}.npz").hardlink_to(path / "predictions-test.npz")
            records = json.loads((path / "metrics.json").read_text())
            (path / "metrics.json").write_text(json.dumps({**records, f"test@k={number}": records["test"]}))
    add_runs(home, "cdr", 4.0, seeds=3)  # this row gets no verdict
    assert rows_by_label(home)["ema"]["p_holm"] == pytest.approx(10 * smallest)


def test_metrics_that_older_evaluations_lack_are_a_dash(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0)
    add_runs(home, "ema", 1.0)
    for path in tmp_path.glob("runs/toy/ema-*/seed*/metrics.json"):
        records = json.loads(path.read_text())
        records["test"]["metrics"] |= {"macro_acc": 40.0, "ece": 7.0}
        path.write_text(json.dumps(records))
    shown = results_table(tmp_path, "toy").set_index("method")
    assert list(shown["Macro Acc"]) == ["-", "40.00 ± 0.00"]
    assert list(shown["ECE"]) == ["-", "7.00 ± 0.00"]


def test_samples_are_paired_by_id_not_by_position(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    for seed in range(3):
        logits = home.logits(1.0, seed)
        home.evaluate(home.train(home.config("baseline", {}), seed), logits)
        run = home.train(home.config("ema", {}), seed)
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
    command = f"diffalign train-head --dataset toy --method baseline --image image-{home.caches['image'][:12]}"
    assert rows["ema"]["reason"] == f"no baseline on these features; train one with: {command}"


def test_imported_features_of_texts_are_a_diagnostic_too(tmp_path: Path) -> None:
    """Their identity says so by the modality, not by the rules by which texts were encoded here."""
    home = make_home(tmp_path, CLASSES)
    ids = [sample.id for sample in home.manifest.samples]
    np.save(tmp_path / "theirs.npy", np.random.default_rng(0).normal(size=(len(ids), 12)).astype(np.float32))
    (tmp_path / "theirs.txt").write_text("\n".join(ids))
    done = import_features(tmp_path / "theirs.npy", home.path, dataset="toy", name="theirs", modality="text")
    home.caches["theirs"] = open_cache(done.path).fingerprint
    add_runs(home, "baseline", 4.0, image="theirs")
    add_runs(home, "baseline", 1.0)
    rows = rows_by_label(home)
    assert {label: row["kind"] for label, row in rows.items()} == {"baseline": "image", TEXT_ONLY_LABEL: "text"}
    assert rows["baseline"]["verdict"] == "the baseline"


@pytest.mark.parametrize("train", ["none", "image"])
def test_a_head_that_was_trained_on_is_not_the_baseline(train: str, tmp_path: Path) -> None:
    """It is better on validation than the plain baseline, and has the same method, features and manifest."""
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0)
    add_runs(home, "ema", 1.5)
    config = home.config("baseline", {})
    config = dataclasses.replace(config, training={**config.training, "stage": "joint", "train": train, "init": "0" * 12})
    for seed in range(3):
        run = home.train(config, seed, scores=(80.0, 90.0))
        home.evaluate(run, home.logits(2.0, seed))
    rows = rows_by_label(home)
    label = f"baseline · trained on with --unfreeze {train}"
    assert list(rows) == ["baseline", label, "ema"]
    assert (rows["baseline"]["verdict"], rows[label]["verdict"]) == ("the baseline", "3 of 5 seeds")
    for name in (label, "ema"):
        assert rows[name]["acc1_vs_baseline"] == pytest.approx(rows[name]["acc1"] - rows["baseline"]["acc1"])
    results = collect_results(tmp_path, "toy", "test")
    shown = choose_shown_heads(results, home.manifest).heads
    assert [head.label for head in shown] == ["baseline", "ema"]


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
        for seed in range(5):
            run = home.train(home.config("baseline", {"dropout": dropout}), seed, scores)
            home.evaluate(run, home.logits(strength, seed))
    rows = rows_by_label(home)
    assert rows["baseline · dropout=0.5"]["verdict"] == "the baseline"
    assert rows["baseline · dropout=0.0"]["verdict"] == "beats the baseline"


@pytest.mark.parametrize("select", ["metric", "loss", "last"])
def test_of_candidates_the_best_metric_was_kept(select: str, tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    config = home.config("knn", {})
    config = dataclasses.replace(config, training={**config.training, "select": select})
    run = home.train(config, 0)
    home.evaluate(run, home.logits(1.0, 0))
    history = {"phase": "neighbours", "epoch": range(3), "lr": "", "loss": "", "candidate": range(3)}
    pd.DataFrame({**history, "val_metric": [40.0, 60.0, 50.0], "val_loss": [1.0, 2.0, 0.5]}).to_csv(run.path / "history.csv")
    assert [head.val_metric for head in collect_results(tmp_path, "toy", "test").heads] == [60.0]


def test_the_settings_of_a_stacked_head_are_named_one_by_one(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    for tau in (0.1, 0.2):
        settings = {"head": "ema", "head_settings": f"width=8 tau={tau}", "base": {"dropout": 0.0}}
        home.evaluate(home.train(home.config("stacked", settings), 0), home.logits(1.0, 0))
    assert set(rows_by_label(home)) == {"stacked · head.tau=0.1", "stacked · head.tau=0.2"}


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


def test_metrics_that_an_earlier_evaluation_of_one_seed_does_not_have_are_left_out(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0, seeds=3)
    add_runs(home, "ema", 1.0, seeds=3)
    (path,) = tmp_path.glob("runs/toy/ema-*/seed2/predictions-test.npz")
    with np.load(path) as arrays:
        np.savez_compressed(path, **{name: arrays[name] for name in arrays.files if name != "acc5"})
    row = results_frame(tmp_path, "toy").set_index("method").loc["ema"]
    assert np.isfinite(row["acc1_low"])
    assert np.isnan(row["acc5_low"])


def test_the_five_best_of_five_classes_are_left_out(tmp_path: Path) -> None:
    for count in (5, 6):
        home = make_home(tmp_path / str(count), CLASSES[:count])
        add_runs(home, "baseline", 1.0, seeds=1)
        assert ("Acc-5" in results_table(tmp_path / str(count), "toy")) == (count == 6)
        notes = " ".join(collect_results(tmp_path / str(count), "toy", "test").notes)
        assert ("the 5 best classes are left out: of 5 classes in all" in notes) == (count == 5)


def test_table_shows_spread_only_where_there_is_one(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add_runs(home, "baseline", 1.0, seeds=1)
    add_runs(home, "ema", 1.0, seeds=3)
    shown = results_table(tmp_path, "toy")
    assert list(shown) == ["method", "seeds", "Acc-1", "Acc-1 vs baseline", "Acc-5", "Acc-5 vs baseline", "train s", "verdict"]
    assert "±" not in shown["Acc-1"][0]
    assert "±" in shown["Acc-1"][1]
    assert shown["Acc-1 vs baseline"][0] == "-"
    add_runs(home, "baseline", 1.0, seeds=3)
    assert " to " in results_table(tmp_path, "toy")["Acc-1 vs baseline"][1]
    add_runs(home, "cdr", 1.0, seeds=2)
    shown = results_table(tmp_path, "toy").set_index("method")
    assert " to " not in str(shown.loc["cdr", "Acc-1 vs baseline"])
    assert shown["verdict"].to_dict() == {"baseline": "the baseline", "cdr": "2 of 5 seeds", "ema": "3 of 5 seeds"}


def test_a_baseline_that_is_not_evaluated_on_the_split_is_named_with_the_command(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    trained = home.train(home.config("baseline", {}), 0)
    add_runs(home, "ema", 1.0)
    command = f"diffalign evaluate {trained.path.parent} --split test"
    assert rows_by_label(home)["ema"]["reason"] == (
        f"the baseline on these features is not evaluated on test; do it with: {command}"
    )
