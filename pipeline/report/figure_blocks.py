"""The figures about the results of methods: which heads they show, the drawings, and captions that say how they were made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.cache import open_cache
from pipeline.data.manifest import Manifest
from pipeline.report import figure_data, figures
from pipeline.report.blocks import Block, ExampleGroup, Paragraph, SvgFigure
from pipeline.report.figures import TrainingCurve
from pipeline.report.results import BASELINE, DatasetResults, HeadRuns, ResultRow, label_configs, read_history
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import parse_place
from pipeline.runtime.runs import REAL_TEXT

NUM_EXAMPLES_PER_CASE = 2
MAX_WHOLE_MATRIX_CLASSES = 20  # a confusion matrix of more classes shows the most confused ones only
MAX_PRECISION_CLASSES = 20  # classes in the figure of average precisions
MIN_TSNE_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class ShownHeads:
    """The heads that the figures show: one per method, all on the same image features, the baseline first."""

    heads: tuple[HeadRuns, ...]
    rows: tuple[ResultRow, ...]  # the evaluations of those heads that have one

    @property
    def baseline_and_best(self) -> tuple[ResultRow, ...]:
        """The baseline and the method that is best on validation; fewer than two rows when one is missing."""
        others = [row for row in self.rows if row.head.config.method != BASELINE]
        baseline = [row for row in self.rows if row.head.config.method == BASELINE]
        return (*baseline, *sorted(others, key=lambda row: -row.head.val_metric)[:1])


def choose_shown_heads(results: DatasetResults, manifest: Manifest) -> ShownHeads:
    """Choose the best head on validation of every method, among the heads on one set of image features.

    These are the features of the best baseline, or of the best head when there is no baseline. Heads that were trained on a
    text control, or on a part of the training split, are left out; those that joint training has trained on come last.
    """
    heads = [
        head
        for head in results.heads
        if head.feature_kind == "image"
        and head.config.manifest == manifest.fingerprint()
        and (head.config.text_control, head.config.train_fraction) == (REAL_TEXT, 1)
    ]
    ranked = sorted(heads, key=lambda head: (head.config.is_continued, head.config.method != BASELINE, -head.val_metric))
    best_by_method: dict[str, HeadRuns] = {}
    for head in ranked:
        if head.config.caches["image"] == ranked[0].config.caches["image"]:
            best_by_method.setdefault(head.config.method, head)
    methods = sorted(best_by_method, key=lambda method: (method != BASELINE, method))
    shown = tuple(best_by_method[method] for method in methods)
    rows = {id(row.head): row for row in results.rows if row.evaluation_name == results.split}
    labels = label_configs([head.config for head in shown], [False] * len(shown), results.caches)  # the names of the methods
    named = [replace(head, label=label) for head, label in zip(shown, labels, strict=True)]
    evaluated = [(head, rows[id(own)]) for head, own in zip(named, shown, strict=True) if id(own) in rows]
    return ShownHeads(tuple(named), tuple(replace(row, head=head, label=head.label) for head, row in evaluated))


def training_curve_figure(shown_heads: ShownHeads, manifest: Manifest) -> Block:
    """Return the figure of training loss and validation metric by epoch."""
    if not shown_heads.heads:
        return Paragraph("There is no finished run on image features of the current manifest, so there are no curves.")
    curves = [training_curve(head, figures.head_colour(index)) for index, head in enumerate(shown_heads.heads)]
    metric_label = "Acc-1" if manifest.label_kind == "single" else "mAP"
    caption = (
        "Mean over seeds; the band is the range between the lowest and the highest seed. Above, the validation metric of every "
        "method, from the begin to the end of its last phase, the only one that is validated: epochs of different numbers can "
        "so be compared. Below, the training loss of each, all its phases side by side, each as wide as the others; the loss "
        "has an axis of its own, because losses of different methods have different parts. In a phase that tries candidates, "
        "each is an epoch without training loss."
    )
    alt = "Training curves of " + ", ".join(curve.label for curve in curves)
    return SvgFigure(figures.draw_training_curves(curves, metric_label), alt, caption)


def training_curve(head: HeadRuns, colour: str) -> TrainingCurve:
    """Return the history of a head, cut to the epochs that all its seeds have."""
    histories = [read_history(run) for run in head.runs]
    num_epochs = min(map(len, histories))
    loss, val_metric = (
        np.stack([history[column].to_numpy(dtype=float)[:num_epochs] for history in histories])
        for column in ("loss", "val_metric")
    )
    phase = histories[0]["phase"].astype(str).to_numpy()[:num_epochs]
    is_start = np.append(True, phase[1:] != phase[:-1])
    number = is_start.cumsum() - 1
    lengths, starts = np.bincount(number), np.flatnonzero(is_start)
    position = number + (np.arange(1, num_epochs + 1) - starts[number]) / lengths[number]
    return TrainingCurve(head.label, colour, loss, val_metric, position, tuple(phase[starts].tolist()))


def feature_space_blocks(results: DatasetResults, manifest: Manifest, shown_heads: ShownHeads) -> list[Block]:
    """Return the t-SNE figure of the image features and of the features of every method."""
    if not shown_heads.rows:
        return [_nothing_evaluated(results)]
    first = figure_data.read_predictions(shown_heads.rows[0])
    ids = first.ids[: len(first.feature)]
    indices, group, classes = figure_data.choose_tsne_samples(first.label[: len(ids)])
    if len(indices) < MIN_TSNE_SAMPLES or len(set(group.tolist())) < 2:
        return [Paragraph("There are too few examples of the most frequent classes for a t-SNE.")]
    shown_ids = [ids[index] for index in indices]
    try:
        vectors = {"image features": read_image_features(results, shown_heads.rows[0].head, shown_ids)}
    except UserError as error:
        return [Paragraph(f"The image features cannot be read, so there is no t-SNE: {error}.")]
    stored = {row.label: _read_stored_features(row, shown_ids) for row in shown_heads.rows}
    vectors |= {
        label: features for label, features in stored.items() if len(features) == len(indices) and np.isfinite(features).all()
    }
    missing = [label for label in stored if label not in vectors]
    panels = [
        (f"{name} ({figure_data.mean_silhouette(features, group):+.2f})", figure_data.tsne_positions(features))
        for name, features in vectors.items()
    ]
    svg = figures.draw_embeddings(panels, group, [manifest.class_names[k] for k in classes])
    return [SvgFigure(svg, f"t-SNE of {', '.join(vectors)}", _tsne_caption(len(indices), len(classes), missing))]


def _tsne_caption(num_samples: int, num_classes: int, missing: Sequence[str]) -> str:
    caption = (
        f"t-SNE of the same {num_samples} examples: what the image encoder gives, and the vector each method's classifier "
        f"reads (its first seed). The classes are the {num_classes} with most examples, up to "
        f"{figure_data.MAX_SAMPLES_PER_TSNE_CLASS} of each. In brackets, the mean silhouette (cosine) of the classes in the "
        "full space, -1 to 1: it measures what the picture can only suggest."
    )
    if missing:
        caption += f" Left out, for their stored features are not finite or of other examples: {', '.join(missing)}."
    return caption


def _read_stored_features(row: ResultRow, ids: Sequence[str]) -> np.ndarray:
    """Read the features [m,D] that were stored with the row's first seed, for those of the samples that have one."""
    predictions = figure_data.read_predictions(row)
    index_of = {sample_id: index for index, sample_id in enumerate(predictions.ids[: len(predictions.feature)])}
    return predictions.feature[[index_of[sample_id] for sample_id in ids if sample_id in index_of]]


