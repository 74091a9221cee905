"""The papers' figures of features and predictions, from finished runs: t-SNE, confidences, confusion, the path of a class.

Each is written as SVG and PDF, with a CSV file of the numbers behind it and its caption. Samples and classes are chosen by
fixed rules. The robustness figure is that of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from pipeline.cache.table import label_tensor, split_samples
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.report import figure_data, figures
from pipeline.report.figure_blocks import MIN_TSNE_SAMPLES
from pipeline.report.figure_data import SeedPredictions
from pipeline.report.grid_figures import plot_axis_effects
from pipeline.report.grid_page import axis_effect_caption, axis_effects, grid_metric
from pipeline.report.grid_results import read_grid
from pipeline.report.printed import PRINT_WIDTH_INCHES, plot_examples, write_printed
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder
from pipeline.studies.class_path import write_class_path
from pipeline.studies.trained_head import TrainedHead
from pipeline.types import Split

MAX_SAMPLES_PER_CLASS = 100  # of a t-SNE, as in MARNet's Figure 3
CONFUSED_GROUP_SIZE = 5  # in SeDA's Figure 5
NUM_HARD_CLASSES = 15  # of multi-label data, which have no confusion
_SAME_SAMPLES = " The classes were chosen on these same samples, so the first method looks worse here than it is."


class DrawFigure(Protocol):
    """See `PaperFigure.write`; the runs have been checked."""

    def __call__(
        self, home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test"
    ) -> list[Path]: ...


@dataclass(frozen=True, slots=True)
class PaperFigure:
    """A figure of a paper: what it shows, and the methods that it needs trained."""

    title: str
    methods: tuple[str, ...]
    draw: DrawFigure

    def write(self, home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test") -> list[Path]:
        """Write the figure, and return its files: for each part SVG, PDF, CSV, and the caption as text.

        Args:
            home: The folder of all artifacts.
            dataset: A prepared dataset.
            runs: A finished run of each of the methods, by method; all were trained on the same image features.
            folder: Where the files are written; it is made if it is not there.
            split: The split whose samples are shown; what is chosen by results is chosen on validation.

        Raises:
            UserError: A run is missing or not finished, or the dataset or the runs cannot give the figure.
        """
        for method in self.methods:
            if method not in runs:
                command = f"diffalign train-head --dataset {dataset} --method {method}"
                raise UserError(f"{self.title} needs a run of {method}; train one with: {command}")
            runs[method].check_done()
        chosen = {method: runs[method] for method in self.methods}
        if len({run.config().caches["image"] for run in chosen.values()}) > 1:
            paths = ", ".join(str(run.path) for run in chosen.values())
            raise UserError(f"{paths} read different image features: take runs on the same ones")
        return self.draw(home, dataset, chosen, folder, split)


def write_robustness(grid_folder: Path, folder: Path, name: str) -> list[Path]:
    """Write SeDA's Figure 3, the validation metric against every axis of a grid, and return the files `<name>.…`.

    Raises:
        UserError: The folder is no grid, or no axis of it has two values with finished runs.
    """
    grid = read_grid(grid_folder)
    effects = axis_effects(grid)
    if not effects or not any(effect.runs.any() for effect in effects):
        raise UserError(f"{grid_folder} has no finished run, or no axis with two values: there is nothing to plot")
    columns = ("mean", "std", "best", "best_std", "runs")
    numbers = pd.concat(
        pd.DataFrame({"axis": each.axis.name, "value": each.axis.ticks, **{name: getattr(each, name) for name in columns}})
        for each in effects
    )
    plot = partial(plot_axis_effects, effects, grid_metric(grid), PRINT_WIDTH_INCHES)
    return write_printed(folder, name, plot, numbers, f"{grid.dataset}: {axis_effect_caption(grid)}")


def write_feature_space(
    home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test"
) -> list[Path]:
    """Write MARNet's Figure 3, t-SNE of the image features and of CDR's features."""
    manifest, head = read_manifest(home, dataset), TrainedHead.of(runs["cdr"])
    samples = split_samples(manifest, split)
    label = label_tensor(samples, manifest).numpy()
    indices, group, classes = figure_data.choose_tsne_samples(label, MAX_SAMPLES_PER_CLASS)
    table = head.read(home, manifest, samples.select(indices), ("image",), "marnet-fig3")
    group = group[np.isin([samples[index].id for index in indices], table.ids)]
    if len(group) < MIN_TSNE_SAMPLES or len(set(group.tolist())) < 2:
        raise UserError(f"the {split} split of {dataset} has too few samples of its most frequent classes for a t-SNE")
    vectors = {"image features xᵥ": table.columns["image"].flatten(1).cpu(), "features of CDR": head.feature(table)}
    positions = {name: figure_data.tsne_positions(each.numpy()) for name, each in vectors.items()}
    panels = [
        (f"{name}, silhouette {figure_data.mean_silhouette(vectors[name].numpy(), group):+.2f}", each)
        for name, each in positions.items()
    ]
    counts = np.bincount(group, minlength=len(classes))
    names = [f"{manifest.class_names[k]} ({count})" for k, count in zip(classes, counts, strict=True)]
    numbers = pd.concat(
        pd.DataFrame({"panel": name, "id": table.ids, "class": [manifest.class_names[classes[k]] for k in group]}).assign(
            x=each[:, 0], y=each[:, 1]
        )
        for name, each in positions.items()
    )
    caption = (
        f"{dataset}, {split} split: t-SNE of the same {len(group)} samples before and after CDR (seed {head.run.seed}), up to "
        f"{MAX_SAMPLES_PER_CLASS} of each of the {len(classes)} most frequent classes; their numbers are in brackets. Each "
        "t-SNE is initialised by PCA, with a fixed seed. Silhouette: mean over the samples, by cosine distance in the full "
        "space, -1 to 1."
    )
    return write_printed(
        folder, "marnet-fig3", partial(figures.plot_embeddings, panels, group, names, PRINT_WIDTH_INCHES), numbers, caption
    )


def write_cdr_examples(
    home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test"
) -> list[Path]:
    """Write MARNet's Figure 4, the five best classes of the baseline and of CDR for a few samples."""
    manifest = read_manifest(home, dataset)
    return _write_examples("marnet-fig4", manifest, _predictions(home, runs, split), folder, split)


