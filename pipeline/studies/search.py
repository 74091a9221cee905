"""Run a grid: train its cells, rank them on validation, and read the test split only for the winner.

The cells are trained on all cores of this machine or by the workers of a dask scheduler. Cells are ordinary runs: finished runs
are not trained again, and the same command resumes after any interruption. A run that fails is listed, and the others finish;
the traceback of a bug is in `error.txt` of the run. On a GPU, runs of one structure are trained as one model, with all
seeds, because a single head leaves the GPU mostly idle.

This module is what the leading process does; `search_worker` is what a worker does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from pipeline.runtime.errors import UserError
from pipeline.runtime.executor import Executor, num_processes, open_executor, run_here
from pipeline.runtime.files import lock
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import TEST_READS, RunFolder
from pipeline.studies.grid import Grid
from pipeline.studies.halving import Halving, validations_until
from pipeline.studies.leaderboard import Leaderboard, RunOutcome
from pipeline.studies.search_worker import (
    RunFailure,
    SearchOptions,
    evaluate_run,
    group_job,
    is_brief,
    split_evenly,
    train_group,
)
from pipeline.training.heads import can_stack_seeds
from pipeline.training.state import delete_saved_state

logger = logging.getLogger(__name__)

GridStrategy = Literal["auto", "processes", "stacked"]


@dataclass(frozen=True, slots=True)
class GridResult:
    """The result of a grid that has been run."""

    folder: Path
    axes: tuple[str, ...]  # fields of the grid, columns of the ranking
    ranking: pd.DataFrame  # one row per cell
    runs: pd.DataFrame  # one row per run, as in cells.csv
    winner: Mapping[str, Any]  # empty when no cell finished
    failed: Mapping[str, str]  # run -> reason
    bugs: frozenset[str]  # the runs among them that failed by a bug, whose tracebacks are in their `error.txt`


def run_grid(
    grid: Grid,
    scheduler: str = "local",
    workers: int = -1,
    read_test: bool = True,
    strategy: GridStrategy = "auto",
    max_ensemble_size: int = 0,
) -> GridResult:
    """Train the unfinished runs of a grid, rank its cells on validation, and evaluate the winner on the test split.

    Args:
        grid: The cells and seeds to train.
        scheduler: "local", or the address of a dask scheduler, whose workers then do the training.
        workers: Processes of this machine; -1: one per core, 0: only this process. Only with the scheduler "local".
        read_test: Whether to evaluate the winner on the test split.
        strategy: "stacked" trains runs of one structure as one model, "processes" trains each run by itself, and "auto" is
            "stacked" where all workers have a GPU, else "processes".
        max_ensemble_size: Runs of one model at most; 0: as many as fit in memory. Not with the strategy "processes".

    Raises:
        UserError: two options contradict each other, or the scheduler does not answer.
    """
    if scheduler != "local" and workers >= 0:
        raise UserError("--workers are processes of this machine, --scheduler has its own: give one of them")
    if max_ensemble_size and strategy == "processes":
        raise UserError("--lanes are runs of one model, and --strategy processes trains every run by itself: give one of them")
    folder = grid.create_folder()
    leaderboard = Leaderboard(grid, folder)
    num_unfinished = sum(not head.run.is_done for head in grid.heads.values())
    number = num_processes(workers, num_unfinished, grid.features.num_bytes)
    starts_late = workers < 0 and number > 1 and all(map(is_brief, grid.heads.values()))
    with open_executor(scheduler if num_unfinished else "local", number, starts_late) as executor:
        is_stacked = strategy == "stacked" or (strategy == "auto" and executor.on_gpu)
        logger.info(
            "%s: %s, %s, %s",
            _describe_size(grid, num_unfinished),
            _describe_workers(scheduler, executor, starts_late),
            _describe_strategy(strategy, scheduler, is_stacked),
            _describe_precision(grid),
        )
        options = SearchOptions(
            max_ensemble_size=max_ensemble_size if is_stacked else 1,
            num_local_workers=executor.num_workers if scheduler == "local" else 1,
            progress=is_stacked and executor.map is run_here,
        )
        trainer = GridTrainer(leaderboard, executor, options)
        trainer.train(trainer.run_halving() if grid.search == "optuna" else list(grid.heads), math.inf)
        winner, failed = _choose_winner(leaderboard, executor, read_test)
    reasons = {run: failure.reason for run, failure in failed.items()}
    bugs = frozenset(run for run, failure in failed.items() if failure.is_bug)
    return GridResult(folder, tuple(grid.axes), leaderboard.ranking(), leaderboard.rows(), winner, reasons, bugs)


def _choose_winner(
    leaderboard: Leaderboard, executor: Executor, read_test: bool
) -> tuple[dict[str, Any], dict[str, RunFailure]]:
    """Write the winner, with its test metrics when they may be read, and return it with every failed run."""
    failed = {
        str(leaderboard.run(*pair).path): RunFailure(outcome.reason, outcome.is_bug)
        for pair, outcome in leaderboard.outcomes.items()
        if outcome.state == "failed"
    }
    best = leaderboard.finished_cells()[:1]
    winner = leaderboard.write_winner({}) if best else {}
    if best and read_test and _is_decided(leaderboard):
        tests, not_evaluated = _evaluate_winner(leaderboard, executor, best[0])
        failed |= not_evaluated
        winner = winner if not_evaluated else leaderboard.write_winner(tests)
    return winner, failed


@dataclass(frozen=True, slots=True)
class GridTrainer:
    """Trains runs of a grid and records their outcomes on the leaderboard."""

    leaderboard: Leaderboard
    executor: Executor
    options: SearchOptions

    def train(self, pairs: Sequence[tuple[int, int]], last_epoch: float) -> None:
        """Train runs until an epoch is validated, and record their outcomes.

        Args:
            pairs: The runs, as (cell, seed).
            last_epoch: An epoch of the last phase, from 1; inf: train to the end.
        """
        leaderboard, pending = self.leaderboard, []
        for pair in pairs:
            if self._needs_training(*pair, last_epoch):
                pending.append(pair)
            else:
                leaderboard.add(*pair, leaderboard.read_outcome(*pair))
        leaderboard.save()
        groups = self._group(pending)
        heads = leaderboard.grid.heads
        jobs = [group_job([heads[pair] for pair in group], last_epoch, self.options) for group in groups]
        title = "grid" if last_epoch == math.inf else f"to epoch {last_epoch}"
        with ProgressBar(label=title, total=len(pairs), initial=len(pairs) - len(pending), unit="run") as bar:
            bar.set_postfix_str(leaderboard.describe_best())
            for number, get_result in self.executor.map(train_group, jobs):
                try:
                    failed = get_result()
                except UserError as error:
                    failed = {run.path: RunFailure(str(error)) for run in jobs[number].runs}
                self._record(groups[number], failed)
                if leaderboard.is_save_due:
                    leaderboard.save()
                    bar.set_postfix_str(leaderboard.describe_best(), refresh=False)
                bar.update(len(groups[number]))
            bar.set_postfix_str(leaderboard.describe_best())
        leaderboard.save()

    def _record(self, pairs: Sequence[tuple[int, int]], failed: Mapping[Path, RunFailure]) -> None:
        """Add the outcomes of a group; a run that another process finished meanwhile has not failed."""
        for cell, seed in pairs:
            run = self.leaderboard.run(cell, seed)
            failure = None if run.is_done else failed.get(run.path)
            outcome = RunOutcome("failed", *failure) if failure else self.leaderboard.read_outcome(cell, seed)
            self.leaderboard.add(cell, seed, outcome)

    def _needs_training(self, cell: int, seed: int, last_epoch: float) -> bool:
        """Whether a run has to be trained until this epoch; a run with a damaged file cannot be."""
        run = self.leaderboard.run(cell, seed)
        if run.is_done:
            delete_saved_state(run)
            return False
        try:
            validations = self.leaderboard.validations(cell, seed)
        except UserError:
            return False
        return not validations or validations[-1].is_candidate or validations[-1].epoch < last_epoch

    def _group(self, pairs: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
        """Split runs into groups of one structure, none too large, and enough of them for all workers.

        Runs of one seed stand next to each other; where seeds cannot be stacked, a group has one.
        """
        if self.options.max_ensemble_size == 1:
            return [[pair] for pair in pairs]
        by_structure: dict[Hashable, list[tuple[int, int]]] = {}
        grid = self.leaderboard.grid
        for cell, seed in sorted(pairs, key=lambda pair: grid.seeds.index(pair[1])):
            own_seed = None if can_stack_seeds(grid.heads[cell, seed]) else seed
            by_structure.setdefault((grid.structures[cell], own_seed), []).append((cell, seed))
        max_size = self.options.max_ensemble_size or len(pairs)
        num_workers = self.executor.num_workers
        return [
            group
            for alike in by_structure.values()
            for group in split_evenly(alike, min(max_size, math.ceil(len(alike) / num_workers)))
        ]

    def run_halving(self) -> list[tuple[int, int]]:
        """Train the first seed of all cells by successive halving, and record the cells that are given up as pruned.

        Returns:
            The runs of the remaining cells, of all seeds, as (cell, seed). They are still to be trained to the end.
        """
        leaderboard = self.leaderboard
        first, *others = leaderboard.grid.seeds
        remaining = list(range(len(leaderboard.grid.cells)))
        halving = Halving([cell.training.epochs for cell in leaderboard.grid.cells])
        for rung in halving.rungs:
            self.train([(cell, first) for cell in remaining], rung)
            for cell in list(remaining):
                reason = self._reason_to_prune(cell, first, halving, rung)
                if reason:
                    remaining.remove(cell)
                    for seed in others:
                        leaderboard.add(cell, seed, RunOutcome("pruned", reason))
            leaderboard.save()
        return [(cell, seed) for cell in remaining for seed in leaderboard.grid.seeds]

    def _reason_to_prune(self, cell: int, seed: int, halving: Halving, rung: int) -> str:
        """Return why a cell is given up at a rung, and record the run that was pruned; "" when the cell goes on."""
        leaderboard = self.leaderboard
        if leaderboard.outcomes[cell, seed].state == "failed":
            return f"seed {seed} failed"
        validations = leaderboard.validations(cell, seed)
        pruned_epoch = halving.pruned_epoch(cell, validations, rung)
        if not pruned_epoch:
            return ""
        reason = f"pruned at epoch {pruned_epoch}"
        last = validations_until(validations, rung)[-1]
        leaderboard.add(cell, seed, RunOutcome("pruned", reason, metric=last.metric, loss=last.loss))
        _free_disk(leaderboard.run(cell, seed))
        return reason


def _free_disk(run: RunFolder) -> None:
    """Delete the saved state of a pruned run, unless another process trains it. If it is wanted later, it starts again."""
    if not run.is_done:
        with suppress(UserError), lock(run.path):
            delete_saved_state(run)


def _is_decided(leaderboard: Leaderboard) -> bool:
    """Whether no run can change the winner any more; if one can, log that the test split is not read."""
    open_runs = [pair for pair, outcome in leaderboard.outcomes.items() if outcome.is_open]
    if open_runs:
        logger.info(
            "the test split is not read: %s runs failed, and with them another cell may win; run it again", len(open_runs)
        )
    return not open_runs


def _evaluate_winner(
    leaderboard: Leaderboard, executor: Executor, cell: int
) -> tuple[dict[int, Mapping[str, float]], dict[str, RunFailure]]:
    """Return the winner's metrics on the test split by seed, and the failure of each run that could not be evaluated."""
    grid = leaderboard.grid
    runs = [leaderboard.run(cell, seed) for seed in grid.seeds]
    _announce_test_read(grid, cell, runs)
    tests: dict[int, Mapping[str, float]] = {}
    failed: dict[str, RunFailure] = {}
    for number, get_result in executor.map(evaluate_run, [(grid.features.home, run.path) for run in runs]):
        try:
            outcome = get_result()
        except UserError as error:
            outcome = RunFailure(str(error))
        if isinstance(outcome, RunFailure):
            failed[str(runs[number].path)] = outcome._replace(reason=f"not evaluated on the test split: {outcome.reason}")
        else:
            tests[grid.seeds[number]] = outcome
    return tests, failed


