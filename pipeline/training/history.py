"""The validated epochs of a run, and the rule that chooses which epoch it keeps."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder


class Validation(NamedTuple):
    """The result of validating one epoch of the last phase."""

    epoch: int  # number of finished epochs of the phase, from 1
    metric: float  # percent
    loss: float
    is_candidate: bool = False  # whether the epoch tried a candidate, see `Phase.candidates`

    def rank(self, select: str) -> tuple[float, float, float]:
        """Return a sort key, another one for each epoch: the run keeps the epoch with the largest key.

        Equal metrics are decided by the loss, and equal losses by the metric; of equal epochs, the latest is kept. Candidates
        are ranked by the metric whatever `select` says, and of equal ones the first is kept.

        Args:
            select: "metric", "loss" or "last", as in `TrainConfig.select`.
        """
        if self.is_candidate:
            return self.metric, -self.loss, -self.epoch
        if select == "last":
            return self.epoch, 0.0, 0.0
        return (self.metric, -self.loss, self.epoch) if select == "metric" else (-self.loss, self.metric, self.epoch)


def read_validations(run: RunFolder) -> list[Validation]:
    """Return the validated epochs of a run in order, as far as its history has been saved.

    A finished run has at least one.

    Raises:
        UserError: the history is damaged or missing.
    """
    path = run.path / "history.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val_metric")]
        found = [
            Validation(int(row["epoch"]) + 1, float(row["val_metric"]), float(row["val_loss"]), bool(row.get("candidate")))
            for row in rows
        ]
    except (FileNotFoundError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged or missing; {run.remedy}") from error
    if run.is_done and not found:
        raise UserError(f"{path} has no validated epoch; {run.remedy}")
    return found


def best_validation(found: Sequence[Validation], select: str) -> Validation:
    """Return the validated epoch whose weights a run keeps; see `Validation.rank`."""
    return max(found, key=lambda validation: validation.rank(select))
