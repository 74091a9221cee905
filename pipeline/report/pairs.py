"""Comparisons of heads with one another: heads of a dataset by name, and the rows of a study with its first row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipeline.evaluation.statistics import Estimate, find_verdict, paired_bootstrap
from pipeline.report.comparison import adjust_p_values, bootstrap_differences, count_seeds, deciding_metric, pair_scores
from pipeline.report.results import ResultRow, SampleMetrics, collect_results
from pipeline.runtime.errors import UserError


class Judged(NamedTuple):
    """What the difference to another head is, and what may be said of it."""

    metric: str
    difference: Estimate  # in points
    verdict: str


def judge_against(
    first: SampleMetrics, others: Sequence[SampleMetrics], groups: Mapping[str, str], better: str, worse: str
) -> list[Judged]:
    """Compare other heads with a first one in the deciding metric; p-values are adjusted for their number.

    Args:
        first: The values of the head to compare with.
        others: The values of the other heads, on the same samples.
        groups: See `pair_scores`.
        better: The verdict on a head that is above the first one.
        worse: The verdict on a head that is below it.

    Raises:
        UserError: A head was evaluated on other samples.
    """
    return judge_pairs([(other, first) for other in others], groups, better, worse)


def judge_pairs(
    pairs: Sequence[tuple[SampleMetrics, SampleMetrics]], groups: Mapping[str, str], better: str, worse: str
) -> list[Judged]:
    """Compare the two heads of every pair in the deciding metric, as `judge_against` does; the verdict is on the first."""
    metric = deciding_metric(list(pairs[0][0].by_metric))
    paired = [pair_scores(a, b, groups) for a, b in pairs]
    if not all(paired):
        raise UserError("the heads were not evaluated on the same samples: compare heads of one manifest")
    estimates = [paired_bootstrap(scores[metric]) for scores in paired]
    num_seeds = [min(len(a.seeds), len(b.seeds)) for a, b in pairs]
    adjusted = adjust_p_values(estimates, num_seeds)
    return [
        Judged(metric, estimate, find_verdict(estimate, p_holm, count, better, worse))
        for estimate, p_holm, count in zip(estimates, adjusted, num_seeds, strict=True)
    ]


def compare_pairs(home: Path, dataset: str, names: Sequence[str], split: str = "test") -> pd.DataFrame:
    """Compare heads with one another on the samples of a split: the first with each of the others.

    Seeds and samples are drawn anew, as in `paired_bootstrap`.

    Args:
        home: The folder of all artifacts.
        dataset: The name of a dataset with runs.
        names: At least two folders of heads, "<method>-<fingerprint>", or unique beginnings of them.
        split: The split that the runs have been evaluated on, with their own settings.

    Returns:
        One row per pair and metric that is a mean over samples. Columns: a, b (folders of the two heads); metric; a_mean,
        b_mean (percent, over seeds); difference, low, high (a - b in points, with its 95 % interval; NaN with fewer than three
        seeds); p_holm (p-value, adjusted for the number of pairs); verdict; a_seeds, b_seeds.

    Raises:
        UserError: A name fits no head or several, a head is not evaluated on the split, or two heads were evaluated on other
            samples.
    """
    if len(names) < 2:
        raise UserError("a comparison takes at least two heads: give two names of folders, <method>-<fingerprint>")
    results = collect_results(home, dataset, split)
    rows = [row for row in results.rows if row.evaluation_name == split]
    first, *others = (_find_row(rows, name, split) for name in names)
    differences = [_require_differences(first, other, results.groups) for other in others]
    return pd.DataFrame(_pair_lines(first, others, differences))


def _require_differences(a: ResultRow, b: ResultRow, groups: Mapping[str, str]) -> dict[str, Estimate]:
    differences = bootstrap_differences(a, b, groups)
    if not differences:
        raise UserError(f"{a.folder} and {b.folder} were not evaluated on the same samples: compare heads of one manifest")
    return differences


def _pair_lines(a: ResultRow, others: Sequence[ResultRow], differences: Sequence[dict[str, Estimate]]) -> list[dict[str, Any]]:
    """Return the lines of `compare_pairs`: for each pair one per metric."""
    num_seeds = [count_seeds(a, b) for b in others]
    metrics = [metric for metric in differences[0] if all(metric in each for each in differences)]
    adjusted = {metric: adjust_p_values([each[metric] for each in differences], num_seeds) for metric in metrics}
    lines = []
    for index, (b, own) in enumerate(zip(others, differences, strict=True)):
        for metric in metrics:
            p_holm = adjusted[metric][index]
            lines.append(
                {
                    "a": a.folder,
                    "b": b.folder,
                    "metric": metric,
                    "a_mean": float(a.metric_values(metric).mean()),
                    "b_mean": float(b.metric_values(metric).mean()),
                    **dict(zip(("difference", "low", "high"), own[metric], strict=False)),
                    "p_holm": p_holm,
                    "verdict": find_verdict(own[metric], p_holm, num_seeds[index], "a is better", "b is better"),
                    "a_seeds": len(a.runs),
                    "b_seeds": len(b.runs),
                }
            )
    return lines


def _find_row(rows: Sequence[ResultRow], name: str, split: str) -> ResultRow:
    """Return the row of the head whose folder begins with a name."""
    found = [row for row in rows if row.folder == name] or [row for row in rows if row.folder.startswith(name)]
    if len(found) != 1:
        choices = ", ".join(sorted(row.folder for row in found or rows)) or "none"
        problem = "several heads begin" if found else f"no head that is evaluated on {split} begins"
        raise UserError(f"{problem} with {name!r}; choose one of: {choices}")
    return found[0]
