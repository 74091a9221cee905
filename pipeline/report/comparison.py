"""The table of results: mean and spread over seeds, difference to the baseline with its interval, and a verdict.

A verdict takes five seeds of both methods. Its p-value is adjusted for all rows of the table that get one (Holm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import (
    MIN_SEEDS_FOR_VERDICT,
    Estimate,
    Scores,
    find_verdict,
    format_mean_std,
    holm,
    mean_of_finite,
    paired_bootstrap,
    sample_std,
)
from pipeline.report.results import (
    BASELINE,
    DatasetResults,
    ResultRow,
    SampleMetrics,
    collect_results,
    count_parameters,
    is_informative,
)
from pipeline.report.row_groups import NamedRow, name_rows

METRIC_LABELS = {
    "acc1": "Acc-1",
    "acc5": "Acc-5",
    "macro_acc": "Macro Acc",
    "ece": "ECE",
    "map": "mAP",
    "pre1": "Pre-1",
    "pre5": "Pre-5",
    "rec1": "Rec-1",
    "rec5": "Rec-5",
}

COLUMNS_WITHOUT_METRICS = ["method", "kind", "group", "name", "seeds", "train_seconds", "params", "p_holm", "verdict", "reason"]


def find_baseline(row: ResultRow, results: DatasetResults) -> ResultRow | None:
    """Return the baseline that a row is compared with: the best on validation with the same image features and training data.

    Returns:
        The row of the baseline; None when there is no such baseline, or when `row` is that baseline itself.
    """
    config = row.head.config
    candidates = [
        other
        for other in results.rows
        if other.head.config.method == BASELINE
        and not other.head.config.is_continued
        and other.evaluation_name == results.split
        and other.head.feature_kind == row.head.feature_kind == "image"
        and (other.head.config.caches["image"], other.head.config.manifest) == (config.caches["image"], config.manifest)
        and other.head.config.train_fraction == config.train_fraction
    ]
    best = max(candidates, key=lambda other: other.head.val_metric, default=None)
    return None if best is row else best


def pair_scores(a: SampleMetrics, b: SampleMetrics, groups: Mapping[str, str]) -> dict[str, Scores]:
    """Return the values of two heads on the same samples, paired by id, for each metric that both have.

    Args:
        a: Values of one head.
        b: Values of another head.
        groups: The group of each sample that has one; the samples of a group are drawn together.

    Returns:
        Values in percent by metric; empty when the two were not evaluated on the same samples.
    """
    if sorted(a.ids) != sorted(b.ids):
        return {}
    positions = {sample_id: index for index, sample_id in enumerate(b.ids)}
    aligned = np.array([positions[sample_id] for sample_id in a.ids])
    clusters = clusters_of(a.ids, groups)
    return {
        name: Scores(a.by_metric[name], b.by_metric[name][:, aligned], clusters, a.seeds == b.seeds)
        for name in a.by_metric
        if name in b.by_metric
    }


def clusters_of(ids: Sequence[str], groups: Mapping[str, str]) -> np.ndarray:
    """Return the number of the cluster of each sample [N]: its group, or a cluster of its own."""
    names = [("group", groups[sample_id]) if sample_id in groups else ("sample", sample_id) for sample_id in ids]
    return pd.factorize(pd.Series(names))[0]


def bootstrap_differences(row: ResultRow, baseline: ResultRow, groups: Mapping[str, str]) -> dict[str, Estimate]:
    """Return the differences to another row in points by metric, see `pair_scores` and `paired_bootstrap`."""
    pairs = pair_scores(row.sample_metrics(), baseline.sample_metrics(), groups)
    return {metric: paired_bootstrap(scores) for metric, scores in pairs.items()}


def count_seeds(*rows: ResultRow) -> int:
    """Return the number of seeds of the row that has fewest."""
    return min(len(row.runs) for row in rows)


def adjust_p_values(estimates: Sequence[Estimate | None], num_seeds: Sequence[int]) -> list[float]:
    """Return the p-values of a table, adjusted for the number of its rows that get a verdict; NaN for the others."""
    has_verdict = [count >= MIN_SEEDS_FOR_VERDICT for count in num_seeds]
    return holm([each.p if each and has else np.nan for each, has in zip(estimates, has_verdict, strict=True)])


def list_metrics(results: DatasetResults) -> list[str]:
    """Return the informative metrics of all rows: first those of `METRIC_LABELS` in that order, then the others by name."""
    names = {name for row in results.rows for record in row.records for name in record["metrics"]}
    found = {name for name in names if is_informative(name, results.num_classes)}
    return [name for name in METRIC_LABELS if name in found] + sorted(found - set(METRIC_LABELS))


def deciding_metric(metrics: Sequence[str]) -> str:
    """Return the metric that decides whether a method beats the baseline; it has a value for every sample."""
    return "acc1" if "acc1" in metrics else "pre1"


def results_frame(home: Path, dataset: str, split: str = "test") -> pd.DataFrame:
    """Return the results of a dataset on a split as numbers, one row per method and evaluation, metrics in percent.

    Returns:
        Columns: method, kind, group and name (see `name_rows`), seeds; for each metric m of `list_metrics`: m, m_std, and
        m_vs_baseline, m_low, m_high (NaN where there is no baseline or no interval); train_seconds; params (see
        `count_parameters`); p_holm (adjusted p-value of the deciding metric); verdict; reason (why nothing is claimed). There
        are no rows when nothing has been evaluated on the split.

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
    baselines = [find_baseline(row, results) for row in results.rows]
    pairs = list(zip(results.rows, baselines, strict=True))
    differences = [bootstrap_differences(row, other, results.groups) if other else {} for row, other in pairs]
    deciding = [own.get(deciding_metric(metrics)) for own in differences]
    num_seeds = [count_seeds(row, other or row) for row, other in pairs]
    adjusted = adjust_p_values(deciding, num_seeds)
    frame = []
    for index, ((row, baseline), place) in enumerate(zip(pairs, name_rows(results, baselines), strict=True)):
        verdict, reason = _explain_verdict(row, results, baseline, deciding[index], adjusted[index])
        numbers = _compare_row(row, place, baseline, differences[index], metrics)
        frame.append({**numbers, "p_holm": adjusted[index], "verdict": verdict, "reason": reason})
    return pd.DataFrame(frame, columns=None if frame else COLUMNS_WITHOUT_METRICS)


