"""What the pictures show: which examples, which classes and which numbers, chosen by fixed rules."""

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
from pipeline.report.blocks import Answer, Example
from pipeline.report.results import Row, predictions_path

NUM_GROUPS = 5  # classes of the t-SNE
GROUP_SIZE = 40  # samples of each
NUM_CONFUSED = 18  # classes of a confusion matrix that cannot show all
THUMBNAIL = 192  # pixels


@dataclass(frozen=True, slots=True)
class Predictions:
    """The per-example results of one seed."""

    ids: list[str]
    logits: np.ndarray  # [N,C]
    label: np.ndarray  # [N], or [N,C] of 0 and 1
    feature: np.ndarray  # [M,D] of the first M rows

    @property
    def is_right(self) -> np.ndarray:
        """Whether the best class is a label, [N]."""
        best = self.logits.argmax(axis=1)
        return best == self.label if self.label.ndim == 1 else self.label[np.arange(len(best)), best] > 0


def read_predictions(row: Row, seed: int = 0) -> Predictions:
    """The results of the row's k-th seed."""
    with np.load(predictions_path(row.runs[seed], row.evaluation)) as arrays:
        ids = [str(sample_id) for sample_id in arrays["ids"]]
        return Predictions(ids, arrays["logits"], arrays["label"], arrays["feature"].astype(np.float32))


def choose_groups(label: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Rows, their group 0..4 and the classes of the groups: the five most frequent classes, the first 40 rows of each.

    Rows that carry two of the classes are left out.
    """
    indicators = label > 0 if label.ndim == 2 else label[:, None] == np.arange(label.max() + 1)
    counts = indicators.sum(axis=0)
    classes = sorted(np.argsort(-counts, kind="stable")[:NUM_GROUPS].tolist())
    inside = indicators[:, classes]
    rows = [np.flatnonzero(inside[:, k] & (inside.sum(axis=1) == 1))[:GROUP_SIZE] for k in range(len(classes))]
    return np.concatenate(rows), np.repeat(np.arange(len(classes)), [len(part) for part in rows]), classes


def plane(vectors: np.ndarray) -> np.ndarray:
    """The t-SNE [n,2] of vectors [n,D], the same bits every time."""
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    with threadpool_limits(1):  # the order of sums would depend on the number of threads
        return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)


def separation(vectors: np.ndarray, group: np.ndarray) -> float:
    """The mean silhouette -1..1 of the groups in the space of the vectors themselves."""
    return float(silhouette_score(vectors, group, metric="cosine"))


def confusion(row: Row, num_classes: int) -> np.ndarray:
    """Counts [C,C] of true class by predicted class, summed over seeds; single label."""
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    for seed in range(len(row.runs)):
        predictions = read_predictions(row, seed)
        np.add.at(counts, (predictions.label, predictions.logits.argmax(axis=1)), 1)
    return counts


def most_confused(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The classes with most errors, as true or predicted class, in both matrices together; in class order."""
    errors = before + after
    errors = errors - np.diag(np.diag(errors))
    return np.sort(np.argsort(-(errors.sum(axis=0) + errors.sum(axis=1)), kind="stable")[:NUM_CONFUSED])


def shares(counts: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Rows of these classes as shares of all their examples [c,c], with a last column for other classes if there are any."""
    rows = counts[classes] / np.maximum(counts[classes].sum(axis=1, keepdims=True), 1)
    inside = rows[:, classes]
    return inside if len(classes) == len(counts) else np.column_stack([inside, rows.sum(axis=1) - inside.sum(axis=1)])


def average_precisions(row: Row, classes: np.ndarray) -> np.ndarray:
    """Average precision [c] of these classes in percent, mean over seeds; multi-label."""
    per_seed = []
    for seed in range(len(row.runs)):
        predictions = read_predictions(row, seed)
        label, logits = predictions.label, predictions.logits
        per_seed.append([average_precision_score(label[:, k], logits[:, k]) for k in classes])
    return 100.0 * np.mean(per_seed, axis=0)


def choose_examples(right: Sequence[np.ndarray], ids: Sequence[str], each: int) -> dict[tuple[bool, ...], list[int]]:
    """Rows by case (which methods are right), at most `each` per case: the first in the order of the SHA-256 of their ids."""
    order = sorted(range(len(ids)), key=lambda row: hashlib.sha256(ids[row].encode()).digest())
    cases: dict[tuple[bool, ...], list[int]] = {}
    for row in order:
        cases.setdefault(tuple(bool(method[row]) for method in right), []).append(row)
    return {case: rows[:each] for case, rows in sorted(cases.items(), reverse=True)}


def count_cases(right: Sequence[np.ndarray]) -> Counter[tuple[bool, ...]]:
    """How often each case occurs."""
    return Counter(tuple(bool(value) for value in values) for values in zip(*right, strict=True))


def example(
    manifest: Manifest, sample_id: str, answers: Mapping[str, tuple[np.ndarray, bool]], present: Sequence[int]
) -> Example:
    """The thumbnail and the five best classes of every method; `answers` maps its name to (logits [C], whether sigmoid)."""
    shown = []
    for method, (logits, sigmoid) in answers.items():
        confidence = (1 + np.tanh(logits / 2)) / 2 if sigmoid else np.exp(logits - np.logaddexp.reduce(logits))
        best = np.argsort(-logits, kind="stable")[:5]
        classes = tuple((manifest.class_names[k], float(confidence[k]), int(k) in present) for k in best)
        shown.append(Answer(method, classes))
    labels = tuple(manifest.class_names[k] for k in present)
    return Example(sample_id, _thumbnail(manifest, sample_id), labels, tuple(shown))


def _thumbnail(manifest: Manifest, sample_id: str) -> bytes:
    """A small PNG of the sample; empty when its file cannot be shown."""
    (sample,) = (sample for sample in manifest.samples if sample.id == sample_id)
    try:
        picture = open_image(manifest.media_path(sample), THUMBNAIL)
    except ValueError:
        return b""
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
