"""Draw the figures of a grid: the metric against each axis, against each pair of axes, and all cells as lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from pipeline.report.figures import COLOURS, FIGURE_STYLE, FIGURE_WIDTH_INCHES, INK, SvgDrawing, shorten, to_svg

MAX_PANELS_PER_ROW = 3
# The middle of viridis: its ends are hard to see on a dark or a light page.
SCORE_COLOURMAP = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.28, 0.9, 256)))
MAX_PRINTED_VALUES = 12  # a heat map with more rows or columns shows no numbers, because they could not be read
MAX_WRITTEN_MEANS = 4  # a panel of at most so many values shows their numbers
MAX_TICKS = 16  # labels along an axis
MAX_TICK_CHARS = 18
# In parallel coordinates, the lines through one value are spread over this share of the space between two values.
LINE_SPREAD = 0.7


@dataclass(frozen=True, slots=True)
class GridAxis:
    """One axis of a grid, with V values."""

    name: str
    ticks: tuple[str, ...]
    is_ordered: bool  # the values are numbers, so a line joins their points


@dataclass(frozen=True, slots=True)
class AxisEffect:
    """The metric against one axis: the columns of `robustness.mean_by_value`, each [V]."""

    axis: GridAxis
    mean: np.ndarray
    std: np.ndarray
    best: np.ndarray
    best_std: np.ndarray
    runs: np.ndarray


def draw_axis_effects(effects: Sequence[AxisEffect], metric: str) -> SvgDrawing:
    """Draw what `plot_axis_effects` plots."""
    with mpl.rc_context(FIGURE_STYLE):
        return to_svg(plot_axis_effects(effects, metric))


def plot_axis_effects(effects: Sequence[AxisEffect], metric: str, width: float = FIGURE_WIDTH_INCHES) -> Figure:
    """Plot one panel per axis, in a figure of a width in inches; all panels have the same vertical axis."""
    num_rows, num_columns = -(-len(effects) // MAX_PANELS_PER_ROW), _num_columns(len(effects), width)
    panel_width = width / num_columns
    label_height = max(_upright_label_inches(effect.axis, panel_width) for effect in effects)
    figure = Figure(figsize=(width, 0.5 + (2.6 + label_height) * num_rows), layout="constrained")
    first_axes: Axes | None = None
    for index, effect in enumerate(effects):
        axes = figure.add_subplot(num_rows, num_columns, index + 1, sharey=first_axes)
        first_axes = first_axes or axes
        is_ordered = effect.axis.is_ordered
        _draw_points(axes, effect.mean, effect.std, COLOURS[1], is_ordered, "mean over everything else", -0.06)
        _draw_points(axes, effect.best, effect.best_std, COLOURS[5], is_ordered, "best of everything else", 0.06)
        _set_ticks(axes, effect.axis, panel_width)
        _write_means(axes, effect)
        is_leftmost = index % MAX_PANELS_PER_ROW == 0
        axes.set(xlabel=shorten(effect.axis.name, 40), ylabel=f"validation {metric} (%)" if is_leftmost else "")
        axes.margins(x=0.12 if len(effect.mean) > MAX_WRITTEN_MEANS else 0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def _num_columns(num_panels: int, width: float) -> int:
    """Return how many panels stand side by side; on a page few panels are no wider than many, with room beside them."""
    return MAX_PANELS_PER_ROW if width == FIGURE_WIDTH_INCHES else min(num_panels, MAX_PANELS_PER_ROW)


def _write_means(axes: Axes, effect: AxisEffect) -> None:
    """Write the numbers beside the points of an axis with few values: on the left the means, on the right the best."""
    if len(effect.mean) > MAX_WRITTEN_MEANS:
        return
    for values, side, colour in ((effect.mean, -1, COLOURS[1]), (effect.best, 1, COLOURS[5])):
        for position in np.flatnonzero(np.isfinite(values)):
            place = {
                "xytext": (5 * side, 5),
                "textcoords": "offset points",
                "va": "bottom",
                "ha": "right" if side < 0 else "left",
            }
            axes.annotate(
                f"{values[position]:.1f}", (position + 0.06 * side, values[position]), color=colour, fontsize=7.5, **place
            )


def _draw_points(axes: Axes, mean: np.ndarray, std: np.ndarray, colour: str, is_joined: bool, label: str, shift: float) -> None:
    """Draw means with error bars where there is a deviation; a missing mean leaves a gap."""
    line = "-" if is_joined else "none"
    bars = np.where(np.isfinite(std), std, 0.0)
    axes.errorbar(
        np.arange(len(mean)) + shift, mean, bars, color=colour, fmt="o", linestyle=line, markersize=5, capsize=3, label=label
    )


def _set_ticks(axes: Axes, axis: GridAxis, panel_width: float) -> None:
    """Label the horizontal axis of a panel of a width in inches; the labels are upright when they are too long."""
    positions = _tick_positions(len(axis.ticks))
    labels = [shorten(axis.ticks[position], MAX_TICK_CHARS) for position in positions]
    axes.set_xticks(positions, labels, rotation=90 if _upright_label_inches(axis, panel_width) else 0)


def _upright_label_inches(axis: GridAxis, panel_width: float) -> float:
    """Return the height in inches of upright tick labels; 0 when the labels fit side by side in a panel of this width."""
    lengths = [min(len(axis.ticks[position]), MAX_TICK_CHARS) for position in _tick_positions(len(axis.ticks))]
    return 0.08 * max(lengths) if sum(lengths) + 2 * len(lengths) > 11 * panel_width else 0.0


def _tick_positions(num_values: int) -> range:
    """Return the positions of every value, every second value, … so that there are at most `MAX_TICKS`."""
    return range(0, num_values, -(-num_values // MAX_TICKS))


def draw_heat_maps(maps: Sequence[tuple[GridAxis, GridAxis, np.ndarray]], metric: str) -> SvgDrawing:
    """Draw one heat map per pair of axes, all on one scale of colours; a cell without runs is empty.

    Args:
        maps: For each pair the axis of the rows, the axis of the columns, and the mean scores [R,C].
        metric: Name of the metric.
    """
    num_rows, num_columns = -(-len(maps) // MAX_PANELS_PER_ROW), _num_columns(len(maps), FIGURE_WIDTH_INCHES)
    all_means = np.concatenate([means[np.isfinite(means)] for _, _, means in maps])
    scale = Normalize(all_means.min(), max(all_means.max(), all_means.min() + 1e-9))
    with mpl.rc_context(FIGURE_STYLE | {"axes.grid": False}):
        height = min(1.2 + 0.42 * max(len(row_axis.ticks) for row_axis, _, _ in maps), 5.0)
        height += max(_upright_label_inches(column_axis, FIGURE_WIDTH_INCHES / num_columns) for _, column_axis, _ in maps)
        figure = Figure(figsize=(FIGURE_WIDTH_INCHES, num_rows * height), layout="constrained")
        for index, (row_axis, column_axis, means) in enumerate(maps):
            axes = figure.add_subplot(num_rows, num_columns, index + 1)
            axes.imshow(means, cmap=SCORE_COLOURMAP, norm=scale, aspect="auto")
            _set_ticks(axes, column_axis, FIGURE_WIDTH_INCHES / num_columns)
            positions = _tick_positions(len(row_axis.ticks))
            axes.set_yticks(positions, [shorten(row_axis.ticks[position], MAX_TICK_CHARS) for position in positions])
            axes.set(xlabel=shorten(column_axis.name, 40), ylabel=shorten(row_axis.name, 40))
            axes.tick_params(length=0)
            _print_values(axes, means, scale)
        bar = figure.colorbar(ScalarMappable(scale, SCORE_COLOURMAP), ax=figure.axes, aspect=30, pad=0.02)
        bar.set_label(f"validation {metric} (%)")
        bar.outline.set_visible(False)
        return to_svg(figure)


def _print_values(axes: Axes, means: np.ndarray, scale: Normalize) -> None:
    """Write the numbers into a heat map, in black or white by the brightness of the colour behind them."""
    if max(means.shape) > MAX_PRINTED_VALUES:
        return
    for row, column in np.argwhere(np.isfinite(means)):
        red, green, blue, _ = SCORE_COLOURMAP(scale(means[row, column]))
        colour = "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "#ffffff"
        axes.text(column, row, f"{means[row, column]:.1f}", ha="center", va="center", color=colour, fontsize=7.5)


def draw_parallel_coordinates(
    grid_axes: Sequence[GridAxis], positions: np.ndarray, scores: np.ndarray, winner: int, metric: str
) -> SvgDrawing:
    """Draw one line per cell, through its value on each axis to its score.

    The lines through one value lie side by side in the order of their scores.

    Args:
        grid_axes: The A axes.
        positions: [K,A] index of each cell's value on each axis.
        scores: [K] mean metric of each cell; all are finite.
        winner: Index of the cell that is drawn on top; -1 for none.
        metric: Name of the metric.
    """
    rank = np.argsort(np.argsort(scores, kind="stable"), kind="stable") / max(len(scores) - 1, 1) - 0.5
    num_values = np.array([len(axis.ticks) for axis in grid_axes])
    scale = Normalize(scores.min(), max(scores.max(), scores.min() + 1e-9))
    heights = np.column_stack([(positions + 0.5 + LINE_SPREAD * rank[:, None]) / num_values, 0.05 + 0.9 * scale(scores)])
    with mpl.rc_context(FIGURE_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(FIGURE_WIDTH_INCHES, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for cell in np.argsort(scores, kind="stable"):
            axes.plot(heights[cell], color=SCORE_COLOURMAP(scale(scores[cell])), linewidth=1.1, alpha=0.7)
        if winner >= 0:
            axes.plot(heights[winner], color=COLOURS[5], linewidth=2.6, label="the best on validation")
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02))
        for number, axis in enumerate(grid_axes):
            _draw_value_bars(axes, number, axis)
        axes.axvline(len(grid_axes), color=INK, linewidth=0.9)
        for score in np.linspace(scores.min(), scores.max(), 5 if scores.max() > scores.min() else 1):
            axes.text(len(grid_axes) + 0.03, 0.05 + 0.9 * scale(score), f"{score:.1f}", ha="left", va="center", fontsize=7.5)
        names = [*(shorten(axis.name, max(100 // len(heights[0]), 8)) for axis in grid_axes), f"{metric} (%)"]
        axes.set_xticks(range(len(names)), names)
        axes.set(xlim=(-0.35, len(grid_axes) + 0.25), ylim=(0, 1), yticks=[])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        return to_svg(figure)


def _draw_value_bars(axes: Axes, number: int, axis: GridAxis) -> None:
    """Draw the values of the `number`-th axis as vertical bars; the lines of the cells pass through these bars."""
    num_values = len(axis.ticks)
    centres = (np.arange(num_values) + 0.5) / num_values
    half_height = (LINE_SPREAD / 2 + 0.05) / num_values
    axes.vlines(np.full(num_values, number), centres - half_height, centres + half_height, color=INK, linewidth=2.2)
    for position in _tick_positions(num_values):
        tick = shorten(axis.ticks[position], MAX_TICK_CHARS)
        axes.text(number - 0.03, centres[position], tick, ha="right", va="center", fontsize=8, fontweight="bold")
