"""The first section of a report: the reference, the methods and what is claimed of them, and apart from these the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import (
    MIN_SEEDS_FOR_INTERVAL,
    MIN_SEEDS_FOR_VERDICT,
    NUM_RESAMPLES,
    describe_spread,
    format_seeds,
)
from pipeline.report.blocks import Block, BulletList, Heading, Paragraph, SvgFigure, Table
from pipeline.report.comparison import (
    METRIC_LABELS,
    compared_metrics,
    deciding_metric,
    find_baseline,
    format_differences,
    format_means,
    format_results,
    list_metrics,
)
from pipeline.report.figures import draw_differences
from pipeline.report.provenance import split_read_blocks
from pipeline.report.results import DatasetResults, ResultRow, cache_folders, plural
from pipeline.report.row_groups import ROW_GROUPS
from pipeline.runtime.runs import REAL_TEXT
from pipeline.runtime.settings import flatten

SELECTION_RULES = {
    "metric": "highest validation metric, then lowest validation loss",
    "loss": "lowest validation loss",
    "last": "the last one, without a choice",
}

CONTROLS_NOTE = (
    "What a method gains from its text is its difference to a control of the same settings. A row “real text” is such a "
    "comparison: all else of it is as in the controls below it. A control without one has no counterpart that is evaluated."
)


def results_blocks(results: DatasetResults, frame: pd.DataFrame) -> list[Block]:
    """Return the section; `frame` is the table of `compare_results`."""
    blocks: list[Block] = [Paragraph(_introduction(results)), Heading(f"Results on the {results.split} split")]
    if frame.empty:
        command = f"diffalign evaluate <run folder> --split {results.split}"
        text = f"Nothing has been evaluated on the {results.split} split yet; for every finished run: {command}"
        blocks.append(Paragraph(text))
    else:
        blocks += _group_blocks(results, frame)
    if results.notes:
        blocks.append(BulletList(results.notes))
    return [*blocks, *_selection_blocks(results)]


def _introduction(results: DatasetResults) -> str:
    methods = sorted({head.config.method for head in results.heads})
    sizes = sorted({record["n"] for row in results.rows for record in row.records})
    examples = f" The {results.split} split has {' or '.join(map(str, sizes))} usable examples." if sizes else ""
    left_out = {(record.get("excluded", 0), record["n"]) for row in results.rows for record in row.records}
    examples += "".join(
        f" {excluded} of {excluded + used} are left out: they have no image feature."
        for excluded, used in sorted(left_out)
        if excluded
    )
    reads_text = any("text" in head.config.caches for head in results.heads)
    text = "Text is seen in training only" if reads_text else "None of them has read text in training"
    return f"Methods: {', '.join(methods)}. {text}; every prediction reads the image features and nothing else.{examples}"


def _group_blocks(results: DatasetResults, frame: pd.DataFrame) -> list[Block]:
    """The reference and the methods, how to read their numbers, and then the other groups, each under a heading of its own."""
    details = [_describe_row(row, results) for row in results.rows]
    found = [group for group in ROW_GROUPS if (frame["group"] == group).any()]
    blocks: list[Block] = [] if set(found) - {"diagnostics"} else [Paragraph("There is nothing to compare but diagnostics.")]
    for number, group in enumerate(found):
        own = _with_real_text(results, frame) if group == "controls" else frame[frame["group"] == group]
        own_details = [details[int(index)] for index in own.index]
        if group != "methods":
            blocks.append(Heading(ROW_GROUPS[group], level=3))
        if group == "diagnostics":
            ordered = _in_reading_order(format_results(own), METRIC_LABELS[deciding_metric(list_metrics(results))])
            table = _to_table(ordered, "", own_details, key=f"results {group}")
            blocks.append(replace(table, print_caption=_print_caption(results, own, table.key)))
            continue
        blocks += [_reference(results)] if number == 0 else []
        blocks += _comparison_blocks(results, own, own_details, f"results {group}", with_guide=number == 0)
        blocks += [Paragraph(CONTROLS_NOTE)] if group == "controls" else []
    return blocks


def _with_real_text(results: DatasetResults, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the controls, each after the row that differs from it in nothing but its real text, if there is one."""
    index_of = {(row.head.config.fingerprint(), row.evaluation_name): index for index, row in enumerate(results.rows)}
    pairs = []
    for index in np.flatnonzero(frame["group"] == "controls").tolist():
        row = results.rows[index]
        real = replace(row.head.config, text_control=REAL_TEXT).fingerprint()
        pairs.append((index_of.get((real, row.evaluation_name), -1), index))
    own = frame.loc[list(dict.fromkeys(index for pair in sorted(pairs) for index in pair if index >= 0))]
    methods = [results.rows[int(index)].head.config.method for index in own.index]
    names = [
        name if group == "controls" else f"{method} · real text{name.removeprefix(method)}"
        for name, group, method in zip(own["name"], own["group"], methods, strict=True)
    ]
    return own.assign(name=names)


