"""The outcomes of a grid's runs as tables: one row per run (`cells.csv`), the ranked cells, and the winner (`winner.json`)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from pipeline.evaluation.statistics import judge_cells, rank_cells, sample_std
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.runs import RunFolder
from pipeline.studies.grid import Grid
from pipeline.training.history import Validation, best_validation, read_validations
from pipeline.training.state import DIVERGED

# The pause between two writes of cells.csv is MIN_SAVE_SECONDS plus SAVE_PAUSE_FACTOR times the duration of a write.
MIN_SAVE_SECONDS = 1.0
SAVE_PAUSE_FACTOR = 10


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """The state of one run and its scores."""

    state: Literal["done", "stopped", "pruned", "failed"]  # stopped: paused at a rung of the search
    reason: str = ""
    is_bug: bool = False  # the run failed by a bug; its traceback is in `error.txt`
    metric: float = math.nan  # on validation, percent
    loss: float = math.nan
    seconds: float = math.nan  # of training

    @property
    def is_open(self) -> bool:
        """Whether the run failed but may succeed if it is repeated; a run that diverges would diverge again."""
        return self.state == "failed" and DIVERGED not in self.reason


@dataclass
class Leaderboard:
    """The outcomes of a grid so far, by cell and seed. They are saved in `cells.csv` of the grid's folder."""

    grid: Grid
    folder: Path
    outcomes: dict[tuple[int, int], RunOutcome] = field(default_factory=dict)
    next_save: float = -math.inf  # on the monotonic clock

    def run(self, cell: int, seed: int) -> RunFolder:
        """Return the folder of a run."""
        return self.grid.heads[cell, seed].run

    def validations(self, cell: int, seed: int) -> list[Validation]:
        """Return the validated epochs of a run; empty when the run has not started.

        Raises:
            UserError: the history of the run is damaged, or a finished run has none.
        """
        run = self.run(cell, seed)
        return read_validations(run) if run.is_done or (run.path / "history.csv").is_file() else []

    def read_outcome(self, cell: int, seed: int) -> RunOutcome:
        """Return the outcome of a run that was trained, as its folder shows it; "failed" when its files are damaged."""
        run = self.run(cell, seed)
        try:
            validations = self.validations(cell, seed)
            best = best_validation(validations, self.grid.cells[cell].training.select)
            if run.is_done:
                return RunOutcome("done", metric=best.metric, loss=best.loss, seconds=run.read_done()["seconds"])
        except UserError as error:
            return RunOutcome("failed", str(error))
        return RunOutcome("stopped", f"stopped at epoch {validations[-1].epoch}", metric=best.metric, loss=best.loss)

    def add(self, cell: int, seed: int, outcome: RunOutcome) -> None:
        """Record the outcome of a run in memory; `save` writes it to disk."""
        self.outcomes[cell, seed] = outcome

    @property
    def is_save_due(self) -> bool:
        """Whether the last `save` was long enough ago for another one to cost little."""
        return time.monotonic() >= self.next_save

    def save(self) -> None:
        """Write cells.csv."""
        started = time.monotonic()
        write_atomic(self.folder / "cells.csv", self.rows().to_csv(index=False))
        now = time.monotonic()
        self.next_save = now + MIN_SAVE_SECONDS + SAVE_PAUSE_FACTOR * (now - started)

    @property
    def metric(self) -> str:
        """See `Grid.metric`."""
        return self.grid.metric

    def rows(self) -> pd.DataFrame:
        """Return one row per run with an outcome, in the order of the grid."""
        rows = []
        for cell, seed in self.grid.heads:
            outcome = self.outcomes.get((cell, seed))
            if outcome:
                values = {f"val_{self.metric}": outcome.metric, "val_loss": outcome.loss, "seconds": outcome.seconds}
                state = {"state": outcome.state, "reason": outcome.reason}
                path = self.run(cell, seed).path.relative_to(self.grid.features.home)
                rows.append({"cell": cell, **self.grid.cells[cell].point, "seed": seed, **values, **state, "run": str(path)})
        return pd.DataFrame(rows)

    def scores(self) -> np.ndarray:
        """Return the validation metric of each run [K,S], in percent; NaN where it is not done."""
        outcomes = ((self.outcomes.get((cell, seed)) for seed in self.grid.seeds) for cell in range(len(self.grid.cells)))
        return np.array([[each.metric if each and each.state == "done" else np.nan for each in row] for row in outcomes])

    def ranked_cells(self) -> pd.DataFrame:
        """Return the cells by rank; see `rank_cells` for the columns."""
        missing = RunOutcome("stopped", "missing")
        num_cells = len(self.grid.cells)
        outcomes = [[self.outcomes.get((cell, seed), missing) for seed in self.grid.seeds] for cell in range(num_cells)]
        done = np.array([[outcome.state == "done" for outcome in row] for row in outcomes])
        losses = np.array([[outcome.loss for outcome in row] for row in outcomes])
        reasons = [[outcome.reason for outcome in row] for row in outcomes]
        return rank_cells(self.scores(), np.where(done, losses, np.nan), reasons)

    def finished_cells(self) -> list[int]:
        """Return the cells of which all seeds are done, best first."""
        return self.ranked_cells().dropna(subset=["rank"])["cell"].to_list()

    def seed_values(self, cell: int, name: str) -> np.ndarray:
        """Return the metric, loss or seconds of the finished runs of a cell, in the order of the seeds.

        Args:
            cell: The number of the cell.
            name: A field of `RunOutcome`: "metric", "loss" or "seconds".
        """
        outcomes = (self.outcomes.get((cell, seed)) for seed in self.grid.seeds)
        return np.array([getattr(outcome, name) for outcome in outcomes if outcome and outcome.state == "done"])

    def describe_best(self) -> str:
        """Return a text for users with the best cell so far, over its finished seeds; "" before any run is done."""
        table = self.ranked_cells().dropna(subset=["score"])
        if table.empty:
            return ""
        table = table.sort_values(["score", "loss", "cell"], ascending=[False, True, True])
        return f"best {self.metric} {table['score'].iloc[0]:.2f} at {self.grid.cells[table['cell'].iloc[0]].label}"

    def ranking(self) -> pd.DataFrame:
        """Return one row per cell: first the finished cells by rank, then the others in the order of the grid.

        The verdict compares a cell with the best one over seeds alone: see `judge_cells`.
        """
        table = self.ranked_cells().rename(columns={"score": f"val_{self.metric}", "loss": "val_loss"})
        points = pd.DataFrame([self.grid.cells[cell].point for cell in table["cell"]])
        shown = table[[f"val_{self.metric}", "std", "val_loss", "seeds", "state"]]
        verdict = pd.Series(judge_cells(self.scores(), table), name="verdict")
        return pd.concat([table["rank"], points, shown, verdict], axis=1)

    def write_winner(self, tests: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
        """Write winner.json and return its content: the winning cell with its metrics on validation and test.

        Args:
            tests: The metrics of the winner on the test split, by seed; empty when the test split has not been read.
        """
        cell = self.finished_cells()[0]
        metrics, losses = self.seed_values(cell, "metric"), self.seed_values(cell, "loss")
        head = self.grid.heads[cell, self.grid.seeds[0]]
        names = next(iter(tests.values()), {})
        facts = {
            "cell": dict(self.grid.cells[cell].point),
            "config": head.config.fingerprint(),
            "runs": [str(self.run(cell, seed).path.relative_to(self.grid.features.home)) for seed in self.grid.seeds],
            "seeds": list(self.grid.seeds),
            "val": {self.metric: summarise_seeds(metrics), "loss": summarise_seeds(losses)},
            "test": {name: summarise_seeds(np.array([tests[seed][name] for seed in self.grid.seeds])) for name in names},
        }
        write_atomic(self.folder / "winner.json", json.dumps(facts, indent=1, allow_nan=False))
        return facts


def summarise_seeds(values: np.ndarray) -> dict[str, Any]:
    """Return the mean, the sample standard deviation (0 for a single value) and the values themselves.

    Args:
        values: [S], one value per seed.
    """
    std = sample_std(values)
    return {"mean": float(values.mean()), "std": 0.0 if math.isnan(std) else std, "values": values.tolist()}
