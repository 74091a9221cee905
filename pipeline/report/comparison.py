"""The rows as one table: mean and spread over seeds, distance to the baseline with its interval, what that allows to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import format_mean_std, mean_of_finite, paired_bootstrap, sample_std
from pipeline.report.results import BASELINE, Results, Row, collect

NUM_RESAMPLES = 4000  # of the bootstrap
NAMES = {"acc1": "Acc-1", "acc5": "Acc-5", "map": "mAP", "pre1": "Pre-1", "pre5": "Pre-5", "rec1": "Rec-1", "rec5": "Rec-5"}


def baseline_of(row: Row, results: Results) -> Row | None:
    """The baseline on the same image features and manifest that is best on validation; None without one or for itself."""
    config = row.head.config
    candidates = [
        other
        for other in results.rows
        if other.head.config.method == BASELINE
        and other.evaluation == results.split
        and other.head.kind == row.head.kind == "image"
        and (other.head.config.caches["image"], other.head.config.manifest) == (config.caches["image"], config.manifest)
    ]
    best = max(candidates, key=lambda other: other.head.score, default=None)
    return None if best is row else best


def baseline_differences(row: Row, baseline: Row) -> dict[str, tuple[float, float, float]]:
    """Per metric that is a mean over samples: points above the baseline and their paired bootstrap 95 % interval.

    Seeds are averaged first, then samples are resampled. Empty when the two were not evaluated on the same samples.
    """
    ids, terms = row.terms()
    other_ids, other = baseline.terms()
    if sorted(ids) != sorted(other_ids):
        return {}
    position = {sample_id: place for place, sample_id in enumerate(other_ids)}
    order = np.array([position[sample_id] for sample_id in ids])
    shared = [name for name in terms if name in other]
    return {name: paired_bootstrap(terms[name], other[name][order], NUM_RESAMPLES, seed=0) for name in shared}


def metric_names(results: Results) -> list[str]:
    """The metrics of the rows: those with a short name first, in its order."""
    found = {name for row in results.rows for record in row.records for name in record["metrics"]}
    return [name for name in NAMES if name in found] + sorted(found - set(NAMES))


def claim_metric(metrics: Sequence[str]) -> str:
    """The metric that decides who beats the baseline: the first with terms per sample."""
    return "acc1" if "acc1" in metrics else "pre1"


def numbers(home: Path, dataset: str, split: str = "test") -> pd.DataFrame:
    """Methods × metrics on a split, in percent.

    Columns: method, kind, seeds; per metric m: m, m_std, and m_vs_baseline, m_low, m_high (NaN where there is no baseline
    or no interval); train_seconds; verdict; reason (why nothing is claimed). No rows when nothing has been evaluated on the
    split. `ValueError` when the dataset has no runs.
    """
    return count_up(collect(home, dataset, split))


def table(home: Path, dataset: str, split: str = "test") -> pd.DataFrame:
    """`numbers` as strings for people: mean ± std over seeds, the difference with its interval, seconds, verdict."""
    return printable(numbers(home, dataset, split))


def count_up(results: Results) -> pd.DataFrame:
    """`numbers` of results that have been collected."""
    metrics = metric_names(results)
    return pd.DataFrame([_line(row, results, metrics) for row in results.rows])


def _line(row: Row, results: Results, metrics: Sequence[str]) -> dict[str, Any]:
    baseline = baseline_of(row, results)
    found = baseline_differences(row, baseline) if baseline else {}
    line: dict[str, Any] = {"method": row.label, "kind": row.head.kind, "seeds": len(row.runs)}
    for metric in metrics:
        values = row.values(metric)
        line[metric], line[f"{metric}_std"] = mean_of_finite(values), sample_std(values)
        if baseline:
            above = float(values.mean() - baseline.values(metric).mean())
            line |= dict(zip(_compared(metric), found.get(metric, (above, np.nan, np.nan)), strict=True))
        else:
            line |= dict.fromkeys(_compared(metric), np.nan)
    line["train_seconds"] = float(np.mean([record["train_seconds"] for record in row.records]))
    line["verdict"], line["reason"] = _verdict(row, results, baseline, found.get(claim_metric(metrics)))
    return line


def _compared(metric: str) -> tuple[str, str, str]:
    return f"{metric}_vs_baseline", f"{metric}_low", f"{metric}_high"


def _verdict(row: Row, results: Results, baseline: Row | None, found: tuple[float, float, float] | None) -> tuple[str, str]:
    """What the interval allows to say, or "no claim" and the reason."""
    if row.head.kind == "text":
        return "no claim", "it is a diagnostic"
    if row.head.kind == "unknown":
        return "no claim", "the cache of its image features is gone, so what they were made from cannot be checked"
    if baseline is None and row.head.config.method == BASELINE and row.evaluation == results.split:
        return "the baseline", ""
    if baseline is None:
        command = f"diffalign train-head --dataset {results.dataset} --method {BASELINE}"
        return "no claim", f"no {BASELINE} on these features; train one with: {command}"
    if found is None:
        return "no claim", "it was not evaluated on the same examples as the baseline"
    _, low, high = found
    if low > 0:
        return "beats the baseline", ""
    return ("falls below the baseline" if high < 0 else "not distinguishable"), ""


def printable(frame: pd.DataFrame) -> pd.DataFrame:
    """`numbers` as strings for people, only the metrics with a short name.

    When there are more than two of them, only the one that decides is compared with the baseline.
    """
    if frame.empty:
        return frame
    metrics = [metric for metric in NAMES if metric in frame]
    compared = metrics if len(metrics) <= 2 else [claim_metric(metrics)]
    shown = pd.DataFrame({"method": frame["method"], "seeds": frame["seeds"].astype(str)})
    for metric in metrics:
        shown = shown.join(spreads(frame, [metric]))
        if metric in compared:
            shown = shown.join(distances(frame, [metric]))
    shown["train s"] = [f"{seconds:.1f}" for seconds in frame["train_seconds"]]
    shown["verdict"] = frame["verdict"]
    return shown


def spreads(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Columns of `numbers` as mean ± standard deviation over seeds."""
    return pd.DataFrame(
        {
            NAMES.get(metric, metric): [
                format_mean_std(*values) for values in zip(frame[metric], frame[f"{metric}_std"], strict=True)
            ]
            for metric in metrics
        },
        index=frame.index,
    )


def distances(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Columns of `numbers` as points above the baseline with their interval; no column where no row is compared."""
    return pd.DataFrame(
        {
            f"{NAMES.get(metric, metric)} vs baseline": [_interval(*values) for values in compared.itertuples(index=False)]
            for metric in metrics
            if (compared := frame[list(_compared(metric))]).notna().any(axis=None)
        },
        index=frame.index,
    )


def _interval(above: float, low: float, high: float) -> str:
    if np.isnan(above):
        return "-"
    return f"{above:+.2f}" if np.isnan(low) else f"{above:+.2f} ({low:+.2f} to {high:+.2f})"
