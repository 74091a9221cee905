"""Drawings of a grid: the metric against each axis and each pair of axes, and all cells at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from pipeline.report.figures import COLOURS, INK, STYLE, WIDTH, short, svg

COLUMNS = 3  # panels beside each other
# The middle of viridis: its ends would be lost on a dark or a light page.
PALETTE = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.28, 0.9, 256)))
MOST_PRINTED = 12  # columns of a heat map whose numbers can still be read
MOST_TICKS = 16  # labels along an axis
LONGEST = 18  # characters of a label
FAN = 0.7  # share of the space between two values over which the lines of one value are spread


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a grid, V values."""

    name: str
    ticks: tuple[str, ...]
    is_ordered: bool  # numbers: their points are joined by a line


@dataclass(frozen=True, slots=True)
class Effect:
    """The metric against one axis: what `robustness.by_value` gives, each [V]."""

    axis: Axis
    mean: np.ndarray
    std: np.ndarray
    best: np.ndarray
    best_std: np.ndarray


def effects(panels: Sequence[Effect], metric: str) -> bytes:
    """One panel per axis; the vertical axis is the same in all."""
    rows, across = -(-len(panels) // COLUMNS), min(len(panels), COLUMNS)
    with mpl.rc_context(STYLE):
        below = max(_below(panel.axis, across) for panel in panels)
        figure = Figure(figsize=(WIDTH, 0.5 + (2.6 + below) * rows), layout="constrained")
        shared: Axes | None = None
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, across, index + 1, sharey=shared)
            shared = shared or axes
            _points(axes, panel.mean, panel.std, COLOURS[1], panel.axis.is_ordered, "mean over everything else", -0.06)
            _points(axes, panel.best, panel.best_std, COLOURS[5], panel.axis.is_ordered, "best of everything else", 0.06)
            _ticks(axes, panel.axis, across)
            axes.set(xlabel=short(panel.axis.name, 40), ylabel=f"validation {metric} (%)" if index % COLUMNS == 0 else "")
            axes.margins(x=0.12)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        return svg(figure)


def _points(axes: Axes, mean: np.ndarray, std: np.ndarray, shade: str, joined: bool, label: str, shift: float) -> None:
    """Means with their deviations where there are any; what is missing leaves a gap."""
    line = "-" if joined else "none"
    bars = np.where(np.isfinite(std), std, 0.0)
    axes.errorbar(
        np.arange(len(mean)) + shift, mean, bars, color=shade, fmt="o", linestyle=line, markersize=5, capsize=3, label=label
    )


def _ticks(axes: Axes, axis: Axis, across: int) -> None:
    """The values along the horizontal axis of one of so many panels, upright where they are too long."""
    places = _shown(len(axis.ticks))
    labels = [short(axis.ticks[place], LONGEST) for place in places]
    axes.set_xticks(places, labels, rotation=90 if _below(axis, across) else 0)


def _below(axis: Axis, across: int) -> float:
    """Inches that values take when they are upright, 0 when they fit side by side."""
    lengths = [min(len(axis.ticks[place]), LONGEST) for place in _shown(len(axis.ticks))]
    return 0.08 * max(lengths) if sum(lengths) + 2 * len(lengths) > 110 / across else 0.0


def _shown(count: int) -> range:
    """The places of every, every second, … value, so that there are at most `MOST_TICKS`."""
    return range(0, count, -(-count // MOST_TICKS))


def heat_maps(maps: Sequence[tuple[Axis, Axis, np.ndarray]], metric: str) -> bytes:
    """One map [R,C] per pair of axes, rows and columns, on one scale of colours; a place without runs is empty."""
    rows, across = -(-len(maps) // COLUMNS), min(len(maps), COLUMNS)
    every = np.concatenate([means[np.isfinite(means)] for _, _, means in maps])
    scale = Normalize(every.min(), max(every.max(), every.min() + 1e-9))
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        height = min(1.0 + 0.42 * max(len(down.ticks) for down, _, _ in maps), 5.0)
        height += max(_below(along, across) for _, along, _ in maps)
        figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
        for index, (down, along, means) in enumerate(maps):
            axes = figure.add_subplot(rows, across, index + 1)
            axes.imshow(means, cmap=PALETTE, norm=scale, aspect="auto")
            _ticks(axes, along, across)
            places = _shown(len(down.ticks))
            axes.set_yticks(places, [short(down.ticks[place], LONGEST) for place in places])
            axes.set(xlabel=short(along.name, 40), ylabel=short(down.name, 40))
            axes.tick_params(length=0)
            _print_values(axes, means, scale)
        bar = figure.colorbar(ScalarMappable(scale, PALETTE), ax=figure.axes, aspect=30, pad=0.02)
        bar.set_label(f"validation {metric} (%)")
        bar.outline.set_visible(False)
        return svg(figure)


def _print_values(axes: Axes, means: np.ndarray, scale: Normalize) -> None:
    if max(means.shape) > MOST_PRINTED:
        return
    for row, column in np.argwhere(np.isfinite(means)):
        red, green, blue, _ = PALETTE(scale(means[row, column]))
        shade = "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
        axes.text(column, row, f"{means[row, column]:.1f}", ha="center", va="center", color=shade, fontsize=7.5)


def parallel(axes_of_grid: Sequence[Axis], places: np.ndarray, scores: np.ndarray, winner: int, metric: str) -> bytes:
    """One line per cell through its places [K,A] to its score [K], the metric; `winner` is the cell drawn on top, -1: none.

    The lines of one value lie side by side in the order of their scores. Scores are finite.
    """
    rank = np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(len(scores) - 1, 1) - 0.5
    counts = np.array([len(axis.ticks) for axis in axes_of_grid])
    scale = Normalize(scores.min(), max(scores.max(), scores.min() + 1e-9))
    heights = np.column_stack([(places + 0.5 + FAN * rank[:, None]) / counts, 0.05 + 0.9 * scale(scores)])
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for cell in np.argsort(scores, kind="stable"):
            axes.plot(heights[cell], color=PALETTE(scale(scores[cell])), linewidth=1.1, alpha=0.7)
        if winner >= 0:
            axes.plot(heights[winner], color=COLOURS[5], linewidth=2.6, label="the best on validation")
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02))
        for number, axis in enumerate(axes_of_grid):
            _stations(axes, number, axis)
        axes.axvline(len(counts), color=INK, linewidth=0.9)
        for score in np.linspace(scores.min(), scores.max(), 5 if scores.max() > scores.min() else 1):
            axes.text(len(counts) + 0.03, 0.05 + 0.9 * scale(score), f"{score:.1f}", ha="left", va="center", fontsize=7.5)
        names = [*(short(axis.name, max(100 // len(heights[0]), 8)) for axis in axes_of_grid), f"{metric} (%)"]
        axes.set_xticks(range(len(names)), names)
        axes.set(xlim=(-0.35, len(counts) + 0.25), ylim=(0, 1), yticks=[])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return svg(figure)


def _stations(axes: Axes, number: int, axis: Axis) -> None:
    """The values of an axis as bars that its lines pass through."""
    count = len(axis.ticks)
    middle = (np.arange(count) + 0.5) / count
    reach = (FAN / 2 + 0.05) / count
    axes.vlines(np.full(count, number), middle - reach, middle + reach, color=INK, linewidth=2.2)
    for place in _shown(count):
        tick = short(axis.ticks[place], LONGEST)
        axes.text(number - 0.03, middle[place], tick, ha="right", va="center", fontsize=8, fontweight="bold")
