"""Whether confidences are right: the reliability plot of every method, and accuracy class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from pipeline.data.manifest import Manifest
from pipeline.evaluation.scores import NUM_CALIBRATION_BINS
from pipeline.evaluation.statistics import format_seeds
from pipeline.report.blocks import Block, CollapsibleSection, Heading, SvgFigure, Table
from pipeline.report.figure_blocks import ShownHeads
from pipeline.report.figure_data import SeedPredictions, class_precisions, read_predictions
from pipeline.report.figures import FIGURE_STYLE, FIGURE_WIDTH_INCHES, INK, SvgDrawing, head_colour, shorten, to_svg

MAX_PANELS_PER_LINE = 5


@dataclass(frozen=True, slots=True)
class Reliability:
    """The predictions of one method by their confidence, in bins of equal width; a bin holds its upper edge."""

    label: str
    num_samples: np.ndarray  # [bins]
    confidence: np.ndarray  # [bins] mean of the bin, 0..1; NaN in an empty bin
    accuracy: np.ndarray  # [bins] share that is right


def measure_reliability(label: str, predictions: Sequence[SeedPredictions]) -> Reliability:
    """Return the reliability of the predicted classes of several seeds together; single-label only."""
    confidence = np.concatenate([np.exp(each.log_scores.max(axis=1)) for each in predictions])
    is_right = np.concatenate([each.is_right for each in predictions])
    bins = np.clip(np.ceil(confidence * NUM_CALIBRATION_BINS).astype(int) - 1, 0, NUM_CALIBRATION_BINS - 1)
    counts, confidences, right = (
        np.bincount(bins, weights, NUM_CALIBRATION_BINS) for weights in (None, confidence, is_right.astype(float))
    )
    size = np.where(counts > 0, counts, np.nan)
    return Reliability(label, counts, confidences / size, right / size)


def draw_reliability(curves: Sequence[Reliability]) -> SvgDrawing:
    """Draw accuracy against confidence, one panel per method; dots grow with the share of the samples of their bin."""
    num_columns = min(len(curves), MAX_PANELS_PER_LINE)
    num_rows = -(-len(curves) // num_columns)
    with mpl.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(FIGURE_WIDTH_INCHES, 0.4 + 2.2 * num_rows), layout="constrained")
        for index, curve in enumerate(curves):
            axes = figure.add_subplot(num_rows, MAX_PANELS_PER_LINE, 1 + index)
            shown, colour = curve.num_samples > 0, head_colour(index)
            x, y = curve.confidence[shown], curve.accuracy[shown]
            axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=0.8, linestyle=":")
            axes.plot(x, y, color=colour, linewidth=1.2)
            axes.scatter(x, y, 6 + 90 * curve.num_samples[shown] / curve.num_samples.sum(), color=colour, linewidths=0)
            is_first = index % num_columns == 0
            axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal", xlabel="confidence", ylabel="accuracy" if is_first else "")
            axes.set(title=shorten(curve.label, 28), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        return to_svg(figure)


def calibration_blocks(manifest: Manifest, shown_heads: ShownHeads) -> list[Block]:
    """Return the section on calibration; empty for multi-label data, whose confidences are of each class by itself."""
    if manifest.label_kind == "multi" or not shown_heads.rows:
        return []
    curves, numbers = [], []
    for row in shown_heads.rows:
        curve = measure_reliability(row.label, [read_predictions(row, number) for number in range(len(row.runs))])
        ece = row.metric_values("ece")
        known = ece[np.isfinite(ece)]
        title = f"{row.label}: ECE {format_seeds(known)}" if len(known) else row.label
        curves.append(Reliability(title, curve.num_samples, curve.confidence, curve.accuracy))
        numbers += [
            (row.label, f"{edge / NUM_CALIBRATION_BINS:.2f}", str(count), f"{confidence:.3f}", f"{accuracy:.3f}")
            for edge, count, confidence, accuracy in zip(
                range(1, NUM_CALIBRATION_BINS + 1), curve.num_samples, curve.confidence, curve.accuracy, strict=True
            )
            if count
        ]
    caption = (
        f"Share of right predictions against their confidence, in {NUM_CALIBRATION_BINS} bins of equal width, all seeds "
        "together; larger dots hold more examples. On the dotted line confidences are right, below it the method is too sure. "
        "ECE: mean distance to that line in percent, mean ± standard deviation over seeds; lower is better."
    )
    columns = ("method", "confidence up to", "examples", "mean confidence", "accuracy")
    table = Table(columns, tuple(numbers), "The numbers of the reliability plots.")
    alt = f"Reliability plots of {', '.join(row.label for row in shown_heads.rows)}"
    figure = SvgFigure(draw_reliability(curves), alt, caption)
    return [Heading("Calibration"), figure, CollapsibleSection("The numbers of these plots", (table,))]


def class_accuracies(predictions: SeedPredictions, num_classes: int) -> np.ndarray:
    """Return the share of the examples of each class that is right [C], in percent; NaN without examples; single-label only."""
    counts = np.bincount(predictions.label, minlength=num_classes)
    right = np.bincount(predictions.label, predictions.is_right.astype(float), num_classes)
    return 100.0 * right / np.where(counts > 0, counts, np.nan)


def class_table_blocks(manifest: Manifest, shown_heads: ShownHeads) -> list[Block]:
    """Return a collapsible table with one number per class and method: accuracy, or average precision of multi-label data."""
    if not shown_heads.rows:
        return []
    is_multi, num_classes = manifest.label_kind == "multi", len(manifest.class_names)
    label = read_predictions(shown_heads.rows[0]).label
    counts = (label > 0).sum(axis=0) if is_multi else np.bincount(label, minlength=num_classes)
    classes = np.flatnonzero(counts)

    def measure(predictions: SeedPredictions) -> np.ndarray:
        return class_precisions(predictions, classes) if is_multi else class_accuracies(predictions, num_classes)[classes]

    values = [
        np.array([measure(read_predictions(row, number)) for number in range(len(row.runs))]).T for row in shown_heads.rows
    ]
    rows = [
        (manifest.class_names[k], str(counts[k]), *(format_seeds(own[position]) for own in values))
        for position, k in enumerate(classes)
    ]
    means = [own.mean(axis=0) for own in values]
    name = "Average precision" if is_multi else "Accuracy"
    rows.append(("mean over classes", str(len(label)), *(format_seeds(own) for own in means)))
    caption = (
        f"{name} of each class in percent, mean ± standard deviation over seeds; the last row is the mean over classes, where "
        "each class counts the same (macro)."
    )
    table = Table(("class", "examples", *(row.label for row in shown_heads.rows)), tuple(rows), caption)
    return [CollapsibleSection(f"{name} of each of {len(classes)} classes", (table,))]