def _compare_row(
    row: ResultRow, place: NamedRow, baseline: ResultRow | None, differences: Mapping[str, Estimate], metrics: Sequence[str]
) -> dict[str, Any]:
    """Return the numbers of a row by column."""
    columns: dict[str, Any] = {"method": row.label, "kind": row.head.feature_kind, **place._asdict(), "seeds": len(row.runs)}
    for metric in metrics:
        values = row.metric_values(metric)
        columns[metric], columns[f"{metric}_std"] = mean_of_finite(values), sample_std(values[np.isfinite(values)])
        difference = columns[metric] - mean_of_finite(baseline.metric_values(metric)) if baseline else np.nan
        without_interval = Estimate(difference, np.nan, np.nan, np.nan)
        columns |= dict(zip(_difference_columns(metric), differences.get(metric, without_interval), strict=False))
    columns["train_seconds"] = float(np.mean([record["train_seconds"] for record in row.records]))
    columns["params"] = count_parameters(row.runs[0])
    return columns


def _difference_columns(metric: str) -> tuple[str, str, str]:
    return f"{metric}_vs_baseline", f"{metric}_low", f"{metric}_high"


def _explain_verdict(
    row: ResultRow, results: DatasetResults, baseline: ResultRow | None, difference: Estimate | None, p_holm: float
) -> tuple[str, str]:
    """Return the verdict that the interval allows and why nothing is claimed; "" for a claim."""
    if row.head.feature_kind == "text":
        return "no claim", "it is a diagnostic"
    if row.head.feature_kind == "unknown":
        return "no claim", "the cache of its image features is gone, so what they were made from cannot be checked"
    is_baseline = row.head.config.method == BASELINE and not row.head.config.is_continued
    if baseline is None and is_baseline and row.evaluation_name == results.split:
        return "the baseline", ""
    if baseline is None:
        return "no claim", _no_baseline(row, results)
    if difference is None:
        return "no claim", "it was not evaluated on the same examples as the baseline"
    num_seeds = count_seeds(row, baseline)
    verdict = find_verdict(difference, p_holm, num_seeds, "beats the baseline", "falls below the baseline")
    few = "it" if len(row.runs) == num_seeds else "the baseline"
    return verdict, f"{few} has {verdict} that a verdict takes" if num_seeds < MIN_SEEDS_FOR_VERDICT else ""


