"""Figures for print: the drawings that only a paper has, and the files of a figure as SVG and PDF.

The same numbers give the same bytes on one machine.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

from pipeline.report.blocks import ClassPredictions, ExampleCard
from pipeline.report.figures import COLOURS, FIGURE_STYLE, MISSING_GLYPH, frame_plane, shorten, to_plain_svg
from pipeline.runtime.files import write_atomic

logger = logging.getLogger(__name__)

PRINT_WIDTH_INCHES = 7.0  # both columns of a page
PRINT_STYLE: Any = FIGURE_STYLE | {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "pdf.fonttype": 42,  # TrueType; publishers refuse matplotlib's own choice
}
MARKER_OF_STAGE = {"DSL": "s", "DST": "D"}
IMAGE_LABEL, TEXT_LABEL = "image xᵥ", "text xₛ"


def write_printed(folder: Path, name: str, plot: Callable[[], Figure], numbers: pd.DataFrame, caption: str) -> list[Path]:
    """Write a figure as `<name>.svg` and `.pdf`, the numbers behind it as `.csv` and its caption as `.txt`; return the paths.

    Args:
        folder: The folder, which is made if it is not there.
        name: The name of the files.
        plot: Makes the figure; it is called in the style of printed figures.
        numbers: The numbers behind it.
        caption: What the figure shows and how it was made.
    """
    with mpl.rc_context(PRINT_STYLE):
        figure = plot()
        contents: dict[str, str | bytes] = {"svg": to_plain_svg(figure)}
        figure.set_layout_engine("none")  # both files have the layout that was just found
        contents["pdf"] = to_pdf(figure)
    contents |= {"csv": numbers.to_csv(index=False), "txt": f"{caption}\n"}
    paths = [folder / f"{name}.{suffix}" for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomic(path, content)
    return paths


def to_pdf(figure: Figure) -> bytes:
    """Return the figure as PDF without dates; a letter that the font lacks becomes a box, which is logged."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", MISSING_GLYPH, UserWarning)
        figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    if caught:
        logger.warning("the font of the PDF lacks letters of the class names: they are boxes there, and right in the SVG")
    return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class AlignmentPath:
    """The images and texts of n samples, and K states on the way from one to the other, in one plane."""

    title: str
    image: np.ndarray | None  # [n,2]; None: image features have another width
    text: np.ndarray  # [n,2]
    states: np.ndarray  # [K,n,2]; the last one is the aligned feature
    state_names: tuple[str, ...]
    stages: tuple[str, ...]  # of each state: "DSL" or "DST"; of the last one ""


@dataclass(frozen=True, slots=True)
class ChainCosines:
    """Mean cosine similarity of the states of a chain to the images and the texts of their samples, S steps."""

    step: np.ndarray  # [S+1], descending, counted from 1; 0 stands for the data
    state: np.ndarray  # [S+1,2]: to the image, to the text; the last one is the aligned feature
    prediction: np.ndarray  # [S,2]: the same of what the network predicts from the state
    is_dsl: np.ndarray  # [S]: whether the learner trains the step


def plot_paths(paths: Sequence[AlignmentPath]) -> Figure:
    """Plot the paths side by side, with one legend for all."""
    figure = Figure(figsize=(PRINT_WIDTH_INCHES, 3.9), layout="constrained")
    entries = {}
    for axes, path in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths, strict=True):
        _plot_path(axes, path)
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, handletextpad=0.2)
    return figure


def _plot_path(axes: Axes, path: AlignmentPath) -> None:
    size = min(18.0, 1500.0 / len(path.text))
    for line in path.states.transpose(1, 0, 2):
        axes.plot(*line.T, color=COLOURS[0], alpha=0.35, linewidth=0.6)
    filled = [(path.text, TEXT_LABEL, COLOURS[5], "^"), (path.states[-1], path.state_names[-1], COLOURS[3], "o")]
    if path.image is not None:
        filled.insert(0, (path.image, IMAGE_LABEL, COLOURS[1], "o"))
    for positions, name, colour, marker in filled:
        axes.scatter(*positions.T, s=size, color=colour, marker=marker, linewidths=0, label=name, zorder=3)
    for positions, name, stage, grey in zip(
        path.states[:-1], path.state_names, path.stages, np.linspace(0.75, 0.1, len(path.states) - 1), strict=False
    ):
        style = {"facecolors": "none", "edgecolors": str(grey), "linewidths": 0.8, "marker": MARKER_OF_STAGE[stage]}
        axes.scatter(*positions.T, s=size, label=name, zorder=2, **style)
    axes.set(title=shorten(path.title, 60))
    frame_plane(axes)


