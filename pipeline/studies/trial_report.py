"""What a search of settings has tried, as `<home>/reports/<dataset>/tune-<digest>.csv` and .md: one row per trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.report.blocks import Block, Heading, Paragraph, Table
from pipeline.report.markdown import render_markdown
from pipeline.runtime.files import write_atomic

_INTRODUCTION = (
    "Every method got the same number of random points of its space, the same seeds and the same epochs. Points are ranked by "
    "the mean score of their trials, on validation alone; the test split was not read. The best of many scores is optimistic: "
    "it is no estimate of the score on test. A point that was given up early is listed with the score that it had then."
)


def write_trial_report(
    home: Path,
    dataset: str,
    name: str,
    trials: Mapping[str, pd.DataFrame],
    entries: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write both files and return the CSV file.

    Args:
        home: The folder of all artifacts.
        dataset: The name of the dataset.
        name: The name of both files without its ending.
        trials: By method, its trials: point, split, seed, state, score, loss, seconds, settings, code, run, reason.
        entries: By method, its best point, see `tuned_entry`.
    """
    path = home / "reports" / dataset / f"{name}.csv"
    frame = pd.concat([table.assign(method=method) for method, table in trials.items()], ignore_index=True)
    columns = ["method", *(column for column in frame.columns if column != "method")]
    write_atomic(path, frame[columns].to_csv(index=False))
    blocks: list[Block] = [Paragraph(_INTRODUCTION), Heading("Chosen settings"), _chosen_table(trials, entries)]
    for method, table in trials.items():
        blocks += [Heading(f"Trials of {method}"), _trial_rows(table)]
    write_atomic(path.with_suffix(".md"), render_markdown(f"{dataset}: search of settings", blocks))
    return path


def _chosen_table(trials: Mapping[str, pd.DataFrame], entries: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for method, table in trials.items():
        entry = entries.get(method)
        chosen = (
            " ".join(f"{key}={value}" for key, value in {**entry["settings"], **entry["training"]}.items()) if entry else "-"
        )
        score = f"{entry['selection']['score']:.2f}" if entry else "-"
        size = [str(table["point"].nunique()), str(len(table)), f"{table['seconds'].sum():.0f}"]
        rows.append((method, chosen, score, *size))
    facts = next((entry["selection"] for entry in entries.values()), {})
    caption = ", ".join(f"{key}: {value}" for key, value in facts.items() if key not in ("score", "space", "trials"))
    spaces = ", ".join(f"{method} {entry['selection']['space']}" for method, entry in entries.items())
    columns = ("method", "settings", "score", "points", "trials", "seconds")
    return Table(columns, tuple(rows), f"{caption}. Digests of the spaces: {spaces}." if facts else "", num_text_columns=2)


def _pairs(entry: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in {**entry["settings"], **entry["training"]}.items())


def _trial_rows(table: pd.DataFrame) -> Table:
    columns = ("settings", "split", "state", "code", "point", "seed", "score", "seconds")
    ordered = table.sort_values("score", ascending=False, kind="stable")
    rows = tuple(tuple(_cell(row[column]) for column in columns) for row in ordered.to_dict("records"))
    return Table(columns, rows, "", num_text_columns=4)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if pd.isna(value) else f"{value:.2f}"
    return str(value)
