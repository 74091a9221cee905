"""The table across data sets: how much the methods gain over the baseline, and how often, over several data sets together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.statistics import MIN_SEEDS_FOR_VERDICT, NUM_RESAMPLES, Estimate, Scores, compare_across, find_verdict
from pipeline.report.blocks import Block, Heading, Paragraph, Table
from pipeline.report.comparison import METRIC_LABELS, adjust_p_values, deciding_metric, pair_scores
from pipeline.report.figure_blocks import choose_shown_heads
from pipeline.report.results import BASELINE, collect_results


def across_blocks(home: Path, datasets: Sequence[str], split: str) -> list[Block]:
    """Return a section with one row per method that has results on at least two of the datasets; none for a single dataset.

    Raises:
        UserError: A dataset has no runs or no manifest.
    """
    names = list(dict.fromkeys(datasets))
    if len(names) < 2:
        return []
    scores: dict[str, dict[str, Scores]] = {}
    for name in names:
        for method, own in _scores_by_method(home, name, split).items():
            scores.setdefault(method, {})[name] = own
    compared = {method: own for method, own in sorted(scores.items()) if len(own) > 1}
    heading = Heading(f"Across data sets: {', '.join(names)}")
    if not compared:
        text = f"No method is evaluated on the {split} split of two of these data sets, beside a baseline on the same examples."
        return [heading, Paragraph(text)]
    return [heading, _across_table(compared)]


def _scores_by_method(home: Path, dataset: str, split: str) -> Mapping[str, Scores]:
    """Return the deciding metric of each method and of the baseline; each has its best head on validation."""
    results = collect_results(home, dataset, split)
    rows = {row.head.config.method: row for row in choose_shown_heads(results, read_manifest(home, dataset)).rows}
    baseline = rows.pop(BASELINE, None)
    if baseline is None:
        return {}
    own = baseline.sample_metrics()
    pairs = {method: pair_scores(row.sample_metrics(), own, results.groups) for method, row in rows.items()}
    return {method: scores[deciding_metric(list(scores))] for method, scores in pairs.items() if scores}


def _across_table(compared: Mapping[str, Mapping[str, Scores]]) -> Table:
    figures = [compare_across(list(own.values())) for own in compared.values()]
    num_seeds = [min(len(values) for each in own.values() for values in each[:2]) for own in compared.values()]
    adjusted = adjust_p_values([gain for gain, _ in figures], num_seeds)
    rows = tuple(
        (
            method,
            ", ".join(own),
            _format_estimate(gain, "+.2f"),
            _format_estimate(improvement, ".2f"),
            find_verdict(gain, p_holm, count, "beats the baseline", "falls below the baseline"),
        )
        for (method, own), (gain, improvement), p_holm, count in zip(
            compared.items(), figures, adjusted, num_seeds, strict=True
        )
    )
    caption = (
        f"Points are of {METRIC_LABELS['acc1']}, or {METRIC_LABELS['pre1']} for multi-label data; each method has its best "
        "head on validation. Interquartile mean: over all seeds and data sets, of the points above the mean of the baseline. "
        "Probability of improvement: that a seed of the method is above a seed of the baseline, mean over data sets; 0.5 is no "
        f"difference. 95 % intervals: a bootstrap of seeds and examples inside each data set ({NUM_RESAMPLES:,} resamples), "
        "which says nothing about other data sets. The verdict is that on the interquartile mean, after Holm over the rows; it "
        f"takes {MIN_SEEDS_FOR_VERDICT} seeds everywhere."
    )
    columns = (
        "method",
        "data sets",
        "interquartile mean of points above the baseline",
        "probability of improvement",
        "verdict",
    )
    return Table(columns, rows, caption, num_text_columns=2, key="across data sets")


def _format_estimate(estimate: Estimate, style: str) -> str:
    value, low, high = (format(number, style) for number in estimate[:3])
    return value if np.isnan(estimate.low) else f"{value} ({low} to {high})"
