"""Pages about grids: their numbers agree with pandas, they are complete and escaped, and they say what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from helpers.command_line import run
from helpers.grid_folders import write_grid, write_winner
from helpers.pages import HOSTILE_TEXT, Page, write_page
from helpers.report_home import make_home
from helpers.tiny_heads import caches_by_key

from pipeline.report import robustness, write_grid_page
from pipeline.report.grid_figures import plot_axis_effects
from pipeline.report.grid_page import axis_effects
from pipeline.report.grid_results import find_grids, read_grid

AXES = {"w_ce_dst": (2.0, 0.5, 1.0), "num_steps": (900, 1200), "stage_step": (0, 300, 500, 700)}
UNFINISHED_STATES = {
    (0, 1): "failed",
    (3, 0): "pruned",
    (3, 1): "pruned",
    (3, 2): "pruned",
    (7, 2): "missing",
    (8, 0): "stopped",
}


def finished_runs(folder: Path) -> pd.DataFrame:
    """Read the finished runs of a grid without the code of the report."""
    rows = pd.read_csv(folder / "cells.csv")
    return rows[rows["state"] == "done"]


@pytest.mark.parametrize("states", [{}, UNFINISHED_STATES])
def test_means_by_value_and_by_pair_are_those_of_pandas(states: dict[tuple[int, int], str], tmp_path: Path) -> None:
    folder = write_grid(tmp_path, AXES, states=states)
    grid, rows = read_grid(folder), finished_runs(folder)
    whole = rows.groupby("cell").filter(lambda group: len(group) == 3)
    cells = whole.groupby(["cell", *AXES])["val_acc1"].agg(["mean", "std"]).reset_index()
    for field in AXES:
        table = robustness.mean_by_value(grid, field)
        groups = rows.groupby(field)["val_acc1"]
        assert grid.axes[field] == tuple(groups.groups)
        for name, values in (("mean", groups.mean()), ("std", groups.std()), ("runs", groups.count())):
            np.testing.assert_allclose(table[name], values)
        best = cells.loc[cells.groupby(field)["mean"].idxmax()].set_index(field).sort_index()
        np.testing.assert_allclose(table["best"], best["mean"])
        np.testing.assert_allclose(table["best_std"], best["std"])
        assert robustness.mean_range(grid, field) == pytest.approx(np.ptp(groups.mean()))
    for row, column in (("num_steps", "w_ce_dst"), ("w_ce_dst", "stage_step")):
        means = rows.pivot_table(index=row, columns=column, values="val_acc1", aggfunc="mean")
        np.testing.assert_allclose(robustness.mean_by_pair(grid, row, column), means)


def test_values_and_pairs_without_a_finished_run_have_no_mean(tmp_path: Path) -> None:
    states = {(cell, seed): "pruned" for cell in (0, 1) for seed in (0, 1)}  # both cells of tau = 0.1, and half of 0.2
    grid = read_grid(write_grid(tmp_path, {"tau": (0.1, 0.2), "lr": (1e-3, 1e-2)}, (0, 1), states={**states, (2, 0): "failed"}))
    table = robustness.mean_by_value(grid, "tau")
    assert table["runs"].tolist() == [0, 3]
    assert np.isnan(table.loc[0, ["mean", "std", "best", "best_std"]].to_numpy(dtype=float)).all()
    assert table["best"][1] == pytest.approx(grid.by_cell_and_seed("score")[3].mean())
    assert np.isnan(robustness.mean_by_pair(grid, "tau", "lr")).tolist() == [[True, True], [False, False]]
    assert robustness.mean_range(grid, "tau") == 0.0


def test_cells_are_ranked_by_mean_then_loss_and_only_with_all_their_seeds(tmp_path: Path) -> None:
    folder = write_grid(tmp_path, {"tau": (0.1, 0.2, 0.3, 0.4)}, (0, 1), states={(3, 1): "failed"})
    rows = pd.read_csv(folder / "cells.csv")
    rows["val_acc1"] = [50.0, 52.0, 51.0, 51.0, 55.0, 55.0, 99.0, np.nan]
    rows["val_loss"] = [2.0, 2.0, 1.5, 1.5, 1.0, 1.0, 0.1, np.nan]
    rows.to_csv(folder / "cells.csv", index=False)
    ranked = robustness.rank_grid_cells(read_grid(folder))
    assert ranked["cell"].tolist() == [2, 1, 0, 3]
    assert ranked["rank"].tolist() == [1, 2, 3, pd.NA]
    assert ranked["state"].tolist() == ["done", "done", "done", "failed for a reason"]
    assert ranked["seeds"].tolist() == [2, 2, 2, 1]


def test_the_ranking_of_a_real_grid_is_that_of_the_grid_command(
    tiny_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    caches = caches_by_key(home)
    arguments = ["grid", "--dataset", "tiny", "--method", "ema", "--home", str(home), "--seeds", "0,1", "--workers", "0"]
    arguments += ["--image", caches["image"], "--text", caches["text"], "--train", "epochs=2", "--train", "batch_size=8"]
    arguments += ["--grid", "lr=1e-2,1e-3", "--grid", "tau=0.2,0.07", "--set", "width=16", "--json"]
    assert run(arguments, monkeypatch) == 0
    printed = json.loads(capsys.readouterr().out)
    grid = read_grid(Path(printed["grid"]))
    assert list(grid.axes) == ["lr", "tau"]
    assert grid.axes["lr"] == (1e-3, 1e-2)
    ranked = robustness.rank_grid_cells(grid)
    for line, cell in zip(ranked.to_dict("records"), printed["cells"], strict=True):
        assert grid.cell_values(line["cell"]) == {field: cell[field] for field in grid.axes}
        assert (line["rank"], line["seeds"], line["state"]) == (cell["rank"], cell["seeds"], cell["state"])
        assert (line["score"], line["std"], line["loss"]) == pytest.approx((cell["val_acc1"], cell["std"], cell["val_loss"]))
    parsed = Page(write_grid_page(grid.path))
    test = printed["winner"]["test"]["acc1"]
    assert f"On the test split, read for this cell alone: Acc-1 {test['mean']:.2f} ± {test['std']:.2f}" in parsed.text
    assert f"The best on validation is lr={printed['cells'][0]['lr']} tau={printed['cells'][0]['tau']}: Acc-1" in parsed.text


def test_a_page_shows_every_view_and_needs_nothing_else(tmp_path: Path) -> None:
    folder = write_grid(tmp_path, AXES)
    best = robustness.rank_grid_cells(grid := read_grid(folder))["cell"][0]
    runs = [f"runs/toy/seda-{best:012d}/seed{seed}" for seed in range(3)]
    write_winner(folder, grid.cell_values(int(best)), runs, {"acc1": [50.0, 51.0, 55.0], "acc5": [80.0, 80.0, 80.0]})
    page = write_grid_page(folder)
    assert page == folder / "index.html"
    parsed = Page(page)
    assert "toy: Grid of seda over gamma, T, t" in parsed.text
    assert "gamma (w_ce_dst): 0.5, 1.0, 2.0; T (num_steps): 900, 1200; t (stage_step): 0, 300, 500, 700" in parsed.text
    assert "On the test split, read for this cell alone: Acc-1 52.00 ± 2.65, Acc-5 80.00 ± 0.00." in parsed.text
    assert "All 24 cells" in parsed.text
    assert len(parsed.drawings) == 3
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "iframe", "object", "svg", "a"}
    for drawing in parsed.drawings:
        ElementTree.fromstring(drawing)
    assert page.read_bytes() == write_grid_page(folder).read_bytes()
    other = tmp_path / f"runs/toy/seda-{(best + 1) % 24:012d}/seed0/test_reads.jsonl"
    other.parent.mkdir(parents=True)
    other.write_text("{}\n")
    assert "it has also been read for 1 run of other cells" in Page(write_grid_page(folder)).text


def test_an_incomplete_grid_says_so(tmp_path: Path) -> None:
    folder = write_grid(tmp_path, AXES, states=UNFINISHED_STATES, search="optuna", metric="map")
    parsed = Page(write_grid_page(folder))
    assert "66 of 72 runs have finished (1 failed, 1 missing, 3 pruned, 1 stopped), and 20 of 24 cells have all" in parsed.text
    assert "which flatters the values whose worse cells were given up" in parsed.text
    assert "successive halving gives up the worse cells early" in parsed.text
    assert "failed for a reason" in parsed.text
    assert "Mean validation mAP over all other values and seeds" in parsed.text
    assert "The test split has not been read for it." in parsed.text
    assert len(parsed.drawings) == 3


@pytest.mark.parametrize("state", ["missing", "failed"])
def test_a_grid_without_a_finished_run_has_a_page(state: str, tmp_path: Path) -> None:
    states = {(cell, seed): state for cell in range(2) for seed in range(2)}
    folder = write_grid(tmp_path, {"tau": (0.1, 0.2)}, (0, 1), states=states)
    parsed = Page(write_grid_page(folder))
    assert f"0 of 4 runs have finished (4 {state})" in parsed.text
    assert "No run has finished, so there is nothing to show" in parsed.text
    assert parsed.drawings == []


@pytest.mark.parametrize(
    ("axes", "num_drawings"),
    [
        ({"lr": (1e-3, 1e-2)}, 2),  # no pair: no heat map
        ({"lr": (1e-3,)}, 0),
        ({"residual": (True, False), "stages": ("dst", "dsl", "both"), "w_sc": (1.0,)}, 3),
        ({"lr": tuple(10.0**-k for k in range(30)), "stages": ("dst", "dsl")}, 3),
        ({"a": (1, 2), "b": (1, 2), "c": (1, 2), "d": (1, 2), "e": (1, 2)}, 3),
    ],
)
def test_axes_of_any_kind_and_number(axes: dict[str, tuple[object, ...]], num_drawings: int, tmp_path: Path) -> None:
    folder = write_grid(tmp_path, axes, (0,))
    grid, parsed = read_grid(folder), Page(write_grid_page(folder))
    assert len(parsed.drawings) == num_drawings
    if "stages" in axes:
        assert grid.axes["stages"] == axes["stages"]  # words stay in the order of the grid
    if "residual" in axes:
        assert grid.axes["residual"] == (False, True)
    assert ("have no numbers" in parsed.text) == ("lr" in axes and len(axes["lr"]) > 12)
    if len(axes) > 4:
        means = (
            finished_runs(folder)
            .melt(id_vars="val_acc1", value_vars=list(axes))
            .groupby(["variable", "value"])["val_acc1"]
            .mean()
        )
        kept = sorted(means.groupby("variable").agg(np.ptp).nlargest(4).index)
        assert sorted({field for pair in robustness.axis_pairs(grid) for field in pair}) == kept
        assert len(robustness.axis_pairs(grid)) == 6
        assert f"Shown are the pairs of the 4 axes whose means lie furthest apart: {kept[0]} × {kept[1]}; " in parsed.text


def test_a_few_cells_have_their_numbers_in_panels_of_a_third_of_the_page(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path, {"tau": (0.1, 0.2), "stages": ("dst", "dsl", "both", "none", "all")}))
    figure = plot_axis_effects(axis_effects(grid), "Acc-1")
    few, many = figure.axes
    numbers = robustness.mean_by_value(grid, "tau")[["mean", "best"]].to_numpy().T.ravel()
    assert [text.get_text() for text in few.texts] == [f"{number:.1f}" for number in numbers]
    assert list(many.texts) == []
    figure.canvas.draw()
    assert all(axes.get_position().width < 0.34 for axes in figure.axes)


def test_nothing_in_a_grid_becomes_markup(tmp_path: Path) -> None:
    home = make_home(tmp_path, [f"class {k}" for k in range(8)])
    home.evaluate(home.train(home.config("baseline", {}), 0), home.logits(2.0, 1))
    axes = {f"kind{HOSTILE_TEXT}": (f"a{HOSTILE_TEXT}", f"b{HOSTILE_TEXT}"), "tau": (0.1, 0.2)}
    folder = write_grid(tmp_path, axes, method="ema", states={(0, 0): HOSTILE_TEXT}, search=HOSTILE_TEXT)
    page, text = write_page(tmp_path, "toy")
    for path in (page, write_grid_page(folder)):
        parsed = Page(path)
        assert f"b{HOSTILE_TEXT}" in parsed.text
        assert parsed.foreign_scripts == []
        assert not [key for _, attributes in parsed.elements for key in attributes if key.startswith("on")]
        for drawing in parsed.drawings:
            assert b"alert" not in drawing
            assert {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(drawing).iter()}.isdisjoint(
                {"script", "a"}
            )
    markdown = text.read_text(encoding="utf-8")
    assert "## Grid of ema over kind" in markdown
    assert "<" not in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


@pytest.mark.slow
def test_the_report_has_a_section_per_grid_and_names_a_damaged_one(tmp_path: Path) -> None:
    home = make_home(tmp_path, [f"class {k}" for k in range(8)])
    home.evaluate(home.train(home.config("baseline", {}), 0), home.logits(2.0, 1))
    write_grid(tmp_path, {"tau": (0.1, 0.2)}, method="ema")
    write_grid(tmp_path, AXES)
    damaged = write_grid(tmp_path, {"lr": (0.1, 0.2)}, method="ema", name="ffffffffffff")
    whole = json.loads((damaged / "grid.json").read_text())
    contents = ["{", "[]", "{}", "[" * 100_000, json.dumps({**whole, "cells": []}), json.dumps({**whole, "seeds": []})]
    for name, content in [
        ("winner.json", "{}"),
        ("winner.json", '{"test": {"acc1": 1}}'),
        *(("grid.json", c) for c in contents),
    ]:
        (damaged / name).write_text(content)
        parsed = Page(write_page(tmp_path, "toy")[0])
        assert f"A grid cannot be read: {damaged} is damaged" in parsed.text
        assert "Grid of ema over tau" in parsed.text
        assert "Grid of seda over gamma, T, t" in parsed.text
        (damaged / "winner.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"is damaged .*; run the same grid command again"):
        write_grid_page(damaged)
    with pytest.raises(ValueError, match="is not a grid: give a folder"):
        write_grid_page(tmp_path)
    (damaged / "grid.json").write_text((tmp_path / "grids" / "toy" / "ema-0123456789ab" / "grid.json").read_text())
    (damaged / "cells.csv").write_text("cell,seed\n0,0\n")
    assert len(find_grids(tmp_path, "toy")[0]) == 2
