"""Read the folders of grids: the cells that were asked for, the state of every run, and the winner."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError

CELL_TABLE_COLUMNS = ("cell", "seed", "state", "reason", "val_loss", "run")  # of cells.csv, beside the axes and the metric


@dataclass(frozen=True, slots=True)
class GridResults:
    """The results of one grid of K cells and S seeds over A axes; not all runs need to have finished."""

    path: Path
    dataset: str
    method: str
    search: str  # "all": every cell is trained to its end; "optuna": only the better cells are
    axes: Mapping[str, tuple[Any, ...]]  # field -> values; numbers in ascending order, words in the order of the grid
    axis_names: Mapping[str, str]  # field -> its letter in the papers, where there is one, else the field
    positions: np.ndarray  # [K,A] index of each cell's value on each axis, counted from 0
    seeds: tuple[int, ...]
    metric: str  # "acc1", or "map" for multi-label data; "" before any run has ended
    runs: pd.DataFrame  # K * S rows, cell by cell: cell, seed, state (or "missing"), reason, score, loss, run
    winner: Mapping[str, Any]  # content of winner.json; empty before there is a winner

    @property
    def home(self) -> Path:
        """The home that the grid is in."""
        return self.path.absolute().parents[2]

    def by_cell_and_seed(self, column: str) -> np.ndarray:
        """Return a column of `runs` as [K,S]: "score" (validation, in percent) or "loss"; NaN where a run has not finished."""
        return self.runs[column].to_numpy(dtype=float).reshape(len(self.positions), len(self.seeds))

    def cell_values(self, cell: int) -> dict[str, Any]:
        """Return the values of a cell by field."""
        axes = zip(self.axes.items(), self.positions[cell], strict=True)
        return {field: values[position] for (field, values), position in axes}

    def positions_on(self, field: str) -> np.ndarray:
        """Return the positions [K] of the cells on one axis."""
        return self.positions[:, list(self.axes).index(field)]


def find_grids(home: Path, dataset: str) -> tuple[list[GridResults], list[str]]:
    """Return the grids of a dataset by name, and one sentence for each grid that cannot be read."""
    grids, notes = [], []
    for file in sorted((home / "grids" / dataset).glob("*/grid.json")):
        try:
            grids.append(read_grid(file.parent))
        except UserError as error:
            notes.append(f"A grid cannot be read: {error}.")
    return grids, notes


def read_grid(folder: Path) -> GridResults:
    """Read the grid in a folder `<home>/grids/<dataset>/<method>-<fingerprint12>`.

    Raises:
        UserError: The folder is not a grid, or one of its files is damaged.
    """
    if not (folder / "grid.json").is_file():
        raise UserError(f"{folder} is not a grid: give a folder …/grids/<dataset>/<method>-<fingerprint>")
    try:
        return _read_files(folder)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{folder} is damaged ({error!r}); run the same grid command again") from error


def _read_files(folder: Path) -> GridResults:
    plan = json.loads((folder / "grid.json").read_text())
    cell_table = _read_cell_table(folder / "cells.csv")
    fields: dict[str, list[Any]] = dict(plan["axes"])
    axes = {field: _sort_numbers(fields[field]) for field in sorted(fields, key=_column_order(cell_table.columns))}
    letters = _read_symbols(str(plan["method"]))
    seeds = tuple(int(seed) for seed in plan["seeds"])
    metrics = [column for column in map(str, cell_table.columns) if column.startswith("val_") and column != "val_loss"]
    if not plan["cells"] or not seeds:
        raise UserError("grid.json has no cells, or no seeds")
    return GridResults(
        path=folder,
        dataset=str(plan["dataset"]),
        method=str(plan["method"]),
        search=str(plan["search"]),
        axes=axes,
        axis_names={field: letters.get(field, field) for field in axes},
        positions=np.array([[axes[field].index(cell[field]) for field in axes] for cell in plan["cells"]], dtype=np.int64),
        seeds=seeds,
        metric=metrics[0].removeprefix("val_") if metrics else "",
        runs=_list_runs(cell_table, metrics[0] if metrics else "val_loss", len(plan["cells"]), seeds),
        winner=_read_winner(folder / "winner.json"),
    )


def _read_winner(path: Path) -> dict[str, Any]:
    """Read cell, runs and test (mean, std and values by metric) from winner.json; empty when there is no file."""
    if not path.is_file():
        return {}
    winner = json.loads(path.read_text())
    test = {
        str(name): {"mean": float(value["mean"]), "std": float(value["std"]), "values": list(value["values"])}
        for name, value in dict(winner["test"]).items()
    }
    return {"cell": dict(winner["cell"]), "runs": list(map(str, winner["runs"])), "test": test}


def _read_cell_table(path: Path) -> pd.DataFrame:
    """Read cells.csv as strings, except cell and seed, which are numbers; without rows when there is no file yet."""
    cell_table = pd.read_csv(path, dtype=str) if path.is_file() else pd.DataFrame(columns=pd.Index(CELL_TABLE_COLUMNS))
    return cell_table.astype({"cell": int, "seed": int})


def _column_order(columns: pd.Index) -> Callable[[str], tuple[int, str]]:
    """Return a sort key that puts fields in the order of these columns, and fields without a column last, by name."""
    position = {column: index for index, column in enumerate(columns)}
    return lambda field: (position.get(field, len(position)), field)


def _sort_numbers(values: list[Any]) -> tuple[Any, ...]:
    """Sort the values when all of them are numbers; words stay in their order."""
    is_number = all(isinstance(value, bool | int | float) for value in values)
    return tuple(sorted(values)) if is_number else tuple(values)


def _list_runs(cell_table: pd.DataFrame, metric: str, num_cells: int, seeds: tuple[int, ...]) -> pd.DataFrame:
    """Return one row per run of the grid, with what cells.csv says about it; see `GridResults.runs`."""
    planned = pd.MultiIndex.from_product([range(num_cells), seeds], names=["cell", "seed"])
    rows = cell_table.set_index(["cell", "seed"]).reindex(planned).reset_index()
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


def _read_symbols(method: str) -> dict[str, str]:
    """Return field -> letter of the papers from the source text of a method; to import the method would import torch."""
    if method not in plugins.names("methods"):
        return {}
    tree = ast.parse(plugins.source("methods", method))
    for statement in (each for node in tree.body if isinstance(node, ast.ClassDef) for each in node.body):
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "symbols" for target in targets):
            assert isinstance(statement, ast.Assign | ast.AnnAssign), method
            assert statement.value is not None, method
            letters = {field: letter for letter, field in ast.literal_eval(statement.value).items()}
            # grids of earlier versions name the settings of a method's parts without the part
            return {field.rpartition(".")[2]: letter for field, letter in letters.items()} | letters
    return {}