def _reference(results: DatasetResults) -> Paragraph:
    """Say which baseline the rows are compared with; there is one for each set of image features and share of the data."""
    baselines = {id(found): found for row in results.rows if (found := find_baseline(row, results))}
    if not baselines:
        return Paragraph("Reference: none. No row has an evaluated baseline on the same image features to be compared with.")
    metric = deciding_metric(list_metrics(results))
    named = [
        f"{row.label} ({row.folder}, {plural(len(row.runs), 'seed')}, image features "
        f"{cache_folders(results.caches).get(row.head.config.caches['image'], 'unknown')}, {METRIC_LABELS[metric]} "
        f"{format_seeds(row.metric_values(metric))})"
        for row in baselines.values()
    ]
    text = (
        "every difference, interval and verdict is to it" if len(named) == 1 else "a row is compared with that on its features"
    )
    return Paragraph(f"Reference: {'; '.join(named)}. It is the baseline that is best on validation; {text}.")


def _describe_row(row: ResultRow, results: DatasetResults) -> str:
    """The settings of a row in one paragraph, for readers who ask for them."""
    config = row.head.config
    pairs = {**flatten(config.settings), **{f"training {key}": value for key, value in sorted(config.training.items())}}
    features = cache_folders(results.caches).get(config.caches["image"], config.caches["image"][:12])
    seeds = ", ".join(str(run.seed) for run in row.runs)
    settings = ", ".join(f"{key}={value}" for key, value in pairs.items())
    changed = f" Changed for this evaluation: {row.overrides}." if row.overrides else ""
    return f"{row.folder}; seeds {seeds}; image features {features}. {settings}.{changed}"


def _comparison_blocks(
    results: DatasetResults, frame: pd.DataFrame, details: Sequence[str], key: str, with_guide: bool = True
) -> list[Block]:
    """The table of a group, a figure of the differences to the baseline, and one sentence per row."""
    metric = deciding_metric(list_metrics(results))
    metric_label = METRIC_LABELS[metric]
    sentences = [_claim(row, metric) for row in frame.to_dict("records") if row["verdict"] != "the baseline"]
    caption = _results_caption(results, frame) if with_guide else "Columns as in the first table."
    table = replace(
        _to_table(_in_reading_order(format_results(frame), metric_label), caption, details, key),
        print_caption=_print_caption(results, frame, key),
    )
    blocks: list[Block] = [table, *_further_metrics(results, frame, key)]
    compared = frame.dropna(subset=[f"{metric}_low"])
    if len(compared):
        intervals = compared[[f"{metric}_vs_baseline", f"{metric}_low", f"{metric}_high"]].to_numpy(dtype=float)
        caption = (
            f"Difference to the baseline in {metric_label}, with its 95 % interval. Filled: the interval leaves out zero. "
            "Open and grey: this many examples and seeds cannot tell the two apart."
        )
        svg = draw_differences(compared["name"].tolist(), intervals, metric_label)
        blocks.append(SvgFigure(svg, "; ".join(sentences), caption, key=key))
    elif sentences or with_guide:
        text = f"No row has a baseline and {MIN_SEEDS_FOR_INTERVAL} seeds of both, so nothing is claimed."
        blocks.append(Paragraph(text))
    blocks += [BulletList(tuple(sentences))] if sentences else []
    return [*blocks, Paragraph(_reading_guide(results, metric_label))] if with_guide else blocks


def _in_reading_order(table: pd.DataFrame, metric_label: str) -> pd.DataFrame:
    """Return a table with what is claimed and its grounds first: they stay in sight where a screen is too narrow for all."""
    first = [name for name in ("method", metric_label, f"{metric_label} vs baseline", "verdict") if name in table]
    return table[[*first, *(name for name in table if name not in first)]]


def _print_caption(results: DatasetResults, frame: pd.DataFrame, key: str) -> str:
    """Return the caption of a table of results in a paper, where nothing else of the page is beside it."""
    metric = deciding_metric(list_metrics(results))
    group = ROW_GROUPS[key.removeprefix("results ")]
    sentences = [f"{group}, on the {results.split} split of {results.dataset}, in percent", describe_spread(frame["seeds"])]
    if frame[f"{metric}_vs_baseline"].notna().any():
        intervals = f"with 95 % intervals from {MIN_SEEDS_FOR_INTERVAL} seeds on"
        sentences.append(f"Differences to the baseline are in points, {intervals}")
        sentences.append(f"The verdict is on {METRIC_LABELS[metric]}, after Holm")
    return ". ".join([*sentences, *_trained_otherwise(frame)]) + "."


