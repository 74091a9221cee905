"""Choose, by fixed rules, the examples, classes and numbers that the figures of a report show."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import average_precision_score, silhouette_score
from threadpoolctl import threadpool_limits

from pipeline.data.manifest import Manifest
from pipeline.data.media import open_image
from pipeline.evaluation.scores import log_scores
from pipeline.report.blocks import ClassPredictions, ExampleCard
from pipeline.report.results import ResultRow, predictions_path
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder

NUM_TSNE_CLASSES = 5
MAX_SAMPLES_PER_TSNE_CLASS = 40
NUM_CONFUSED_CLASSES = 18  # classes of a confusion matrix that is too small for all classes
NUM_TOP_CLASSES = 5  # classes that an example card lists for each method
THUMBNAIL_PIXELS = 192


@dataclass(frozen=True, slots=True)
class SeedPredictions:
    """The per-sample results of one evaluation of one seed."""

    ids: list[str]
    logits: np.ndarray  # [N,C]
    label: np.ndarray  # [N], or [N,C] of 0 and 1
    feature: np.ndarray  # [M,D] of the first M samples
    label_loss: str

    @property
    def log_scores(self) -> np.ndarray:
        """The log of the confidence in each class [N,C]."""
        return log_scores(self.logits, self.label, self.label_loss)

    @property
    def is_right(self) -> np.ndarray:
        """Whether the class with the highest logit is a label of the sample, [N]."""
        best = self.logits.argmax(axis=1)
        return best == self.label if self.label.ndim == 1 else self.label[np.arange(len(best)), best] > 0


def read_predictions(row: ResultRow, seed_index: int = 0) -> SeedPredictions:
    """Read the predictions of one seed of a row; `seed_index` counts from 0 and is not the seed itself."""
    return read_run_predictions(row.runs[seed_index], row.evaluation_name, row.head.config.label_loss)


def read_run_predictions(run: RunFolder, evaluation_name: str, label_loss: str) -> SeedPredictions:
    """Read the predictions of an evaluation of a run; `label_loss` is that of its config."""
    with np.load(predictions_path(run, evaluation_name)) as arrays:
        ids = [str(sample_id) for sample_id in arrays["ids"]]
        feature = arrays["feature"].astype(np.float32)
        return SeedPredictions(ids, arrays["logits"], arrays["label"], feature, label_loss)


def choose_tsne_samples(
    label: np.ndarray, max_samples: int = MAX_SAMPLES_PER_TSNE_CLASS
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Choose the samples of the t-SNE: the five most frequent classes, and the first samples of each.

    Samples that have two of these classes as labels are left out.

    Args:
        label: Labels [N], or [N,C] of 0 and 1.
        max_samples: Of each class.

    Returns:
        The indices [n] of the samples, the group 0..4 [n] of each of them, and the class of each group.
    """
    is_label = label > 0 if label.ndim == 2 else label[:, None] == np.arange(label.max() + 1)  # [N,C]
    counts = is_label.sum(axis=0)
    classes = sorted(np.argsort(-counts, kind="stable")[:NUM_TSNE_CLASSES].tolist())
    is_chosen_label = is_label[:, classes]
    has_one_label = is_chosen_label.sum(axis=1) == 1
    indices = [np.flatnonzero(is_chosen_label[:, k] & has_one_label)[:max_samples] for k in range(len(classes))]
    return np.concatenate(indices), np.repeat(np.arange(len(classes)), [len(part) for part in indices]), classes


def tsne_positions(vectors: np.ndarray) -> np.ndarray:
    """Return the t-SNE positions [n,2] of vectors [n,D], the same bits every time."""
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    with threadpool_limits(1):  # with more threads, the order in which numbers are added would depend on their number
        return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)


def mean_silhouette(vectors: np.ndarray, group: np.ndarray) -> float:
    """Return the mean silhouette, -1..1, of groups [n] of vectors [n,D], by cosine distance in the full space."""
    return float(silhouette_score(vectors, group, metric="cosine"))


def confusion_counts(row: ResultRow, num_classes: int) -> np.ndarray:
    """Count samples [C,C] by true class (rows) and predicted class (columns), summed over seeds; single-label only."""
    return sum(
        (count_confusions(read_predictions(row, seed_index), num_classes) for seed_index in range(len(row.runs))),
        np.zeros((num_classes, num_classes), dtype=np.int64),
    )


