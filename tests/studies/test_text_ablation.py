"""The study of texts: its rows are ordinary runs, its differences are those of the runs, and its sentence follows from them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run as run_command
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings

from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import Estimate
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.report.pairs import Judged
from pipeline.report.results import collect_results
from pipeline.runtime.runs import find_runs
from pipeline.studies.text_ablation import compare_texts, explain
from pipeline.training.text_controls import is_text_of_class

ROWS = ["real", "shuffled-within", "shuffled-across", "noise", "label"]
TRAINING = {**FAST_TRAINING, "epochs": 2}


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


@pytest.mark.parametrize(
    ("method", "weights"), [("ema", ["w_ita"]), ("cdr", ["w_mse"]), ("seda", ["w_mse"]), ("marnet", ["cdr.w_mse", "ema.w_ita"])]
)
def test_rows_are_runs_with_one_difference(home: Path, method: str, weights: list[str]) -> None:
    settings = small_settings(method)
    table, conclusion = compare_texts(
        home, "tiny", method, "head", [0, 1, 2], caches_by_key(home), settings, TRAINING, progress=False
    )
    assert table["text"].tolist() == [*ROWS, "no text term"]
    assert table["verdict"].tolist() == ["real", *["3 of 5 seeds"] * 5]
    assert conclusion.startswith("Nothing is claimed: there are 3 of 5 seeds.")
    rows = {row.label: row for row in collect_results(home, "tiny", "test").rows}
    assert len(rows) == 6
    runs = find_runs(home, "tiny")
    assert len(runs) == 18
    real = next(r for r in runs if r.config().text_control == "real" and _weights(r.config().settings, weights) != {0.0})
    means = {}
    for run in runs:
        config, name = run.config(), run.config().text_control
        if name == "real" and _weights(config.settings, weights) == {0.0}:
            name = "no text term"
        else:
            assert config.settings == real.config().settings
        assert config.training == real.config().training
        means.setdefault(name, []).append(evaluate(home, run, "test", {})["metrics"]["acc1"])
    for _, row in table.iterrows():
        assert float(row["acc1"].split()[0]) == pytest.approx(np.mean(means[row["text"]]), abs=0.006)
        if row["text"] != "real":
            cell = row["Acc-1: real - it"]
            difference, low, high = (float(part.strip("()")) for part in cell.replace(" to ", " ").split())
            assert low <= difference <= high
            assert difference == pytest.approx(np.mean(means["real"]) - np.mean(means[row["text"]]), abs=0.006)


def _weights(settings: object, names: list[str]) -> set[float]:
    found = set()
    for name in names:
        value = settings
        for part in name.split("."):
            value = value[part]  # type: ignore[index]
        found.add(value)
    return found


def test_the_command_prints_the_table_and_the_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = caches_by_key(home)
    common = ["ablate", "text", "tiny", "--home", str(home), "--image", caches["image"], "--quiet"]
    options = ["--method", "ema", "--set", "width=16", "--train", "epochs=1", "--seeds", "0,1", "--split", "val"]
    assert run_command([*common, "--text", caches["text"], *options], monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "shuffled-within" in printed
    assert "no text term" in printed
    assert "Nothing is claimed" in printed
    assert not list(home.glob("runs/tiny/*/*/test_reads.jsonl"))
    assert run_command([*common, "--text", caches["text"], *options, "--json"], monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["text"] for row in result["rows"]] == [*ROWS, "no text term"]
    assert result["conclusion"] in printed
    assert run_command([*common, "--text", "noise", *options], monkeypatch) == 2
    assert "name the text cache alone, not 'noise'" in capsys.readouterr().err
    assert run_command([*common, "--text", caches["text"], "--method", "baseline"], monkeypatch) == 2
    assert "baseline reads no text, so there is nothing to compare" in capsys.readouterr().err


def judged(**differences: tuple[float, str]) -> dict[str, Judged]:
    """Return controls that are so many points from real texts, with these verdicts."""
    return {
        name.replace("_", "-") if name != "no_term" else "no text term": Judged(
            "acc1", Estimate(value, value - 1, value + 1, 0.5), verdict
        )
        for name, (value, verdict) in differences.items()
    }


SAME = "not distinguishable"


@pytest.mark.parametrize(
    ("within", "across", "noise", "no_term", "expected"),
    [
        ("below real", "below real", "below real", "below real", ["The texts help ema", "+2.00 points of Acc-1 above"]),
        (SAME, "below real", SAME, SAME, ["gains from the class that a text belongs to", "pictures of the class (+2.00"]),
        (SAME, SAME, SAME, "below real", ["Nothing shows that what the texts say helps ema", "as one more target"]),
        ("above real", "above real", SAME, "above real", ["Nothing shows", "Without its text term ema is better"]),
        ("below real", SAME, "below real", "below real", ["Nothing shows", "Without its text term ema loses"]),
    ],
)
def test_the_sentence_says_what_the_verdicts_say(
    within: str, across: str, noise: str, no_term: str, expected: list[str]
) -> None:
    verdicts = {"shuffled_within": within, "shuffled_across": across, "noise": noise, "label": SAME, "no_term": no_term}
    sentence = explain("ema", "Acc-1", judged(**{name: (-2.0, verdict) for name, verdict in verdicts.items()}), 5)
    for part in expected:
        assert part in sentence


def test_what_is_lower_is_not_called_so_many_points_above() -> None:
    verdicts = judged(shuffled_within=(4.31, "3 of 5 seeds"), shuffled_across=(-1.5, "3 of 5 seeds"))
    sentence = explain("ema", "Acc-1", verdicts, 3)
    assert "real texts are 4.31 points of Acc-1 below texts of other pictures of the same class, and +1.50 points" in sentence
    of_class = explain("ema", "Acc-1", judged(shuffled_across=(4.31, SAME)), 5)
    assert "real texts are 4.31 points of Acc-1 below texts of any other picture" in of_class
    costly = judged(shuffled_within=(0.0, SAME), shuffled_across=(0.0, SAME), noise=(0.0, SAME), no_term=(2.0, "above real"))
    assert "is better: 2.00 points of Acc-1 is what real texts cost" in explain("ema", "Acc-1", costly, 5)


def test_the_control_within_a_class_is_void_where_the_text_is_a_function_of_the_class(home: Path) -> None:
    """Of Ingredient-101, for example: every picture of a class has the texts of the class."""
    manifest = read_manifest(home, "tiny")
    assert not is_text_of_class(manifest)
    samples = tuple(replace(sample, texts=(manifest.class_names[sample.labels[0]],)) for sample in manifest.samples)
    of_class = replace(manifest, samples=samples, rows=(), meta={**manifest.meta, "texts_recur": True})
    assert is_text_of_class(of_class)
    write_manifest(of_class, home)
    quiet = ExtractOptions(progress=False, workers=0)
    widths = {"image": 32, "text": 24}
    caches = {key: extract(of_class, "random_projection", {"modality": key, "width": width}, home, options=quiet).name
              for key, width in widths.items()}  # fmt: skip
    settings = small_settings("ema")
    table, conclusion = compare_texts(
        home, "tiny", "ema", "head", [0, 1], caches, settings, {**TRAINING, "epochs": 1}, progress=False
    )
    rows = dict(zip(table["text"], table["verdict"], strict=True))
    assert rows["shuffled-within"] == "void: the text is a function of the class"
    assert rows["shuffled-across"] == "2 of 5 seeds"
    assert "the control within a class is void" in conclusion
    verdicts = judged(shuffled_across=(-2.0, "below real"), noise=(0.0, SAME), label=(0.0, SAME), no_term=(-1.0, "below real"))
    sentence = explain("ema", "Acc-1", verdicts, 5)
    assert sentence.startswith("ema gains from the class that a text belongs to: real texts are +2.00 points of Acc-1 above")
    assert "Its text term helps by +1.00 points" in sentence


def test_without_a_text_term_nothing_is_said_of_it() -> None:
    verdicts = judged(shuffled_within=(0.5, SAME), shuffled_across=(math.pi, SAME), noise=(0.0, SAME), label=(0.0, SAME))
    sentence = explain("own", "Pre-1", verdicts, 5)
    assert sentence.startswith("Nothing shows that what the texts say helps own")
    assert "-0.50 points of Pre-1" in sentence
    assert "term" not in sentence
