"""Successive halving with Optuna's pruner: at every rung, the better half of the cells judged so far goes on.

A rung is an epoch at which cells are judged. The pruner compares a trial with the trials that were reported before it, so its
verdict would depend on which worker is faster. Therefore all cells reach a rung before any is judged, and they are judged in
the order of the grid. The verdicts are then the same on any number of workers and after any interruption. The best cell of a
rung always goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.runtime.errors import UserError
from pipeline.training.history import Validation, best_validation

HALVING_FACTOR = 2  # of the epochs, and of the cells that go on, from rung to rung
NUM_RUNGS = 3  # below the end of training


class Halving:
    """Decides which cells are given up, by the validation metric that they have reached at each rung."""

    def __init__(self, num_epochs: Sequence[int]) -> None:
        """Start with no cell judged.

        Args:
            num_epochs: For each cell, the number of epochs of its whole training.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise UserError("--search optuna needs Optuna: pip install optuna") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first = max(1, min(num_epochs) // HALVING_FACTOR**NUM_RUNGS)
        powers = (first * HALVING_FACTOR**exponent for exponent in range(30))
        self.rungs = [rung for rung in powers if rung < max(num_epochs)]
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=HALVING_FACTOR)
        study = optuna.create_study(direction="maximize", pruner=pruner)
        self.trials = [study.ask() for _ in num_epochs]
        self.reported_epochs = [0] * len(num_epochs)  # by cell, the last epoch that was reported to Optuna

    def pruned_epoch(self, cell: int, validations: Sequence[Validation], rung: int) -> int:
        """Return the epoch at which a cell is given up, or 0 when it goes on.

        Args:
            cell: The number of the cell.
            validations: The validated epochs of the cell's run; those after the rung are ignored.
            rung: The epoch at which the cell is judged.
        """
        for judged in validations_until(validations, rung):
            if judged.epoch > self.reported_epochs[cell]:
                self.reported_epochs[cell] = judged.epoch
                self.trials[cell].report(judged.metric, judged.epoch)
                if self.trials[cell].should_prune():
                    return judged.epoch
        return 0


def validations_until(validations: Sequence[Validation], rung: int) -> list[Validation]:
    """Return the validated epochs before the rung, and the first one at or after it.

    A run that has tried candidates is finished, and is judged at every rung by the one that it keeps.
    """
    if validations and validations[0].is_candidate:
        return [best_validation(validations, select="metric")._replace(epoch=rung)]
    return [each for number, each in enumerate(validations) if number == 0 or validations[number - 1].epoch < rung]
