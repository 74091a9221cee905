"""Sampler curves in a report: accuracy and milliseconds per sample against the number of sampling steps.

The curves are read from the CSV files in the runs; `pipeline.studies.sampler_curve` writes these files.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from pipeline.evaluation.statistics import describe_spread, format_mean_std
from pipeline.report.blocks import Block, Heading, SvgFigure, Table
from pipeline.report.comparison import METRIC_LABELS
from pipeline.report.figures import COLOURS, FIGURE_STYLE, FIGURE_WIDTH_INCHES, SvgDrawing, to_svg
from pipeline.report.results import DatasetResults, HeadRuns, plural
from pipeline.types import SPLITS

POINT_COLUMNS = ["sampler", "steps", "draws"]  # these identify a point of a curve


def sampler_curve_filename(evaluation_name: str) -> str:
    """Return the name of the CSV file with a curve, in the folder of its run."""
    return f"sampler-curve-{evaluation_name}.csv"


def curve_metric(curve: pd.DataFrame) -> str:
    """Return the metric that is drawn."""
    return "acc1" if "acc1" in curve else "map"


def draw_sampler_curve(curve: pd.DataFrame) -> SvgDrawing:
    """Draw the metric and the milliseconds per sample against the number of steps S, as SVG.

    There is one line per number of draws. The ancestral chain is drawn as a star.
    """
    metric = curve_metric(curve)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH_INCHES, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, (draws, points) in enumerate(curve.groupby("draws")):
            for axes, column in ((left, metric), (right, "ms")):
                _draw_lines(axes, points, column, int(str(draws)), index)
        _set_scales(left, curve, f"{METRIC_LABELS[metric]} (%)")
        _set_scales(right, curve, "milliseconds per sample")
        right.set_yscale("log")
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        return to_svg(figure)


def _draw_lines(axes: Axes, points: pd.DataFrame, column: str, num_draws: int, index: int) -> None:
    """Draw the points with one number of draws, which is the `index`-th of the curve."""
    colour = COLOURS[1 + index]
    for sampler, style in (("ddim", "o-"), ("ancestral", "*")):
        shown = points[points["sampler"] == sampler].sort_values("steps")
        label = f"{sampler}, {plural(num_draws, 'draw')}"
        size = (5 if sampler == "ddim" else 10) + 4 * index  # growing rings, so that equal points can be seen
        fill = colour if index == 0 else "none"
        axes.plot(shown["steps"], shown[column], style, color=colour, ms=size, mfc=fill, label=label)


def _set_scales(axes: Axes, curve: pd.DataFrame, label: str) -> None:
    steps = sorted(set(curve["steps"]))
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="steps S", ylabel=label)


def sampler_curve_blocks(results: DatasetResults) -> list[Block]:
    """Return a section with the curve of every head that has one; no blocks when no head has one."""
    blocks = [block for head in results.heads for split in SPLITS for block in _curve_blocks(head, split)]
    return [Heading("Steps of the sampler"), *blocks] if blocks else []


def _curve_blocks(head: HeadRuns, split: str) -> list[Block]:
    """The curve of a head on a split as a figure and a table, mean over the seeds that have a curve."""
    files = [run.path / sampler_curve_filename(split) for run in head.runs]
    curves = [pd.read_csv(file) for file in files if file.is_file()]
    if not curves:
        return []
    all_seeds = pd.concat(curves)
    metric = curve_metric(all_seeds)
    metric_label = METRIC_LABELS[metric]
    statistics = all_seeds.groupby(POINT_COLUMNS, sort=False)[[metric, "ms"]].agg(["mean", "std"])
    caption = (
        f"{metric_label} on the {split} split and milliseconds per sample of {head.label} against the steps of its sampler; "
        f"{plural(len(curves), 'seed')} of {_format_range(all_seeds['n'].tolist())} samples. Ancestral: the papers' chain of "
        f"every step. Times: {_describe_timing(all_seeds)}. {_describe_own_sampler(head)}"
    )
    rows = tuple(
        (str(point[0]), str(point[1]), str(point[2]), format_mean_std(values[0], values[1]), f"{values[2]:.3g}")
        for point, values in zip(statistics.index, statistics.to_numpy(), strict=True)
    )
    means = statistics.xs("mean", axis=1, level=1).reset_index()
    key = f"sampler {head.runs[0].path.parent.name} {split}"
    columns = (*POINT_COLUMNS, f"{split} {metric_label}", "ms per sample")
    figure = SvgFigure(draw_sampler_curve(means), f"{metric_label} and time of {head.label} against steps", caption, key=key)
    return [figure, Table(columns, rows, f"{describe_spread([len(curves)])}.", key=key)]


def _describe_timing(curve: pd.DataFrame) -> str:
    batch_sizes = _format_range(curve["batch"].tolist())
    devices = " and ".join(sorted({str(device) for device in curve["device"]}))
    return f"median of {_format_range(curve['passes'].tolist())} passes over {batch_sizes} samples on {devices}, one thread"


def _format_range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _describe_own_sampler(head: HeadRuns) -> str:
    sampler, draws = head.config.setting("sampler"), head.config.setting("draws")
    steps = head.config.setting("sample_steps" if sampler == "ddim" else "num_steps")
    return f"The head's own: {sampler}, {steps} steps, {plural(draws, 'draw')}."
