"""The papers' tables as data, and the table with our numbers beside theirs."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

from pipeline.data.artefacts import Artefact, artefact_names, read_artefact
from pipeline.data.manifest import Manifest
from pipeline.report.blocks import Table
from pipeline.report.latex import escape_latex, render_latex
from pipeline.report.paper_table import (
    SINGLE_LABEL_METRICS,
    RowResult,
    compare_rows,
    describe_order,
    paper_table,
    table_metrics,
    write_table_files,
)
from pipeline.report.results import SampleMetrics
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import configure, find_settings
from pipeline.studies.backbones import BACKBONES

TABLES = [name for name in artefact_names() if read_artefact(name).kind == "table"]
IDS = [f"sample {number}" for number in range(200)]


def test_the_artefacts_are_those_of_the_papers() -> None:
    assert artefact_names() == [
        "marnet-table1", "marnet-table2", "marnet-fig3", "marnet-fig4",
        "seda-table1", "seda-table2", "seda-table3", "seda-fig3", "seda-fig4", "seda-fig5",
    ]  # fmt: skip
    with pytest.raises(UserError, match="did you mean 'seda-table2'"):
        read_artefact("seda-tabel2")


def test_the_numbers_are_those_of_the_papers() -> None:
    """Facts that the text of the papers states, or that two of their tables share."""
    table1, table2 = read_artefact("marnet-table1"), read_artefact("marnet-table2")
    assert table1.row("ITA").paper == table2.row("+EMA").paper
    assert table1.row("ViT-B/16").paper == table2.row("Baseline").paper
    assert table1.row("MARNet").paper == table2.row("+Fusion").paper
    seda1, seda2, seda3 = (read_artefact(f"seda-table{number}") for number in (1, 2, 3))
    for name in ("vireo172", "nuswide"):
        assert seda1.row("SeDA_ViT16").paper[name] == seda2.row("+T+I+L").paper[name]
        assert seda1.row("ViT-B/16").paper[name] == seda2.row("Base").paper[name]
    base, learner = (seda2.row(title).paper["nuswide"][3] or 0.0 for title in ("Base", "+T+I+L"))
    assert 100 * (learner / base - 1) == pytest.approx(2.6, abs=0.05)  # "Rec-5 improved by 2.6%"
    bi_stage = seda3.row("Bi-stage method with DSL module first and DST module second")
    assert bi_stage.paper["vireo172"] == seda2.row("+T+I+L").paper["vireo172"]
    for row in seda1.rows:  # hits per image and label: recall at 5 cannot be below recall at 1, nor precision at 5 above
        pre1, pre5, rec1, rec5 = (number or 0.0 for number in row.paper["nuswide"])
        assert pre5 < pre1
        assert rec1 < rec5
        assert 1.7 < pre1 / rec1 < 1.8


@pytest.mark.parametrize("name", TABLES)
def test_every_row_names_settings_that_its_method_has(name: str) -> None:
    for row in read_artefact(name).rows:
        if row.method in plugins.names("methods"):
            config = plugins.get("methods", row.method).Config
            assert all(find_settings(config, key) for key in row.settings), row.title
            configure(config, row.settings)
        assert row.unfreeze in ("", "image", "both")
        assert row.backbone in ("", *BACKBONES)


def test_every_cell_of_a_figure_is_possible_with_any_tuned_settings() -> None:
    figure = read_artefact("seda-fig3")
    config = plugins.get("methods", figure.method).Config
    for tuned in ({}, {"stage_order": "reverse", "train_min_step": 0.5}, {"stage_order": "literal", "train_min_step": 0.5}):
        for values in itertools.product(*figure.axes.values()):
            cell = dict(zip(figure.axes, values, strict=True))
            assert configure(config, {**tuned, **figure.settings, **cell}).stage_order == "literal"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: tabel\ntitle: x", "kind is 'tabel'"),
        ("kind: table\ntitle: x\nheads: [A]\nbase: b\nrows: [{name: [c], method: baseline}]", "which is no row"),
        ("kind: table\ntitle: x\nheads: [A]\nbase: b\nrows: [{name: [b, c], method: baseline}]", "2 cells of text, not 1"),
        (
            "kind: table\ntitle: x\nheads: [A]\nbase: b\ndatasets: {d: {name: D, metrics: [acc1]}}\n"
            "rows: [{name: [b], method: baseline, paper: {d: [1, 2]}}]",
            "does not have the columns of d",
        ),
        ("kind: table\ntitel: x", "titel"),
        ("kind: table\ntitle: x\nheads: [A]\nbase: b", "its base is 'b', which is no row"),
        ("kind: grid\ntitle: x\naxes: {w_sc: [0, 1]}", "a grid needs a method and axes"),
        (
            "kind: table\ntitle: x\nheads: [A]\nbase: b\ndatasets: {d: {name: D, metrics: [acc1]}}\n"
            "rows: [{name: [b], method: baseline, paper: {d: ['85.4 %']}}]",
            "other things than numbers for d",
        ),
    ],
)
def test_a_wrong_file_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_artefact(str(tmp_path / "own.yaml"))
    assert "own.yaml" in str(error.value)


def result_of(artefact: Artefact, title: str, accuracy: np.ndarray, **more: str) -> RowResult:
    """A row with these accuracies of each sample [S,N], as if it had been trained."""
    samples = SampleMetrics(tuple(range(len(accuracy))), IDS, {"acc1": accuracy, "acc5": np.full_like(accuracy, 100.0)})
    metrics = {name: values.mean(axis=1).tolist() for name, values in samples.by_metric.items()}
    return RowResult(row=artefact.row(title), samples=samples, metrics=metrics, features="features-0123", preset="head", **more)


@pytest.fixture
def artefact() -> Artefact:
    return read_artefact("marnet-table2")


@pytest.fixture
def results(artefact: Artefact) -> list[RowResult]:
    rng = np.random.default_rng(0)
    rates = {"Baseline": 0.2, "+EMA": 0.9, "+MLP": 0.2, "+Fusion": 0.5}
    found = {title: result_of(artefact, title, 100.0 * (rng.random((5, len(IDS))) < rate)) for title, rate in rates.items()}
    missing = RowResult(row=artefact.row("+CDR(MLP)"), reason="no text & 100 % <lost>")
    return [found.get(row.title, missing) for row in artefact.rows]


def test_numbers_are_means_differences_and_verdicts(artefact: Artefact, results: list[RowResult]) -> None:
    frame = compare_rows(artefact, results, {}, SINGLE_LABEL_METRICS)
    rows: dict[str, dict[Any, Any]] = {each["Module"]: each for each in frame.to_dict("records")}
    for result in results:
        row = rows[result.row.title]
        if result.samples is None:
            assert np.isnan(row["acc1"])
            assert row["verdict"] == "not had"
            continue
        values = result.samples.by_metric["acc1"].mean(axis=1)
        assert row["acc1"] == pytest.approx(values.mean())
        assert row["acc1_std"] == pytest.approx(values.std(ddof=1))
        if result.row.title != "Baseline":
            base = results[0].samples
            assert base is not None
            assert row["acc1_diff"] == pytest.approx(values.mean() - base.by_metric["acc1"].mean())
            assert row["acc1_low"] < row["acc1_diff"] < row["acc1_high"]
    verdicts = {title: row["verdict"] for title, row in rows.items()}
    assert verdicts["Baseline"] == "the base"
    assert verdicts["+EMA"] == verdicts["+Fusion"] == "above Baseline"
    assert verdicts["+MLP"] == "not distinguishable"
    assert rows["+EMA"]["ingredients101 acc5"] == 97.8


def test_a_verdict_takes_five_seeds(artefact: Artefact, results: list[RowResult]) -> None:
    first = results[1].samples
    assert first is not None
    few = result_of(artefact, "+EMA", first.by_metric["acc1"][:3])
    frame = compare_rows(artefact, [results[0], few, *results[2:]], {}, SINGLE_LABEL_METRICS)
    assert frame["verdict"][1] == "3 of 5 seeds"


def test_one_seed_has_no_spread_and_five_classes_no_best_five(
    artefact: Artefact, tiny_manifest: Manifest, results: list[RowResult]
) -> None:
    assert table_metrics(tiny_manifest) == ["acc1"]  # it has four classes
    assert table_metrics(replace(tiny_manifest, class_names=tuple("abcdef"))) == ["acc1", "acc5"]
    alone = [replace(each, samples=None, metrics=None) for each in results]
    first = results[0].samples
    assert first is not None
    alone[0] = result_of(artefact, "Baseline", first.by_metric["acc1"][:1])
    shown = paper_table(artefact, compare_rows(artefact, alone, {}, ["acc1"]), "tiny", "test")
    assert not any("±" in cell for row in (*shown.rows, (shown.caption,)) for cell in row)
    assert "Of one seed" in shown.caption
    assert shown.columns[5:] == ("ours, tiny: Acc-1", "Acc-1 vs Baseline", "verdict")


def test_a_row_is_compared_with_the_row_that_it_names() -> None:
    table = read_artefact("seda-table1")
    rng = np.random.default_rng(1)
    rates = {"ViT-B/16": 0.9, "ResNet-50": 0.1, "SeDA_RN50": 0.5}
    found = {name: result_of(table, name, 100.0 * (rng.random((5, len(IDS))) < rate)) for name, rate in rates.items()}
    results = [found.get(row.title, RowResult(row=row, reason="not tried")) for row in table.rows]
    frame = compare_rows(table, results, {}, SINGLE_LABEL_METRICS).set_index("Model")
    assert frame.loc["SeDA_RN50", "verdict"] == "above ResNet-50"
    assert frame.loc["ResNet-50", "verdict"] == "below ViT-B/16"
    shown = paper_table(table, frame.reset_index(), "tiny", "test")
    assert [shown.is_text(number) for number in range(len(shown.columns))] == [True] * 2 + [False] * 12 + [True]
    row = next(row for row in shown.rows if row[1] == "SeDA_RN50")
    assert row[2] == "86.01 (+4.43)"  # of the paper, to its ResNet-50
    assert "of SeDA_RN50 to ResNet-50" in shown.caption


def test_the_page_has_the_papers_numbers_ours_and_what_is_missing(
    artefact: Artefact, results: list[RowResult], tmp_path: Path
) -> None:
    frame = compare_rows(artefact, results, {}, SINGLE_LABEL_METRICS)
    table = paper_table(artefact, frame, "tiny", "test")
    assert table.columns[:3] == ("Module", "Vireo-Food172 Acc-1", "Vireo-Food172 Acc-5")
    by_title = {row[0]: row for row in table.rows}
    assert by_title["+EMA"][1:5] == ("87.8 (+2.4)", "97.9 (+0.6)", "88.8 (+0.5)", "97.8 (+0.2)")
    assert by_title["+Fusion"][2] == "98.0 (+0.7)"
    assert by_title["+CDR(MLP)"][5:] == ("-", "-", "-", "-", "not had")
    files = write_table_files(tmp_path, "own", artefact.title, table, frame, "few words", ["a | note"])
    assert [path.suffix for path in files] == [".md", ".tex", ".csv"]
    assert r"a \| note" in files[0].read_text()
    assert files[2].read_text().count("\n") == 1 + len(artefact.rows)
    pairs = frame[["vireo172 acc1", "acc1"]].dropna().to_numpy()
    expected = kendalltau(pairs[:, 0], pairs[:, 1])[0]
    assert f"is {expected:+.2f} over 4 rows" in describe_order(artefact, frame)[0]


def test_latex_says_what_the_cells_say() -> None:
    """Undo the escapes and split at what is left of them: the cells come back."""
    cells = (("a & b_1", "50 %", r"\x{y}~^"), ("<b> #1", "$5", "1.0 ± 0.5"))
    table = Table(("one", "two", "three"), cells, "100 % & more", num_text_columns=2)
    text = render_latex(table, "own")
    assert r"\begin{tabular}{llr}" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"\caption{100 \% \& more}" in text
    body = re.search(r"\\midrule\n(.*)\n    \\bottomrule", text, re.DOTALL)
    assert body
    names = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
             r"\textgreater{}": ">", r"$\pm$": "±"}  # fmt: skip
    for line, row in zip(body[1].splitlines(), cells, strict=True):
        found = []
        for cell in re.split(r"(?<!\\)&", line.strip().removesuffix(r"\\")):
            tokens = re.findall(r"\\text\w+\{\}|\$\\pm\$|\\.|.", cell.strip())
            found.append("".join(names.get(token) or token.removeprefix("\\") for token in tokens))
        assert tuple(found) == row
    assert escape_latex("two\nlines") == "two lines"
    bracketed = render_latex(Table(("a",), (("[1pt]",), ("*",)), "b"), "own")  # would be options of the line's end before them
    assert not re.search(r"(\\\\|rule)\s*[\[*]", bracketed)


def test_printed_tables_are_no_wider_than_a_page(tmp_path: Path) -> None:
    """Every part has the names of the rows and whole groups; together they have all columns, in order, with their heads."""
    artefact = read_artefact("seda-table1")
    rng = np.random.default_rng(0)
    results = [result_of(artefact, row.title, 100.0 * (rng.random((5, len(IDS))) < 0.5)) for row in artefact.rows]
    frame = compare_rows(artefact, results, {}, SINGLE_LABEL_METRICS)
    wide, narrow = (paper_table(artefact, frame, "emoji_vendors", "test", is_narrow) for is_narrow in (False, True))
    write_table_files(tmp_path, "own", artefact.title, wide, frame, "", [], narrow)
    text = (tmp_path / "own.tex").read_text()
    tabulars = re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, re.DOTALL)
    heads, titles = [], [row.title for row in artefact.rows]
    for tabular in tabulars:
        lines = [line.strip().removesuffix(r"\\").split("&") for line in tabular.splitlines() if "&" in line]
        _, head, *rows = [[cell.strip() for cell in cells] for cells in lines]
        assert [cells[0].replace("\\", "") for cells in rows] == titles
        assert max(sum(map(len, cells)) for cells in rows) <= 75  # of digits of 4.6 points, 345 points
        heads += head[1:]
        assert r"\multicolumn{" + str(len(head)) + r"}{l}{\emph{Visual Modal Backbone}}" in tabular
    labels = {"acc1": "Acc-1", "acc5": "Acc-5", "pre1": "Pre-1", "pre5": "Pre-5", "rec1": "Rec-1", "rec5": "Rec-5"}
    papers = [labels[metric] for own in artefact.datasets.values() for metric in own.metrics]
    assert heads == [*papers, "mean", r"$\Delta$", r"95 \% interval", "mean", r"$\Delta$", "verdict"]
    assert r"\multicolumn{4}{c}{NUS-WIDE}" in text
    assert r"\cmidrule(lr){4-7}" in text
    assert text.count(r"\label{tab:own}") == 1


def test_labels_have_no_characters_of_latex() -> None:
    table = Table(("a",), (("b",),), "c")
    assert r"\label{tab:my-table-1}" in render_latex(table, "my_table%}1")
    assert r"\label{tab:t-2}" in render_latex(table, "t é\\2")


def test_rows_on_other_samples_are_not_compared(artefact: Artefact, results: list[RowResult]) -> None:
    first = results[1]
    assert first.samples is not None
    other = replace(first, samples=first.samples._replace(ids=[f"other {number}" for number in range(len(IDS))]))
    frame = compare_rows(artefact, [results[0], other, *results[2:]], {}, SINGLE_LABEL_METRICS)
    assert frame["verdict"][1] == "no claim"
    assert np.isnan(frame["acc1_diff"][1])