def plot_cosines(cosines: ChainCosines) -> Figure:
    """Plot the cosines against the step, with noise at the left and data at the right."""
    figure = Figure(figsize=(PRINT_WIDTH_INCHES, 2.4), layout="constrained")
    axes = figure.add_subplot()
    for column, (target, colour) in enumerate(((IMAGE_LABEL, COLOURS[1]), (TEXT_LABEL, COLOURS[5]))):
        axes.plot(cosines.step, cosines.state[:, column], ".-", color=colour, label=f"state to {target}")
        axes.plot(cosines.step[:-1], cosines.prediction[:, column], "--", color=colour, label=f"prediction to {target}")
    if cosines.is_dsl.any() and not cosines.is_dsl.all():
        low, high = _span(cosines.step[:-1], cosines.is_dsl)
        axes.axvspan(low, high, color=COLOURS[0], alpha=0.15, linewidth=0, label="steps of the DSL")
    axes.invert_xaxis()
    axes.set(xlabel="step n of the sampling, from noise to data", ylabel="mean cosine similarity")
    figure.legend(loc="outside right center")
    return figure


def _span(step: np.ndarray, is_inside: np.ndarray) -> tuple[float, float]:
    """Return the range of the steps inside, up to half way to their neighbours."""
    half = 0.5 * float(np.abs(np.diff(step)).max())
    return float(step[is_inside].min() - half), float(step[is_inside].max() + half)


def plot_examples(cards: Sequence[tuple[str, ExampleCard]]) -> Figure:
    """Plot the most likely classes of every method beside the picture of each example; true classes are bold.

    Args:
        cards: A title and the example, for each example; all have the same methods.
    """
    num_methods = len(cards[0][1].predictions)
    figure = Figure(figsize=(PRINT_WIDTH_INCHES, 0.25 + 1.35 * len(cards)), layout=ConstrainedLayoutEngine(hspace=0.08))
    all_axes = figure.subplots(len(cards), 1 + num_methods, squeeze=False, width_ratios=[0.75, *([1.0] * num_methods)])
    for (title, card), (picture, *panels) in zip(cards, all_axes, strict=True):
        _show_thumbnail(picture, card)
        picture.set_title(shorten(title, 48), fontsize=7.5)
        for number, (axes, predictions) in enumerate(zip(panels, card.predictions, strict=True)):
            colour = COLOURS[0] if number == 0 else COLOURS[number]
            _plot_confidences(axes, predictions, colour)
            if card is cards[0][1]:
                axes.set_title(shorten(predictions.method, 40), fontweight="bold")
    return figure


def _show_thumbnail(axes: Axes, card: ExampleCard) -> None:
    axes.axis("off")
    if card.thumbnail:
        with Image.open(io.BytesIO(card.thumbnail)) as picture:
            axes.imshow(np.asarray(picture.convert("RGB")))
    else:
        axes.text(0.5, 0.5, "not available", ha="center", va="center", transform=axes.transAxes)
    axes.text(
        0.5, -0.03, shorten(", ".join(card.labels), 40), ha="center", va="top", transform=axes.transAxes, fontweight="bold"
    )


def _plot_confidences(axes: Axes, predictions: ClassPredictions, colour: str) -> None:
    """Plot the classes of one method as bars, the most likely above."""
    rows = np.arange(len(predictions.top_classes))
    names, confidences, is_label = zip(*predictions.top_classes, strict=True)
    axes.barh(rows, confidences, height=0.72, color=colour, alpha=0.75)
    axes.set_yticks(rows, [shorten(name, 26) for name in names])
    for row, (text, is_true) in enumerate(zip(axes.get_yticklabels(), is_label, strict=True)):
        text.set_fontweight("bold" if is_true else "normal")
        axes.text(confidences[row] + 0.02, row, format_confidence(confidences[row]), va="center", fontsize=7)
    axes.set(xlim=(0, 1.22), ylim=(len(rows) - 0.5, -0.5), xticks=[])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


def format_confidence(confidence: float) -> str:
    """Return a confidence 0..1 with two digits: "0.64", and "3.1e-5" where it is small."""
    if confidence >= 0.01:
        return f"{confidence:.2f}"
    mantissa, _, exponent = f"{confidence:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"
