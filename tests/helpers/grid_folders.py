"""Writes folders of synthetic grids, in the format of `run_grid`, for tests of the report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def write_grid(
    home: Path,
    axes: Mapping[str, Sequence[Any]],
    seeds: Sequence[int] = (0, 1, 2),
    method: str = "seda",
    states: Mapping[tuple[int, int], str] | None = None,
    dataset: str = "toy",
    name: str = "0123456789ab",
    search: str = "all",
    metric: str = "acc1",
) -> Path:
    """Write grid.json and cells.csv of a grid with random scores, and return the folder.

    Args:
        home: The home folder.
        axes: The values of the grid, by field.
        seeds: The seeds of every cell.
        method: The name of a method.
        states: The states of runs that are not done, by (cell, seed). A run in the state "missing" has no row in cells.csv.
        dataset: The name of a dataset.
        name: The fingerprint in the name of the folder.
        search: "all" or "optuna".
        metric: The metric that ranks cells.
    """
    states = states or {}
    folder = home / "grids" / dataset / f"{method}-{name}"
    folder.mkdir(parents=True)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    identity = {"dataset": dataset, "method": method, "axes": {field: list(values) for field, values in axes.items()}}
    identity |= {"cells": points, "seeds": list(seeds), "search": search}
    (folder / "grid.json").write_text(json.dumps(identity, indent=1, sort_keys=True))
    rng = np.random.default_rng(0)
    rows = []
    for (cell, point), seed in itertools.product(enumerate(points), seeds):
        state = states.get((cell, seed), "done")
        scores = {f"val_{metric}": rng.uniform(40, 60), "val_loss": rng.uniform(1, 2), "seconds": 1.0}
        if state == "failed":
            scores = dict.fromkeys(scores, np.nan)
        reason = "" if state == "done" else f"{state} for a reason"
        outcome = {"state": state, "reason": reason, "run": f"runs/{dataset}/{method}-{cell:012d}/seed{seed}"}
        if state != "missing":
            rows.append({"cell": cell, **point, "seed": seed, **scores, **outcome})
    if rows:
        pd.DataFrame(rows).to_csv(folder / "cells.csv", index=False)
    return folder


def write_winner(folder: Path, cell: Mapping[str, Any], runs: Sequence[str], test: Mapping[str, Sequence[float]]) -> None:
    """Write winner.json with metrics on the test split by seed, and the logs of the test reads of its runs."""
    values = {key: np.array(value) for key, value in test.items()}
    summary = {key: {"mean": value.mean(), "std": value.std(ddof=1), "values": value.tolist()} for key, value in values.items()}
    facts = {"cell": dict(cell), "runs": list(runs), "seeds": [0, 1, 2], "val": {}, "test": summary}
    (folder / "winner.json").write_text(json.dumps(facts))
    for run in runs:
        log = folder.parents[2] / run / "test_reads.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("{}\n")
