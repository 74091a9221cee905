"""Draw the figures of a report as SVG bytes.

The colours of text and lines follow the light or dark page around a figure. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colour of text and lines. `to_svg` replaces it by currentColor: INK on a light page, DARK_INK on a dark page.
INK = "#1f2933"
DARK_INK = "#e3e7eb"
# Okabe and Ito's palette, safe for colour-blind readers, without its yellow and black. The first colour, a grey, is that of
# the baseline.
COLOURS = ("#7f8a94", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "P")
FIGURE_WIDTH_INCHES = 10.0  # the same for every figure, so that all letters have one size on the page
MAX_NUMBERED_CLASSES = 8  # a confusion matrix of at most so many classes shows its numbers
MARGIN_INCHES = 0.04  # around a figure whose height is that of its content
MISSING_GLYPH = "Glyph .* missing from font"  # matplotlib's warning
FIGURE_STYLE: Any = {
    "svg.hashsalt": "diffalign",  # without it, the ids inside the SVG would be random
    "text.parse_math": False,  # a class name may contain a dollar sign
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "image.interpolation": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK),
}


class SvgDrawing(bytes):
    """A figure as SVG for a page, in the colours of the page."""

    figure: Figure  # with the layout of the drawing; for other formats
    plain: str  # the same SVG in ink


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """The training history of one head: S seeds, E epochs."""

    label: str
    colour: str
    loss: np.ndarray  # [S,E]
    val_metric: np.ndarray  # [S,E]; NaN in epochs without validation
    position: np.ndarray  # [E] phases before the epoch plus the share of its own phase that is over at its end
    phases: tuple[str, ...]  # names of the P phases; phase p reaches from p to p + 1


def head_colour(index: int) -> str:
    """Return the colour of the i-th head; head 0 is the baseline."""
    return COLOURS[0] if index == 0 else COLOURS[1 + (index - 1) % (len(COLOURS) - 1)]


def draw_training_curves(curves: Sequence[TrainingCurve], metric_label: str) -> SvgDrawing:
    """Draw the validation metric of all heads in one panel, and below it the loss of each head in its own panel."""
    num_columns = min(len(curves), 5)
    num_rows = -(-len(curves) // num_columns)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH_INCHES, 3.2 + 1.9 * num_rows), layout="constrained")
        layout = figure.add_gridspec(1 + num_rows, num_columns, height_ratios=[3.2, *([1.7] * num_rows)])
        axes = figure.add_subplot(layout[0, :])
        for curve in curves:
            _draw_mean_and_range(axes, curve.val_metric, curve, curve.position - len(curve.phases) + 1)
        axes.set(title="Validation", xlabel="share of the validated phase", xlim=(0, 1.02), ylabel=f"{metric_label} (%)")
        axes.legend(loc="lower right", ncols=2)
        for index, curve in enumerate(curves):
            row, column = divmod(index, num_columns)
            axes = figure.add_subplot(layout[1 + row, column])
            _draw_mean_and_range(axes, curve.loss, curve, curve.position)
            for border in range(1, len(curve.phases)):
                axes.axvline(border, color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
            names = [shorten(name, 34 // len(curve.phases)) for name in curve.phases]
            axes.set_xticks(np.arange(len(names)) + 0.5, names)
            axes.tick_params(axis="x", length=0)
            axes.set(title=shorten(curve.label, 26), xlim=(0, len(names)), ylabel="training loss" if column == 0 else "")
        return to_svg(figure)


def _draw_mean_and_range(axes: Axes, values: np.ndarray, curve: TrainingCurve, position: np.ndarray) -> None:
    """Draw the mean over seeds of values [S,E] at positions [E], and the range of the seeds; skip epochs with NaN."""
    epochs = np.flatnonzero(np.isfinite(values).all(axis=0))
    finite, x = values[:, epochs], position[epochs]
    marker = {"marker": "o", "markersize": 3} if len(epochs) == 1 else {}
    axes.plot(x, finite.mean(axis=0), color=curve.colour, linewidth=1.5, label=shorten(curve.label, 60), **marker)
    axes.fill_between(x, finite.min(axis=0), finite.max(axis=0), color=curve.colour, alpha=0.18, linewidth=0)


def draw_differences(labels: Sequence[str], intervals: np.ndarray, metric_label: str) -> SvgDrawing:
    """Draw the points above the baseline, one line per row; the baseline is at zero.

    Args:
        labels: Names of the R rows.
        intervals: [R,3] difference, low end and high end of its interval, in points.
        metric_label: Name of the metric.
    """
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH_INCHES, 0.9 + 0.32 * len(labels)), layout="constrained")
        axes = figure.add_subplot()
        for row, (difference, low, high) in enumerate(intervals):
            is_decided = low > 0 or high < 0
            colour = COLOURS[1] if low > 0 else COLOURS[5] if high < 0 else COLOURS[0]
            axes.plot([low, high], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot(difference, row, "o", color=colour, markersize=6.5, markerfacecolor=colour if is_decided else "none")
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_yticks(range(len(labels)), [shorten(label, 60) for label in labels])
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel=f"{metric_label}, points above the baseline")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return to_svg(figure)


def draw_embeddings(panels: Sequence[tuple[str, np.ndarray]], group: np.ndarray, names: Sequence[str]) -> SvgDrawing:
    """Draw what `plot_embeddings` plots."""
    with mpl.rc_context(FIGURE_STYLE):
        return to_svg(plot_embeddings(panels, group, names))


def plot_embeddings(
    panels: Sequence[tuple[str, np.ndarray]], group: np.ndarray, names: Sequence[str], width: float = FIGURE_WIDTH_INCHES
) -> Figure:
    """Plot positions in the plane of the same samples in every panel, marked by group.

    Args:
        panels: Title and positions [n,2] of each panel.
        group: The group [n] of each sample, counted from 0.
        names: Names of the groups.
        width: Of the figure, in inches.
    """
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(width, 0.5 + 3.1 * num_rows), layout="constrained")
    for index, (title, positions) in enumerate(panels):
        axes = figure.add_subplot(num_rows, num_columns, index + 1)
        for number, name in enumerate(names):
            x, y = positions[group == number].T
            style = {"s": min(20, 4000 / len(group)), "color": COLOURS[1 + number], "marker": MARKERS[number]}
            axes.scatter(x, y, label=shorten(name, 28) if index == 0 else None, alpha=0.85, linewidths=0, **style)
        axes.set(title=shorten(title, 50))
        frame_plane(axes)
    figure.legend(loc="outside lower center", ncols=5 if width == FIGURE_WIDTH_INCHES else 3)
    return figure


def frame_plane(axes: Axes) -> None:
    """Frame positions in the plane: the numbers along the axes mean nothing."""
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, alpha=0.25)


def draw_confusions(before: np.ndarray, after: np.ndarray, names: Sequence[str], titles: tuple[str, str]) -> SvgDrawing:
    """Draw what `plot_confusions` plots."""
    with mpl.rc_context(FIGURE_STYLE | {"font.size": 7.5}):
        return to_svg(plot_confusions(before, after, names, titles))


def plot_confusions(
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str],
    titles: tuple[str, str],
    width: float = FIGURE_WIDTH_INCHES,
) -> Figure:
    """Plot two confusion matrices and their difference; small matrices have their numbers in percent, and no scale of colours.

    Args:
        before: Shares [c,k], 0..1; rows are true classes, columns are predicted classes. k is c, or c + 1 when the last
            column stands for all other classes.
        after: The same for the second method.
        names: Names of the c classes.
        titles: Titles of the two matrices.
        width: Of the figure, in inches.
    """
    limit = max(float(np.abs(after - before).max()), 0.01)
    panels = [(before, "Blues", 0.0, 1.0), (after, "Blues", 0.0, 1.0), (after - before, "RdBu", -limit, limit)]
    columns = [shorten(name, 20) for name in (*names, "other classes")[: before.shape[1]]]
    has_numbers = len(names) <= MAX_NUMBERED_CLASSES
    figure = Figure(figsize=(width, width), layout="constrained")
    all_axes = figure.subplots(1, 3)
    for axes, title, (matrix, palette, low, high) in zip(all_axes, (*titles, "difference"), panels, strict=True):
        is_first = axes is all_axes[0]
        image = axes.imshow(matrix, cmap=palette, vmin=low, vmax=high)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(names)), columns[: len(names)] if is_first else [""] * len(names))
        axes.set(title=shorten(title, 40), xlabel="predicted", ylabel="true" if is_first else "")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        if has_numbers:
            _print_percentages(axes, matrix, high, sign="+" if low < 0 else "")
        elif not is_first:
            place = axes.inset_axes((1.03, 0.125, 0.025, 0.75))
            figure.colorbar(image, cax=place).outline.set_visible(False)
    _fit_height(figure)
    return figure


def _fit_height(figure: Figure) -> None:
    """Lay out a figure that is higher than its content, and cut what is empty above and below; axes keep their sizes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", MISSING_GLYPH, UserWarning)
        figure.draw_without_rendering()
        content = figure.get_tightbbox()  # in inches
    figure.set_layout_engine("none")
    height = figure.get_figheight()
    bottom, new_height = content.y0 - MARGIN_INCHES, content.height + 2 * MARGIN_INCHES
    places = [axes.get_position() for axes in figure.axes]
    figure.set_figheight(new_height)
    for axes, place in zip(figure.axes, places, strict=True):
        y, high = (place.y0 * height - bottom) / new_height, place.height * height / new_height
        axes.set_position((place.x0, y, place.width, high))


