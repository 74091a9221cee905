"""Drawings as SVG bytes that follow the reader's light or dark page; the same numbers give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#1f2933"  # replaced by currentColor, which is INK on a light page and DARK_INK on a dark one
DARK_INK = "#e3e7eb"
# Okabe and Ito's palette, safe for colour-blind readers, without its yellow and black; the first is the baseline's.
COLOURS = ("#7f8a94", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "P")
WIDTH = 10.0  # inches; the same for every drawing, so that all letters have one size on the page
STYLE: Any = {
    "svg.hashsalt": "diffalign",  # ids of the drawing's parts would be random otherwise
    "text.parse_math": False,  # a class name may hold a dollar sign
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


@dataclass(frozen=True, slots=True)
class Curve:
    """The training of one head: S seeds, E epochs."""

    label: str
    colour: str
    loss: np.ndarray  # [S,E]
    score: np.ndarray  # [S,E]; NaN where nothing was validated
    starts: tuple[int, ...]  # epochs at which a later phase starts


def colour(index: int) -> str:
    """The colour of the i-th head; 0 is the baseline."""
    return COLOURS[0] if index == 0 else COLOURS[1 + (index - 1) % (len(COLOURS) - 1)]


def training_curves(curves: Sequence[Curve], score_name: str) -> bytes:
    """The validation metric of all heads in one panel, each head's loss in a panel of its own below."""
    columns = min(len(curves), 5)
    rows = -(-len(curves) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2 + 1.9 * rows), layout="constrained")
        grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3.2, *([1.7] * rows)])
        axes = figure.add_subplot(grid[0, :])
        for curve in curves:
            _band(axes, curve.score, curve)
        axes.set(title="Validation", xlabel="epoch", ylabel=f"{score_name} (%)")
        axes.legend(loc="lower right", ncols=2)
        for index, curve in enumerate(curves):
            axes = figure.add_subplot(grid[1 + index // columns, index % columns])
            _band(axes, curve.loss, curve)
            for start in curve.starts:
                axes.axvline(start + 0.5, color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
            axes.set(title=short(curve.label, 26), xlabel="epoch", ylabel="training loss" if index % columns == 0 else "")
        return svg(figure)


def _band(axes: Axes, values: np.ndarray, curve: Curve) -> None:
    """Mean over seeds [S,E] and the range between the smallest and the largest; epochs without values are left out."""
    epochs = np.flatnonzero(np.isfinite(values).all(axis=0))
    kept = values[:, epochs]
    axes.plot(epochs + 1, kept.mean(axis=0), color=curve.colour, linewidth=1.5, label=short(curve.label, 60))
    axes.fill_between(epochs + 1, kept.min(axis=0), kept.max(axis=0), color=curve.colour, alpha=0.18, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def draw_differences(labels: Sequence[str], intervals: np.ndarray, metric: str) -> bytes:
    """Points above the baseline [R,3] (difference, low, high), one line per row, and the baseline at zero."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.32 * len(labels)), layout="constrained")
        axes = figure.add_subplot()
        for place, (middle, low, high) in enumerate(intervals):
            decided = low > 0 or high < 0
            shade = COLOURS[1] if low > 0 else COLOURS[5] if high < 0 else COLOURS[0]
            axes.plot([low, high], [place, place], color=shade, linewidth=2.2, solid_capstyle="round")
            axes.plot(middle, place, "o", color=shade, markersize=6.5, markerfacecolor=shade if decided else "none")
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_yticks(range(len(labels)), [short(label, 60) for label in labels])
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel=f"{metric}, points above the baseline")
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return svg(figure)


def embeddings(panels: Sequence[tuple[str, np.ndarray]], group: np.ndarray, names: Sequence[str]) -> bytes:
    """Plane positions [n,2] of the same samples in every panel, marked by the group [n] they belong to."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 3.1 * rows), layout="constrained")
        for index, (title, plane) in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            for number, name in enumerate(names):
                x, y = plane[group == number].T
                style = {"s": 20, "alpha": 0.85, "linewidths": 0, "color": COLOURS[1 + number], "marker": MARKERS[number]}
                axes.scatter(x, y, label=short(name, 28) if index == 0 else None, **style)
            axes.set(title=short(title, 50), xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set(visible=True, alpha=0.25)
        figure.legend(loc="outside lower center", ncols=5)
        return svg(figure)


def confusions(before: np.ndarray, after: np.ndarray, names: Sequence[str], titles: tuple[str, str]) -> bytes:
    """Two matrices [c,k] of shares 0..1, rows true and columns predicted classes, and their difference."""
    limit = max(float(np.abs(after - before).max()), 0.01)
    panels = [(before, "Blues", 0.0, 1.0), (after, "Blues", 0.0, 1.0), (after - before, "RdBu", -limit, limit)]
    columns = [short(name, 20) for name in (*names, "other classes")[: before.shape[1]]]
    with mpl.rc_context(STYLE | {"axes.grid": False, "font.size": 7.5}):
        figure = Figure(figsize=(WIDTH, 1.75 + 2.6 * before.shape[0] / before.shape[1]), layout="constrained")
        row = figure.subplots(1, 3)
        for axes, title, (matrix, palette, low, high) in zip(row, (*titles, "difference"), panels, strict=True):
            shown = axes.imshow(matrix, cmap=palette, vmin=low, vmax=high)
            axes.set_xticks(range(len(columns)), columns, rotation=90)
            axes.set_yticks(range(len(names)), columns[: len(names)] if axes is row[0] else [""] * len(names))
            axes.set(title=short(title, 40), xlabel="predicted", ylabel="true" if axes is row[0] else "")
            axes.tick_params(length=0)
            if axes is not row[0]:
                figure.colorbar(shown, ax=axes, aspect=30, pad=0.03, shrink=0.75).outline.set_visible(False)
        return svg(figure)


def class_changes(before: np.ndarray, after: np.ndarray, names: Sequence[str], titles: tuple[str, str]) -> bytes:
    """One number per class [c], in percent, before and after, joined by a line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.24 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(len(names))
        axes.hlines(places, before, after, color=INK, alpha=0.35, linewidth=1.2)
        axes.plot(before, places, "o", color=COLOURS[0], markersize=5, label=short(titles[0], 60))
        axes.plot(after, places, "D", color=COLOURS[1], markersize=5, label=short(titles[1], 60))
        axes.set_yticks(places, [short(name, 32) for name in names])
        axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 100), xlabel="average precision (%)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
        return svg(figure)


def short(text: str, length: int) -> str:
    """The text on one line, cut to a length."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def svg(figure: Figure) -> bytes:
    """The figure as SVG without date or source, in the ink of the page around it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = re.sub(r"<!--.*?-->", "", buffer.getvalue().decode(), flags=re.DOTALL)  # matplotlib repeats every text in one
    style = f"<style>svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{DARK_INK}}}}}</style>"
    return drawing.replace(INK, "currentColor").replace("<defs>", f"{style}\n <defs>", 1).encode()
