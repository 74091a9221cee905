"""The table of results: mean and spread over seeds, difference to the baseline with its interval, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import format_mean_std, mean_of_finite, paired_bootstrap, sample_std
from pipeline.report.results import BASELINE, DatasetResults, ResultRow, collect_results
from pipeline.runtime.errors import UserError

NUM_BOOTSTRAP_RESAMPLES = 4000
METRIC_LABELS = {
    "acc1": "Acc-1",
    "acc5": "Acc-5",
    "map": "mAP",
    "pre1": "Pre-1",
    "pre5": "Pre-5",
    "rec1": "Rec-1",
    "rec5": "Rec-5",
}


def find_baseline(row: ResultRow, results: DatasetResults) -> ResultRow | None:
    """Return the baseline that a row is compared with: the best on validation with the same image features and manifest.

    Returns:
        The row of the baseline; None when there is no such baseline, or when `row` is that baseline itself.
    """
    config = row.head.config
    candidates = [
        other
        for other in results.rows
        if other.head.config.method == BASELINE
        and other.evaluation_name == results.split
        and other.head.feature_kind == row.head.feature_kind == "image"
        and (other.head.config.caches["image"], other.head.config.manifest) == (config.caches["image"], config.manifest)
    ]
    best = max(candidates, key=lambda other: other.head.val_metric, default=None)
    return None if best is row else best


def bootstrap_differences(row: ResultRow, baseline: ResultRow) -> dict[str, tuple[float, float, float]]:
    """Return the differences to the baseline with their paired bootstrap 95 % intervals.

    Only metrics that are a mean over samples have one. Seeds are averaged first; then samples are resampled. Samples are
    paired by id.

    Returns:
        (difference, low, high) in points by metric; empty when the two were not evaluated on the same samples.
    """
    ids, metrics = row.per_sample_metrics()
    baseline_ids, baseline_metrics = baseline.per_sample_metrics()
    if sorted(ids) != sorted(baseline_ids):
        return {}
    baseline_index = {sample_id: index for index, sample_id in enumerate(baseline_ids)}
    aligned = np.array([baseline_index[sample_id] for sample_id in ids])
    shared = [name for name in metrics if name in baseline_metrics]
    return {
        name: paired_bootstrap(metrics[name], baseline_metrics[name][aligned], NUM_BOOTSTRAP_RESAMPLES, seed=0)
        for name in shared
    }


def compare_pairs(home: Path, dataset: str, names: Sequence[str], split: str = "test") -> pd.DataFrame:
    """Compare heads with one another on the samples of a split: the first with each of the others.

    Seeds are averaged first; then samples are resampled, as in `bootstrap_differences`.

    Args:
        home: The folder of all artifacts.
        dataset: The name of a dataset with runs.
        names: At least two folders of heads, "<method>-<fingerprint>", or unique beginnings of them.
        split: The split that the runs have been evaluated on, with their own settings.

    Returns:
        One row per pair and metric that is a mean over samples. Columns: a, b (folders of the two heads); metric; a_mean,
        b_mean (percent, over seeds); difference, low, high (a - b in points, with its 95 % interval); a_seeds, b_seeds.

    Raises:
        UserError: A name fits no head or several, a head is not evaluated on the split, or two heads were evaluated on other
            samples.
    """
    if len(names) < 2:
        raise UserError("a comparison takes at least two heads: give two names of folders, <method>-<fingerprint>")
    rows = [row for row in collect_results(home, dataset, split).rows if row.evaluation_name == split]
    first, *others = (_find_row(rows, name, split) for name in names)
    return pd.DataFrame([line for other in others for line in _compare_pair(first, other)])


def _compare_pair(a: ResultRow, b: ResultRow) -> list[dict[str, Any]]:
    """Return the lines of `compare_pairs` for two heads, one per metric."""
    differences = bootstrap_differences(a, b)
    if not differences:
        raise UserError(f"{a.folder} and {b.folder} were not evaluated on the same samples: compare heads of one manifest")
    return [
        {
            "a": a.folder,
            "b": b.folder,
            "metric": metric,
            "a_mean": float(a.metric_values(metric).mean()),
            "b_mean": float(b.metric_values(metric).mean()),
            **dict(zip(("difference", "low", "high"), interval, strict=True)),
            "a_seeds": len(a.runs),
            "b_seeds": len(b.runs),
        }
        for metric, interval in differences.items()
    ]


def _find_row(rows: Sequence[ResultRow], name: str, split: str) -> ResultRow:
    """Return the row of the head whose folder begins with a name."""
    found = [row for row in rows if row.folder == name] or [row for row in rows if row.folder.startswith(name)]
    if len(found) != 1:
        choices = ", ".join(sorted(row.folder for row in found or rows)) or "none"
        problem = "several heads begin" if found else f"no head that is evaluated on {split} begins"
        raise UserError(f"{problem} with {name!r}; choose one of: {choices}")
    return found[0]


def list_metrics(results: DatasetResults) -> list[str]:
    """Return the metrics of all rows: first those of `METRIC_LABELS` in that order, then the others by name."""
    found = {name for row in results.rows for record in row.records for name in record["metrics"]}
    return [name for name in METRIC_LABELS if name in found] + sorted(found - set(METRIC_LABELS))


def deciding_metric(metrics: Sequence[str]) -> str:
    """Return the metric that decides whether a method beats the baseline; it has a value for every sample."""
    return "acc1" if "acc1" in metrics else "pre1"


def results_frame(home: Path, dataset: str, split: str = "test") -> pd.DataFrame:
    """Return the results of a dataset on a split as numbers, one row per method and evaluation, metrics in percent.

    Returns:
        Columns: method, kind, seeds; for each metric m: m, m_std, and m_vs_baseline, m_low, m_high (NaN where there is no
        baseline or no interval); train_seconds; verdict; reason (why nothing is claimed). There are no rows when nothing has
        been evaluated on the split.

    Raises:
        UserError: The dataset has no runs.
    """
    return compare_results(collect_results(home, dataset, split))


def results_table(home: Path, dataset: str, split: str = "test") -> pd.DataFrame:
    """Return `results_frame` as strings to read: mean ± std over seeds, difference with its interval, seconds, verdict."""
    return format_results(results_frame(home, dataset, split))


def compare_results(results: DatasetResults) -> pd.DataFrame:
    """Return the table of `results_frame` for results that have been collected already."""
    metrics = list_metrics(results)
    return pd.DataFrame([_compare_row(row, results, metrics) for row in results.rows])


def _compare_row(row: ResultRow, results: DatasetResults, metrics: Sequence[str]) -> dict[str, Any]:
    baseline = find_baseline(row, results)
    differences = bootstrap_differences(row, baseline) if baseline else {}
    columns: dict[str, Any] = {"method": row.label, "kind": row.head.feature_kind, "seeds": len(row.runs)}
    for metric in metrics:
        values = row.metric_values(metric)
        columns[metric], columns[f"{metric}_std"] = mean_of_finite(values), sample_std(values)
        if baseline:
            difference = float(values.mean() - baseline.metric_values(metric).mean())
            without_interval = (difference, np.nan, np.nan)
            columns |= dict(zip(_difference_columns(metric), differences.get(metric, without_interval), strict=True))
        else:
            columns |= dict.fromkeys(_difference_columns(metric), np.nan)
    columns["train_seconds"] = float(np.mean([record["train_seconds"] for record in row.records]))
    columns["verdict"], columns["reason"] = _verdict(row, results, baseline, differences.get(deciding_metric(metrics)))
    return columns


def _difference_columns(metric: str) -> tuple[str, str, str]:
    return f"{metric}_vs_baseline", f"{metric}_low", f"{metric}_high"


def _verdict(
    row: ResultRow, results: DatasetResults, baseline: ResultRow | None, difference: tuple[float, float, float] | None
) -> tuple[str, str]:
    """Return the verdict that the interval allows and "", or "no claim" and the reason."""
    if row.head.feature_kind == "text":
        return "no claim", "it is a diagnostic"
    if row.head.feature_kind == "unknown":
        return "no claim", "the cache of its image features is gone, so what they were made from cannot be checked"
    if baseline is None and row.head.config.method == BASELINE and row.evaluation_name == results.split:
        return "the baseline", ""
    if baseline is None:
        return "no claim", _no_baseline(row, results)
    if difference is None:
        return "no claim", "it was not evaluated on the same examples as the baseline"
    _, low, high = difference
    if low > 0:
        return "beats the baseline", ""
    return ("falls below the baseline" if high < 0 else "not distinguishable"), ""


def _no_baseline(row: ResultRow, results: DatasetResults) -> str:
    """Return why a row has no baseline, with the command that mends it."""
    config = row.head.config
    for run in results.not_evaluated:
        other = run.config()
        is_same = (other.caches["image"], other.manifest) == (config.caches["image"], config.manifest)
        if other.method == BASELINE and is_same:
            command = f"diffalign evaluate {run.path.parent} --split {results.split}"
            return f"the {BASELINE} on these features is not evaluated on {results.split}; do it with: {command}"
    command = f"diffalign train-head --dataset {results.dataset} --method {BASELINE}"
    return f"no {BASELINE} on these features; train one with: {command}"


def format_results(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a `results_frame` as strings to read, with the metrics of `METRIC_LABELS` only.

    When there are more than two of these metrics, only the deciding metric is compared with the baseline.
    """
    if frame.empty:
        return frame
    metrics = [metric for metric in METRIC_LABELS if metric in frame]
    compared = metrics if len(metrics) <= 2 else [deciding_metric(metrics)]
    shown = pd.DataFrame({"method": frame["method"], "seeds": frame["seeds"].astype(str)})
    for metric in metrics:
        shown = shown.join(format_means(frame, [metric]))
        if metric in compared:
            shown = shown.join(format_differences(frame, [metric]))
    shown["train s"] = [f"{seconds:.1f}" for seconds in frame["train_seconds"]]
    shown["verdict"] = frame["verdict"]
    return shown


def format_means(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return one column of strings per metric: mean ± standard deviation over seeds."""
    return pd.DataFrame(
        {
            METRIC_LABELS.get(metric, metric): [
                format_mean_std(*values) for values in zip(frame[metric], frame[f"{metric}_std"], strict=True)
            ]
            for metric in metrics
        },
        index=frame.index,
    )


def format_differences(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return one column of strings per metric: points above the baseline with their interval.

    A metric in which no row is compared with a baseline has no column.
    """
    return pd.DataFrame(
        {
            f"{METRIC_LABELS.get(metric, metric)} vs baseline": [
                _format_difference(*values) for values in differences.itertuples(index=False)
            ]
            for metric in metrics
            if (differences := frame[list(_difference_columns(metric))]).notna().any(axis=None)
        },
        index=frame.index,
    )


def _format_difference(difference: float, low: float, high: float) -> str:
    if np.isnan(difference):
        return "-"
    return f"{difference:+.2f}" if np.isnan(low) else f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"
