"""What a grid has found, as a section of the report and as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import format_mean_std
from pipeline.report import grid_figures, html, robustness
from pipeline.report.blocks import Block, Bullets, Folded, Grid, Heading, Picture, Text
from pipeline.report.comparison import NAMES
from pipeline.report.figures import short
from pipeline.report.grid_figures import Axis, Effect
from pipeline.report.results import plural
from pipeline.report.studies import Study, find_studies, read_study
from pipeline.runtime.files import write_atomic

TOP = 10  # cells of the first table
LISTED = 20  # runs that have not finished
SEARCHES = {
    "all": "every cell is trained to its end",
    "optuna": "successive halving gives up the worse cells early",
}


def write_grid_page(folder: Path) -> Path:
    """Write `index.html` into a grid's folder, one file that needs nothing else, and return its path.

    `ValueError` when the folder is no grid or a file of it is damaged.
    """
    study = read_study(folder)
    page = folder / "index.html"
    write_atomic(page, html.render_html(f"{study.dataset}: {_title(study)}", _section(study)))
    return page


def grids(home: Path, dataset: str) -> list[Block]:
    """One section per grid of the dataset; nothing when there is none."""
    studies, notes = find_studies(home, dataset)
    blocks: list[Block] = [Heading("Grids"), Bullets(tuple(notes))] if notes else []
    for study in studies:
        blocks += [Heading(_title(study)), *_section(study)]
    return blocks


def _title(study: Study) -> str:
    return f"Grid of {study.method} over {', '.join(study.names.values())}"


def _section(study: Study) -> list[Block]:
    ranked = robustness.ranking(study)
    blocks: list[Block] = [Text(_asked(study)), *_incomplete(study, ranked)]
    if not ranked["seeds"].any():
        return [*blocks, Text("No run has finished, so there is nothing to show; the same grid command goes on.")]
    return [*blocks, *_winner(study, ranked), *_table(study, ranked), *_effects(study), *_maps(study), *_lines(study, ranked)]


def _asked(study: Study) -> str:
    """What was tried."""
    axes = [
        f"{study.names[field]}{f' ({field})' if study.names[field] != field else ''}: {', '.join(map(str, values))}"
        for field, values in study.axes.items()
    ]
    combinations = int(np.prod([len(values) for values in study.axes.values()]))
    drawn = f", drawn from {combinations}," if len(study.places) < combinations else ""
    search = SEARCHES.get(study.search, study.search)
    return (
        f"{plural(len(study.places), 'cell')}{drawn} with {plural(len(study.seeds), 'seed')} each; {search}. "
        f"{'; '.join(axes)}. Folder: {study.path.name}."
    )


def _incomplete(study: Study, ranked: pd.DataFrame) -> list[Block]:
    """How many runs have not finished, why, and what that does to the means."""
    left = study.runs[study.runs["state"] != "done"]
    if left.empty:
        return []
    counts = ", ".join(f"{count} {state}" for state, count in left["state"].value_counts().sort_index().items())
    whole = int((ranked["seeds"] == len(study.seeds)).sum())
    text = (
        f"{len(study.runs) - len(left)} of {plural(len(study.runs), 'run')} have finished ({counts}), and {whole} of "
        f"{plural(len(study.places), 'cell')} have all their seeds; only these are ranked. Means are over what has finished, "
        "so those of two values may cover different cells."
    )
    if "pruned" in left["state"].to_numpy():
        text += " Cells that were given up have no part in them, which flatters the values whose worse cells were given up."
    rows = tuple(
        (_label(study, int(line["cell"])), str(line["seed"]), str(line["state"]), str(line["reason"]))
        for line in left.head(LISTED).to_dict("records")
    )
    more = f"The first {LISTED} of {len(left)}." if len(left) > LISTED else ""
    table = Grid(("cell", "seed", "state", "reason"), rows, more, words=4)
    return [Text(text), Folded(f"Runs that have not finished: {len(left)}", (table,))]


def _label(study: Study, cell: int) -> str:
    return " ".join(f"{study.names[field]}={value}" for field, value in study.values(cell).items())


def _metric(study: Study) -> str:
    return NAMES.get(study.metric, study.metric)


def _winner(study: Study, ranked: pd.DataFrame) -> list[Block]:
    """The best cell on validation, and what the test split says of it."""
    best = ranked.iloc[0]
    if pd.isna(best["rank"]):
        return [Text("No cell has all its seeds yet, so none is chosen.")]
    near = int((ranked["score"][ranked["rank"].notna()] >= best["score"] - best["std"]).sum()) - 1
    score = format_mean_std(best["score"], best["std"])
    text = (
        f"The best on validation is {_label(study, int(best['cell']))}: {_metric(study)} {score}. "
        f"It is the highest of {plural(int(ranked['rank'].notna().sum()), 'cell')}, so this number is optimistic. "
        + (f"Within one standard deviation of it: {near} of the others. " if near > 0 else "")
    )
    if study.winner.get("cell") != study.values(int(best["cell"])) or not study.winner.get("test"):
        return [Text(f"{text}The test split has not been read for it.")]
    own = set(study.winner["runs"])
    tests = [
        f"{NAMES.get(name, name)} {format_mean_std(value['mean'], value['std'] if len(value['values']) > 1 else np.nan)}"
        for name, value in study.winner["test"].items()
    ]
    others = [run for run in study.runs["run"] if run and run not in own and (study.home / run / "test_reads.jsonl").is_file()]
    alone = f"it has also been read for {plural(len(others), 'run')} of other cells" if others else "read for this cell alone"
    return [Text(f"{text}On the test split, {alone}: {', '.join(tests)}.")]


def _table(study: Study, ranked: pd.DataFrame) -> list[Block]:
    """The best cells, and all of them folded away."""
    fields = tuple(study.names[field] for field in study.axes)
    columns = ("rank", *fields, f"validation {_metric(study)}", "loss", "seeds", "state")
    rows = []
    for line in ranked.to_dict("records"):
        values = [str(value) for value in study.values(int(line["cell"])).values()]
        numbers = (format_mean_std(line["score"], line["std"]), f"{line['loss']:.3f}") if line["seeds"] else ("-", "-")
        rank = "-" if pd.isna(line["rank"]) else str(line["rank"])
        rows.append((rank, *values, *numbers, str(line["seeds"]), short(str(line["state"]), 60)))
    caption = (
        "Mean ± standard deviation over seeds, in percent; of equal cells the one with the lower validation loss is better."
    )
    top = Grid(columns, tuple(rows[:TOP]), caption)
    return [top] if len(rows) <= TOP else [top, Folded(f"All {len(rows)} cells", (Grid(columns, tuple(rows), caption),))]


def _axis(study: Study, field: str) -> Axis:
    values = study.axes[field]
    is_ordered = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return Axis(study.names[field], tuple(map(str, values)), is_ordered)


def _effects(study: Study) -> list[Block]:
    """The robustness plots: the metric against each axis, and their numbers."""
    fields = robustness.varied(study)
    if not fields:
        return [Text("Every axis has a single value, so there is nothing to plot.")]
    tables = {field: robustness.by_value(study, field) for field in fields}
    panels = [
        Effect(_axis(study, field), *(table[name].to_numpy(dtype=float) for name in ("mean", "std", "best", "best_std")))
        for field, table in tables.items()
    ]
    reaches = ", ".join(f"{study.names[field]} {robustness.reach(study, field):.2f}" for field in fields)
    rows = tuple(
        (study.names[field], str(value), *_numbers(line), str(int(line["runs"])))
        for field, table in tables.items()
        for value, line in zip(study.axes[field], table.to_dict("records"), strict=True)
    )
    caption = (
        f"Validation {_metric(study)} against each axis (SeDA, Figure 3). Mean over everything else: all other values and "
        "seeds, with their standard deviation, which is how much the choice of the rest matters. Best of everything else: the "
        "best cell with this value that has all its seeds, with its deviation over them. Values are equally far apart. Points "
        f"between the highest and the lowest mean: {reaches}."
    )
    names = ("axis", "value", "mean over everything else", "best of everything else", "runs")
    numbers = Folded("The numbers of these plots", (Grid(names, rows, "", words=2),))
    alt = f"Validation {_metric(study)} against {', '.join(study.names[field] for field in fields)}"
    return [Picture(grid_figures.effects(panels, _metric(study)), alt, caption), numbers]


def _numbers(line: Mapping[Any, float]) -> tuple[str, str]:
    pairs = ((line["mean"], line["std"]), (line["best"], line["best_std"]))
    first, second = ("-" if np.isnan(mean) else format_mean_std(mean, std) for mean, std in pairs)
    return first, second


def _maps(study: Study) -> list[Block]:
    """Heat maps of pairs of axes."""
    pairs = robustness.pairs(study)
    if not pairs:
        return []
    maps = [(_axis(study, down), _axis(study, along), robustness.by_pair(study, down, along)) for down, along in pairs]
    caption = (
        f"Mean validation {_metric(study)} over all other values and seeds, for every pair of axes; empty: no finished run."
    )
    if len(robustness.varied(study)) > robustness.NUM_PAIRED:
        shown = "; ".join(f"{study.names[down]} × {study.names[along]}" for down, along in pairs)
        caption += f" Shown are the pairs of the {robustness.NUM_PAIRED} axes whose means lie furthest apart: {shown}."
    if any(max(means.shape) > grid_figures.MOST_PRINTED for _, _, means in maps):
        caption += f" Maps of more than {grid_figures.MOST_PRINTED} values have no numbers."
    drawing = grid_figures.heat_maps(maps, _metric(study))
    return [Picture(drawing, f"Heat maps of validation {_metric(study)}", caption)]


def _lines(study: Study, ranked: pd.DataFrame) -> list[Block]:
    """All cells as lines through their values."""
    fields = robustness.varied(study)
    shown = ranked[ranked["seeds"] > 0]
    if not fields or len(shown) < 2:
        return []
    columns = np.column_stack([study.column(field) for field in fields])
    winner = 0 if pd.notna(shown["rank"].iloc[0]) else -1
    drawing = grid_figures.parallel(
        [_axis(study, field) for field in fields],
        columns[shown["cell"].to_numpy(dtype=int)],
        shown["score"].to_numpy(dtype=float),
        winner,
        _metric(study),
    )
    caption = (
        f"Every cell as a line through its values to its mean validation {_metric(study)}, which is also its colour. At each "
        "value the lines lie in the order of the metric: where the upper ones gather, cells are good."
    )
    return [Picture(drawing, f"Parallel coordinates of {plural(len(shown), 'cell')}", caption)]
