"""Trackers: TensorBoard, or programs of your own, that are told what happens in a run while it trains.

`history.csv` in the run's folder is always there; a tracker is told its rows as they come. A tracker that fails is left
out, and training goes on.
"""

from __future__ import annotations

import logging
import math
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError, describe_error
from pipeline.runtime.runs import RunFolder
from pipeline.training.history import best_validation, read_validations

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Follows one run. It is made by calling its class with the run's folder: `run.config()` has the settings."""

    def log(self, epoch: int, row: Mapping[str, Any]) -> None:
        """Take one row of the history.

        When a run resumes after an interruption, a new tracker is told all rows again from the first one.

        Args:
            epoch: Number of finished epochs, from 1, over all phases.
            row: phase, epoch (of the phase, from 0), lr, loss and its parts, and, of validated epochs, val_metric (percent)
                and val_loss.
        """
        ...

    def close(self, results: Mapping[str, float]) -> None:
        """Take the end of the run.

        Args:
            results: val_metric and val_loss of the epoch that is kept, seconds of training, and how near generated texts are to
                the real ones (text_cos, text_mse, …) where the head generates any; empty when the run has not finished.
        """
        ...


MakeTracker = Callable[[RunFolder], Tracker]


class TensorBoard:
    """Writes the log of TensorBoard into the folder of the run: `tensorboard --logdir artifacts/runs` shows all runs."""

    def __init__(self, run: RunFolder) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise UserError("--log tensorboard needs a package: pip install tensorboard") from error
        for earlier in run.path.glob("events.out.tfevents.*"):  # all of its rows are written again
            earlier.unlink()
        self.writer = SummaryWriter(str(run.path))

    def log(self, epoch: int, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row; those of validation are val/metric and val/loss."""
        for name, value in row.items():
            if name not in ("phase", "epoch", "candidate") and math.isfinite(value):
                self.writer.add_scalar(
                    name.replace("val_", "val/", 1) if name.startswith("val_") else f"train/{name}", value, epoch
                )
        self.writer.flush()

    def close(self, results: Mapping[str, float]) -> None:
        """Write the results, and close the file."""
        for name, value in results.items():
            self.writer.add_scalar(f"result/{name}", value)
        self.writer.close()


TRACKERS: Mapping[str, MakeTracker] = {"tensorboard": TensorBoard}


def find_tracker(word: str | MakeTracker) -> MakeTracker:
    """Return what makes a tracker: "tensorboard", the class of a file of your own ("trackers.py:WeightsAndBiases"), a class.

    Raises:
        UserError: there is no such tracker, file or class.
    """
    if not isinstance(word, str):
        return word
    file, _, name = word.rpartition(":")
    if not file:
        if word not in TRACKERS:
            raise unknown_choice(word, f"unknown tracker {word!r}", TRACKERS, hint="or a class of your own, FILE.py:CLASS")
        return TRACKERS[word]
    if not Path(file).is_file():
        raise UserError(f"{file} is not there: give the file of a tracker and its class, FILE.py:CLASS")
    found = runpy.run_path(file).get(name)
    if not isinstance(found, type):
        raise UserError(f"{file} has no class {name!r}")
    return found


@dataclass(slots=True)
class RunTrackers:
    """The trackers of one run, those that have failed left out."""

    makers: Sequence[MakeTracker] = ()
    _opened: list[Tracker] = field(default_factory=list)

    def open(self, run: RunFolder, history: Sequence[Mapping[str, Any]]) -> None:
        """Make the trackers, and tell them the rows that there are."""
        for make in self.makers:
            try:
                self._opened.append(make(run))
            except UserError:
                raise
            except Exception as error:  # a service that is not there, for example
                _warn(make, error)
        for epoch, row in enumerate(history, 1):
            self.log(epoch, row)

    def log(self, epoch: int, row: Mapping[str, Any]) -> None:
        """See `Tracker.log`."""
        self._tell(lambda tracker: tracker.log(epoch, row))

    def close(self, finished: RunFolder | None = None) -> None:
        """End the trackers, with the results of the run if it has finished; see `Tracker.close`."""
        if self._opened:
            results = _read_results(finished) if finished else {}
            self._tell(lambda tracker: tracker.close(results))
            self._opened.clear()

    def _tell(self, action: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._opened):
            try:
                action(tracker)
            except Exception as error:
                self._opened.remove(tracker)
                _warn(tracker, error)


def _warn(tracker: Any, error: Exception) -> None:
    name = getattr(tracker, "__name__", type(tracker).__name__)
    logger.warning("the tracker %s has failed (%s); training goes on without it", name, describe_error(error))


def replay(run: RunFolder, makers: Sequence[MakeTracker]) -> None:
    """Tell trackers the whole history of a finished run, and its results."""
    if makers:
        trackers = RunTrackers(makers)
        trackers.open(run, [dict(row.dropna()) for _, row in pd.read_csv(run.path / "history.csv").iterrows()])
        trackers.close(run)


def _read_results(run: RunFolder) -> dict[str, float]:
    """Return what `Tracker.close` is told of a finished run."""
    kept = best_validation(read_validations(run), run.config().training["select"])
    figures = {"val_metric": kept.metric, "val_loss": kept.loss, "seconds": run.read_done()["seconds"]}
    return {**figures, **run.read_alignment()}
