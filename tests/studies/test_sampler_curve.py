"""Tests of sampler curves: the points, the accuracies, the times, the files and the command."""

from __future__ import annotations

import json
import math
import shutil
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.command_line import run as run_cli
from helpers.pages import Page
from helpers.tiny_heads import small_settings, train_tiny
from torch import Tensor

from pipeline.evaluation.evaluate import evaluate, read_metrics
from pipeline.nn.denoisers import PFIN
from pipeline.report import write_report
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder
from pipeline.studies.sampler_curve import SamplerPoint, curve_points, parse_points, write_sampler_curve


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the tiny home that may be written to; timing is shortened."""
    monkeypatch.setattr("pipeline.studies.sampler_curve.MIN_TIMED_SECONDS", 0.02)
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1500, [1, 2, 5, 10, 20, 50, 1500]),
        (50, [1, 2, 5, 10, 20, 50]),
        (7, [1, 2, 5, 7]),
        (1, [1]),
    ],
)
def test_points_are_every_s_up_to_t_once_and_the_ancestral_chain(num_steps: int, expected: list[int]) -> None:
    points = curve_points(num_steps)
    assert len(set(points)) == len(points)
    for draws in (1, 8):
        assert [point.steps for point in points if point.sampler == "ddim" and point.draws == draws] == expected
        assert [point for point in points if point.sampler == "ancestral" and point.draws == draws] == [
            SamplerPoint("ancestral", num_steps, draws)
        ]


def test_slow_points_are_measured_only_when_they_are_asked_for() -> None:
    usual = parse_points("", 1500)
    assert set(usual) < set(parse_points("all", 1500)) == set(curve_points(1500))
    assert [point for point in usual if point.steps * point.draws > 400] == [SamplerPoint("ancestral", 1500, 1)]
    assert sum(point.steps * point.draws for point in usual) == 9 * (1 + 2 + 5 + 10 + 20 + 50) + 1500
    assert parse_points("", 20) == curve_points(20)
    chosen = [SamplerPoint("ddim", 5, 1), SamplerPoint("ddim", 20, 8)]
    chosen += [SamplerPoint("ancestral", 1500, 1), SamplerPoint("ancestral", 1500, 2)]
    assert parse_points("5, 20x8,ancestral,5,ancestralx2", 1500) == chosen


@pytest.mark.parametrize("text", ["0", "1501", "5x0", "x", "five", "1,,2", "5x8x2", "²", "-1"])
def test_words_that_are_no_points_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"give all, or a list of S, SxK, ancestral and ancestralxK with S steps, 1 to 1500"):
        parse_points(text, 1500)


def test_the_command_measures_the_points_that_it_is_given(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_tiny(home, "cdr")
    arguments = ["evaluate", str(run.path), "--home", str(home), "--points", "2,5x3"]
    assert run_cli([*arguments, "--sampler-curve"], monkeypatch) == 0
    _, *rows, _ = capsys.readouterr().out.splitlines()
    assert [row.split()[:3] for row in rows] == [["ddim", "2", "1"], ["ddim", "5", "3"]]
    assert run_cli(arguments, monkeypatch) == 2
    assert "--points belongs to --sampler-curve: give that too, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["cdr", "marnet", "seda"])
def test_accuracies_are_those_of_evaluate(method: str, home: Path, tmp_path: Path) -> None:
    run = train_tiny(home, method)
    other = Path(shutil.copytree(home, tmp_path / "other"))
    curve = write_sampler_curve(home, run, "val", {}, progress=False)
    assert curve.table == run.path / "sampler-curve-val.csv"
    pd.testing.assert_frame_equal(pd.read_csv(curve.table), curve.rows)
    assert len(curve.rows) == 2 * (5 + 1)
    copy = RunFolder.at(other / run.path.relative_to(home))
    for row in curve.rows.to_dict("records"):
        steps = {"sample_steps": str(row["steps"])} if row["sampler"] == "ddim" else {}
        alone = evaluate(other, copy, "val", {"sampler": str(row["sampler"]), "draws": str(row["draws"]), **steps})
        assert {name: row[name] for name in alone["metrics"]} == alone["metrics"]
        assert row["n"] == alone["n"] == 4
    assert read_metrics(run).keys() == read_metrics(copy).keys()
    for path in sorted(run.path.glob("predictions-val*.npz")):
        ours, theirs = np.load(path), np.load(copy.path / path.name)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)


def test_times_are_medians_of_passes_and_grow_with_the_steps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, forward = [0.0], PFIN.forward

    def forward_in_a_millisecond_a_sample(self: PFIN, x_n: Tensor, e: Tensor, context: Any) -> Tensor:
        now[0] += 0.001 * len(x_n)
        return forward(self, x_n, e, context)

    monkeypatch.setattr(PFIN, "forward", forward_in_a_millisecond_a_sample)
    monkeypatch.setattr("pipeline.studies.sampler_curve.time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = write_sampler_curve(home, train_tiny(home, "seda"), "val", {}, progress=False).rows
    assert set(rows["batch"]) == {4}
    assert set(rows["threads"]) == {1}
    steps = (rows["steps"] * rows["draws"]).to_numpy(float)
    for name in ("ms", "ms_min", "ms_max"):
        np.testing.assert_allclose(rows[name], steps)
    assert list(rows["passes"]) == [max(5, math.ceil(20 / (4 * each) - 1e-9)) for each in steps]  # of 20 ms together


def test_a_time_is_the_median_of_the_passes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, seconds = [0.0], cycle([0.4, 3.6, 0.8, 1.2, 2.0])

    def pass_of_some_seconds(*_: Any, **__: Any) -> None:
        now[0] += next(seconds)

    monkeypatch.setattr("pipeline.studies.sampler_curve.predict", pass_of_some_seconds)
    monkeypatch.setattr("pipeline.studies.sampler_curve.time", SimpleNamespace(perf_counter=lambda: now[0]))
    rows = write_sampler_curve(home, train_tiny(home, "seda"), "val", {}, progress=False).rows
    for name, expected in {"ms_min": 100.0, "ms": 300.0, "ms_max": 900.0, "passes": 5}.items():  # of a batch of four samples
        np.testing.assert_allclose(rows[name], expected)


def test_the_test_split_is_read_for_its_evaluations_alone_and_logged(home: Path) -> None:
    run = train_tiny(home, "cdr")
    write_sampler_curve(home, run, "val", {}, progress=False)
    log = run.path / "test_reads.jsonl"
    assert not log.exists()
    for _ in range(2):
        curve = write_sampler_curve(home, run, "test", {}, progress=False)
        reads = [json.loads(line)["evaluation"] for line in log.read_text().splitlines()]
        assert len(set(reads)) == len(reads) == len(curve.rows)
        assert set(reads) <= read_metrics(run).keys()


def test_other_settings_of_prediction_write_another_curve(home: Path) -> None:
    run = train_tiny(home, "cdr")
    curve = write_sampler_curve(home, run, "val", {"eta": "0.5"}, progress=False)
    assert curve.table.name == "sampler-curve-val@eta=0.5.csv"
    assert curve.picture.name == "sampler-curve-val@eta=0.5.svg"
    assert "val@eta=0.5,sample_steps=2" in read_metrics(run)


def test_the_command_prints_a_table_or_one_object_and_the_report_shows_the_curve(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [train_tiny(home, "cdr", seed) for seed in (0, 1)]
    arguments = ["evaluate", str(runs[0].path.parent), "--sampler-curve", "--home", str(home)]
    assert run_cli([*arguments, "--json"], monkeypatch) == 0
    printed = capsys.readouterr()
    assert "sampler curve: 100%" in printed.err
    assert "ancestral S=20 K=8" in printed.err
    curves = json.loads(printed.out)["curves"]
    assert [curve["run"] for curve in curves] == [str(run.path) for run in runs]
    assert [len(curve["points"]) for curve in curves] == [12, 12]
    assert run_cli([*arguments[:1], str(runs[0].path), *arguments[2:]], monkeypatch) == 0
    header, *rows, files = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["sampler", "steps", "draws", "n", "acc1", "acc5"]
    assert len(rows) == 12
    assert files == f"files: {curves[0]['table']}, {curves[0]['picture']}"
    for path in runs:
        evaluate(home, path, "test", {})
    means = pd.concat([pd.read_csv(curve["table"]) for curve in curves]).groupby(["sampler", "steps", "draws"])["acc1"].mean()
    page, text = write_report(home, "tiny")
    assert "Steps of the sampler" in Page(page).text
    assert "The head's own: ddim, 5 steps, 1 draw." in Page(page).text
    assert len(Page(page).drawings) == 4  # training, classes, calibration, and the curve
    for sampler, steps, draws in means.index:
        assert f"| {sampler} | {steps} | {draws} | {means[sampler, steps, draws]:.2f} ±" in text.read_text()


def test_a_head_that_does_not_sample_is_refused_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {**small_settings("cdr"), "denoiser": "regression"}
    monkeypatch.setattr("pipeline.methods.cdr.CDR.small", lambda: small)
    for method in ("ema", "cdr"):
        run = train_tiny(home, method)
        assert run_cli(["evaluate", str(run.path), "--sampler-curve", "--home", str(home)], monkeypatch) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert "predicts without a sampler, so there is no curve; methods that sample: cdr, marnet, seda" in printed.err


def test_settings_that_the_curve_varies_and_unfinished_runs_are_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_tiny(home, "cdr")
    arguments = ["evaluate", str(run.path), "--sampler-curve", "--home", str(home)]
    assert run_cli([*arguments, "--set", "draws=1"], monkeypatch) == 2
    assert "varies sampler, sample_steps, draws: leave draws out of --set" in capsys.readouterr().err
    assert run_cli([*arguments, "--set", "w_mse=1"], monkeypatch) == 2
    assert "'w_mse' is a setting of training" in capsys.readouterr().err
    (run.path / "done").unlink()
    assert run_cli(arguments, monkeypatch) == 2
    assert "has not finished training" in capsys.readouterr().err
