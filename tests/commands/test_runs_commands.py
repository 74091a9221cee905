"""`diffalign runs` and `diffalign compare`, on a home with synthetic runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.command_line import run
from helpers.report_home import ReportHome, make_home
from sklearn.metrics import average_precision_score

from pipeline.commands.options import show_table
from pipeline.evaluation.statistics import Scores, paired_bootstrap
from pipeline.report.blocks import CollapsibleSection, Table
from pipeline.report.head_changes import HeadPredictions, changed_samples, class_differences, read_head_predictions
from pipeline.report.provenance import split_read_blocks
from pipeline.report.results import collect_results
from pipeline.runtime.head_names import HeadFolder, list_heads

HOSTILE = "=1+1 <b>cat</b>"
CLASSES = ("dog", HOSTILE, "bird", "cow", "fox", "owl")
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> ReportHome:
    """Two methods with three seeds; the second is the stronger one."""
    home = make_home(tmp_path_factory.mktemp("home"), CLASSES)
    for method, strength, settings in (("baseline", 1.0, {}), ("ema", 2.0, {"width": 16, "tau": 0.1})):
        for seed in range(3):
            trained = home.train(home.config(method, settings), seed)
            home.evaluate(trained, home.logits(strength, seed + 10 * int(strength)))
    return home


def call(home: ReportHome, monkeypatch: pytest.MonkeyPatch, capsys: Printed, *words: str) -> str:
    assert run([*words, "--home", str(home.path)], monkeypatch) == 0
    return capsys.readouterr().out


def test_heads_are_listed_shown_tagged_and_found_by_their_tags(
    home: ReportHome, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    rows = {row["head"]: row for row in json.loads(call(home, monkeypatch, capsys, "runs", "ls", "--json"))}
    assert [name.rpartition("-")[0] for name in sorted(rows)] == ["toy/baseline", "toy/ema"]
    ema = next(row for name, row in rows.items() if "ema" in name)
    assert (ema["seeds"], ema["training"], ema["val"]) == ("3", "no text", "Acc-1 55.00 ± 0.00")
    assert call(home, monkeypatch, capsys, "runs", "tag", "ema", "mine", "draft") == f"head: {ema['head']}\ntags: draft, mine\n"
    assert call(home, monkeypatch, capsys, "runs", "tag", "mine", "draft", "--remove").endswith("tags: mine\n")
    assert "ema-" in call(home, monkeypatch, capsys, "runs", "ls", "toy", "--tag", "mine")
    assert "baseline-" not in call(home, monkeypatch, capsys, "runs", "ls", "--tag", "mine")
    shown = json.loads(call(home, monkeypatch, capsys, "runs", "show", "mine", "--json"))
    assert shown["tags"] == ["mine"]
    assert shown["not_default"] == {"width": 16, "tau": 0.1}
    assert shown["training_not_default"] == {"epochs": 4}
    assert shown["train_seconds"] == "3.00 ± 1.00"
    assert shown["evaluations"]["test"].endswith("(3 of 3 seeds)")
    assert "not_default:\n  tau: 0.1\n  width: 16\n" in call(home, monkeypatch, capsys, "runs", "show", "mine")


def test_a_table_of_hostile_text_moves_no_cursor_and_is_aligned(capsys: Printed) -> None:
    show_table(pd.DataFrame({"path": ["a\x1b[2J\u202eb", "n\u200di\n"], "n": [1, 20]}), as_json=False)
    assert capsys.readouterr().out == "path             n\na\\x1b[2J\\u202eb  1\nn\u200di\\n           20\n"


def test_two_heads_are_compared_in_settings_metrics_classes_and_samples(
    home: ReportHome, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    found = json.loads(call(home, monkeypatch, capsys, "compare", "ema", "baseline", "--split", "test", "--json"))
    assert {row["setting"]: (row["A"], row["B"]) for row in found["settings"]} == {
        "method": ("ema", "baseline"),
        "width": ("16", "-"),
        "tau": ("0.1", "-"),
    }
    heads = list_heads(home.path)
    right = {}
    for letter, name in (("A", "ema"), ("B", "baseline")):
        head = next(each for each in heads if each.name.startswith(name))
        assert found["heads"][letter] == {
            "head": head.full_name,
            "tags": list(head.tags),
            "seeds": [0, 1, 2],
            "path": str(head.path),
        }
        logits = [np.load(each.path / "predictions-test.npz")["logits"] for each in head.runs]
        right[letter] = np.stack([each.argmax(axis=1) for each in logits]) == home.label
    metric = next(row for row in found["metrics"] if row["metric"] == "acc1")
    oracle = paired_bootstrap(Scores(100.0 * right["A"], 100.0 * right["B"], None, True))
    assert (metric["difference"], metric["low"]) == pytest.approx(oracle[:2])
    classes = {row["class"]: row for row in found["pairs"][0]["classes"]}
    assert set(classes) == set(CLASSES)
    for index, name in enumerate(CLASSES):
        member = home.label == index
        expected = [100 * right[letter][:, member].mean() for letter in "AB"]
        assert [classes[name][key] for key in ("n", "a", "b")] == pytest.approx([member.sum(), *expected])
        assert classes[name]["low"] <= classes[name]["difference"] <= classes[name]["high"]
    majority = {letter: values.mean(axis=0) > 0.5 for letter, values in right.items()}
    ids = np.array([sample.id for sample in home.manifest.split("test")])
    changed = {row["sample_id"]: row["right"] for row in found["pairs"][0]["changed_samples"]}
    assert changed == {
        **dict.fromkeys(ids[majority["A"] & ~majority["B"]].tolist(), "a"),
        **dict.fromkeys(ids[~majority["A"] & majority["B"]].tolist(), "b"),
    }


def test_what_is_printed_names_the_heads(home: ReportHome, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    printed = call(home, monkeypatch, capsys, "compare", "baseline", "ema", "--split", "test", "--top", "6")
    assert printed.startswith("A = toy/baseline-")
    assert "\nB = toy/ema-" in printed
    assert "accuracy of the classes that change most (6 classes in all)" in printed
    assert HOSTILE in printed
    for words, complaint in (
        (["compare", "ema"], "at least two heads"),
        (["compare", "ema", "ema"], "stands twice"),
        (["compare", "ema", "emma"], "is called 'emma'; choose one of"),
        (["compare", "ema/seed0", "baseline/seed0"], "compare takes whole heads, with all their seeds: say ema"),
        (["compare", "ema/seed7", "baseline"], "has no seed7; it has: seed0, seed1, seed2"),
    ):
        assert run([*words, "--home", str(home.path)], monkeypatch) == 2
        assert complaint in capsys.readouterr().err


def predictions(best: list[list[int]], label: list[int], num_classes: int = 3) -> HeadPredictions:
    """Return the predictions of seeds that choose these classes, [S,N]."""
    chosen, true = np.array(best), np.array(label)
    ids = tuple(f"sample {k}" for k in range(len(label)))
    return HeadPredictions(tuple(range(len(best))), ids, true, np.log(0.9 * np.eye(num_classes)[chosen] + 0.01), chosen == true)


def test_an_interval_of_a_class_stays_within_what_is_possible_and_takes_samples() -> None:
    """One sample says nothing of others, and three seeds that disagree would widen past 100 points."""
    label = [0] * 6 + [1] + [2] * 6
    a = predictions([[0] * 6 + [1] + [2] * 6, [0] * 6 + [1] + [2] * 6, [1] * 6 + [0] + [2] * 6], label)
    b = predictions([[1] * 6 + [0] + [2] * 6, [1] * 6 + [0] + [2] * 6, [1] * 6 + [0] + [2] * 6], label)
    rows = {row["class"]: row for row in class_differences(a, b, ("x", "lone", "z"), {}).to_dict("records")}
    right = 100.0 * np.array([[True] * 6, [True] * 6, [False] * 6])
    assert paired_bootstrap(Scores(right, 0 * right, None, True)).high > 100
    assert -100 <= rows["x"]["low"] <= rows["x"]["difference"] <= rows["x"]["high"] <= 100
    assert np.isnan([rows["lone"]["low"], rows["lone"]["high"]]).all()
    assert rows["lone"]["difference"] == pytest.approx(200 / 3)
    grouped = class_differences(a, b, ("x", "lone", "z"), dict.fromkeys(a.ids[:6], "one picture"))
    assert grouped.loc[grouped["class"] == "x", ["low", "high"]].isna().to_numpy().all()


def test_a_head_that_is_wrong_is_not_shown_with_the_right_class() -> None:
    """One seed of three is right: the class that most of its seeds predict would be the right one, or a tie."""
    label = [0, 0, 2]
    right = predictions([[0, 0, 2]] * 3, label)
    others = predictions([[0, 0, 0], [1, 1, 1], [2, 1, 2]], label)
    table = changed_samples(right, others, ("cat", "dog", "owl")).set_index("sample_id")
    assert dict(table["b"]) == {"sample 0": "dog or owl", "sample 1": "dog", "sample 2": "cat or dog"}
    assert dict(table["a"]) == {"sample 0": "cat", "sample 1": "cat", "sample 2": "owl"}


def test_heads_of_one_method_are_told_apart_in_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    home = make_home(tmp_path, CLASSES, num_test=6)
    plain = replace(home.config("ema", {"w_ita": 1.0, "tau": 0.1}), caches=home.caches)
    home.train(plain, 0)
    home.train(replace(plain, settings={"w_ita": 0.0, "tau": 0.1}), 0)
    home.train(replace(plain, training={**plain.training, "epochs": 9}), 0)
    home.train(home.config("baseline", {}), 0)
    rows = json.loads(call(home, monkeypatch, capsys, "runs", "ls", "--json"))
    assert {(row["head"].partition("-")[0], row["training"], row["differs"]) for row in rows} == {
        ("toy/ema", "real text", "w_ita=1.0, epochs=4"),
        ("toy/ema", "no text term", "w_ita=0.0, epochs=4"),
        ("toy/ema", "real text", "w_ita=1.0, epochs=9"),
        ("toy/baseline", "no text", ""),
    }
    assert "w_ita=0.0, epochs=4" in call(home, monkeypatch, capsys, "runs", "ls")


def test_classes_of_multi_label_data_are_compared_by_average_precision(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES, label_kind="multi")
    heads = []
    for method, strength in (("baseline", 0.5), ("ema", 2.0)):
        for seed in (0, 1):
            trained = home.train(home.config(method, {}), seed)
            value = np.zeros(len(home.label))
            home.evaluate(trained, home.logits(strength, seed), per_sample={"pre1": value})
        heads.append(read_head_predictions(HeadFolder(trained.path.parent).runs, "test"))
    first, second = heads
    table = class_differences(first, second, CLASSES, {}).set_index("class")
    for index, name in enumerate(CLASSES):
        member = home.label[:, index] > 0
        oracle = np.mean([average_precision_score(member, scores[:, index]) for scores in first.log_scores])
        assert table.loc[name, "a"] == pytest.approx(100 * oracle)
    changed = changed_samples(first, second, CLASSES)
    assert set(changed["right"]) <= {"a", "b"}
    assert changed["labels"].str.len().gt(0).all()


def test_runs_are_removed_only_when_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed) -> None:
    home = make_home(tmp_path, CLASSES, num_test=6)
    for seed in (0, 1):
        home.train(home.config("baseline", {}), seed)
    assert "would remove 2 runs" in call(home, monkeypatch, capsys, "runs", "rm", "latest")
    name = list_heads(home.path)[0].name
    assert "would remove 1 run," in call(home, monkeypatch, capsys, "runs", "rm", "baseline/seed1")
    for beginning in ("baseline/seed1", "toy/baseline-", name[:-1]):  # of a name, which another head may have tomorrow
        assert run(["runs", "rm", beginning, "--yes", "--home", str(home.path)], monkeypatch) == 2
        assert f"say the whole name, toy/{name}" in " ".join(capsys.readouterr().err.split())
    assert "removed 1 run," in call(home, monkeypatch, capsys, "runs", "rm", f"toy/{name}/seed1", "--yes")
    assert [each.seed for each in list_heads(home.path)[0].runs] == [0]
    assert json.loads(call(home, monkeypatch, capsys, "runs", "rm", "toy/latest", "--yes", "--json"))["removed"]
    assert call(home, monkeypatch, capsys, "runs", "ls").startswith("no heads in ")


def test_reads_of_the_test_split_stay_on_record_when_their_runs_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    home = make_home(tmp_path, CLASSES, num_test=6)
    for method, seeds in (("baseline", (0, 1)), ("ema", (0,))):
        for seed in seeds:
            home.evaluate(home.train(home.config(method, {}), seed), home.logits(1.0, seed))
    heads = {head.name.partition("-")[0]: head for head in list_heads(home.path)}
    before = _reads_in_the_report(home)
    assert sum(before.values()) == 3
    for word in (f"{heads['baseline'].name}/seed1", heads["ema"].name):
        assert "read the test split 1 times, which stays" in call(home, monkeypatch, capsys, "runs", "rm", word, "--yes")
    assert _reads_in_the_report(home) == {"baseline": 2, f"{heads['ema'].name} (removed)": 1}
    log = home.path / "runs" / "toy" / "removed_test_reads.jsonl"
    log.write_text(log.read_text() * 2)  # as if a removal had been killed and repeated
    assert sum(_reads_in_the_report(home).values()) == 3
    home.evaluate(home.train(home.config("ema", {}), 0), home.logits(1.0, 0))  # a head of the same name that comes back
    assert _reads_in_the_report(home) == {"baseline": 2, "ema": 2}


def _reads_in_the_report(home: ReportHome) -> dict[str, int]:
    (section,) = split_read_blocks(collect_results(home.path, "toy", "test"))
    assert isinstance(section, CollapsibleSection)
    (table,) = section.blocks
    assert isinstance(table, Table)
    return {row[0]: int(row[2]) for row in table.rows}