def count_confusions(predictions: SeedPredictions, num_classes: int) -> np.ndarray:
    """Count samples [C,C] by true class (rows) and predicted class (columns), as `confusion_counts` does, of one seed."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(counts, (predictions.label, predictions.logits.argmax(axis=1)), 1)
    return counts


def confused_group(counts: np.ndarray, num_classes: int) -> np.ndarray:
    """Return classes that are confused with each other: the two confused most, then one by one the most confused with these.

    Confusion is counted in both directions. Of equal ones, the lower class number comes first.

    Args:
        counts: Confusion counts [C,C].
        num_classes: How many classes; all, where there are not more.

    Returns:
        Classes [c] in ascending order.
    """
    errors = counts + counts.T
    errors = errors - np.diag(np.diag(errors))
    chosen = list(np.unravel_index(errors.argmax(), errors.shape)) if errors.any() else [0]
    while len(chosen) < min(num_classes, len(counts)):
        with_chosen = errors[chosen].sum(axis=0)
        with_chosen[chosen] = -1
        chosen.append(with_chosen.argmax())
    return np.sort(np.array(chosen[:num_classes]))


def most_confused_classes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the classes with most errors, as true or predicted class, in two confusion matrices [C,C] together.

    The classes are in ascending order.
    """
    errors = before + after
    errors = errors - np.diag(np.diag(errors))
    return np.sort(np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1)), kind="stable")[:NUM_CONFUSED_CLASSES])


def confusion_shares(counts: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the confusion of c classes, each row as shares of all the examples of its class.

    Args:
        counts: Confusion counts [C,C] of all classes.
        classes: The classes [c] to return.

    Returns:
        Shares [c,c]; or [c,c+1] when there are other classes, and the last column then holds predictions of these.
    """
    rows = counts[classes] / np.maximum(counts[classes].sum(axis=1, keepdims=True), 1)
    inside = rows[:, classes]
    return inside if len(classes) == len(counts) else np.column_stack([inside, rows.sum(axis=1) - inside.sum(axis=1)])


def average_precisions(row: ResultRow, classes: np.ndarray) -> np.ndarray:
    """Return the average precision [c] of classes [c] in percent, mean over seeds; multi-label only."""
    per_seed = [class_precisions(read_predictions(row, seed_index), classes) for seed_index in range(len(row.runs))]
    return np.mean(per_seed, axis=0)


def class_precisions(predictions: SeedPredictions, classes: np.ndarray) -> np.ndarray:
    """Return the average precision [c] of classes [c] in percent, of one seed; multi-label only."""
    label, scores = predictions.label, predictions.log_scores
    return 100.0 * np.array([average_precision_score(label[:, k], scores[:, k]) for k in classes])


def choose_examples(right: Sequence[np.ndarray], ids: Sequence[str], max_per_case: int) -> dict[tuple[bool, ...], list[int]]:
    """Choose examples of every case: the first in the order of the SHA-256 of their ids.

    Args:
        right: For each method, whether its prediction is right, [N].
        ids: Ids of the N samples.
        max_per_case: Number of examples of each case at most.

    Returns:
        Sample indices by case. A case says for each method whether it is right.
    """
    order = sorted(range(len(ids)), key=lambda index: hashlib.sha256(ids[index].encode()).digest())
    cases: dict[tuple[bool, ...], list[int]] = {}
    for index in order:
        cases.setdefault(tuple(bool(is_right[index]) for is_right in right), []).append(index)
    return {case: indices[:max_per_case] for case, indices in sorted(cases.items(), reverse=True)}


def count_cases(right: Sequence[np.ndarray]) -> Counter[tuple[bool, ...]]:
    """Count how often each case of `choose_examples` occurs."""
    return Counter(tuple(bool(value) for value in values) for values in zip(*right, strict=True))


def make_example_card(
    manifest: Manifest, sample_id: str, scores: Mapping[str, np.ndarray], labels: Sequence[int]
) -> ExampleCard:
    """Return a card with the thumbnail of a sample and the five best classes of every method.

    Args:
        manifest: Manifest of the dataset.
        sample_id: Id of the sample.
        scores: For each method the log of its confidence in each class [C].
        labels: The true classes of the sample.
    """
    predictions = []
    for method, own in scores.items():
        confidence, best = np.exp(own), np.argsort(-own, kind="stable")[:NUM_TOP_CLASSES]
        top_classes = tuple((manifest.class_names[k], float(confidence[k]), int(k) in labels) for k in best)
        predictions.append(ClassPredictions(method, top_classes))
    label_names = tuple(manifest.class_names[k] for k in labels)
    return ExampleCard(sample_id, _thumbnail(manifest, sample_id), label_names, tuple(predictions))


def _thumbnail(manifest: Manifest, sample_id: str) -> bytes:
    """A small PNG of the sample; empty when its file cannot be shown."""
    (sample,) = (sample for sample in manifest.samples if sample.id == sample_id)
    try:
        picture = open_image(manifest.media_path(sample), THUMBNAIL_PIXELS)
    except UserError:
        return b""
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
