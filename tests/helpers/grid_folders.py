"""Folders of synthetic grids, written as a sweep writes them, for the tests of their pages."""

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
    """The folder of a grid with noise for scores; `states` are those of runs by cell and seed that are not done.

    A run in the state "missing" has no row in cells.csv.
    """
    states = states or {}
    folder = home / "grids" / dataset / f"{method}-{name}"
    folder.mkdir(parents=True)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    asked = {"dataset": dataset, "method": method, "axes": {field: list(values) for field, values in axes.items()}}
    asked |= {"cells": points, "seeds": list(seeds), "search": search}
    (folder / "grid.json").write_text(json.dumps(asked, indent=1, sort_keys=True))
    rng = np.random.default_rng(0)
    lines = []
    for (cell, point), seed in itertools.product(enumerate(points), seeds):
        state = states.get((cell, seed), "done")
        scores = {f"val_{metric}": rng.uniform(40, 60), "val_loss": rng.uniform(1, 2), "seconds": 1.0}
        if state == "failed":
            scores = dict.fromkeys(scores, np.nan)
        reason = "" if state == "done" else f"{state} for a reason"
        ends = {"state": state, "reason": reason, "run": f"runs/{dataset}/{method}-{cell:012d}/seed{seed}"}
        if state != "missing":
            lines.append({"cell": cell, **point, "seed": seed, **scores, **ends})
    if lines:
        pd.DataFrame(lines).to_csv(folder / "cells.csv", index=False)
    return folder


def write_winner(folder: Path, cell: Mapping[str, Any], runs: Sequence[str], test: Mapping[str, Sequence[float]]) -> None:
    """winner.json with metrics on the test split by seed, and the log of its runs' reads."""
    values = {key: np.array(value) for key, value in test.items()}
    summary = {key: {"mean": value.mean(), "std": value.std(ddof=1), "values": value.tolist()} for key, value in values.items()}
    facts = {"cell": dict(cell), "runs": list(runs), "seeds": [0, 1, 2], "val": {}, "test": summary}
    (folder / "winner.json").write_text(json.dumps(facts))
    for run in runs:
        log = folder.parents[2] / run / "test_reads.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("{}\n")