def write_disambiguation(
    home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test"
) -> list[Path]:
    """Write SeDA's Figure 5, confusion before and after, and the five best classes for a few samples.

    Multi-label data have no confusion: for them it is the average precision of the classes that the baseline finds hardest.
    """
    manifest = read_manifest(home, dataset)
    (on_validation,) = _predictions(home, {"baseline": runs["baseline"]}, "val").values()
    shown = _predictions(home, runs, split)
    write_classes = _write_precisions if manifest.label_kind == "multi" else _write_confusion
    return [
        *write_classes(manifest, on_validation, shown, folder, split),
        *_write_examples("seda-fig5-examples", manifest, shown, folder, split),
    ]


def _display_name(method: str) -> str:
    """Return the name of a method as the papers write it, which is that of its class."""
    return plugins.get("methods", method).__name__


def _predictions(home: Path, runs: Mapping[str, RunFolder], split: Split) -> dict[str, SeedPredictions]:
    """Return the predictions of runs on a split by the methods' names in print; what is missing is evaluated."""
    by_name = {}
    for method, run in runs.items():
        evaluate(home, run, split, {})
        by_name[_display_name(method)] = figure_data.read_run_predictions(run, split, run.config().label_loss)
    return by_name


def _write_examples(
    name: str, manifest: Manifest, predictions: Mapping[str, SeedPredictions], folder: Path, split: Split
) -> list[Path]:
    """Write the five best classes of one sample of every case; a case says which methods are right."""
    first = next(iter(predictions.values()))
    right = [each.is_right for each in predictions.values()]
    scores = {method: each.log_scores for method, each in predictions.items()}
    counts = figure_data.count_cases(right)
    cards = []
    for case, indices in figure_data.choose_examples(right, first.ids, 1).items():
        for index in indices:
            labels = np.flatnonzero(first.label[index]) if first.label.ndim == 2 else [first.label[index]]
            own = {method: each[index] for method, each in scores.items()}
            card = figure_data.make_example_card(manifest, first.ids[index], own, [int(k) for k in labels])
            cards.append((f"{_describe_case(tuple(predictions), case)} ({counts[case]} of {len(first.ids)})", card))
    numbers = pd.DataFrame(
        {"case": title, "id": card.id, "method": each.method, "rank": rank, "class": k, "confidence": p, "is_label": is_label}
        for title, card in cards
        for each in card.predictions
        for rank, (k, p, is_label) in enumerate(each.top_classes, start=1)
    )
    caption = (
        f"{manifest.dataset}, {split} split: the best classes, five at most, of {' and '.join(predictions)} with their "
        "confidence; true classes are bold. Nobody picked these samples: of every case, it is the first one in the order of "
        "the SHA-256 of the ids. How common a case is stands in brackets."
    )
    return write_printed(folder, name, partial(plot_examples, cards), numbers, caption)


