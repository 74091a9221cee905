"""The tables of robustness: means over corruptions, differences to clean pictures and to the baseline, with their intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.report_home import ReportHome, make_home

from pipeline.data.corruptions import Corruption
from pipeline.evaluation.statistics import Scores, paired_bootstrap
from pipeline.report.corruption import (
    collect_corrupted,
    corruption_blocks,
    find_corrupted_baseline,
    head_table,
    robustness_results,
    run_frame,
)
from pipeline.report.results import collect_results
from pipeline.runtime.runs import RunFolder

NOISY = [Corruption("noise", 1), Corruption("noise", 3), Corruption("jpeg", 3)]
NUM_TEST = 60


def add_head(home: ReportHome, method: str, strength: float, seeds: int, corruptions: list[Corruption]) -> np.ndarray:
    """Write runs that lose one point of `strength` for each step of a corruption; return acc1 [1 + corruptions, S, N]."""
    values = []
    for seed in range(seeds):
        run = home.train(home.config(method, {}), seed)
        own = []
        for number, (name, loss) in enumerate(
            [("test", 0), *((each.evaluation("test"), each.strength) for each in corruptions)]
        ):
            logits = home.logits(strength - 0.5 * loss, 100 * seed + number + 7 * len(method))
            home.evaluate(run, logits, name)
            own.append(100.0 * (logits.argmax(axis=1) == home.label))
        add_definitions(run, corruptions)
        values.append(own)
    return np.array(values).transpose(1, 0, 2)


def add_definitions(run: RunFolder, corruptions: list[Corruption]) -> None:
    path = run.path / "metrics.json"
    records = json.loads(path.read_text())
    for each in corruptions:
        records[each.evaluation("test")]["corruption"] = each.identity()
    path.write_text(json.dumps(records))


@pytest.fixture
def home(tmp_path: Path) -> ReportHome:
    return make_home(tmp_path, [f"class {k}" for k in range(5)], num_test=NUM_TEST)


def test_means_differences_and_intervals_are_those_of_the_samples(home: ReportHome) -> None:
    base, ema = (add_head(home, method, strength, 5, NOISY) for method, strength in (("baseline", 2.0), ("ema", 3.5)))
    results = collect_results(home.path, "toy", "test")
    heads = collect_corrupted(results)
    rows = robustness_results(heads, results).to_dict("records")
    mean_base, mean_ema = (values[1:].mean(axis=0) for values in (base, ema))
    row = rows[1]
    assert [each["method"] for each in rows] == ["baseline", "ema"]
    assert row["clean"] == pytest.approx(ema[0].mean())
    assert row["corrupted"] == pytest.approx(mean_ema.mean())
    assert row["corrupted_std"] == pytest.approx(mean_ema.mean(axis=1).std(ddof=1))
    assert row["change"] == pytest.approx(mean_ema.mean() - ema[0].mean())
    for name, pair in {"corrupted": (mean_ema, mean_base), "change": (mean_ema - ema[0], mean_base - base[0])}.items():
        expected = paired_bootstrap(Scores(*pair, None, True))
        assert [row[f"{name}_{part}"] for part in ("vs_baseline", "low", "high")] == pytest.approx(expected[:3])
    assert row["p_holm"] == pytest.approx(paired_bootstrap(Scores(mean_ema, mean_base, None, True)).p)
    assert [each["verdict"] for each in rows] == ["the baseline", "beats the baseline"]
    (baseline, head) = heads
    assert find_corrupted_baseline(head, heads, results) is baseline
    table = head_table(head, baseline, results.groups).set_index("corruption")
    assert table.index.tolist() == ["noise", "jpeg", "all"]
    assert table.columns.tolist() == ["clean", "1", "3", "mean", "to clean", "vs baseline"]
    assert table.loc["jpeg", "1"] == "-"
    means = {"noise": ema[1:3].mean(axis=0), "jpeg": ema[3], "all": mean_ema}
    for kind, values in means.items():
        spread = values.mean(axis=1).std(ddof=1)
        assert table.loc[kind, "mean"] == f"{values.mean():.2f} ± {spread:.2f}"
        assert table.loc[kind, "to clean"] == f"{values.mean() - ema[0].mean():+.2f}"
    difference = paired_bootstrap(Scores(ema[3], base[3], None, True))
    assert table.loc["jpeg", "vs baseline"] == "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference[:3])
    third = np.stack([ema[2], ema[3]]).mean(axis=(0, 2))
    assert table.loc["all", "3"] == f"{third.mean():.2f} ± {third.std(ddof=1):.2f}"


def test_a_baseline_without_these_corruptions_is_none_and_older_corruptions_do_not_count(home: ReportHome) -> None:
    add_head(home, "baseline", 2.0, 3, NOISY[:1])
    add_head(home, "ema", 3.0, 3, NOISY)
    results = collect_results(home.path, "toy", "test")
    heads = collect_corrupted(results)
    assert robustness_results(heads, results)["verdict"].tolist() == ["the baseline", "no baseline on these corruptions"]
    assert "vs baseline" not in head_table(heads[1], find_corrupted_baseline(heads[1], heads, results), {})
    (run, *_) = heads[1].row.runs
    assert run_frame(run, "test")["corruption"].tolist() == ["clean", "noise", "noise", "jpeg"]
    for each in heads[1].row.runs:
        path = each.path / "metrics.json"
        path.write_text(path.read_text().replace('"recipe": 1', '"recipe": 0'))
    assert [head.row.label for head in collect_corrupted(results)] == ["baseline"]
    assert run_frame(run, "test")["corruption"].tolist() == ["clean"]


def test_seeds_without_corruptions_are_left_out_and_no_corruption_is_no_section(home: ReportHome) -> None:
    add_head(home, "baseline", 2.0, 2, [])
    assert corruption_blocks(collect_results(home.path, "toy", "test")) == []
    values = add_head(home, "ema", 3.0, 3, NOISY)
    home.evaluate(home.train(home.config("ema", {}), 3), home.logits(1.0, 5))
    (head,) = collect_corrupted(collect_results(home.path, "toy", "test"))
    assert head.clean.seeds == (0, 1, 2)
    assert head.of_seeds(head.clean) == pytest.approx(values[0].mean(axis=1))
