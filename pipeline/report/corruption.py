"""Robustness to visual noise: what heads lose on corrupted copies of a split's pictures, as tables and as a report's section.

The evaluations are read from the runs; `pipeline.studies.corruption` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pipeline.data.corruptions import CORRUPTION_LEVELS, STRENGTHS, Corruption, all_corruptions
from pipeline.evaluation.statistics import (
    NO_ESTIMATE,
    Estimate,
    describe_spread,
    find_verdict,
    format_mean_std,
    format_seeds,
    paired_bootstrap,
    sample_std,
)
from pipeline.report.blocks import Block, Heading, Paragraph, Table
from pipeline.report.comparison import (
    METRIC_LABELS,
    adjust_p_values,
    deciding_metric,
    find_baseline,
    format_difference,
    pair_scores,
)
from pipeline.report.results import (
    BASELINE,
    DatasetResults,
    ResultRow,
    SampleMetrics,
    plural,
    read_evaluations,
    read_sample_metrics,
)
from pipeline.runtime.runs import RunFolder

ALL_KINDS = "all"  # the last row of a table: the mean over kinds


class CorruptedHead(NamedTuple):
    """A head on clean pictures and on corrupted copies of them, with the same seeds and samples in all evaluations."""

    row: ResultRow  # of the clean pictures
    metric: str  # the deciding one; all values are of it, in percent
    clean: SampleMetrics
    corrupted: Mapping[Corruption, SampleMetrics]

    def mean_over(self, corruptions: Sequence[Corruption]) -> SampleMetrics:
        """Return the mean of each sample over some corruptions."""
        stacked = [self.corrupted[each].by_metric[self.metric] for each in corruptions]
        return self.clean._replace(by_metric={self.metric: np.mean(stacked, axis=0)})

    def change_over(self, corruptions: Sequence[Corruption]) -> SampleMetrics:
        """Return what each sample gains by some corruptions, on average; it is below 0 where accuracy is lost."""
        corrupted = self.mean_over(corruptions).by_metric[self.metric]
        return self.clean._replace(by_metric={self.metric: corrupted - self.clean.by_metric[self.metric]})

    def of_seeds(self, samples: SampleMetrics) -> np.ndarray:
        """Return the mean over samples of each seed [S]."""
        return samples.by_metric[self.metric].mean(axis=1)


def corruption_filename(evaluation_name: str) -> str:
    """Return the name of the CSV file with the evaluations on corrupted copies, in the folder of its run."""
    return f"corruption-{evaluation_name}.csv"


def run_frame(run: RunFolder, evaluation_name: str) -> pd.DataFrame:
    """Return the evaluations of one run, clean pictures first.

    Returns:
        Columns: corruption, strength, level (see `CORRUPTION_LEVELS`), n (samples), the metrics in percent, and <m>_vs_clean,
        the difference of the deciding metric to that on clean pictures.
    """
    records = read_evaluations(run)
    found = _evaluated(records, evaluation_name)
    places = {"clean": ("clean", 0, 0.0), **{each.name: (each.kind, each.strength, each.level) for each in found}}
    own = {"clean": records[evaluation_name], **{each.name: records[each.evaluation(evaluation_name)] for each in found}}
    metric = deciding_metric(list(own["clean"]["metrics"]))
    rows = [
        {
            **dict(zip(("corruption", "strength", "level"), place, strict=True)),
            "n": own[name]["n"],
            **own[name]["metrics"],
            f"{metric}_vs_clean": own[name]["metrics"][metric] - own["clean"]["metrics"][metric],
        }
        for name, place in places.items()
    ]
    return pd.DataFrame(rows)


def _evaluated(records: Mapping[str, Mapping], evaluation_name: str) -> list[Corruption]:
    """Return the corruptions, as they are defined now, on which an evaluation was repeated."""
    corruptions = all_corruptions()
    return [each for each in corruptions if _definition(records, each.evaluation(evaluation_name)) == each.identity()]


def _definition(records: Mapping[str, Mapping], name: str) -> Mapping | None:
    return records[name].get("corruption") if name in records else None


def collect_corrupted(results: DatasetResults) -> list[CorruptedHead]:
    """Return the heads that were evaluated on corrupted copies."""
    heads = [_read_head(row) for row in results.rows if row.head.feature_kind != "text"]
    return [head for head in heads if head]


def _read_head(row: ResultRow) -> CorruptedHead | None:
    """Return a head with the corruptions that all of its seeds have which have any; None when there is none."""
    records = {run: read_evaluations(run) for run in row.runs}
    found = {run: _evaluated(own, row.evaluation_name) for run, own in records.items()}
    runs = [run for run in row.runs if found[run]]
    shared = [each for each in all_corruptions() if runs and all(each in found[run] for run in runs)]
    if not shared:
        return None

    def read(name: str) -> SampleMetrics:
        return read_sample_metrics(runs, [records[run][name] for run in runs], name)

    clean, *corrupted = _on_shared_samples(
        [read(row.evaluation_name), *(read(each.evaluation(row.evaluation_name)) for each in shared)]
    )
    metric = deciding_metric(list(clean.by_metric))
    return CorruptedHead(row, metric, clean, dict(zip(shared, corrupted, strict=True)))


def _on_shared_samples(evaluations: Sequence[SampleMetrics]) -> list[SampleMetrics]:
    """Return evaluations on the samples that all of them have: one may have no feature when it is corrupted."""
    kept = set(evaluations[0].ids).intersection(*(each.ids for each in evaluations))
    result = []
    for each in evaluations:
        places = [place for place, sample_id in enumerate(each.ids) if sample_id in kept]
        by_metric = {name: values[:, places] for name, values in each.by_metric.items()}
        result.append(SampleMetrics(each.seeds, [each.ids[place] for place in places], by_metric))
    return result


def find_corrupted_baseline(
    head: CorruptedHead, heads: Sequence[CorruptedHead], results: DatasetResults
) -> CorruptedHead | None:
    """Return the baseline of a head, if it was evaluated on all corruptions of the head."""
    row = find_baseline(head.row, results)
    return next((each for each in heads if each.row is row and set(head.corrupted) <= set(each.corrupted)), None)


def _difference(a: SampleMetrics, b: SampleMetrics, metric: str, groups: Mapping[str, str]) -> Estimate | None:
    scores = pair_scores(a, b, groups).get(metric)
    return paired_bootstrap(scores) if scores else None


def head_table(head: CorruptedHead, baseline: CorruptedHead | None, groups: Mapping[str, str]) -> pd.DataFrame:
    """Return the table of one head as strings: a row per kind and one for all, mean ± std over seeds in percent.

    Returns:
        Columns: corruption; clean; a column per strength; mean over strengths; "to clean", the mean's difference to clean; and
        "vs baseline", the mean's difference to that of the baseline, with its interval, where there is a baseline.
    """
    strengths = [strength for strength in STRENGTHS if any(each.strength == strength for each in head.corrupted)]
    kinds = [kind for kind in CORRUPTION_LEVELS if any(each.kind == kind for each in head.corrupted)]
    rows = []
    for kind in (*kinds, ALL_KINDS):
        own = [each for each in head.corrupted if kind in (each.kind, ALL_KINDS)]
        cells = {strength: [each for each in own if each.strength == strength] for strength in strengths}
        mean = head.mean_over(own)
        row = {"corruption": kind, "clean": format_seeds(head.of_seeds(head.clean))}
        row |= {
            str(strength): format_seeds(head.of_seeds(head.mean_over(cell))) if cell else "-"
            for strength, cell in cells.items()
        }
        row["mean"] = format_seeds(head.of_seeds(mean))
        row["to clean"] = f"{head.of_seeds(mean).mean() - head.of_seeds(head.clean).mean():+.2f}"
        if baseline:
            difference = _difference(mean, baseline.mean_over(own), head.metric, groups)
            row["vs baseline"] = format_difference(*difference[:3]) if difference else "-"
        rows.append(row)
    return pd.DataFrame(rows)


def robustness_results(heads: Sequence[CorruptedHead], results: DatasetResults) -> pd.DataFrame:
    """Return one row per head as numbers: the mean over all its corruptions, and how it compares with the baseline's.

    Returns:
        Columns: method, folder, seeds, corruptions (how many), metric; clean, corrupted, change (corrupted - clean), each with
        <column>_std over seeds; corrupted_vs_baseline and change_vs_baseline, each with _low and _high of the 95 % interval (of
        the change: above 0 if less is lost than by the baseline); p_holm and verdict on corrupted_vs_baseline.
    """
    rows, estimates, counts = [], [], []
    for head in heads:
        baseline = find_corrupted_baseline(head, heads, results)
        row, estimate = _compare_head(head, baseline, results.groups)
        rows.append(row)
        estimates.append(estimate)
        counts.append(min(len(each.clean.seeds) for each in (head, baseline or head)))
    adjusted = adjust_p_values(estimates, counts)
    for row, head, estimate, p_holm, count in zip(rows, heads, estimates, adjusted, counts, strict=True):
        row |= {"p_holm": p_holm, "verdict": _verdict(head, estimate, p_holm, count)}
    return pd.DataFrame(rows)


def _compare_head(
    head: CorruptedHead, baseline: CorruptedHead | None, groups: Mapping[str, str]
) -> tuple[dict[str, Any], Estimate | None]:
    """Return the row of a head but for its verdict, and what its mean over all corruptions is above the baseline's."""
    own = list(head.corrupted)
    row = {"method": head.row.label, "folder": head.row.folder, "seeds": len(head.clean.seeds)}
    row |= {"corruptions": len(own), "metric": head.metric}
    values = {"clean": head.clean, "corrupted": head.mean_over(own), "change": head.change_over(own)}
    for name, samples in values.items():
        row |= {name: float(head.of_seeds(samples).mean()), f"{name}_std": sample_std(head.of_seeds(samples))}
    others = {"corrupted": baseline.mean_over(own), "change": baseline.change_over(own)} if baseline else {}
    found = {name: _difference(values[name], other, head.metric, groups) for name, other in others.items()}
    for name in ("corrupted", "change"):
        numbers = (found.get(name) or NO_ESTIMATE)[:3]
        row |= dict(zip((f"{name}_vs_baseline", f"{name}_low", f"{name}_high"), numbers, strict=True))
    return row, found.get("corrupted")


