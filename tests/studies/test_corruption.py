"""Evaluations on corrupted copies: their numbers, their files, their log, and what the command and the report show of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.command_line import run as run_cli
from helpers.pages import Page
from helpers.tiny_heads import caches_by_key, train_tiny

from pipeline.cache.reader import find_cache
from pipeline.data import corruptions
from pipeline.data.corruptions import Corruption
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation import evaluate as evaluation
from pipeline.evaluation.evaluate import evaluate, load_method, read_metrics
from pipeline.extraction.corrupted import CorruptedCopies
from pipeline.extraction.extract import ExtractOptions
from pipeline.report import write_report
from pipeline.runtime.rng import KeyedRNG, sample_keys
from pipeline.runtime.runs import RunFolder
from pipeline.studies.corruption import evaluate_corrupted
from pipeline.types import Split
from pipeline.workspace import Workspace

QUIET = ExtractOptions(workers=0, progress=False)
NOISE, BLUR = Corruption("noise", 5), Corruption("blur", 1)


@pytest.fixture(scope="module")
def trained(tiny_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two heads of two seeds and one that samples; after the training, the texts are gone."""
    home = Path(shutil.copytree(tiny_home, tmp_path_factory.mktemp("corruption") / "home"))
    for method, seed in (("baseline", 0), ("baseline", 1), ("ema", 0), ("ema", 1), ("cdr", 0)):
        train_tiny(home, method, seed)
    shutil.rmtree(home / "caches" / "tiny" / caches_by_key(home)["text"])
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "home"))


def runs_of(home: Path, method: str) -> list[RunFolder]:
    return [RunFolder.at(path) for path in sorted((home / "runs" / "tiny").glob(f"{method}-*/seed*"))]


def copies_in(home: Path, split: Split = "test") -> CorruptedCopies:
    manifest = read_manifest(home, "tiny")
    return CorruptedCopies.of_split(home, manifest, split, find_cache(home, manifest, caches_by_key(home)["image"]))


@pytest.mark.parametrize("method", ["ema", "cdr"])
def test_accuracies_are_those_of_the_head_on_corrupted_features(method: str, home: Path) -> None:
    (run, *_), samples = runs_of(home, method), read_manifest(home, "tiny").split("test")
    (done,) = evaluate_corrupted(home, [run], "test", [NOISE, BLUR], {}, QUIET)
    table = pd.read_csv(done.table).set_index("corruption")
    assert done.table == run.path / "corruption-test.csv"
    assert table.index.tolist() == ["clean", "noise", "blur"]
    assert table["strength"].tolist() == [0, 5, 1]
    assert table["level"].tolist() == [0.0, 0.4, 0.005]
    head = load_method(run, run.config(), evaluation.apply_overrides(run.config(), {})[0]).eval()
    label = np.array([sample.labels[0] for sample in samples])
    ids = [sample.id for sample in samples]
    for corruption in (NOISE, BLUR):
        features = torch.from_numpy(copies_in(home).open(corruption).read(ids))
        with torch.inference_mode():
            logits = head.predict(features, KeyedRNG.seeded(run.seed, sample_keys(ids)).at("predict"))
        accuracy = 100 * float((logits.argmax(dim=1).numpy() == label).mean())
        assert table.loc[corruption.kind, "acc1"] == pytest.approx(accuracy)
    clean = evaluate(home, run, "test", {})["metrics"]
    assert {name: table.loc["clean", name] for name in clean} == pytest.approx(clean)
    np.testing.assert_allclose(table["acc1_vs_clean"], table["acc1"] - clean["acc1"])


def test_nothing_is_computed_twice_and_every_read_of_test_is_logged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_of(home, "baseline")
    evaluate_corrupted(home, runs, "val", [NOISE], {}, QUIET)
    assert not (runs[0].path / "test_reads.jsonl").exists()
    first = evaluate_corrupted(home, runs, "test", [NOISE], {}, QUIET)
    contents = {path: path.read_bytes() for path in (home / "runs").rglob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "predict", None)
        patch.setattr("pipeline.extraction.corrupted.plan_extraction", None)
        assert evaluate_corrupted(home, runs, "test", [NOISE], {}, QUIET) == first
    assert {path: path.read_bytes() for path in (home / "runs").rglob("*.*")} == contents
    for run in runs:
        log = [json.loads(line)["evaluation"] for line in (run.path / "test_reads.jsonl").read_text().splitlines()]
        assert log == ["test", "test~noise5"]
        assert set(read_metrics(run)) == {"val", "val~noise5", "test", "test~noise5"}
        with np.load(run.path / "predictions-test~noise5.npz") as arrays:
            assert set(arrays.files) == {"ids", "label", "acc1", "acc5"}
    assert "~" not in " ".join(map(str, Workspace(home).runs("tiny").table))
    monkeypatch.setattr(corruptions, "CORRUPTION_RECIPE", 2)  # another way to corrupt: other copies, and they count anew
    evaluate_corrupted(home, runs[:1], "test", [NOISE], {}, QUIET)
    assert read_metrics(runs[0])["test~noise5"]["corruption"]["recipe"] == 2
    assert (runs[0].path / "test_reads.jsonl").read_text().count("test~noise5") == 2


