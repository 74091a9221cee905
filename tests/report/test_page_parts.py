"""The parts of a report's page: rows in groups, the reference, calibration, classes, curves, and the files beside the page."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.grid_folders import write_grid
from helpers.pages import HOSTILE_TEXT, Page
from helpers.report_home import ReportHome, make_home
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from sklearn.metrics import recall_score

from pipeline.evaluation.metrics import expected_calibration_error
from pipeline.report import results_frame, results_table
from pipeline.report.blocks import Block, CollapsibleSection, Heading, Paragraph, SvgFigure, Table
from pipeline.report.calibration import class_accuracies, measure_reliability
from pipeline.report.comparison import compare_results
from pipeline.report.document import page_title
from pipeline.report.figure_blocks import training_curve
from pipeline.report.figure_data import SeedPredictions
from pipeline.report.figures import draw_confusions
from pipeline.report.grid_page import grid_sections
from pipeline.report.html import render_html
from pipeline.report.latex import escape_latex, render_latex
from pipeline.report.page_files import escape_csv, render_csv, write_page_files
from pipeline.report.provenance import provenance_blocks
from pipeline.report.results import collect_results
from pipeline.report.results_section import results_blocks
from pipeline.report.row_groups import ROW_GROUPS
from pipeline.runtime.runs import REAL_TEXT, RunConfig

CLASSES = [f"class {k}" for k in range(8)]
ENDINGS = ("csv", "tex", "svg", "pdf", "csv", "tex")


def add(home: ReportHome, config: RunConfig, scores: tuple[float, ...] = (40.0, 55.0), name: str = "test") -> None:
    run = home.train(config, 0, scores)
    home.evaluate(run, home.logits(2.0, 1), name=name)


@pytest.fixture(scope="module")
def sorted_home(tmp_path_factory: pytest.TempPathFactory) -> ReportHome:
    """A home whose rows are of all groups."""
    home = make_home(tmp_path_factory.mktemp("groups"), CLASSES)
    add(home, home.config("baseline", {"tau": 0.1}))
    seda = home.config("seda", {"tau": 0.1, "width": 8})
    add(home, seda, (60.0,))
    add(home, seda, (60.0,), name="test@draws=8")
    add(home, home.config("seda", {"tau": 0.2, "width": 8}), (70.0,))
    add(home, home.config("seda", {"tau": 0.1, "width": 16}), (10.0,))
    add(home, dataclasses.replace(seda, text_control="noise"), (99.0,))
    add(home, dataclasses.replace(seda, train_fraction=0.5), (99.0,))
    add(home, dataclasses.replace(seda, training={**seda.training, "stage": "joint", "train": "image", "init": "0"}), (99.0,))
    add(home, home.config("baseline", {"tau": 0.1}, image="text"))
    return home


def test_methods_stand_apart_and_rows_are_called_by_what_differs(sorted_home: ReportHome) -> None:
    frame = results_frame(sorted_home.path, "toy")
    named = {group: sorted(frame["name"][frame["group"] == group]) for group in ROW_GROUPS}
    assert named == {
        "methods": ["baseline", "seda"],  # the head that is best on validation
        "settings": ["seda · tau=0.1", "seda · tau=0.1, width=16"],
        "prediction": ["seda · tau=0.1 · draws=8"],
        "controls": ["seda · text=noise · tau=0.1"],
        "fractions": ["seda · 50 % of the training data · tau=0.1"],
        "continued": ["seda · trained on with --unfreeze image"],
        "diagnostics": ["text only (diagnostic: reads test text)"],
    }
    assert frame["method"].is_unique


def test_rows_say_where_they_were_trained_otherwise_than_the_rows_that_they_are_compared_with(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    ema, seda = home.config("ema", {"tau": 0.1}), home.config("seda", {})
    trained: list[tuple[RunConfig, int, str]] = [
        *((home.config("baseline", {}), 8, REAL_TEXT), (ema, 8, REAL_TEXT), (ema, 3, REAL_TEXT)),
        *((ema, 3, "label"), (ema, 3, "noise"), (seda, 6, REAL_TEXT), (seda, 6, "noise"), (seda, 7, "noise")),
    ]
    for config, epochs, control in trained:
        training = {**config.training, "epochs": epochs}
        add(home, dataclasses.replace(config, training=training, text_control=control), (10.0 * epochs,))
    results = collect_results(tmp_path, "toy", "test")
    blocks = results_blocks(results, compare_results(results))
    methods, settings, controls = ([row[0] for row in block.rows] for block in blocks if isinstance(block, Table))
    assert methods == ["baseline", "ema", "seda · epochs=6 (baseline 8)"]
    assert settings == ["ema · epochs=3 (baseline 8)"]
    assert controls == [
        "seda · text=noise · epochs=7 (baseline 8)",  # nobody trained seda on real text for 7 epochs
        "ema · real text · epochs=3 (baseline 8)",
        "ema · text=label · epochs=3 (baseline 8)",
        "ema · text=noise · epochs=3 (baseline 8)",
        "seda · real text · epochs=6 (baseline 8)",
        "seda · text=noise · epochs=6 (baseline 8)",
    ]
    assert set(results_table(tmp_path, "toy")["method"]) == {
        *methods,
        *settings,
        *(row for row in controls if "real" not in row),
    }


def test_the_reference_is_named_and_settings_are_on_demand(sorted_home: ReportHome) -> None:
    results = collect_results(sorted_home.path, "toy", "test")
    blocks = results_blocks(results, compare_results(results))
    (reference,) = [block.text for block in blocks if isinstance(block, Paragraph) and block.text.startswith("Reference: ")]
    folder = next(row.folder for row in results.rows if row.label == "baseline")
    assert f"baseline ({folder}, 1 seed, image features image-" in reference
    assert [block.text for block in blocks if isinstance(block, Heading) and block.level == 3] == list(ROW_GROUPS.values())[1:]
    first = next(block for block in blocks if isinstance(block, Table))
    assert [row[0] for row in first.rows] == ["baseline", "seda"]
    page = render_html("title", blocks)
    assert "<summary>seda</summary>" in page
    assert "tau=0.2, width=8, training epochs=4" in page


def test_a_dash_is_explained_by_an_older_evaluation_only_where_there_is_one(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    for method in ("baseline", "ema"):
        add(home, home.config(method, {}))
    for is_old in (False, True):
        paths = sorted(tmp_path.glob("runs/toy/*/seed0/metrics.json"))
        for path in paths[is_old:]:
            records = json.loads(path.read_text())
            records["test"]["metrics"] |= {"ece": 7.0}
            path.write_text(json.dumps(records))
        if is_old:
            records = json.loads(paths[0].read_text())
            del records["test"]["metrics"]["ece"]
            paths[0].write_text(json.dumps(records))
        results = collect_results(tmp_path, "toy", "test")
        table = next(block for block in results_blocks(results, compare_results(results)) if isinstance(block, Table))
        assert ("the evaluation is older than the metric" in table.caption) == is_old


@pytest.mark.parametrize("reads_text", [True, False])
def test_a_page_says_whether_text_was_read(reads_text: bool, tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    add(home, home.config("baseline", {}))
    config = home.config("mlp", {})
    add(home, dataclasses.replace(config, caches={**config.caches, "text": home.caches["text"]}) if reads_text else config)
    results = collect_results(tmp_path, "toy", "test")
    how = "trained with text, tested" if reads_text else "trained and tested"
    assert page_title(results) == f"toy: {how} on images alone"
    introduction = next(
        block.text for block in results_blocks(results, compare_results(results)) if isinstance(block, Paragraph)
    )
    assert ("Text is seen in training only" in introduction) == reads_text


def test_contents_are_links_to_the_sections() -> None:
    blocks: list[Block] = [Heading("One <b>"), Heading("part", level=3), Heading("Two")]
    page = render_html("title", blocks)
    assert '<li><a href="#section-1">One &lt;b&gt;</a></li><li><a href="#section-3">Two</a></li>' in page
    assert '<h2 id="section-1">One &lt;b&gt;</h2><h3 id="section-2">part</h3><h2 id="section-3">Two</h2>' in page
    assert "<nav" not in render_html("title", blocks[:2])


def test_reliability_and_classes_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 400)
    label[label == 3] = 2  # a class without examples
    logits = rng.normal(size=(400, 5)) + 2.0 * np.eye(5)[label]
    predictions = SeedPredictions([], logits, label, np.zeros((0, 1)), "softmax_kl")
    curve = measure_reliability("one", [predictions, predictions])
    gap = np.nansum(curve.num_samples * np.abs(curve.confidence - curve.accuracy)) / 800
    confidence = np.exp(predictions.log_scores.max(axis=1))
    assert gap == pytest.approx(expected_calibration_error(confidence, predictions.is_right))
    assert curve.num_samples.sum() == 800
    shown = [0, 1, 2, 4]
    recall = [recall_score(label, logits.argmax(axis=1), average="micro", labels=[k]) for k in shown]
    np.testing.assert_allclose(class_accuracies(predictions, 5)[shown], 100 * np.array(recall))
    assert np.isnan(class_accuracies(predictions, 5)[3])


def test_curves_stand_on_a_scale_of_phases(tmp_path: Path) -> None:
    home = make_home(tmp_path, CLASSES)
    home.train(home.config("ema", {}), 0)  # two epochs of one phase, four of the next
    curve = training_curve(collect_results(tmp_path, "toy", "test").heads[0], "#000000")
    np.testing.assert_allclose(curve.position, [0.5, 1.0, 1.25, 1.5, 1.75, 2.0])
    assert curve.phases == ("adapt", "head")


def test_every_table_and_figure_is_a_file_and_hostile_names_are_inert_there(tmp_path: Path) -> None:
    names = ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "\u202egnp", HOSTILE_TEXT, r"\input{x} 5 % & $x_1^2$ #"]
    matrix = np.eye(len(names))
    table = Table(("class", *names), tuple((name, *["1"] * len(names)) for name in names), HOSTILE_TEXT)
    figure = SvgFigure(draw_confusions(matrix, matrix, names, ("before", "after")), "alt", HOSTILE_TEXT)
    (tmp_path / "files").mkdir()
    for name in ("99-old.csv", "tab-gone.tex"):
        (tmp_path / "files" / name).write_text("of an earlier page")
    blocks = write_page_files(tmp_path, [Heading(f"../{HOSTILE_TEXT}"), table, CollapsibleSection("more", (figure, table))])
    (tmp_path / "index.html").write_text(render_html("title", blocks))
    links = [str(each["href"]) for tag, each in Page(tmp_path / "index.html").elements if tag == "a"]
    written = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in (tmp_path / "files").iterdir()}
    name = "script-alert-1-script-img-src-x-onerror"
    stems = [f"files/{stem}" for stem in (f"tab-{name}", f"fig-{name}", f"tab-{name}-2")]
    assert links == [f"{stem}.{suffix}" for stem, suffix in zip(np.repeat(stems, 2), ENDINGS, strict=True)]
    assert sorted(links) == sorted(written)
    drawing, pdf, *_ = (written[name] for name in links[2:])
    assert {each.tag.rpartition("}")[2] for each in ElementTree.fromstring(drawing).iter()}.isdisjoint({"script", "a"})
    assert b"prefers-color-scheme" not in drawing
    assert pdf.startswith(b"%PDF")
    rows = list(csv.reader(io.StringIO(written[links[0]].decode())))
    assert [row[0] for row in rows[1:4]] == ["'=1+1", "'@SUM(A1)", "'+cmd|' /C calc'!A0"]
    assert rows[0][1:] == [row[0] for row in rows[1:]]
    assert all(cell.isprintable() for row in rows for cell in row)
    assert rb"\input" not in written[links[1]]


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("+1.20 (-0.10 to +2.50)", "+1.20 (-0.10 to +2.50)"),
        ("-3", "-3"),
        ("-", "-"),
        ("12.00 ± 0.50", "12.00 ± 0.50"),
        ("-1+cmd", "'-1+cmd"),
        ("\t=A1", "'=A1"),
        ("a\r\nb\x00", "a b"),
        ("\u202e=A1", "'=A1"),
        ("👩‍🚀", "👩‍🚀"),
    ],
)
def test_cells_are_no_formulas(text: str, cell: str) -> None:
    assert escape_csv(text) == cell
    table = Table(("a", "b"), ((text, 'say "x", y'),), "")
    assert list(csv.reader(io.StringIO(render_csv(table)))) == [["a", "b"], [cell, 'say "x", y']]


def test_files_keep_their_names_when_the_page_grows(sorted_home: ReportHome, tmp_path: Path) -> None:
    """A paper refers to them by \\input and \\ref."""

    def write(home: ReportHome) -> dict[str, str]:
        results = collect_results(home.path, "toy", "test")
        folder = home.path / "page"
        blocks = [*results_blocks(results, compare_results(results)), *grid_sections(home.path, "toy")]
        blocks += provenance_blocks(results, home.manifest)
        write_page_files(folder, [block for block in blocks if not isinstance(block, SvgFigure)])  # PDF takes seconds
        tables = sorted((folder / "files").glob("*.tex"))
        return {path.name: re.findall(r"label\{(.*?)\}", path.read_text())[0] for path in tables}

    home = make_home(tmp_path, CLASSES)
    add(home, home.config("seda", {"tau": 0.1}))
    write_grid(tmp_path, {"tau": (0.1,)}, name="5" * 12)
    first = write(home)
    add(home, home.config("baseline", {"tau": 0.1}))
    add(home, dataclasses.replace(home.config("seda", {"tau": 0.1}), text_control="noise"))
    write_grid(tmp_path, {"tau": (0.1,)}, name="1" * 12)  # another grid, before the first one
    second = write(home)
    assert first.items() < second.items()
    assert {"tab-results-methods.tex", "tab-reads-of-test.tex", "tab-grid-seda-555555555555-best-cells.tex"} < first.keys()
    assert len(set(second.values())) == len(second)
    assert not [name for name in write(sorted_home) if re.search(r"-\d\.tex", name)]  # each has a name of its own


def test_latex_has_no_invisible_letters() -> None:
    assert escape_latex("a\x00b\u202ec\x1b[0m") == "a b c [0m"


def test_latex_has_letters_of_its_own_fonts_and_names_or_numbers_of_others() -> None:
    own = "Äpfel, français, Łódź, señor, “quoted” – 20 €"
    assert escape_latex(own) == own
    assert escape_latex("e\u0301") == "é"  # composed, for pdfLaTeX has no combining letters
    for text in ("🐱 cat", "猫", "кот", "ſ", "„x“", "✈\ufe0f", "👩\u200d🚀"):
        outside = [each for each in text if each not in ("\ufe0f", "\u200d") and (ord(each) > 0x2100 or each in "котſ„")]
        found = re.findall(r"\\otherletter\{(.)\}\{\((.*?)\)\}", escape_latex(text))
        assert found == [(each, f"U+{ord(each):04X}" if each.isalpha() else unicodedata.name(each).lower()) for each in outside]
        assert not re.search(r"\ufe0f|\u200d", escape_latex(text))
    head, _, _ = render_latex(Table(("a",), (("🐱",),), ""), "x").partition(r"\begin{table}")
    assert r"\providecommand{\otherletter}[2]{#2\allowbreak}" in head
    assert r"% \usepackage{booktabs}" in head


@pytest.mark.parametrize(
    "name", ["ema", "ema · text=shuffled-across · epochs=3 (baseline 8)", "🐱" * 3, "0123456789abcdef" * 4]
)
def test_tables_in_latex_are_no_wider_than_a_page(name: str) -> None:
    """Oracle: the widths of the letters of Computer Modern, LaTeX's font, at the size of small letters, 9 points."""
    columns = ("method", "seeds", "Acc-1", "Acc-1 vs baseline", "Acc-5", "Macro Acc", "ECE", "params", "train s", "verdict")
    numbers = ("3", "-53.45 ± 5.97", "-9.77 (-16.58 to +23.46)", "95.98 ± 1.00", "54.66 ± 6.35", "-", "1,288,199", "0.7")
    text = render_latex(Table(columns, ((name, *numbers, "not distinguishable"),) * 50, "a"), "own")
    tabulars = re.findall(r"\\begin\{tabular\}\{(.*?)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    heads: list[str] = []
    for alignment, body in tabulars:
        rows = [[cell.strip(" \\\n") for cell in line.split(" & ")] for line in body.splitlines() if " & " in line]
        kinds = re.findall(r"p\{(\d+)pt\}|([lr])", alignment)
        widths = [
            float(points) if points else max(map(width_in_points, cells))
            for (points, _), *cells in zip(kinds, *rows, strict=True)
        ]
        assert sum(widths) + 6 * len(widths) <= 345
        assert len(rows) <= 41
        heads += [head for head in rows[0][1:] if head not in heads]
        if "Acc-1" in rows[0]:
            assert rows[1][rows[0].index("Acc-1")] == r"$-$53.45 $\pm$ 5.97"
            assert {"--"} >= {row[rows[0].index("ECE")] for row in rows[1:] if "ECE" in rows[0]}
    assert heads == list(columns[1:])
    assert text.count(r"\label{tab:own}") == 1


@lru_cache
def width_in_points(cell: str) -> float:
    letters = (
        re.sub(r"\\otherletter\{.\}|\\allowbreak\{\}|[${}]", "", cell).replace(r"\pm", "+").replace(r"\textperiodcentered", ".")
    )
    box = TextPath((0, 0), letters, 9, prop=FontProperties(family="cmr10")).get_extents()
    return float(box.x1)


def test_captions_in_latex_say_what_the_table_is(sorted_home: ReportHome, tmp_path: Path) -> None:
    results = collect_results(sorted_home.path, "toy", "test")
    blocks = [*results_blocks(results, compare_results(results)), *provenance_blocks(results, sorted_home.manifest)]
    write_page_files(tmp_path, [block for block in blocks if not isinstance(block, SvgFigure)])
    captions = {
        path.stem.removeprefix("tab-"): re.findall(r"\\caption\{(.*)\}", path.read_text())[0]
        for path in (tmp_path / "files").glob("*.tex")
    }
    assert captions["results-controls"].startswith(
        "Controls: trained on other texts than their own, on the test split of toy, in percent."
    )
    assert captions["reads-of-test"].startswith("The test split was read 9 times.")
    assert "Provenance" in captions["provenance"]
    assert all(captions.values())
    assert not [text for text in captions.values() if "first table" in text or "stands here" in text]
