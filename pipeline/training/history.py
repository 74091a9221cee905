"""What a run's validated epochs were worth, and which of them it keeps."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.runtime.runs import RunFolder


class Validation(NamedTuple):
    """A validated epoch of the last phase."""

    epoch: int  # epochs of the phase that were done, from 1
    metric: float  # percent
    loss: float

    def rank(self, select: str) -> tuple[float, float]:
        """The epoch with the largest is kept, of equals the latest: equal metrics are decided by the loss."""
        if select == "last":
            return float(self.epoch), 0.0
        return (self.metric, -self.loss) if select == "metric" else (-self.loss, self.metric)


def validations(run: RunFolder) -> list[Validation]:
    """The validated epochs of a run, as far as its history has been saved, in order; a finished run has at least one.

    `ValueError` when the history is damaged, or missing.
    """
    path = run.path / "history.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("val_metric")]
        seen = [Validation(int(row["epoch"]) + 1, float(row["val_metric"]), float(row["val_loss"])) for row in rows]
    except (FileNotFoundError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged or missing; {run.remedy}") from error
    if run.is_done and not seen:
        raise ValueError(f"{path} has no validated epoch; {run.remedy}")
    return seen


def kept(seen: Sequence[Validation], select: str) -> Validation:
    """The validated epoch whose weights a run keeps."""
    return max(reversed(seen), key=lambda validation: validation.rank(select))
