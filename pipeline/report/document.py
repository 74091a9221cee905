"""The report's sections, in order, and the two files they become."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.report import html, markdown
from pipeline.report.blocks import Block, Bullets, Grid, Heading, Picture, Text
from pipeline.report.comparison import NAMES, NUM_RESAMPLES, claim_metric, count_up, distances, metric_names, printable, spreads
from pipeline.report.figures import draw_differences
from pipeline.report.grid_page import grids
from pipeline.report.pictures import Subjects, answers, choose_subjects, confusion, curves, feature_space
from pipeline.report.provenance import provenance, test_reads
from pipeline.report.results import Results, collect, plural
from pipeline.report.sampler import sampler_curves
from pipeline.runtime.files import write_atomic

SELECTION = {
    "metric": "highest validation metric, then lowest validation loss",
    "loss": "lowest validation loss",
    "last": "the last one, without a choice",
}


def write_report(home: Path, dataset: str, split: str = "test") -> tuple[Path, Path]:
    """Write `<home>/reports/<dataset>/index.html`, one file that needs nothing else, and `report.md` beside it.

    The same runs give the same bytes. `ValueError` when the dataset has no runs or no manifest.
    """
    results = collect(home, dataset, split)
    manifest = manifests.read_manifest(home, dataset)
    subjects = choose_subjects(results, manifest)
    blocks: list[Block] = [
        *_results(results),
        *_stale(results, manifest),
        *_pictures(results, manifest, subjects),
        *sampler_curves(results),
        *grids(home, dataset),
        *provenance(results, manifest),
    ]
    folder = home / "reports" / dataset
    title = f"{dataset}: trained with text, tested on images alone"
    write_atomic(folder / "index.html", html.render_html(title, blocks))
    write_atomic(folder / "report.md", markdown.render_markdown(title, blocks))
    return folder / "index.html", folder / "report.md"


def _results(results: Results) -> list[Block]:
    frame = count_up(results)
    blocks: list[Block] = [Text(_lead(results)), Heading(f"Results on the {results.split} split")]
    if frame.empty:
        command = f"diffalign evaluate <run folder> --split {results.split}"
        blocks.append(Text(f"Nothing has been evaluated on the {results.split} split yet; for every finished run: {command}"))
    else:
        heads = frame[frame["kind"] != "text"]
        blocks += _claims(results, heads) if len(heads) else [Text("There is nothing to compare but text-only diagnostics.")]
        blocks += _diagnostics(frame[frame["kind"] == "text"])
    if results.notes:
        blocks.append(Bullets(results.notes))
    return [*blocks, *_selection(results)]


def _lead(results: Results) -> str:
    methods = sorted({head.config.method for head in results.heads})
    sizes = sorted({record["n"] for row in results.rows for record in row.records})
    examples = f" The {results.split} split has {' or '.join(map(str, sizes))} usable examples." if sizes else ""
    return (
        f"Methods: {', '.join(methods)}. Text is seen in training only; every prediction reads the image features "
        f"and nothing else.{examples}"
    )


def _claims(results: Results, frame: pd.DataFrame) -> list[Block]:
    """The table, the intervals as a picture, and one sentence per row."""
    metric = claim_metric(metric_names(results))
    name = NAMES[metric]
    sentences = [_sentence(line, metric) for line in frame.to_dict("records") if line["verdict"] != "the baseline"]
    blocks: list[Block] = [_grid(printable(frame).drop(columns="verdict"), _table_caption(results)), *_more(results, frame)]
    decided = frame.dropna(subset=[f"{metric}_low"])
    if len(decided):
        numbers = decided[[f"{metric}_vs_baseline", f"{metric}_low", f"{metric}_high"]].to_numpy(dtype=float)
        caption = (
            f"Difference to the baseline in {name}, with its 95 % interval. Filled: the interval leaves out zero. "
            "Open and grey: this many examples cannot tell the two apart."
        )
        blocks.append(Picture(draw_differences(decided["method"].tolist(), numbers, name), "; ".join(sentences), caption))
    else:
        blocks.append(Text("No row can be compared with a baseline, so nothing is claimed."))
    return [*blocks, Bullets(tuple(sentences)), Text(_reading(results, name))]


def _more(results: Results, frame: pd.DataFrame) -> list[Block]:
    """What the first table leaves out when there are many metrics: the other differences, then the other metrics."""
    main = [metric for metric in metric_names(results) if metric in NAMES]
    rest = [metric for metric in metric_names(results) if metric not in NAMES]
    blocks: list[Block] = []
    if len(main) > 2:
        caption = "Points above the baseline with 95 % intervals; a metric that is no mean over examples has none."
        blocks.append(_grid(frame[["method"]].join(distances(frame, main)), caption))
    if rest:
        blocks.append(_grid(frame[["method"]].join(spreads(frame, rest)), "More metrics, in percent."))
    return blocks


def _sentence(line: Mapping[Any, Any], metric: str) -> str:
    """What the row may claim, with its numbers, or why it may claim nothing."""
    above, low, high = (line[f"{metric}_{part}"] for part in ("vs_baseline", "low", "high"))
    if math.isnan(low):
        return f"{line['method']}: no claim, {line['reason']}."
    verdict = "is not distinguishable from the baseline" if line["verdict"] == "not distinguishable" else line["verdict"]
    return f"{line['method']} {verdict} ({NAMES[metric]} {above:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f})."


def _table_caption(results: Results) -> str:
    seeds = {len(row.runs) for row in results.rows}
    spread = "Mean ± standard deviation over seeds" + ("; a row with one seed has no spread" if 1 in seeds else "")
    return f"{spread}; metrics in percent. train s: seconds of training per seed, features already cached."


def _reading(results: Results, name: str) -> str:
    text = (
        f"How to read this: a method beats the baseline when the whole interval of its {name} difference is above zero. "
        f"The interval is a paired bootstrap over examples ({NUM_RESAMPLES:,} resamples, each example's metric averaged over "
        "seeds first), so it covers the choice of examples, not the choice of seeds, and it is not corrected for the number "
        "of rows."
    )
    if results.split == "val":
        return f"{text} The validation split has also chosen the epochs and settings, so these numbers are optimistic."
    return text


def _diagnostics(frame: pd.DataFrame) -> list[Block]:
    if frame.empty:
        return []
    caption = "Diagnostics, not methods: they classify the text of each example itself, which no method may read when tested."
    return [_grid(printable(frame).drop(columns="verdict"), caption)]


def _grid(shown: pd.DataFrame, caption: str) -> Grid:
    return Grid(tuple(shown.columns), tuple(tuple(map(str, row)) for row in shown.itertuples(index=False)), caption)


def _selection(results: Results) -> list[Block]:
    rules = Counter(str(head.config.training["select"]) for head in results.heads)
    chosen = "; ".join(f"{SELECTION[rule]} ({plural(count, 'configuration')})" for rule, count in sorted(rules.items()))
    text = (
        f"Selection happens on the validation split. The epoch that is kept: {chosen}. Where a method has several "
        "configurations, the pictures show the one with the best mean validation metric."
    )
    return [Text(text), *test_reads(results)]


def _stale(results: Results, manifest: Manifest) -> list[Block]:
    """A warning when runs were made before the dataset was prepared anew."""
    labels = [head.label for head in results.heads if head.config.manifest != manifest.fingerprint()]
    if not labels:
        return []
    return [Text(f"Trained on another version of the manifest, and therefore in no picture: {', '.join(labels)}.")]


def _pictures(results: Results, manifest: Manifest, subjects: Subjects) -> list[Block]:
    return [
        Heading("Training"),
        curves(subjects, manifest),
        Heading("Feature space"),
        *feature_space(results, manifest, subjects),
        Heading("What changes between classes"),
        *confusion(manifest, subjects),
        Heading("Single examples"),
        *answers(results, manifest, subjects),
    ]