def test_copies_that_are_damaged_are_made_again_by_the_same_call(home: Path) -> None:
    runs = runs_of(home, "baseline")
    evaluate_corrupted(home, runs[:1], "test", [NOISE], {}, QUIET)
    path = copies_in(home).open(NOISE).path
    chunk = next(path.glob("features/c/*/*"))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-50] + bytes(50))
    evaluate_corrupted(home, runs[1:], "test", [NOISE], {}, QUIET)
    assert chunk.read_bytes() == whole


def test_other_settings_of_prediction_are_other_evaluations(home: Path) -> None:
    (run,) = runs_of(home, "cdr")
    (done,) = evaluate_corrupted(home, [run], "val", [NOISE], {"draws": "3"}, QUIET)
    assert done.table.name == "corruption-val@draws=3.csv"
    assert {"val@draws=3", "val~noise5@draws=3"} <= read_metrics(run).keys()
    assert len(pd.read_csv(done.table)) == 2


def test_the_command_prints_tables_and_the_report_shows_them(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(runs_of(home, method)[0].path.parent) for method in ("baseline", "ema")]
    given = ["evaluate", *folders, "--corrupt", "noise,jpeg", "--strengths", "1,5", "--workers", "0", "--home", str(home)]
    assert run_cli(given, monkeypatch) == 0
    printed = capsys.readouterr()
    assert "0 of 4 are there already; 4 extractions of 12 pictures: about" in printed.err
    assert "then 4 evaluations of each of 4 runs; nothing is trained" in printed.err
    assert "copies with jpeg5, 4 of 4" in printed.err
    lines = printed.out.splitlines()
    assert lines[0] == "baseline on tiny, test, acc1 in percent:"
    assert lines[1].split() == ["corruption", "clean", "1", "5", "mean", "to", "clean"]
    assert [line.split()[0] for line in lines[2:5]] == ["noise", "jpeg", "all"]
    assert "vs baseline" in printed.out
    assert sum(line.startswith("file: ") for line in lines) == 4
    assert run_cli([*given, "-q", "--json"], monkeypatch) == 0
    described = json.loads(capsys.readouterr().out)
    assert [head["method"] for head in described["heads"]] == ["baseline", "ema"]
    assert [head["verdict"] for head in described["heads"]] == ["the baseline", "2 of 5 seeds"]
    tables = [pd.read_csv(run["table"]) for run in described["runs"]]
    means = [table.loc[table["strength"] > 0, "acc1"].mean() for table in tables]
    assert [head["corrupted"] for head in described["heads"]] == pytest.approx([np.mean(means[:2]), np.mean(means[2:])])
    for head, start in zip(described["heads"], (0, 2), strict=True):
        clean = np.mean([table["acc1"][0] for table in tables[start : start + 2]])
        assert head["change"] == pytest.approx(head["corrupted"] - clean)
    page, text = write_report(home, "tiny")
    assert "Robustness to visual noise" in Page(page).text
    assert "| noise |" in text.read_text()


def test_wrong_words_are_refused_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(runs_of(home, "ema")[0].path.parent)
    for words, message in {
        (folder, "--corrupt", "nose"): "unknown corruption 'nose'; choose one of: noise, blur",
        (folder, "--corrupt", "--strengths", "0,1"): "--strengths takes some of 1, 2, 3, 4, 5",
        ("--corrupt", "noise"): "which runs? Give folders of runs",
        (folder, "--corrupt", "--sampler-curve"): "ask one at a time",
        (folder, "--corrupt", "--set", "w_ita=1"): "'w_ita' is a setting of",
        (f"{folder}/seed7", "--corrupt"): "is not a run",
    }.items():
        assert run_cli(["evaluate", *words, "--home", str(home)], monkeypatch) == 2
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.err.count("\n") == 1
    (runs_of(home, "ema")[0].path / "done").unlink()
    assert run_cli(["evaluate", folder, "--corrupt", "--home", str(home)], monkeypatch) == 2
    assert "has not finished training" in capsys.readouterr().err
    assert [path.name for path in (home / "caches").iterdir()] == ["tiny"]
