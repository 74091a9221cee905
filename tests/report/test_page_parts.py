"""The parts of a report's page: rows in groups, the reference, calibration, classes, curves, and the files beside the page."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers.grid_folders import write_grid
from helpers.pages import HOSTILE_TEXT, Page
from helpers.report_home import ReportHome, make_home
from sklearn.metrics import recall_score

from pipeline.evaluation.metrics import expected_calibration_error
from pipeline.report import results_frame, results_table
from pipeline.report.blocks import Block, CollapsibleSection, Heading, Paragraph, SvgFigure, Table
from pipeline.report.calibration import class_accuracies, measure_reliability
from pipeline.report.comparison import compare_results
from pipeline.report.figure_blocks import training_curve
from pipeline.report.figure_data import SeedPredictions
from pipeline.report.figures import draw_confusions
from pipeline.report.grid_page import grid_sections
from pipeline.report.html import render_html
from pipeline.report.latex import escape_latex
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
