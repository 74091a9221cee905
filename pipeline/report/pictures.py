"""The report's pictures: whose results they show, the drawing, and a caption that says how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.cache import open_cache
from pipeline.data.manifest import Manifest
from pipeline.report import evidence, figures
from pipeline.report.blocks import Block, Examples, Picture, Text
from pipeline.report.figures import Curve
from pipeline.report.results import BASELINE, Head, Results, Row, history

EACH = 2  # examples shown of every case


@dataclass(frozen=True, slots=True)
class Subjects:
    """One head per method on the same image features, the baseline first, and the evaluations of those that have one."""

    heads: tuple[Head, ...]
    rows: tuple[Row, ...]

    @property
    def pair(self) -> tuple[Row, ...]:
        """The baseline and the method that is best on validation; fewer when one is missing."""
        others = [row for row in self.rows if row.head.config.method != BASELINE]
        baseline = [row for row in self.rows if row.head.config.method == BASELINE]
        return (*baseline, *sorted(others, key=lambda row: -row.head.score)[:1])


def choose_subjects(results: Results, manifest: Manifest) -> Subjects:
    """For every method its best head on validation, on the features that the best baseline reads, else the best head."""
    heads = [head for head in results.heads if head.kind == "image" and head.config.manifest == manifest.fingerprint()]
    ranked = sorted(heads, key=lambda head: (head.config.method != BASELINE, -head.score))
    chosen: dict[str, Head] = {}
    for head in ranked:
        if head.config.caches["image"] == ranked[0].config.caches["image"]:
            chosen.setdefault(head.config.method, head)
    picked = tuple(chosen[method] for method in sorted(chosen, key=lambda method: (method != BASELINE, method)))
    rows = {id(row.head): row for row in results.rows if row.evaluation == results.split}
    return Subjects(picked, tuple(rows[id(head)] for head in picked if id(head) in rows))


def curves(subjects: Subjects, manifest: Manifest) -> Block:
    """Loss and validation metric per epoch."""
    if not subjects.heads:
        return Text("There is no finished run on image features of the current manifest, so there are no curves.")
    lines = [_curve(head, figures.colour(index)) for index, head in enumerate(subjects.heads)]
    name = "Acc-1" if manifest.label_kind == "single" else "mAP"
    caption = (
        "Mean over seeds; the band is the range between the lowest and the highest seed. Above, the validation metric of every "
        "method; below, the training loss of each with an axis of its own, because losses of different methods have different "
        "parts and cannot be compared. A dotted line starts a new training phase; only the last phase is validated."
    )
    return Picture(
        figures.training_curves(lines, name), "Training curves of " + ", ".join(line.label for line in lines), caption
    )


def _curve(head: Head, colour: str) -> Curve:
    epochs = [history(run) for run in head.runs]
    length = min(map(len, epochs))
    loss, score = (np.stack([frame[key].to_numpy(dtype=float)[:length] for frame in epochs]) for key in ("loss", "val_metric"))
    phase = epochs[0]["phase"].to_numpy()[:length]
    return Curve(head.label, colour, loss, score, tuple((np.flatnonzero(phase[1:] != phase[:-1]) + 1).tolist()))


def feature_space(results: Results, manifest: Manifest, subjects: Subjects) -> list[Block]:
    """t-SNE of the image features and of every method's feature."""
    if not subjects.rows:
        return [_nothing(results)]
    first = evidence.read_predictions(subjects.rows[0])
    ids = first.ids[: len(first.feature)]
    rows, group, classes = evidence.choose_groups(first.label[: len(ids)])
    if len(rows) < 8 or len(set(group.tolist())) < 2:
        return [Text("There are too few examples of the most frequent classes for a t-SNE.")]
    wanted = [ids[row] for row in rows]
    try:
        vectors = {"image features": _image_features(results, subjects.rows[0].head, wanted)}
    except ValueError as error:
        return [Text(f"The image features cannot be read, so there is no t-SNE: {error}.")]
    stored = {row.label: _stored_features(row, wanted) for row in subjects.rows}
    vectors |= {label: matrix for label, matrix in stored.items() if len(matrix) == len(rows) and np.isfinite(matrix).all()}
    missing = [label for label in stored if label not in vectors]
    panels = [
        (f"{name} ({evidence.separation(matrix, group):+.2f})", evidence.plane(matrix)) for name, matrix in vectors.items()
    ]
    names = [manifest.class_names[k] for k in classes]
    caption = (
        f"t-SNE of the same {len(rows)} examples: what the image encoder gives, and the vector each method's classifier reads "
        f"(its first seed). The classes are the {len(classes)} with most examples, up to "
        f"{evidence.GROUP_SIZE} of each. In brackets, the mean silhouette (cosine) of the classes in the full space, -1 to 1: "
        "it measures what the picture can only suggest."
        + (
            f" Left out, for their stored features are not finite or of other examples: {', '.join(missing)}."
            if missing
            else ""
        )
    )
    return [Picture(figures.embeddings(panels, group, names), f"t-SNE of {', '.join(vectors)}", caption)]