def read_image_features(results: DatasetResults, head: HeadRuns, ids: Sequence[str]) -> np.ndarray:
    """Read the image features of the samples from the head's cache, flattened to [n,D]."""
    (path,) = (cache["path"] for cache in results.caches if cache["fingerprint"] == head.config.caches["image"])
    return open_cache(parse_place(path)).read(ids).reshape(len(ids), -1)


def _nothing_evaluated(results: DatasetResults) -> Paragraph:
    text = f"No method on image features has an evaluation on the {results.split} split yet, so there is nothing to show."
    return Paragraph(text)


def class_change_blocks(manifest: Manifest, shown_heads: ShownHeads) -> list[Block]:
    """Return the figure that compares, class by class, the baseline with the method that is best on validation.

    Single-label data get confusion matrices, multi-label data get average precisions.
    """
    if len(shown_heads.baseline_and_best) < 2:
        text = "This comparison needs an evaluated baseline and one more evaluated method on the same image features."
        return [Paragraph(text)]
    before, after = shown_heads.baseline_and_best
    if manifest.label_kind == "multi":
        return [_average_precision_figure(manifest, before, after)]
    return [_confusion_figure(manifest, before, after)]


def _confusion_figure(manifest: Manifest, before: ResultRow, after: ResultRow) -> SvgFigure:
    counts = [figure_data.confusion_counts(row, len(manifest.class_names)) for row in (before, after)]
    classes = np.arange(len(manifest.class_names))
    which_classes = "All classes."
    if len(classes) > MAX_WHOLE_MATRIX_CLASSES:
        classes = figure_data.most_confused_classes(*counts)
        which_classes = (
            f"The {len(classes)} of {len(manifest.class_names)} classes with most errors in both matrices together; "
            "predictions of any other class are in the last column."
        )
    svg = figures.draw_confusions(
        figure_data.confusion_shares(counts[0], classes),
        figure_data.confusion_shares(counts[1], classes),
        [manifest.class_names[k] for k in classes],
        (before.label, after.label),
    )
    caption = (
        f"Confusion of the baseline and of {after.label}, the method that is best on validation. Each row is a true class and "
        f"shows the share of its examples, over all seeds, that were given each class. {which_classes} In the difference, blue "
        "on the diagonal and red beside it are improvements."
    )
    return SvgFigure(svg, f"Confusion matrices of {before.label} and {after.label}", caption)


