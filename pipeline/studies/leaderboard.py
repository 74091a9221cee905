"""What became of a grid's runs, as tables: one row per run, cells by rank, and the winner."""

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

from pipeline.evaluation.statistics import rank_cells, sample_std
from pipeline.runtime.files import write_atomic
from pipeline.runtime.runs import RunFolder
from pipeline.studies.grid import Grid
from pipeline.training.history import Validation, kept, validations
from pipeline.training.state import DIVERGED

SAVE_SECONDS = 1.0  # between two writes of cells.csv, besides
SAVE_SHARE = 10  # times as long as a write takes


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What became of one run."""

    state: Literal["done", "stopped", "pruned", "failed"]  # stopped: at a rung of the search, to go on
    reason: str = ""
    metric: float = math.nan  # on validation, percent
    loss: float = math.nan
    seconds: float = math.nan  # of training

    @property
    def is_open(self) -> bool:
        """Whether the run failed for a reason that may pass; one that diverges does so again."""
        return self.state == "failed" and DIVERGED not in self.reason


@dataclass
class Leaderboard:
    """The outcomes of a grid so far, by cell and seed, kept in `cells.csv` of its folder."""

    grid: Grid
    folder: Path
    outcomes: dict[tuple[int, int], RunOutcome] = field(default_factory=dict)
    next_save: float = -math.inf  # on the monotonic clock

    def run(self, cell: int, seed: int) -> RunFolder:
        """The run of a cell and a seed."""
        return self.grid.heads[cell, seed].run

    def seen(self, cell: int, seed: int) -> list[Validation]:
        """What a run, finished or stopped, had reached by epoch; empty before it was; `ValueError` when that is damaged."""
        run = self.run(cell, seed)
        return validations(run) if run.is_done or (run.path / "history.csv").is_file() else []

    def read(self, cell: int, seed: int) -> RunOutcome:
        """What a run that was trained has left on disk; it failed when that is damaged."""
        run = self.run(cell, seed)
        try:
            seen = self.seen(cell, seed)
            best = kept(seen, self.grid.cells[cell].training.select)
            if run.is_done:
                return RunOutcome("done", "", best.metric, best.loss, run.done()["seconds"])
        except ValueError as error:
            return RunOutcome("failed", str(error))
        return RunOutcome("stopped", f"stopped at epoch {seen[-1].epoch}", best.metric, best.loss)

    def add(self, cell: int, seed: int, outcome: RunOutcome) -> None:
        """Note an outcome; `save` puts it on disk."""
        self.outcomes[cell, seed] = outcome

    @property
    def is_due(self) -> bool:
        """Whether the last `save` is so long ago that another one costs little."""
        return time.monotonic() >= self.next_save

    def save(self) -> None:
        """Write cells.csv."""
        started = time.monotonic()
        write_atomic(self.folder / "cells.csv", self.rows().to_csv(index=False))
        now = time.monotonic()
        self.next_save = now + SAVE_SECONDS + SAVE_SHARE * (now - started)

    @property
    def metric(self) -> str:
        """The metric that selects: acc1, or map of multi-label data."""
        return "acc1" if self.grid.features.manifest.label_kind == "single" else "map"

    def rows(self) -> pd.DataFrame:
        """One row per run with an outcome, in the order of the grid."""
        lines = []
        for cell, seed in self.grid.heads:
            outcome = self.outcomes.get((cell, seed))
            if outcome:
                values = {f"val_{self.metric}": outcome.metric, "val_loss": outcome.loss, "seconds": outcome.seconds}
                ends = {"state": outcome.state, "reason": outcome.reason}
                place = self.run(cell, seed).path.relative_to(self.grid.features.home)
                lines.append({"cell": cell, **self.grid.cells[cell].point, "seed": seed, **values, **ends, "run": str(place)})
        return pd.DataFrame(lines)

    def table(self) -> pd.DataFrame:
        """The cells by rank, see `rank_cells`."""
        missing = RunOutcome("stopped", "missing")
        ends = [[self.outcomes.get((cell, seed), missing) for seed in self.grid.seeds] for cell in range(len(self.grid.cells))]
        done = np.array([[outcome.state == "done" for outcome in cell] for cell in ends])
        scores = np.array([[outcome.metric for outcome in cell] for cell in ends])
        losses = np.array([[outcome.loss for outcome in cell] for cell in ends])
        reasons = [[outcome.reason for outcome in cell] for cell in ends]
        return rank_cells(np.where(done, scores, np.nan), np.where(done, losses, np.nan), reasons)

    def finished(self) -> list[int]:
        """Cells with all their seeds, best first."""
        return self.table().dropna(subset=["rank"])["cell"].to_list()

    def values(self, cell: int, name: str) -> np.ndarray:
        """metric, loss or seconds of a cell's finished runs, by seed."""
        outcomes = (self.outcomes.get((cell, seed)) for seed in self.grid.seeds)
        return np.array([getattr(outcome, name) for outcome in outcomes if outcome and outcome.state == "done"])

    def best(self) -> str:
        """The best cell so far, over the seeds it has, for people; "" before there is one."""
        found = self.table().dropna(subset=["score"]).sort_values(["score", "loss", "cell"], ascending=[False, True, True])
        if found.empty:
            return ""
        return f"best {self.metric} {found['score'].iloc[0]:.2f} at {self.grid.cells[found['cell'].iloc[0]].label}"

    def ranking(self) -> pd.DataFrame:
        """One row per cell: those that finished by rank, then the others in the order of the grid with what became of them."""
        table = self.table().rename(columns={"score": f"val_{self.metric}", "loss": "val_loss"})
        points = pd.DataFrame([self.grid.cells[cell].point for cell in table["cell"]])
        shown = table[[f"val_{self.metric}", "std", "val_loss", "seeds", "state"]]
        return pd.concat([table["rank"], points, shown], axis=1)

    def winner(self, tests: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
        """The winner with its metrics on validation, and those of `tests` by seed on the test split; it is put on disk."""
        cell = self.finished()[0]
        values = self.values(cell, "metric")
        head = self.grid.heads[cell, self.grid.seeds[0]]
        names = next(iter(tests.values()), {})
        facts = {
            "cell": dict(self.grid.cells[cell].point),
            "config": head.config.fingerprint(),
            "runs": [str(self.run(cell, seed).path.relative_to(self.grid.features.home)) for seed in self.grid.seeds],
            "seeds": list(self.grid.seeds),
            "val": {self.metric: summarise_cells(values), "loss": summarise_cells(self.values(cell, "loss"))},
            "test": {name: summarise_cells(np.array([tests[seed][name] for seed in self.grid.seeds])) for name in names},
        }
        write_atomic(self.folder / "winner.json", json.dumps(facts, indent=1, allow_nan=False))
        return facts


def summarise_cells(values: np.ndarray) -> dict[str, Any]:
    """Mean, sample deviation (0 of a single value) and the values themselves."""
    std = sample_std(values)
    return {"mean": float(values.mean()), "std": 0.0 if math.isnan(std) else std, "values": values.tolist()}