def _print_percentages(axes: Axes, matrix: np.ndarray, high: float, sign: str) -> None:
    """Write the shares that are not 0 into a matrix, in percent, in white where the colour behind them is dark."""
    for row, column in np.argwhere(np.abs(matrix) >= 0.005):
        colour = "#ffffff" if abs(matrix[row, column]) > 0.6 * high else "#000000"
        text = f"{100 * matrix[row, column]:{sign}.0f}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")


def draw_class_changes(before: np.ndarray, after: np.ndarray, names: Sequence[str], titles: tuple[str, str]) -> SvgDrawing:
    """Draw what `plot_class_changes` plots."""
    with mpl.rc_context(FIGURE_STYLE):
        return to_svg(plot_class_changes(before, after, names, titles))


def plot_class_changes(
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str],
    titles: tuple[str, str],
    width: float = FIGURE_WIDTH_INCHES,
) -> Figure:
    """Plot one number per class, [c] in percent, of two methods, joined by a line."""
    figure = Figure(figsize=(width, 0.9 + 0.24 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(names))
    axes.hlines(rows, before, after, color=INK, alpha=0.35, linewidth=1.2)
    axes.plot(before, rows, "o", color=COLOURS[0], markersize=5, label=shorten(titles[0], 60))
    axes.plot(after, rows, "D", color=COLOURS[1], markersize=5, label=shorten(titles[1], 60))
    axes.set_yticks(rows, [shorten(name, 32) for name in names])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 100), xlabel="average precision (%)")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def shorten(text: str, max_length: int) -> str:
    """Return the text on one line, cut to at most `max_length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def to_svg(figure: Figure) -> SvgDrawing:
    """Return the figure as SVG without date or creator, with text and lines in the ink of the page around it."""
    style = f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}</style>"
    plain = to_plain_svg(figure, is_transparent=True)
    drawing = SvgDrawing(plain.replace(INK, "currentColor").replace("<defs>", f"{style}\n <defs>", 1).encode())
    figure.set_layout_engine("none")
    drawing.figure, drawing.plain = figure, plain
    return drawing


def to_plain_svg(figure: Figure, is_transparent: bool = False) -> str:
    """Return the figure as SVG without date or creator.

    Text becomes outlines. If the font lacks a letter, all text of the figure stays text, and the browser finds fonts for it.
    """
    buffer = io.BytesIO()
    save: Any = {"format": "svg", "transparent": is_transparent, "metadata": {"Date": None, "Creator": None}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", MISSING_GLYPH, UserWarning)
        try:
            figure.savefig(buffer, **save)
        except UserWarning:
            warnings.filterwarnings("ignore", MISSING_GLYPH, UserWarning)
            buffer = io.BytesIO()
            with mpl.rc_context({"svg.fonttype": "none"}):
                figure.savefig(buffer, **save)
    # matplotlib repeats every text in an XML comment. Control characters of a text are not allowed in XML.
    return re.sub(r"<!--.*?-->|[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", buffer.getvalue().decode(), flags=re.DOTALL)
