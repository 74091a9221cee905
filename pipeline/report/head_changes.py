"""What changes from one head to another: settings, classes and single samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from pipeline.evaluation.statistics import Scores, paired_bootstrap
from pipeline.report.comparison import clusters_of
from pipeline.report.figure_data import read_run_predictions
from pipeline.report.results import distinguishing_settings
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json
from pipeline.runtime.runs import RunConfig, RunFolder

MIN_GROUPS_FOR_INTERVAL = 5  # groups of samples of a class; of fewer, nothing can be said of others


@dataclass(frozen=True, slots=True)
class HeadPredictions:
    """The predictions of all seeds of a head on the N samples of a split."""

    seeds: tuple[int, ...]
    ids: tuple[str, ...]
    label: np.ndarray  # [N], or [N,C] of 0 and 1
    log_scores: np.ndarray  # [S,N,C]
    is_right: np.ndarray  # [S,N]: the class with the highest score is a label of the sample

    @property
    def votes(self) -> np.ndarray:
        """The number of seeds that predict each class, [N,C]."""
        votes = np.zeros(self.log_scores.shape[1:], dtype=np.int64)
        for best in self.log_scores.argmax(axis=2):
            votes[np.arange(len(best)), best] += 1
        return votes

    @property
    def predicted(self) -> np.ndarray:
        """The class that most seeds predict, [N]; of several, the first one."""
        return self.votes.argmax(axis=1)


def read_head_predictions(runs: Sequence[RunFolder], split: str) -> HeadPredictions:
    """Read the predictions of a head's runs on a split, in the order of the sample ids.

    Raises:
        UserError: the seeds were evaluated on different samples, or there are none.
    """
    read = [read_run_predictions(run, split, run.config().label_loss) for run in runs]
    if not read:
        raise UserError(f"no run of this head is evaluated on {split}")
    order = [np.argsort(np.array(each.ids)) for each in read]
    ids = [np.array(each.ids)[own] for each, own in zip(read, order, strict=True)]
    if any(not np.array_equal(ids[0], own) for own in ids):
        raise UserError(f"the seeds of {runs[0].path.parent} were evaluated on different samples: evaluate them again")

    def stack(values: list[np.ndarray]) -> np.ndarray:
        return np.stack([value[own] for value, own in zip(values, order, strict=True)])

    return HeadPredictions(
        seeds=tuple(run.seed for run in runs),
        ids=tuple(map(str, ids[0])),
        label=read[0].label[order[0]],
        log_scores=stack([each.log_scores for each in read]),
        is_right=stack([each.is_right for each in read]),
    )


def differing_settings(runs: Sequence[RunFolder], cache_folders: Mapping[str, str]) -> pd.DataFrame:
    """Return what differs between the configurations of heads, one row per setting.

    Args:
        runs: one run of each head.
        cache_folders: names of the caches' folders by fingerprint.

    Returns:
        Columns: setting, then one per head, by the position of its run; "-" where a head has no such setting.
    """
    settings = [_all_settings(run.config(), cache_folders) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = []
    for name in names:
        values = [each.get(name, "-") for each in settings]
        if len({canonical_json(value) for value in values}) > 1:
            rows.append({"setting": name, **{index: _as_text(value) for index, value in enumerate(values)}})
    return pd.DataFrame(rows, columns=["setting", *range(len(settings))])


def _all_settings(config: RunConfig, cache_folders: Mapping[str, str]) -> dict[str, Any]:
    named = distinguishing_settings(config, cache_folders)
    return {**named, "texts of training": config.text_control, "share of training data": config.train_fraction}


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)


def class_differences(
    a: HeadPredictions, b: HeadPredictions, class_names: Sequence[str], groups: Mapping[str, str]
) -> pd.DataFrame:
    """Return how the classes change from head a to head b, the largest changes first.

    The metric of a class is its accuracy; for multi-label data its average precision.

    Args:
        a: the predictions of the first head.
        b: those of the other head, on the same samples.
        class_names: the name of each class.
        groups: see `comparison.pair_scores`.

    Returns:
        Columns: class; n (its samples in the split); a, b (percent, means over seeds); difference (a - b in points), low, high
        (its 95 % interval over seeds and samples, within -100 and 100; NaN for multi-label data, with fewer than three seeds,
        and with fewer than `MIN_GROUPS_FOR_INTERVAL` groups of samples).
    """
    _check_same_samples(a, b)
    clusters = clusters_of(a.ids, groups)
    rows = []
    for index, name in enumerate(class_names):
        is_member = a.label[:, index] > 0 if a.label.ndim == 2 else a.label == index
        if not is_member.any():
            continue
        row: dict[str, Any] = {"class": name, "n": int(is_member.sum()), "low": np.nan, "high": np.nan}
        if a.label.ndim == 2:
            row["a"], row["b"] = (_average_precision(each, index, is_member) for each in (a, b))
        else:
            right = [100.0 * each.is_right[:, is_member] for each in (a, b)]
            row["a"], row["b"] = (float(each.mean()) for each in right)
            own = np.arange(row["n"]) if clusters is None else clusters[is_member]
            if len(np.unique(own)) >= MIN_GROUPS_FOR_INTERVAL:
                _, low, high, _ = paired_bootstrap(Scores(right[0], right[1], own, a.seeds == b.seeds))
                row["low"], row["high"] = np.clip([low, high], -100.0, 100.0).tolist()
        row["difference"] = row["a"] - row["b"]
        rows.append(row)
    table = pd.DataFrame(rows, columns=["class", "n", "a", "b", "difference", "low", "high"])
    return table.sort_values("difference", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def _average_precision(head: HeadPredictions, index: int, is_member: np.ndarray) -> float:
    """Return the average precision of a class in percent, mean over seeds."""
    return 100.0 * float(np.mean([average_precision_score(is_member, scores[:, index]) for scores in head.log_scores]))


def changed_samples(a: HeadPredictions, b: HeadPredictions, class_names: Sequence[str]) -> pd.DataFrame:
    """Return the samples that one head predicts rightly and the other wrongly: in more than half of its seeds each.

    Samples of which a head gets half of its seeds right are left out.

    Returns:
        Columns: sample_id; labels; right ("a" or "b"); a, b (what most of the head's seeds predict: of the head that is right,
        a label; of the other one, no label; several with as many seeds are joined by "or"); a_right, b_right (share of its
        seeds that are right, 0..1). Those on which the heads differ most come first.
    """
    _check_same_samples(a, b)
    share_a, share_b = (head.is_right.mean(axis=0) for head in (a, b))
    changed = np.flatnonzero(((share_a > 0.5) & (share_b < 0.5)) | ((share_a < 0.5) & (share_b > 0.5)))
    changed = changed[np.argsort(-np.abs(share_a - share_b)[changed], kind="stable")]
    votes = a.votes, b.votes
    rows = [
        {
            "sample_id": a.ids[k],
            "labels": ", ".join(class_names[index] for index in _labels(a.label[k])),
            "right": "a" if share_a[k] > share_b[k] else "b",
            "a": _most_predicted(votes[0][k], a.label[k], share_a[k] > share_b[k], class_names),
            "b": _most_predicted(votes[1][k], a.label[k], share_b[k] > share_a[k], class_names),
            "a_right": float(share_a[k]),
            "b_right": float(share_b[k]),
        }
        for k in changed.tolist()
    ]
    return pd.DataFrame(rows, columns=["sample_id", "labels", "right", "a", "b", "a_right", "b_right"])


def _most_predicted(votes: np.ndarray, label: np.ndarray, is_right: bool, class_names: Sequence[str]) -> str:
    """Return the classes with most of the votes [C]: of the labels of a sample or, if the head is wrong, of the others."""
    counted = np.where(np.isin(np.arange(len(votes)), _labels(label)) == is_right, votes, 0)
    return " or ".join(class_names[index] for index in np.flatnonzero(counted == counted.max()).tolist())


def _labels(label: np.ndarray) -> list[int]:
    return [int(label)] if label.ndim == 0 else np.flatnonzero(label).tolist()


def _check_same_samples(a: HeadPredictions, b: HeadPredictions) -> None:
    if a.ids != b.ids:
        raise UserError("the two heads were not evaluated on the same samples: compare heads of one manifest")
