"""Write what a grid has found, as a section of the report on its dataset and as a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import describe_spread, format_mean_std, judge_cells
from pipeline.report import grid_figures, html, robustness
from pipeline.report.blocks import Block, BulletList, CollapsibleSection, Heading, Paragraph, SvgFigure, Table
from pipeline.report.comparison import METRIC_LABELS
from pipeline.report.figures import shorten
from pipeline.report.grid_figures import AxisEffect, GridAxis
from pipeline.report.grid_results import GridResults, find_grids, read_grid
from pipeline.report.results import plural
from pipeline.runtime.files import write_atomic
from pipeline.runtime.runs import TEST_READS

NUM_TOP_CELLS = 10  # in the table that is always visible
MAX_LISTED_RUNS = 20  # of the runs that have not finished
SEARCH_DESCRIPTIONS = {
    "all": "every cell is trained to its end",
    "optuna": "successive halving gives up the worse cells early",
}


def write_grid_page(folder: Path) -> Path:
    """Write `index.html` into the folder of a grid and return its path; the page needs no other file.

    Raises:
        UserError: The folder is not a grid, or one of its files is damaged.
    """
    grid = read_grid(folder)
    page = folder / "index.html"
    write_atomic(page, html.render_html(f"{grid.dataset}: {_title(grid)}", _grid_blocks(grid)))
    return page


def grid_sections(home: Path, dataset: str) -> list[Block]:
    """Return one section per grid of the dataset; no blocks when there is no grid."""
    grids, notes = find_grids(home, dataset)
    blocks: list[Block] = [Heading("Grids"), BulletList(tuple(notes))] if notes else []
    for grid in grids:
        blocks += [Heading(_title(grid)), *_grid_blocks(grid)]
    return blocks


def _title(grid: GridResults) -> str:
    return f"Grid of {grid.method} over {', '.join(grid.axis_names.values())}"


def _key(grid: GridResults, view: str) -> str:
    """Return what the files of a view of a grid are called."""
    return f"grid {grid.path.name} {view}"


def _grid_blocks(grid: GridResults) -> list[Block]:
    ranked = robustness.rank_grid_cells(grid)
    blocks: list[Block] = [Paragraph(_overview(grid)), *_unfinished_blocks(grid, ranked)]
    if not ranked["seeds"].any():
        text = "No run has finished, so there is nothing to show; the same grid command goes on."
        return [*blocks, Paragraph(text)]
    return [
        *blocks,
        *_winner_blocks(grid, ranked),
        *_cell_tables(grid, ranked),
        *_axis_effect_blocks(grid),
        *_heat_map_blocks(grid),
        *_parallel_coordinate_blocks(grid, ranked),
    ]


def _overview(grid: GridResults) -> str:
    """What was tried: the cells, the seeds, the kind of search and the values of each axis."""
    axes = [
        f"{grid.axis_names[field]}{f' ({field})' if grid.axis_names[field] != field else ''}: {', '.join(map(str, values))}"
        for field, values in grid.axes.items()
    ]
    num_cells = len(grid.positions)
    num_combinations = int(np.prod([len(values) for values in grid.axes.values()]))
    drawn = f", drawn from {num_combinations}," if num_cells < num_combinations else ""
    search = SEARCH_DESCRIPTIONS.get(grid.search, grid.search)
    return (
        f"{plural(num_cells, 'cell')}{drawn} with {plural(len(grid.seeds), 'seed')} each; {search}. "
        f"{'; '.join(axes)}. Folder: {grid.path.name}."
    )


def _unfinished_blocks(grid: GridResults, ranked: pd.DataFrame) -> list[Block]:
    """How many runs have not finished, why, and what that does to the means."""
    unfinished = grid.runs[grid.runs["state"] != "done"]
    if unfinished.empty:
        return []
    counts = ", ".join(f"{count} {state}" for state, count in unfinished["state"].value_counts().sort_index().items())
    num_complete_cells = int((ranked["seeds"] == len(grid.seeds)).sum())
    text = (
        f"{len(grid.runs) - len(unfinished)} of {plural(len(grid.runs), 'run')} have finished ({counts}), and "
        f"{num_complete_cells} of {plural(len(grid.positions), 'cell')} have all their seeds; only these are ranked. Means are "
        "over what has finished, so those of two values may cover different cells."
    )
    if "pruned" in unfinished["state"].to_numpy():
        text += " Cells that were given up have no part in them, which flatters the values whose worse cells were given up."
    rows = tuple(
        (_cell_label(grid, int(run["cell"])), str(run["seed"]), str(run["state"]), str(run["reason"]))
        for run in unfinished.head(MAX_LISTED_RUNS).to_dict("records")
    )
    caption = f"The first {MAX_LISTED_RUNS} of {len(unfinished)}." if len(unfinished) > MAX_LISTED_RUNS else ""
    table = Table(("cell", "seed", "state", "reason"), rows, caption, num_text_columns=4, key=_key(grid, "unfinished"))
    return [Paragraph(text), CollapsibleSection(f"Runs that have not finished: {len(unfinished)}", (table,))]


def _cell_label(grid: GridResults, cell: int) -> str:
    return " ".join(f"{grid.axis_names[field]}={value}" for field, value in grid.cell_values(cell).items())


def grid_metric(grid: GridResults) -> str:
    """Return the grid's metric as figures call it."""
    return METRIC_LABELS.get(grid.metric, grid.metric)


