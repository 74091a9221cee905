"""A table of a paper with our own numbers beside the paper's: differences to its base row, intervals and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.data.artefacts import Artefact, PaperRow
from pipeline.data.manifest import Manifest
from pipeline.evaluation.statistics import (
    MIN_SEEDS_FOR_INTERVAL,
    MIN_SEEDS_FOR_VERDICT,
    NO_ESTIMATE,
    NUM_RESAMPLES,
    Estimate,
    describe_spread,
    find_verdict,
    format_mean_std,
    mean_of_finite,
    paired_bootstrap,
    sample_std,
)
from pipeline.report.blocks import BulletList, Paragraph, Table
from pipeline.report.comparison import METRIC_LABELS, adjust_p_values, deciding_metric, format_difference, pair_scores
from pipeline.report.latex import render_latex
from pipeline.report.markdown import render_markdown
from pipeline.report.results import SampleMetrics, is_informative
from pipeline.runtime.files import write_atomic

SINGLE_LABEL_METRICS = ("acc1", "acc5")
MULTI_LABEL_METRICS = ("pre1", "pre5", "rec1", "rec5")
NOT_HAD = "not had"  # instead of a verdict, in rows that could not be trained


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """What became of one row of a table."""

    row: PaperRow
    samples: SampleMetrics | None = None  # of the finished runs; None: there are none
    metrics: Mapping[str, Sequence[float]] | None = None  # in percent, one value per seed
    features: str = ""  # the image features, for readers
    preset: str = ""  # where the settings that the row does not name come from
    reason: str = ""  # why there are no runs, or fewer than planned


def table_metrics(manifest: Manifest) -> list[str]:
    """Return the metrics that a table on these data has."""
    metrics = MULTI_LABEL_METRICS if manifest.label_kind == "multi" else SINGLE_LABEL_METRICS
    return [metric for metric in metrics if is_informative(metric, len(manifest.class_names))]


def compare_rows(
    artefact: Artefact, results: Sequence[RowResult], groups: Mapping[str, str], metrics: Sequence[str]
) -> pd.DataFrame:
    """Return a table of numbers, one row per row of the paper, metrics in percent.

    Args:
        artefact: The table of the paper.
        results: Its rows in order.
        groups: The group of each sample that has one; see `pair_scores`.
        metrics: See `table_metrics`.

    Returns:
        Columns: the heads of the paper; method, settings, preset, features, seeds; for each metric m: m, m_std and the
        difference m_diff to the row `against` with its interval m_low, m_high; p_holm and verdict on the deciding metric;
        reason; and the paper's numbers, "<dataset> <metric>". NaN where there is no number.
    """
    deciding = deciding_metric(metrics)
    by_title = {result.row.title: result for result in results}
    references = [_reference(artefact, result, by_title) for result in results]
    differences = [_differences(result, other, groups) for result, other in zip(results, references, strict=True)]
    seeds = [_count_seeds(result, other) for result, other in zip(results, references, strict=True)]
    adjusted = adjust_p_values([own.get(deciding) for own in differences], seeds)
    frame = []
    for result, other, own, count, p_holm in zip(results, references, differences, seeds, adjusted, strict=True):
        row = result.row
        line: dict[str, Any] = dict(zip(artefact.heads, row.name, strict=True))
        line |= {
            "method": row.method,
            "settings": _describe_settings(row),
            "preset": result.preset,
            "features": result.features,
        }
        line |= {"seeds": len(result.samples.seeds) if result.samples else 0}
        for metric in metrics:
            values = pd.Series((result.metrics or {}).get(metric, ()), dtype=float).to_numpy()
            line |= {metric: mean_of_finite(values), f"{metric}_std": sample_std(values)}
            line |= dict(
                zip((f"{metric}_{part}" for part in ("diff", "low", "high")), own.get(metric, NO_ESTIMATE), strict=False)
            )
        against = other.row.title if other else ""
        line |= {"against": against, "p_holm": p_holm, "verdict": _verdict(result, own.get(deciding), against, p_holm, count)}
        line |= {"reason": result.reason, **_paper_numbers(artefact, row)}
        frame.append(line)
    return pd.DataFrame(frame)


def _reference(artefact: Artefact, result: RowResult, by_title: Mapping[str, RowResult]) -> RowResult | None:
    reference = artefact.reference(result.row)
    return by_title[reference.title] if reference else None


def _differences(result: RowResult, other: RowResult | None, groups: Mapping[str, str]) -> dict[str, Estimate]:
    """Return the differences by metric; empty without two rows that were evaluated on the same samples."""
    if not (result.samples and other and other.samples):
        return {}
    return {name: paired_bootstrap(scores) for name, scores in pair_scores(result.samples, other.samples, groups).items()}


def _count_seeds(result: RowResult, other: RowResult | None) -> int:
    return min((len(each.samples.seeds) if each.samples else 0) for each in (result, other or result))


def _verdict(result: RowResult, difference: Estimate | None, against: str, p_holm: float, num_seeds: int) -> str:
    if not result.samples:
        return NOT_HAD
    if not against:
        return "the base"
    if difference is None:
        return "no claim"
    return find_verdict(difference, p_holm, num_seeds, f"above {against}", f"below {against}")


def _describe_settings(row: PaperRow) -> str:
    pairs = [f"{name}={value}" for name, value in row.settings.items()]
    return " ".join([*pairs, *([f"unfreeze={row.unfreeze}"] if row.unfreeze else [])])


def _paper_numbers(artefact: Artefact, row: PaperRow) -> dict[str, float]:
    return {
        f"{key} {metric}": math.nan if number is None else number
        for key, dataset in artefact.datasets.items()
        for metric, number in zip(dataset.metrics, row.paper.get(key, (None,) * len(dataset.metrics)), strict=True)
    }


def paper_table(artefact: Artefact, frame: pd.DataFrame, dataset: str, split: str, is_narrow: bool = False) -> Table:
    """Return the table to read: the paper's columns, each number with its difference to the base, then ours.

    Args:
        artefact: The table of the paper.
        frame: The numbers, see `compare_rows`.
        dataset: The name of our data set.
        split: The split of our numbers.
        is_narrow: Whether it is for print: without the paper's differences, and with the interval of the deciding metric alone.
    """
    metrics = [metric for metric in METRIC_LABELS if metric in frame]
    columns = [("", head, list(map(str, frame[head]))) for head in artefact.heads]
    for key, own in artefact.datasets.items():
        for metric in own.metrics:
            cells = _paper_cells(artefact, frame, f"{key} {metric}", with_differences=not is_narrow)
            columns.append((own.name, METRIC_LABELS[metric], cells))
    for metric in metrics:
        label = METRIC_LABELS[metric]
        differences = list(frame[_difference_columns(metric)].itertuples(index=False))
        values = zip(frame[metric], frame[f"{metric}_std"], strict=True)
        means = ["-" if math.isnan(mean) else format_mean_std(mean, std) for mean, std in values]
        if not is_narrow:
            columns.append(("", f"ours, {dataset}: {label}", means))
            columns.append(("", f"{label} vs {artefact.base}", [format_difference(*each) for each in differences]))
            continue
        ours = f"ours: {label}"
        columns.append((ours, "mean", means))
        columns.append((ours, "Δ", [format_difference(value, math.nan, math.nan) for value, _, _ in differences]))
        if metric == deciding_metric(metrics):
            intervals = ["-" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}" for _, low, high in differences]
            columns.append((ours, "95 % interval", intervals))
    verdicts = zip(frame["verdict"], frame["against"], strict=True)
    columns.append(("", "verdict", [verdict.removesuffix(f" {other}" * is_narrow) for verdict, other in verdicts]))
    rows = tuple(zip(*(cells for _, _, cells in columns), strict=True))
    caption = f"{artefact.title}. {_caption(artefact, frame, metrics, f'the {split} split of {dataset}', is_narrow)}"
    if is_narrow:
        groups, heads, _ = zip(*columns, strict=True)
        return Table(heads, rows, caption, len(artefact.heads), groups)
    return Table(tuple(f"{group} {head}".strip() for group, head, _ in columns), rows, caption, len(artefact.heads))


def _difference_columns(metric: str) -> list[str]:
    return [f"{metric}_{part}" for part in ("diff", "low", "high")]


def _paper_cells(artefact: Artefact, frame: pd.DataFrame, column: str, with_differences: bool) -> list[str]:
    """Return the numbers of a column of the paper as it writes them; also with the difference to the row compared with."""
    values = dict(zip((row.title for row in artefact.rows), frame[column], strict=True))
    decimals = max(len(str(value).partition(".")[2]) for value in values.values())
    cells = []
    for row in artefact.rows:
        value, reference = values[row.title], artefact.reference(row)
        gain = value - values[reference.title] if reference else math.nan
        shown = "-" if math.isnan(value) else f"{value:.{decimals}f}"
        cells.append(shown if math.isnan(gain) or not with_differences else f"{shown} ({gain:+.{decimals}f})")
    return cells


def _caption(artefact: Artefact, frame: pd.DataFrame, metrics: Sequence[str], place: str, is_narrow: bool) -> str:
    named = {row.title: row.against for row in artefact.rows if row.against}
    spread = describe_spread(frame["seeds"])
    brackets = "Δ is ours," if is_narrow else "in brackets the paper's; ours"
    others = "".join(f", of {title} to {against}" for title, against in named.items())
    return (
        f"The paper's columns come first; ours are of {place}, in percent. {spread}. "
        f"Differences are to the row {artefact.base}{others}: {brackets} with the 95 % interval of a paired "
        f"bootstrap of seeds and examples ({NUM_RESAMPLES:,} resamples), from {MIN_SEEDS_FOR_INTERVAL} seeds on. The verdict "
        f"is on {METRIC_LABELS[deciding_metric(metrics)]}, after Holm over the rows; it takes {MIN_SEEDS_FOR_VERDICT} seeds."
    )


def describe_order(artefact: Artefact, frame: pd.DataFrame) -> list[str]:
    """Return for each data set of the paper how far the order of our rows is the paper's, where three rows can be ordered."""
    sentences = []
    for key, own in artefact.datasets.items():
        deciding = deciding_metric([metric for metric in METRIC_LABELS if metric in frame])
        pairs = frame[[f"{key} {own.metrics[0]}", deciding]].dropna()
        if len(pairs) > 2:
            tau = pairs.corr(method="kendall").to_numpy()[0, 1]
            sentences.append(
                f"Order: Kendall's tau between the paper's {METRIC_LABELS[own.metrics[0]]} on {own.name} and our "
                f"{METRIC_LABELS[deciding]} is {tau:+.2f} over {len(pairs)} rows; 1 is the same order, 0 none."
            )
    return sentences


def write_table_files(
    folder: Path,
    name: str,
    title: str,
    table: Table,
    frame: pd.DataFrame,
    introduction: str,
    notes: Sequence[str],
    printed: Table | None = None,
) -> list[Path]:
    """Write a table as <name>.md, .tex and .csv into a folder, and return the three files.

    Args:
        folder: The folder.
        name: The name of the files.
        title: The heading of the page.
        table: What readers see.
        frame: The numbers, for the CSV file.
        introduction: The first paragraph of the page.
        notes: One sentence each, under the table.
        printed: The table for LaTeX, if it is another one.
    """
    blocks = [Paragraph(introduction), table, *([BulletList(tuple(notes))] if notes else [])]
    contents = {
        "md": render_markdown(title, blocks),
        "tex": render_latex(printed or table, name),
        "csv": frame.to_csv(index=False),
    }
    for suffix, content in contents.items():
        write_atomic(folder / f"{name}.{suffix}", content)
    return [folder / f"{name}.{suffix}" for suffix in contents]