def _stored_features(row: Row, ids: Sequence[str]) -> np.ndarray:
    """What was stored with the row's first seed, for those of the samples that it has."""
    predictions = evidence.read_predictions(row)
    place = {sample_id: number for number, sample_id in enumerate(predictions.ids[: len(predictions.feature)])}
    return predictions.feature[[place[sample_id] for sample_id in ids if sample_id in place]]


def _image_features(results: Results, head: Head, ids: Sequence[str]) -> np.ndarray:
    (path,) = (cache["path"] for cache in results.caches if cache["fingerprint"] == head.config.caches["image"])
    return open_cache(Path(path)).read(ids).reshape(len(ids), -1)


def _nothing(results: Results) -> Text:
    return Text(f"No method on image features has an evaluation on the {results.split} split yet, so there is nothing to show.")


def confusion(manifest: Manifest, subjects: Subjects) -> list[Block]:
    """Before and after: the baseline and the method that is best on validation."""
    if len(subjects.pair) < 2:
        return [Text("This comparison needs an evaluated baseline and one more evaluated method on the same image features.")]
    before, after = subjects.pair
    titles = (before.label, after.label)
    if manifest.label_kind == "multi":
        return [_class_changes(manifest, before, after)]
    counts = [evidence.confusion(row, len(manifest.class_names)) for row in (before, after)]
    classes = np.arange(len(manifest.class_names))
    which = "All classes."
    if len(classes) > 20:
        classes = evidence.most_confused(*counts)
        which = (
            f"The {len(classes)} of {len(manifest.class_names)} classes with most errors in both matrices together; "
            "predictions of any other class are in the last column."
        )
    drawing = figures.confusions(
        evidence.shares(counts[0], classes),
        evidence.shares(counts[1], classes),
        [manifest.class_names[k] for k in classes],
        titles,
    )
    caption = (
        f"Confusion of the baseline and of {after.label}, the method that is best on validation. Each row is a true class and "
        f"shows the share of its examples, over all seeds, that were given each class. {which} In the difference, blue on the "
        "diagonal and red beside it are improvements."
    )
    return [Picture(drawing, f"Confusion matrices of {before.label} and {after.label}", caption)]


def _class_changes(manifest: Manifest, before: Row, after: Row) -> Picture:
    positives = (evidence.read_predictions(before).label > 0).sum(axis=0)
    classes = np.argsort(-positives, kind="stable")[:20]
    classes = classes[positives[classes] > 0]
    first, second = (evidence.average_precisions(row, classes) for row in (before, after))
    drawing = figures.class_changes(first, second, [manifest.class_names[k] for k in classes], (before.label, after.label))
    caption = (
        f"Average precision per class, mean over seeds, of the baseline and of {after.label}, the method that is best on "
        f"validation; the {len(classes)} most frequent classes, most frequent first."
    )
    return Picture(drawing, f"Average precision per class of {before.label} and {after.label}", caption)


def answers(results: Results, manifest: Manifest, subjects: Subjects) -> list[Block]:
    """The five best classes for a few examples of every case, as the baseline and the best method see them."""
    if not subjects.pair:
        return [_nothing(results)]
    seen = {row.label: evidence.read_predictions(row) for row in subjects.pair}
    first = next(iter(seen.values()))
    if any(predictions.ids != first.ids for predictions in seen.values()):
        return [Text("The methods were not evaluated on the same examples, so they are not shown side by side.")]
    right = [predictions.is_right for predictions in seen.values()]
    totals = evidence.count_cases(right)
    sigmoid = {row.label: row.head.config.settings.get("label_loss") == "bce" for row in subjects.pair}
    blocks: list[Block] = [Text(_how(results, subjects.pair))]
    for case, rows in evidence.choose_examples(right, first.ids, EACH).items():
        items = []
        for row in rows:
            label = first.label[row]
            present = [int(label)] if first.label.ndim == 1 else np.flatnonzero(label).tolist()
            logits = {name: (value.logits[row], first.label.ndim == 2 and sigmoid[name]) for name, value in seen.items()}
            items.append(evidence.example(manifest, first.ids[row], logits, present))
        blocks.append(Examples(f"{_case(tuple(seen), case)}: {totals[case]} of {len(first.ids)}", tuple(items)))
    return blocks


def _how(results: Results, pair: Sequence[Row]) -> str:
    return (
        f"Five best classes with their confidence, of {' and '.join(row.label for row in pair)} (first seed). "
        f"Nobody picked these examples: of every case, they are the first {EACH} of the {results.split} split in the order of "
        "the SHA-256 of their ids. The headings say how common each case is. A tick marks a true class."
    )


def _case(methods: tuple[str, ...], right: tuple[bool, ...]) -> str:
    if len(methods) == 1:
        return f"{methods[0]} is {'right' if right[0] else 'wrong'}"
    if right[0] == right[1]:
        return "Both are right" if right[0] else "Both are wrong"
    return f"Only {methods[0] if right[0] else methods[1]} is right"
