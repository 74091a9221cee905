"""The grids of a dataset as their folders tell them: what was asked for, what became of every run, and the winner."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.runtime import plugins

COLUMNS = ("cell", "seed", "state", "reason", "val_loss", "run")  # of cells.csv, beside the fields and the metric


@dataclass(frozen=True, slots=True)
class Study:
    """One grid of K cells and S seeds, finished or not."""

    path: Path
    dataset: str
    method: str
    search: str  # all: every cell is trained to its end; optuna: the better ones
    axes: Mapping[str, tuple[Any, ...]]  # field -> values, numbers in ascending order, words in the order of the grid
    names: Mapping[str, str]  # field -> the papers' letter, where there is one, else the field
    places: np.ndarray  # [K,A] of the cells on the axes, counted from 0
    seeds: tuple[int, ...]
    metric: str  # acc1, or map of multi-label data; "" before any run has ended
    runs: pd.DataFrame  # K * S rows, cell by cell: cell, seed, state (or "missing"), reason, score, loss, run
    winner: Mapping[str, Any]  # winner.json; empty before there is one

    @property
    def home(self) -> Path:
        """The home the grid lies in."""
        return self.path.absolute().parents[2]

    def of_cells(self, column: str) -> np.ndarray:
        """score (percent, on validation) or loss of every cell and seed [K,S], NaN where a run has not finished."""
        return self.runs[column].to_numpy(dtype=float).reshape(len(self.places), len(self.seeds))

    def values(self, cell: int) -> dict[str, Any]:
        """A cell's values by field."""
        return {field: values[place] for (field, values), place in zip(self.axes.items(), self.places[cell], strict=True)}

    def column(self, field: str) -> np.ndarray:
        """The places [K] of the cells on an axis."""
        return self.places[:, list(self.axes).index(field)]


def find_studies(home: Path, dataset: str) -> tuple[list[Study], list[str]]:
    """The grids of a dataset by name, and one sentence for each that cannot be read."""
    studies, notes = [], []
    for file in sorted((home / "grids" / dataset).glob("*/grid.json")):
        try:
            studies.append(read_study(file.parent))
        except ValueError as error:
            notes.append(f"A grid cannot be read: {error}.")
    return studies, notes


def read_study(folder: Path) -> Study:
    """The grid in a folder `<home>/grids/<dataset>/<method>-<fingerprint12>`; `ValueError` when it is none, or damaged."""
    if not (folder / "grid.json").is_file():
        raise ValueError(f"{folder} is not a grid: give a folder …/grids/<dataset>/<method>-<fingerprint>")
    try:
        return _read(folder)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{folder} is damaged ({error!r}); run the same grid command again") from error


def _read(folder: Path) -> Study:
    asked = json.loads((folder / "grid.json").read_text())
    told = _told(folder / "cells.csv")
    fields: dict[str, list[Any]] = dict(asked["axes"])
    axes = {field: _ordered(fields[field]) for field in sorted(fields, key=_place_in(told.columns))}
    letters = _letters(str(asked["method"]))
    seeds = tuple(int(seed) for seed in asked["seeds"])
    metrics = [column for column in map(str, told.columns) if column.startswith("val_") and column != "val_loss"]
    if not asked["cells"] or not seeds:
        raise ValueError("grid.json has no cells, or no seeds")
    return Study(
        path=folder,
        dataset=str(asked["dataset"]),
        method=str(asked["method"]),
        search=str(asked["search"]),
        axes=axes,
        names={field: letters.get(field, field) for field in axes},
        places=np.array([[axes[field].index(cell[field]) for field in axes] for cell in asked["cells"]], dtype=np.int64),
        seeds=seeds,
        metric=metrics[0].removeprefix("val_") if metrics else "",
        runs=_runs(told, metrics[0] if metrics else "val_loss", len(asked["cells"]), seeds),
        winner=_winner(folder / "winner.json"),
    )


def _winner(path: Path) -> dict[str, Any]:
    """What the report reads of winner.json: cell, runs, and test with mean, std and values by metric; empty without a file."""
    if not path.is_file():
        return {}
    told = json.loads(path.read_text())
    test = {
        str(name): {"mean": float(value["mean"]), "std": float(value["std"]), "values": list(value["values"])}
        for name, value in dict(told["test"]).items()
    }
    return {"cell": dict(told["cell"]), "runs": list(map(str, told["runs"])), "test": test}


def _told(path: Path) -> pd.DataFrame:
    """cells.csv as strings, cell and seed as numbers; without rows when there is none yet."""
    told = pd.read_csv(path, dtype=str) if path.is_file() else pd.DataFrame(columns=pd.Index(COLUMNS))
    return told.astype({"cell": int, "seed": int})


def _place_in(columns: pd.Index) -> Any:
    """A sort key: fields in the order of these columns, the others by name."""
    place = {column: number for number, column in enumerate(columns)}
    return lambda field: (place.get(field, len(place)), field)


def _ordered(values: list[Any]) -> tuple[Any, ...]:
    is_number = all(isinstance(value, bool | int | float) for value in values)
    return tuple(sorted(values)) if is_number else tuple(values)


def _runs(told: pd.DataFrame, metric: str, num_cells: int, seeds: tuple[int, ...]) -> pd.DataFrame:
    """One row per run that was asked for, with what is told of it."""
    asked = pd.MultiIndex.from_product([range(num_cells), seeds], names=["cell", "seed"])
    rows = told.set_index(["cell", "seed"]).reindex(asked).reset_index()
    state = rows["state"].fillna("missing")
    return pd.DataFrame(
        {
            "cell": rows["cell"],
            "seed": rows["seed"],
            "state": state,
            "reason": rows["reason"].fillna("").astype(str),
            "score": rows[metric].astype(float).where(state == "done", math.nan),
            "loss": rows["val_loss"].astype(float).where(state == "done", math.nan),
            "run": rows["run"].fillna("").astype(str),
        }
    )


def _letters(method: str) -> dict[str, str]:
    """field -> the papers' letter, read from the method's source: to import it would import torch."""
    if method not in plugins.names("methods"):
        return {}
    for statement in ast.parse(plugins.source("methods", method)).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "SYMBOLS" for target in targets):
            assert isinstance(statement, ast.Assign | ast.AnnAssign), method
            assert statement.value is not None, method
            return {field: letter for letter, field in ast.literal_eval(statement.value).items()}
    return {}