def _trained_otherwise(frame: pd.DataFrame) -> list[str]:
    """The sentence that explains the names of rows with other settings of training than the baseline's, if there are any."""
    text = "A setting of training that is not the baseline's stands in the name, with the baseline's in brackets"
    return [text] if frame["name"].str.contains("(baseline ", regex=False).any() else []


def _further_metrics(results: DatasetResults, frame: pd.DataFrame, key: str) -> list[Block]:
    """What the first table leaves out when there are many metrics: the other differences, then the other metrics."""
    metrics = list_metrics(results)
    main = [metric for metric in metrics if metric in METRIC_LABELS]
    others = [metric for metric in metrics if metric not in METRIC_LABELS]
    label = METRIC_LABELS[deciding_metric(metrics)]
    names = frame[["name"]].set_axis(["method"], axis=1)
    blocks: list[Block] = []
    if "acc1" not in main and set(main) > set(compared_metrics(main)):
        caption = "Points above the baseline with 95 % intervals; a metric that is no mean over examples has none."
        table = names.join(format_differences(frame, main)).join(frame["verdict"])
        blocks.append(_to_table(table, f"{caption} The verdict is that on {label}.", key=f"{key} differences"))
    if others:
        table = names.join(format_means(frame, others)).join(frame["verdict"])
        blocks.append(_to_table(table, f"More metrics, in percent. The verdict is that on {label}.", key=f"{key} more metrics"))
    return blocks


def _claim(row: Mapping[Any, Any], metric: str) -> str:
    """A sentence with the verdict on a row of the frame and its numbers, or with the reason why nothing is claimed."""
    difference, low, high, p_holm = *(row[f"{metric}_{part}"] for part in ("vs_baseline", "low", "high")), row["p_holm"]
    if math.isnan(low):
        return f"{row['name']}: no claim, {row['reason']}."
    numbers = f"{METRIC_LABELS[metric]} {difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    if math.isnan(p_holm):
        return f"{row['name']}: no verdict, {row['reason']} ({numbers})."
    verdict = "is not distinguishable from the baseline" if row["verdict"] == "not distinguishable" else row["verdict"]
    return f"{row['name']} {verdict} ({numbers}, p = {p_holm:.2g} after Holm)."


def _results_caption(results: DatasetResults, frame: pd.DataFrame) -> str:
    spread = describe_spread(len(row.runs) for row in results.rows)
    text = f"{spread}; metrics in percent. train s: seconds of training per seed, features already cached."
    if frame["params"].notna().any():
        text += " params: numbers in the checkpoint of one seed, statistics of its features included."
    if "ece" in list_metrics(results):
        text += (
            " Macro Acc: mean over classes of the share of their examples that is right. ECE: expected calibration error in 15 "
            "bins of equal width; lower is better."
        )
    if any(frame[metric].isna().any() for metric in list_metrics(results)):
        text += " A dash in the column of a metric: the evaluation is older than the metric."
    best = "A method with several settings stands here with those that are best on validation"
    return f"{text} {'. '.join([*_trained_otherwise(frame), best])}."


def _reading_guide(results: DatasetResults, metric_label: str) -> str:
    clusters = "groups of examples" if results.groups else "examples"
    text = (
        f"How to read this: a method beats the baseline when its {metric_label} difference is above zero, with p below 0.05 "
        f"after Holm's correction for all rows of this page that get a verdict. A verdict takes {MIN_SEEDS_FOR_VERDICT} seeds "
        f"of both, and an interval {MIN_SEEDS_FOR_INTERVAL}. Intervals and p come from a paired bootstrap on two levels "
        f"({NUM_RESAMPLES:,} resamples): {clusters} are drawn anew, the same for both methods, and so are seeds; it covers the "
        "choice of both. The intervals themselves are not corrected for the number of rows."
    )
    if results.split == "val":
        return f"{text} The validation split has also chosen the epochs and settings, so these numbers are optimistic."
    return text


def _to_table(frame: pd.DataFrame, caption: str, details: Sequence[str] = (), key: str = "") -> Table:
    rows = tuple(tuple(map(str, row)) for row in frame.itertuples(index=False))
    return Table(tuple(frame.columns), rows, caption, row_details=tuple(details), key=key)


def _selection_blocks(results: DatasetResults) -> list[Block]:
    """How the epoch of each run was selected, and how often the test split was read."""
    rules = Counter(str(head.config.training["select"]) for head in results.heads)
    chosen = "; ".join(f"{SELECTION_RULES[rule]} ({plural(count, 'configuration')})" for rule, count in sorted(rules.items()))
    text = (
        f"Selection happens on the validation split. The epoch that is kept: {chosen}. Of candidates, such as k of knn, the "
        "one with the highest validation metric is kept. Where a method has several configurations, the pictures show the one "
        "with the best mean validation metric."
    )
    return [Paragraph(text), *split_read_blocks(results)]