def _winner_blocks(grid: GridResults, ranked: pd.DataFrame) -> list[Block]:
    """The best cell on validation, and its metrics on the test split."""
    best = ranked.iloc[0]
    if pd.isna(best["rank"]):
        return [Paragraph("No cell has all its seeds yet, so none is chosen.")]
    num_near = int((ranked["score"][ranked["rank"].notna()] >= best["score"] - best["std"]).sum()) - 1
    score = format_mean_std(best["score"], best["std"])
    text = (
        f"The best on validation is {_cell_label(grid, int(best['cell']))}: {grid_metric(grid)} {score}. "
        f"It is the highest of {plural(int(ranked['rank'].notna().sum()), 'cell')}, so this number is optimistic. "
        + (f"Within one standard deviation of it: {num_near} of the others. " if num_near > 0 else "")
    )
    if grid.winner.get("cell") != grid.cell_values(int(best["cell"])) or not grid.winner.get("test"):
        return [Paragraph(f"{text}The test split has not been read for it.")]
    metrics = [
        f"{METRIC_LABELS.get(name, name)} "
        f"{format_mean_std(value['mean'], value['std'] if len(value['values']) > 1 else np.nan)}"
        for name, value in grid.winner["test"].items()
    ]
    return [Paragraph(f"{text}On the test split, {_describe_test_reads(grid)}: {', '.join(metrics)}.")]


def _describe_test_reads(grid: GridResults) -> str:
    """Whether the test split was read for the winner only, or also for runs of other cells."""
    winner_runs = set(grid.winner["runs"])
    other_runs = [
        run for run in grid.runs["run"] if run and run not in winner_runs and (grid.home / run / TEST_READS).is_file()
    ]
    if other_runs:
        return f"it has also been read for {plural(len(other_runs), 'run')} of other cells"
    return "read for this cell alone"


def _cell_tables(grid: GridResults, ranked: pd.DataFrame) -> list[Block]:
    """A table of the best cells, and a collapsible table of all cells when there are more."""
    names = tuple(grid.axis_names[field] for field in grid.axes)
    columns = ("rank", *names, f"validation {grid_metric(grid)}", "loss", "seeds", "state", "verdict")
    verdicts = judge_cells(grid.by_cell_and_seed("score"), ranked)
    rows = []
    for cell, verdict in zip(ranked.to_dict("records"), verdicts, strict=True):
        values = [str(value) for value in grid.cell_values(int(cell["cell"])).values()]
        has_scores = bool(cell["seeds"])
        numbers = (format_mean_std(cell["score"], cell["std"]), f"{cell['loss']:.3f}") if has_scores else ("-", "-")
        rank = "-" if pd.isna(cell["rank"]) else str(cell["rank"])
        rows.append((rank, *values, *numbers, str(cell["seeds"]), shorten(str(cell["state"]), 60), verdict or "-"))
    caption = (
        f"{describe_spread(ranked['seeds'])}; in percent. Of equal cells the one with the lower validation loss is better. "
        "The verdict compares a cell with the best one over seeds alone (Holm over the cells): it is no claim on other samples."
    )
    top = Table(columns, tuple(rows[:NUM_TOP_CELLS]), caption, key=_key(grid, "best cells"))
    if len(rows) <= NUM_TOP_CELLS:
        return [top]
    return [
        top,
        CollapsibleSection(f"All {len(rows)} cells", (Table(columns, tuple(rows), caption, key=_key(grid, "all cells")),)),
    ]


def _axis(grid: GridResults, field: str) -> GridAxis:
    values = grid.axes[field]
    is_ordered = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return GridAxis(grid.axis_names[field], tuple(map(str, values)), is_ordered)


def axis_effects(grid: GridResults) -> list[AxisEffect]:
    """Return what the robustness figure shows: the validation metric against every axis with more than one value."""
    effects = []
    for field in robustness.varied_axes(grid):
        table = robustness.mean_by_value(grid, field)
        columns = (table[name].to_numpy(dtype=float) for name in ("mean", "std", "best", "best_std"))
        effects.append(AxisEffect(_axis(grid, field), *columns, runs=table["runs"].to_numpy()))
    return effects


