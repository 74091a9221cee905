"""Sampler curves: accuracy and milliseconds per sample against the number of steps, as they lie in the runs."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from pipeline.evaluation.statistics import format_mean_std
from pipeline.report.blocks import Block, Grid, Heading, Picture
from pipeline.report.comparison import NAMES
from pipeline.report.figures import COLOURS, STYLE, WIDTH, svg
from pipeline.report.results import Head, Results, plural
from pipeline.types import SPLITS

WAY = ["sampler", "steps", "draws"]  # what names a point of a curve


def curve_name(evaluation: str) -> str:
    """The file of a curve in its run, for an evaluation with the run's own sampler."""
    return f"sampler-curve-{evaluation}.csv"


def metric_of(curve: pd.DataFrame) -> str:
    """The metric that is drawn."""
    return "acc1" if "acc1" in curve else "map"


def drawing(curve: pd.DataFrame) -> bytes:
    """The metric and the milliseconds per sample against S, a line per number of draws; the ancestral chain is a star."""
    metric = metric_of(curve)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (draws, rows) in enumerate(curve.groupby("draws")):
            shade = COLOURS[1 + number]
            for axes, column in ((left, metric), (right, "ms")):
                for sampler, style in (("ddim", "o-"), ("ancestral", "*")):
                    shown = rows[rows["sampler"] == sampler].sort_values("steps")
                    label = f"{sampler}, {plural(int(str(draws)), 'draw')}"
                    size = (5 if sampler == "ddim" else 10) + 4 * number  # rings, so that equal points can be seen
                    fill = shade if number == 0 else "none"
                    axes.plot(shown["steps"], shown[column], style, color=shade, ms=size, mfc=fill, label=label)
        _scales(left, curve, f"{NAMES[metric]} (%)")
        _scales(right, curve, "milliseconds per sample")
        right.set_yscale("log")
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
        return svg(figure)


def _scales(axes: Axes, curve: pd.DataFrame, label: str) -> None:
    steps = sorted(set(curve["steps"]))
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="steps S", ylabel=label)


def sampler_curves(results: Results) -> list[Block]:
    """A section with the curve of every head that has one; nothing when none has."""
    blocks = [block for head in results.heads for split in SPLITS for block in _curve(head, split)]
    return [Heading("Steps of the sampler"), *blocks] if blocks else []


def _curve(head: Head, split: str) -> list[Block]:
    """The curve of a head on a split, mean over the seeds that have one."""
    files = [run.path / curve_name(split) for run in head.runs]
    curves = [pd.read_csv(file) for file in files if file.is_file()]
    if not curves:
        return []
    every = pd.concat(curves)
    metric = metric_of(every)
    means = every.groupby(WAY, sort=False)[[metric, "ms"]].agg(["mean", "std"])
    caption = (
        f"{NAMES[metric]} on the {split} split and milliseconds per sample of {head.label} against the steps of its sampler; "
        f"{plural(len(curves), 'seed')} of {_range(every['n'].tolist())} samples. Ancestral: the papers' chain of every step. "
        f"Times: {_machine(every)}. {_own(head)}"
    )
    rows = tuple(
        (str(way[0]), str(way[1]), str(way[2]), format_mean_std(line[0], line[1]), f"{line[2]:.3g}")
        for way, line in zip(means.index, means.to_numpy(), strict=True)
    )
    flat = means.xs("mean", axis=1, level=1).reset_index()
    columns = (*WAY, f"{split} {NAMES[metric]}", "ms per sample")
    picture = Picture(drawing(flat), f"{NAMES[metric]} and time of {head.label} against steps", caption)
    return [picture, Grid(columns, rows, "Mean ± standard deviation over seeds.")]


def _machine(every: pd.DataFrame) -> str:
    """How the times were taken."""
    sizes, devices = _range(every["batch"].tolist()), " and ".join(sorted({str(device) for device in every["device"]}))
    return f"median of {_range(every['passes'].tolist())} passes over {sizes} samples on {devices}, one thread"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _own(head: Head) -> str:
    settings = head.config.settings
    steps = settings["sample_steps"] if settings["sampler"] == "ddim" else settings["num_steps"]
    return f"The head's own: {settings['sampler']}, {steps} steps, {plural(settings['draws'], 'draw')}."