def _verdict(head: CorruptedHead, estimate: Estimate | None, p_holm: float, num_seeds: int) -> str:
    config = head.row.head.config
    if estimate is None:
        is_baseline = config.method == BASELINE and not config.is_continued
        return "the baseline" if is_baseline else "no baseline on these corruptions"
    return find_verdict(estimate, p_holm, num_seeds, "beats the baseline", "falls below the baseline")


def format_robustness(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `robustness_results` as strings to read."""
    shown = frame[["method", "seeds", "corruptions"]].astype(str)
    for name in ("clean", "corrupted", "change"):
        shown[name] = [format_mean_std(*pair) for pair in zip(frame[name], frame[f"{name}_std"], strict=True)]
    for name in ("corrupted", "change") if frame["corrupted_vs_baseline"].notna().any() else ():
        columns = frame[[f"{name}_vs_baseline", f"{name}_low", f"{name}_high"]]
        shown[f"{name} vs baseline"] = [format_difference(*values) for values in columns.itertuples(index=False)]
    shown["verdict"] = frame["verdict"]
    return shown


class Robustness(NamedTuple):
    """What the heads of a dataset lose on corrupted copies; all fields have the same order."""

    heads: list[CorruptedHead]
    summary: pd.DataFrame  # `robustness_results`
    tables: list[pd.DataFrame]  # `head_table` of each


def compare_corrupted(results: DatasetResults) -> Robustness:
    """Return the tables of all heads that were evaluated on corrupted copies."""
    heads = collect_corrupted(results)
    tables = [head_table(head, find_corrupted_baseline(head, heads, results), results.groups) for head in heads]
    return Robustness(heads, robustness_results(heads, results), tables)


def corruption_blocks(results: DatasetResults) -> list[Block]:
    """Return a section with a table of all heads that were evaluated on corrupted copies, and a table of each; or no blocks."""
    heads, summary, tables = compare_corrupted(results)
    if not heads:
        return []
    label = METRIC_LABELS[heads[0].metric]
    text = (
        f"{label} on the {results.split} split whose pictures were corrupted before the encoder saw them: fixed corruptions in "
        "up to five strengths, the same copies for all heads. Change: corrupted minus clean; a change above the baseline's "
        "means that less is lost."
    )
    spread = describe_spread(len(head.clean.seeds) for head in heads)
    caption = f"{label} in percent, the mean over all corruptions. {spread}; 95 % intervals."
    return [
        Heading("Robustness to visual noise"),
        Paragraph(text),
        _to_block(format_robustness(summary), caption, "robustness"),
        *(
            _to_block(
                table,
                f"{label} of {head.row.label} by corruption and strength; {_describe_size(head)}.",
                f"robustness {head.row.folder}",
            )
            for head, table in zip(heads, tables, strict=True)
        ),
    ]


def _describe_size(head: CorruptedHead) -> str:
    return f"{plural(len(head.clean.seeds), 'seed')} of {plural(len(head.clean.ids), 'sample')}"


def _to_block(frame: pd.DataFrame, caption: str, key: str) -> Table:
    return Table(tuple(frame.columns), tuple(map(tuple, frame.to_numpy().tolist())), caption, key=key)
