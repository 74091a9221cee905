"""Successive halving by Optuna's pruner: at every rung a cell goes on if it is in the better half of those judged so far.

The pruner compares a trial with those before it, so its verdict would depend on which worker is faster. Here all cells reach a
rung before any is judged, in the order of the grid: the verdicts are the same on any number of workers, and after any
interruption. The best cell of a rung always goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.training.history import Validation

FACTOR = 2  # of the epochs, and of the cells that go on, from rung to rung
RUNGS = 3  # below the end of training


class Halving:
    """The judge of cells by the validation metric they have reached."""

    def __init__(self, epochs: Sequence[int]) -> None:
        """For cells that are trained for so many epochs; `ValueError` when Optuna is not installed."""
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise ValueError("--search optuna needs Optuna: pip install 'diffalign[search]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first = max(1, min(epochs) // FACTOR**RUNGS)
        self.limits = [limit for limit in (first * FACTOR**rung for rung in range(30)) if limit < max(epochs)]
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=FACTOR)
        study = optuna.create_study(direction="maximize", pruner=pruner)
        self.trials = [study.ask() for _ in epochs]
        self.judged = [0] * len(epochs)  # the last epoch that was reported

    def pruned_at(self, cell: int, seen: Sequence[Validation], limit: int) -> int:
        """The epoch at which the cell is given up, judged by what it had reached at this rung; 0: it goes on."""
        for epoch, metric, _ in up_to(seen, limit):
            if epoch > self.judged[cell]:
                self.judged[cell] = epoch
                self.trials[cell].report(metric, epoch)
                if self.trials[cell].should_prune():
                    return epoch
        return 0


def up_to(seen: Sequence[Validation], limit: int) -> list[Validation]:
    """The validated epochs before the limit, and the first at or after it."""
    return [each for number, each in enumerate(seen) if number == 0 or seen[number - 1].epoch < limit]