def _announce_test_read(grid: Grid, cell: int, runs: Sequence[RunFolder]) -> None:
    """Log for which cell the test split is read now, and whether runs of the grid have read it before."""
    earlier = {head.run for head in grid.heads.values() if (head.run.path / TEST_READS).is_file()}
    num_others = len(earlier.difference(runs))
    verb = "was read before" if earlier.intersection(runs) else "is read" if num_others else "is read once"
    others = f"; it was read before for {num_others} runs of other cells" if num_others else ""
    logger.info("the test split %s, for the winner: %s%s", verb, grid.cells[cell].label, others)


def _describe_size(grid: Grid, num_unfinished: int) -> str:
    size, num_runs = f"{len(grid.cells)} cells × {len(grid.seeds)} seeds", len(grid.heads)
    if num_unfinished == num_runs:
        return size
    return f"{size}, {num_runs - num_unfinished} of {num_runs} runs are there already"


def _describe_workers(scheduler: str, executor: Executor, starts_late: bool) -> str:
    if scheduler != "local":
        return f"the {executor.num_workers} workers of {scheduler}"
    if executor.map is run_here:
        return "this process alone"
    return f"{'this process, or if it saves time ' * starts_late}{executor.num_workers} single-threaded processes"


def _describe_strategy(strategy: GridStrategy, scheduler: str, is_stacked: bool) -> str:
    how = "runs of one structure as one model" if is_stacked else "every run by itself"
    no_gpu = "no GPU" if scheduler == "local" else "not all of them have a GPU"
    reason = f"--strategy {strategy}" if strategy != "auto" else "on the GPU" if is_stacked else no_gpu
    return f"{how} ({reason})"


def _describe_precision(grid: Grid) -> str:
    formats = {"float32": "float32", "mixed": "bfloat16"}
    return " and ".join(sorted({formats[cell.training.precision] for cell in grid.cells})) + " products"