def _average_precision_figure(manifest: Manifest, before: ResultRow, after: ResultRow) -> SvgFigure:
    num_positives = (figure_data.read_predictions(before).label > 0).sum(axis=0)
    classes = np.argsort(-num_positives, kind="stable")[:MAX_PRECISION_CLASSES]
    classes = classes[num_positives[classes] > 0]
    first, second = (figure_data.average_precisions(row, classes) for row in (before, after))
    class_names = [manifest.class_names[k] for k in classes]
    svg = figures.draw_class_changes(first, second, class_names, (before.label, after.label))
    caption = (
        f"Average precision per class, mean over seeds, of the baseline and of {after.label}, the method that is best on "
        f"validation; the {len(classes)} most frequent classes, most frequent first."
    )
    return SvgFigure(svg, f"Average precision per class of {before.label} and {after.label}", caption)


def example_blocks(results: DatasetResults, manifest: Manifest, shown_heads: ShownHeads) -> list[Block]:
    """Return a few examples of every case with the five best classes of the baseline and of the best method.

    A case says which of the two methods are right.
    """
    rows = shown_heads.baseline_and_best
    if not rows:
        return [_nothing_evaluated(results)]
    by_method = {row.label: figure_data.read_predictions(row) for row in rows}
    first = next(iter(by_method.values()))
    if any(predictions.ids != first.ids for predictions in by_method.values()):
        return [Paragraph("The methods were not evaluated on the same examples, so they are not shown side by side.")]
    right = [predictions.is_right for predictions in by_method.values()]
    case_counts = figure_data.count_cases(right)
    scores = {name: predictions.log_scores for name, predictions in by_method.items()}
    blocks: list[Block] = [Paragraph(_examples_introduction(results, rows))]
    for case, indices in figure_data.choose_examples(right, first.ids, NUM_EXAMPLES_PER_CASE).items():
        cards = []
        for index in indices:
            label = first.label[index]
            labels = np.flatnonzero(label).tolist() if first.label.ndim == 2 else [int(label)]
            own = {name: each[index] for name, each in scores.items()}
            cards.append(figure_data.make_example_card(manifest, first.ids[index], own, labels))
        title = f"{_describe_case(tuple(by_method), case)}: {case_counts[case]} of {len(first.ids)}"
        blocks.append(ExampleGroup(title, tuple(cards)))
    return blocks


def _examples_introduction(results: DatasetResults, rows: Sequence[ResultRow]) -> str:
    return (
        f"Five best classes with their confidence, of {' and '.join(row.label for row in rows)} (first seed). "
        f"Nobody picked these examples: of every case, they are the first {NUM_EXAMPLES_PER_CASE} of the {results.split} split "
        "in the order of the SHA-256 of their ids. The headings say how common each case is. A tick marks a true class."
    )


def _describe_case(methods: tuple[str, ...], right: tuple[bool, ...]) -> str:
    if len(methods) == 1:
        return f"{methods[0]} is {'right' if right[0] else 'wrong'}"
    if right[0] == right[1]:
        return "Both are right" if right[0] else "Both are wrong"
    return f"Only {methods[0] if right[0] else methods[1]} is right"