def axis_effect_caption(grid: GridResults) -> str:
    """Return the caption of the robustness figure."""
    fields = robustness.varied_axes(grid)
    ranges = ", ".join(f"{grid.axis_names[field]} {robustness.mean_range(grid, field):.2f}" for field in fields)
    return (
        f"Validation {grid_metric(grid)} against each axis (SeDA, Figure 3). Mean over everything else: all other values and "
        "seeds, with their standard deviation, which is how much the choice of the rest matters. Best of everything else: the "
        "best cell with this value that has all its seeds, with its deviation over them. Values are equally far apart. Points "
        f"between the highest and the lowest mean: {ranges}."
    )


def _axis_effect_blocks(grid: GridResults) -> list[Block]:
    """The robustness figure, which shows the metric against each axis, and a collapsible table of its numbers."""
    effects = axis_effects(grid)
    if not effects:
        return [Paragraph("Every axis has a single value, so there is nothing to plot.")]
    svg = grid_figures.draw_axis_effects(effects, grid_metric(grid))
    alt = f"Validation {grid_metric(grid)} against {', '.join(effect.axis.name for effect in effects)}"
    numbers = CollapsibleSection("The numbers of these plots", (replace(_axis_effect_table(effects), key=_key(grid, "axes")),))
    return [SvgFigure(svg, alt, axis_effect_caption(grid), key=_key(grid, "axes")), numbers]


def _axis_effect_table(effects: Sequence[AxisEffect]) -> Table:
    rows = tuple(
        (effect.axis.name, value, *_format_effect(mean, std, best, best_std), str(runs))
        for effect in effects
        for value, mean, std, best, best_std, runs in zip(
            effect.axis.ticks, effect.mean, effect.std, effect.best, effect.best_std, effect.runs, strict=True
        )
    )
    columns = ("axis", "value", "mean over everything else", "best of everything else", "runs")
    return Table(columns, rows, "", num_text_columns=2)


def _format_effect(mean: float, std: float, best: float, best_std: float) -> tuple[str, str]:
    first, second = (
        "-" if np.isnan(middle) else format_mean_std(middle, off) for middle, off in ((mean, std), (best, best_std))
    )
    return first, second


def _heat_map_blocks(grid: GridResults) -> list[Block]:
    """A heat map for each pair of axes."""
    pairs = robustness.axis_pairs(grid)
    if not pairs:
        return []
    maps = [(_axis(grid, row), _axis(grid, column), robustness.mean_by_pair(grid, row, column)) for row, column in pairs]
    caption = (
        f"Mean validation {grid_metric(grid)} over all other values and seeds, for every pair of axes; empty: no finished run."
    )
    if len(robustness.varied_axes(grid)) > robustness.NUM_PAIRED_AXES:
        shown = "; ".join(f"{grid.axis_names[row]} × {grid.axis_names[column]}" for row, column in pairs)
        caption += f" Shown are the pairs of the {robustness.NUM_PAIRED_AXES} axes whose means lie furthest apart: {shown}."
    if any(max(means.shape) > grid_figures.MAX_PRINTED_VALUES for _, _, means in maps):
        caption += f" Maps of more than {grid_figures.MAX_PRINTED_VALUES} values have no numbers."
    svg = grid_figures.draw_heat_maps(maps, grid_metric(grid))
    return [SvgFigure(svg, f"Heat maps of validation {grid_metric(grid)}", caption, key=_key(grid, "pairs"))]


def _parallel_coordinate_blocks(grid: GridResults, ranked: pd.DataFrame) -> list[Block]:
    """All cells as lines through their values to their scores."""
    fields = robustness.varied_axes(grid)
    shown = ranked[ranked["seeds"] > 0]
    if not fields or len(shown) < 2:
        return []
    positions = np.column_stack([grid.positions_on(field) for field in fields])
    winner = 0 if pd.notna(shown["rank"].iloc[0]) else -1
    svg = grid_figures.draw_parallel_coordinates(
        [_axis(grid, field) for field in fields],
        positions[shown["cell"].to_numpy(dtype=int)],
        shown["score"].to_numpy(dtype=float),
        winner,
        grid_metric(grid),
    )
    caption = (
        f"Every cell as a line through its values to its mean validation {grid_metric(grid)}, which is also its colour. At "
        "each value the lines lie in the order of the metric: where the upper ones gather, cells are good."
    )
    return [SvgFigure(svg, f"Parallel coordinates of {plural(len(shown), 'cell')}", caption, key=_key(grid, "lines"))]