def compared_metrics(metrics: Sequence[str]) -> list[str]:
    """Return the metrics whose difference to the baseline stands in the first table."""
    return [metric for metric in ("acc1", "acc5", "map", "pre1") if metric in metrics]


def _no_baseline(row: ResultRow, results: DatasetResults) -> str:
    """Return why a row has no baseline, with the command that mends it."""
    config = row.head.config
    for run in results.not_evaluated:
        other = run.config()
        is_same = (other.caches["image"], other.manifest) == (config.caches["image"], config.manifest)
        if other.method == BASELINE and is_same and not other.is_continued:
            command = f"diffalign evaluate {run.path.parent} --split {results.split}"
            return f"the {BASELINE} on these features is not evaluated on {results.split}; do it with: {command}"
    names = [Path(cache["path"]).name for cache in results.caches if cache["fingerprint"] == config.caches["image"]]
    image = f" --image {names[0]}" if names else ""
    command = f"diffalign train-head --dataset {results.dataset} --method {BASELINE}{image}"
    return f"no {BASELINE} on these features; train one with: {command}"


def format_results(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a `results_frame` as strings to read, with the metrics of `METRIC_LABELS` only.

    Of these, only `compared_metrics` are compared with the baseline. The methods have the names of `name_rows`.
    """
    if frame.empty:
        return frame
    metrics = [metric for metric in METRIC_LABELS if metric in frame]
    compared = compared_metrics(metrics)
    shown = pd.DataFrame({"method": frame["name"], "seeds": frame["seeds"].astype(str)})
    for metric in metrics:
        shown = shown.join(format_means(frame, [metric]))
        if metric in compared:
            shown = shown.join(format_differences(frame, [metric]))
    if "params" in frame and frame["params"].notna().any():
        shown["params"] = ["-" if np.isnan(count) else f"{count:,.0f}" for count in frame["params"]]
    shown["train s"] = [f"{seconds:.1f}" for seconds in frame["train_seconds"]]
    shown["verdict"] = frame["verdict"]
    return shown


def format_means(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return one column of strings per metric: mean ± standard deviation over seeds."""
    return pd.DataFrame(
        {
            METRIC_LABELS.get(metric, metric): [
                "-" if np.isnan(mean) else format_mean_std(mean, std)
                for mean, std in zip(frame[metric], frame[f"{metric}_std"], strict=True)
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
                format_difference(*values) for values in differences.itertuples(index=False)
            ]
            for metric in metrics
            if (differences := frame[list(_difference_columns(metric))]).notna().any(axis=None)
        },
        index=frame.index,
    )


def format_difference(difference: float, low: float, high: float) -> str:
    """Return points with their interval, "+1.20 (-0.10 to +2.50)"; without one, the points; "-" for NaN."""
    if np.isnan(difference):
        return "-"
    return f"{difference:+.2f}" if np.isnan(low) else f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"
