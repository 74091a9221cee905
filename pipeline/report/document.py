"""Write the report on a dataset: all its sections in order, as one HTML file and one Markdown file."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.statistics import MIN_SEEDS_FOR_INTERVAL, MIN_SEEDS_FOR_VERDICT, NUM_RESAMPLES, describe_spread
from pipeline.report import html, markdown
from pipeline.report.across import across_blocks
from pipeline.report.alignment import alignment_blocks
from pipeline.report.blocks import Block, BulletList, Heading, Paragraph, SvgFigure, Table
from pipeline.report.comparison import (
    METRIC_LABELS,
    compare_results,
    compared_metrics,
    deciding_metric,
    format_differences,
    format_means,
    format_results,
    list_metrics,
)
from pipeline.report.corruption import corruption_blocks
from pipeline.report.figure_blocks import (
    ShownHeads,
    choose_shown_heads,
    class_change_blocks,
    example_blocks,
    feature_space_blocks,
    training_curve_figure,
)
from pipeline.report.figures import draw_differences
from pipeline.report.grid_page import grid_sections
from pipeline.report.provenance import provenance_blocks, split_read_blocks
from pipeline.report.results import DatasetResults, collect_results, plural
from pipeline.report.sampler import sampler_curve_blocks
from pipeline.runtime.files import write_atomic

RESULTS_FILE = "results.csv"
SELECTION_RULES = {
    "metric": "highest validation metric, then lowest validation loss",
    "loss": "lowest validation loss",
    "last": "the last one, without a choice",
}


def write_report(home: Path, dataset: str, split: str = "test", across: Sequence[str] = ()) -> tuple[Path, Path]:
    """Write the report on a dataset as `<home>/reports/<dataset>/index.html` and `report.md`, and return their paths.

    The HTML file needs no other file. The table of results, see `results_frame`, is in `results.csv` beside them. The same runs
    give the same bytes.

    Args:
        home: The folder of all artifacts.
        dataset: The name of a dataset with runs.
        split: The split of the results.
        across: Other datasets with runs, for a section that compares the methods over all of them.

    Raises:
        UserError: A dataset has no runs or no manifest.
    """
    results = collect_results(home, dataset, split)
    manifest = read_manifest(home, dataset)
    shown_heads = choose_shown_heads(results, manifest)
    frame = compare_results(results)
    blocks: list[Block] = [
        *_results_section(results, frame),
        *across_blocks(home, [dataset, *across], split),
        *alignment_blocks(results.heads),
        *_old_manifest_warning(results, manifest),
        *_figure_sections(results, manifest, shown_heads),
        *sampler_curve_blocks(results),
        *corruption_blocks(results),
        *grid_sections(home, dataset),
        *provenance_blocks(results, manifest),
    ]
    folder = home / "reports" / dataset
    title = f"{dataset}: trained with text, tested on images alone"
    write_atomic(folder / "index.html", html.render_html(title, blocks))
    write_atomic(folder / "report.md", markdown.render_markdown(title, blocks))
    write_atomic(folder / RESULTS_FILE, frame.to_csv(index=False))
    return folder / "index.html", folder / "report.md"


def read_results(page: Path) -> pd.DataFrame:
    """Return the table of results beside a page that `write_report` has written; it has no rows when nothing is evaluated."""
    text = page.with_name(RESULTS_FILE).read_text(encoding="utf-8")
    if not text.strip():
        return pd.DataFrame()
    names = ("method", "kind", "verdict", "reason")
    return pd.read_csv(io.StringIO(text), converters=dict.fromkeys(names, str))  # which leave an empty cell empty


def _results_section(results: DatasetResults, frame: pd.DataFrame) -> list[Block]:
    blocks: list[Block] = [Paragraph(_introduction(results)), Heading(f"Results on the {results.split} split")]
    if frame.empty:
        command = f"diffalign evaluate <run folder> --split {results.split}"
        text = f"Nothing has been evaluated on the {results.split} split yet; for every finished run: {command}"
        blocks.append(Paragraph(text))
    else:
        heads = frame[frame["kind"] != "text"]
        if len(heads):
            blocks += _comparison_blocks(results, heads)
        else:
            blocks.append(Paragraph("There is nothing to compare but text-only diagnostics."))
        blocks += _diagnostics_table(frame[frame["kind"] == "text"])
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
    return (
        f"Methods: {', '.join(methods)}. Text is seen in training only; every prediction reads the image features "
        f"and nothing else.{examples}"
    )


def _comparison_blocks(results: DatasetResults, frame: pd.DataFrame) -> list[Block]:
    """The results table, a figure of the differences to the baseline, and one sentence per row."""
    metric = deciding_metric(list_metrics(results))
    metric_label = METRIC_LABELS[metric]
    sentences = [_claim(row, metric) for row in frame.to_dict("records") if row["verdict"] != "the baseline"]
    main_table = _to_table(format_results(frame), _results_caption(results))
    blocks: list[Block] = [main_table, *_further_metrics(results, frame)]
    compared = frame.dropna(subset=[f"{metric}_low"])
    if len(compared):
        intervals = compared[[f"{metric}_vs_baseline", f"{metric}_low", f"{metric}_high"]].to_numpy(dtype=float)
        caption = (
            f"Difference to the baseline in {metric_label}, with its 95 % interval. Filled: the interval leaves out zero. "
            "Open and grey: this many examples and seeds cannot tell the two apart."
        )
        svg = draw_differences(compared["method"].tolist(), intervals, metric_label)
        blocks.append(SvgFigure(svg, "; ".join(sentences), caption))
    else:
        text = f"No row has a baseline and {MIN_SEEDS_FOR_INTERVAL} seeds of both, so nothing is claimed."
        blocks.append(Paragraph(text))
    return [*blocks, BulletList(tuple(sentences)), Paragraph(_reading_guide(results, metric_label))]


def _further_metrics(results: DatasetResults, frame: pd.DataFrame) -> list[Block]:
    """What the first table leaves out when there are many metrics: the other differences, then the other metrics."""
    metrics = list_metrics(results)
    main = [metric for metric in metrics if metric in METRIC_LABELS]
    others = [metric for metric in metrics if metric not in METRIC_LABELS]
    label = METRIC_LABELS[deciding_metric(metrics)]
    blocks: list[Block] = []
    if "acc1" not in main and set(main) > set(compared_metrics(main)):
        caption = "Points above the baseline with 95 % intervals; a metric that is no mean over examples has none."
        table = frame[["method"]].join(format_differences(frame, main)).join(frame["verdict"])
        blocks.append(_to_table(table, f"{caption} The verdict is that on {label}."))
    if others:
        table = frame[["method"]].join(format_means(frame, others)).join(frame["verdict"])
        blocks.append(_to_table(table, f"More metrics, in percent. The verdict is that on {label}."))
    return blocks


def _claim(row: Mapping[Any, Any], metric: str) -> str:
    """A sentence with the verdict on a row of the frame and its numbers, or with the reason why nothing is claimed."""
    difference, low, high, p_holm = *(row[f"{metric}_{part}"] for part in ("vs_baseline", "low", "high")), row["p_holm"]
    if math.isnan(low):
        return f"{row['method']}: no claim, {row['reason']}."
    numbers = f"{METRIC_LABELS[metric]} {difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
    if math.isnan(p_holm):
        return f"{row['method']}: no verdict, {row['reason']} ({numbers})."
    verdict = "is not distinguishable from the baseline" if row["verdict"] == "not distinguishable" else row["verdict"]
    return f"{row['method']} {verdict} ({numbers}, p = {p_holm:.2g} after Holm)."


def _results_caption(results: DatasetResults) -> str:
    spread = describe_spread(len(row.runs) for row in results.rows)
    text = f"{spread}; metrics in percent. train s: seconds of training per seed, features already cached."
    if "ece" in list_metrics(results):
        text += (
            " Macro Acc: mean over classes of the share of their examples that is right. ECE: expected calibration error in 15 "
            "bins of equal width; lower is better. A dash: the evaluation is older than the metric."
        )
    return text


def _reading_guide(results: DatasetResults, metric_label: str) -> str:
    clusters = "groups of examples" if results.groups else "examples"
    text = (
        f"How to read this: a method beats the baseline when its {metric_label} difference is above zero, with p below 0.05 "
        f"after Holm's correction for all rows that get a verdict. A verdict takes {MIN_SEEDS_FOR_VERDICT} seeds of both, and "
        f"an interval {MIN_SEEDS_FOR_INTERVAL}. Intervals and p come from a paired bootstrap on two levels ({NUM_RESAMPLES:,} "
        f"resamples): {clusters} are drawn anew, the same for both methods, and so are seeds; it covers the choice of both. "
        "The intervals themselves are not corrected for the number of rows."
    )
    if results.split == "val":
        return f"{text} The validation split has also chosen the epochs and settings, so these numbers are optimistic."
    return text


def _diagnostics_table(frame: pd.DataFrame) -> list[Block]:
    if frame.empty:
        return []
    caption = "Diagnostics, not methods: they classify the text of each example itself, which no method may read when tested."
    return [_to_table(format_results(frame), caption)]


def _to_table(frame: pd.DataFrame, caption: str) -> Table:
    return Table(tuple(frame.columns), tuple(tuple(map(str, row)) for row in frame.itertuples(index=False)), caption)


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


def _old_manifest_warning(results: DatasetResults, manifest: Manifest) -> list[Block]:
    """A warning when runs were trained before the dataset was prepared again, with another manifest."""
    labels = [head.label for head in results.heads if head.config.manifest != manifest.fingerprint()]
    if not labels:
        return []
    return [Paragraph(f"Trained on another version of the manifest, and therefore in no picture: {', '.join(labels)}.")]


def _figure_sections(results: DatasetResults, manifest: Manifest, shown_heads: ShownHeads) -> list[Block]:
    return [
        Heading("Training"),
        training_curve_figure(shown_heads, manifest),
        Heading("Feature space"),
        *feature_space_blocks(results, manifest, shown_heads),
        Heading("What changes between classes"),
        *class_change_blocks(manifest, shown_heads),
        Heading("Single examples"),
        *example_blocks(results, manifest, shown_heads),
    ]
