"""Parts of the training split: nested, by class, part of a run's identity; and the study that compares heads on them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run as run_command
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings, train_tiny

from pipeline.data.manifest import Manifest
from pipeline.data.splits import by_fraction
from pipeline.evaluation.evaluate import evaluate
from pipeline.report.comparison import results_frame
from pipeline.runtime.runs import find_runs
from pipeline.studies.data_ablation import compare_fractions
from pipeline.training.features import open_features
from pipeline.workspace import Workspace


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def test_fractions_are_nested_and_by_class(tiny_manifest: Manifest) -> None:
    samples = tiny_manifest.split("train")
    previous: set[str] = set()
    for fraction, per_class in ((0.01, 1), (0.25, 2), (0.5, 3), (0.6, 4), (0.75, 5), (1.0, 6)):
        kept = by_fraction(samples, fraction)
        assert Counter(sample.labels for sample in kept) == {(label,): per_class for label in range(4)}
        assert kept == [sample for sample in samples if sample in kept]
        assert previous <= {sample.id for sample in kept}
        previous = {sample.id for sample in kept}
    several = [replace(sample, labels=(0, 1) if row % 3 else (2,)) for row, sample in enumerate(samples)]
    assert len(by_fraction(several, 0.25)) == 6
    for fraction in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            by_fraction(samples, fraction)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("control", ["", ":shuffled-across", ":noise"])
def test_training_reads_the_fraction_alone_and_validation_all(tiny_home: Path, control: str, window: int) -> None:
    caches = caches_by_key(tiny_home)
    features = open_features(tiny_home, "tiny", "ema", {**caches, "text": caches["text"] + control}, fraction=0.5)
    expected = {sample.id for sample in by_fraction(features.manifest.split("train"), 0.5)}
    train, val = features.splits(window, seed=0)
    assert (set(train.ids), len(train.ids), features.num_train) == (expected, 12, 12)
    assert len(val.ids) == 4
    if control == ":shuffled-across":  # a text comes from the same part
        whole = open_features(tiny_home, "tiny", "ema", caches).train
        texts = {tuple(text): sample_id for text, sample_id in zip(whole.columns["text"].tolist(), whole.ids, strict=True)}
        found = {texts[tuple(text)] for table in train.tables() for text in table.columns["text"].tolist()}
        assert found == expected


def test_a_part_is_another_run_with_a_row_and_a_baseline_of_its_own(home: Path) -> None:
    workspace, caches = Workspace(home), caches_by_key(home)
    image, text = caches["image"], caches["text"]
    for method in ("baseline", "ema"):
        train = {**FAST_TRAINING, "epochs": 2}
        given = small_settings(method)
        whole = workspace.train_head("tiny", method, train=train, image=image, text=text, settings=given)
        half = workspace.train_head("tiny", method, train=train, fraction=0.5, image=image, text=text, settings=given)
        again = train_tiny(home, method, training={"epochs": 2})
        assert whole.path == again.path != half.path
        assert "train_fraction" not in json.loads((whole.path / "config.json").read_text())
        assert half.config.train_fraction == 0.5
        for run in (whole, half):
            run.evaluate("test")
    frame = results_frame(home, "tiny").set_index("method")
    assert set(frame.index) == {name + part for name in ("baseline", "ema") for part in ("", " · 50 % of the training data")}
    for part in ("", " · 50 % of the training data"):
        own, base = (frame["acc1"].to_dict()[name + part] for name in ("ema", "baseline"))
        assert frame["acc1_vs_baseline"].to_dict()["ema" + part] == pytest.approx(own - base)


def test_the_study_compares_with_the_baseline_on_the_same_part(home: Path) -> None:
    table = compare_fractions(
        home, "tiny", "ema", "head", [0, 1, 2], [0.5, 1.0], caches_by_key(home), {"width": 16},
        {**FAST_TRAINING, "epochs": 2}, progress=False,
    )  # fmt: skip
    assert table["training samples"].tolist() == [12, 24]
    assert table["verdict"].tolist() == ["3 of 5 seeds"] * 2
    scores: dict[tuple[str, float], list[float]] = {}
    for run in find_runs(home, "tiny"):
        key = run.config().method, run.config().train_fraction
        scores.setdefault(key, []).append(evaluate(home, run, "test", {})["metrics"]["acc1"])
    assert {key: len(values) for key, values in scores.items()} == {
        (name, part): 3 for name in ("ema", "baseline") for part in (0.5, 1.0)
    }
    for _, row in table.iterrows():
        own, base = (np.mean(scores[name, row["fraction"]]) for name in ("ema", "baseline"))
        assert float(row["Acc-1 ema"].split()[0]) == pytest.approx(own, abs=0.006)
        assert float(row["Acc-1 baseline"].split()[0]) == pytest.approx(base, abs=0.006)
        assert float(row["difference"].split()[0]) == pytest.approx(own - base, abs=0.006)


def test_the_command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    caches = caches_by_key(home)
    common = ["ablate", "data", "tiny", "--home", str(home), "--image", caches["image"], "--text", caches["text"], "--quiet"]
    options = ["--method", "ema", "--set", "width=16", "--train", "epochs=1", "--seeds", "0", "--split", "val", "--json"]
    assert run_command([*common, *options, "--fractions", "0.5,1"], monkeypatch) == 0
    assert [row["fraction"] for row in json.loads(capsys.readouterr().out)] == [0.5, 1.0]
    assert run_command([*common, *options, "--fractions", "2"], monkeypatch) == 2
    assert "must be above 0 and at most 1, not 2.0" in capsys.readouterr().err
    assert run_command([*common, "--method", "baseline"], monkeypatch) == 2
    assert "choose another method" in capsys.readouterr().err