def _describe_case(methods: tuple[str, ...], case: tuple[bool, ...]) -> str:
    right = [method for method, is_right in zip(methods, case, strict=True) if is_right]
    return "both right" if len(right) == 2 else f"only {right[0]} right" if right else "both wrong"


def _write_confusion(
    manifest: Manifest, on_validation: SeedPredictions, shown: Mapping[str, SeedPredictions], folder: Path, split: Split
) -> list[Path]:
    """Write the confusion of classes that the baseline confuses on validation."""
    num_classes = len(manifest.class_names)
    on_val = figure_data.count_confusions(on_validation, num_classes)
    classes = figure_data.confused_group(on_val, CONFUSED_GROUP_SIZE)
    names = [manifest.class_names[k] for k in classes]
    counts = {method: figure_data.count_confusions(each, num_classes) for method, each in shown.items()}
    before, after = (figure_data.confusion_shares(each, classes) for each in counts.values())
    numbers = pd.DataFrame(
        {"method": method, "true": manifest.class_names[row], "predicted": manifest.class_names[column], "samples": number}
        for method, matrix in counts.items()
        for row in classes
        for column, number in enumerate(matrix[row])
        if number or column in classes
    )
    first, second = shown
    sizes = ", ".join(f"{name} {number}" for name, number in zip(names, counts[first][classes].sum(axis=1), strict=True))
    caption = (
        f"{manifest.dataset}, {split} split: confusion of {first} and {second}, in percent of a true class. "
        "The classes are the two that the baseline confuses most on validation, and then one by one those it confuses most "
        f"with these; all others are in the last column. Samples: {sizes}. In the difference, blue on the diagonal and red "
        f"beside it are improvements.{_SAME_SAMPLES if split == 'val' else ''}"
    )
    plot = partial(figures.plot_confusions, before, after, names, (first, second), PRINT_WIDTH_INCHES)
    return write_printed(folder, "seda-fig5-confusion", plot, numbers, caption)


def _write_precisions(
    manifest: Manifest, on_validation: SeedPredictions, shown: Mapping[str, SeedPredictions], folder: Path, split: Split
) -> list[Path]:
    """Write the average precision of the classes that are hardest for the baseline on validation."""
    has_positives = [(each.label > 0).any(axis=0) for each in (on_validation, *shown.values())]
    classes = np.flatnonzero(np.logical_and.reduce(has_positives))
    hardness = figure_data.class_precisions(on_validation, classes)
    classes = classes[np.argsort(hardness, kind="stable")[:NUM_HARD_CLASSES]]
    names = [manifest.class_names[k] for k in classes]
    first, second = shown
    before, after = (figure_data.class_precisions(each, classes) for each in shown.values())
    numbers = pd.DataFrame({"class": names, **{first: before, second: after}})
    caption = (
        f"{manifest.dataset}, {split} split: average precision of {first} and {second}, of the {len(classes)} classes whose "
        "average precision is lowest for the baseline on validation. Samples with several labels have no confusion matrix."
        f"{_SAME_SAMPLES if split == 'val' else ''}"
    )
    plot = partial(figures.plot_class_changes, before, after, names, (first, second), PRINT_WIDTH_INCHES)
    return write_printed(folder, "seda-fig5-precision", plot, numbers, caption)


FIGURES: Mapping[str, PaperFigure] = {
    "marnet-fig3": PaperFigure(
        "Image features before and after the diffusion (MARNet, Figure 3)", ("cdr",), write_feature_space
    ),
    "marnet-fig4": PaperFigure("Five best classes of examples (MARNet, Figure 4)", ("baseline", "cdr"), write_cdr_examples),
    "seda-fig4": PaperFigure("The path of one class from image to text (SeDA, Figure 4)", ("l2", "seda"), write_class_path),
    "seda-fig5": PaperFigure(
        "Confusion and examples before and after (SeDA, Figure 5)", ("baseline", "seda"), write_disambiguation
    ),
}
