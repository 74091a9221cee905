"""Run a grid: on every core of this machine or over dask, choose on validation, and read the test split for the winner alone.

Cells are ordinary runs: finished ones are not trained again, and the same command goes on after any interruption. A run that
fails is listed, and the others finish. On a GPU, cells of one structure and one seed are trained as one model: a single head
leaves it idle.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, TypeVar

import pandas as pd

from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime.executor import Executor, num_processes, open_executor, run_here
from pipeline.runtime.files import lock
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunFolder
from pipeline.studies.grid import Grid
from pipeline.studies.halving import Halving, up_to
from pipeline.studies.leaderboard import Leaderboard, RunOutcome
from pipeline.training.config import TrainConfig
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.heads import HeadPlan, capacity, plan_head_on, train_heads
from pipeline.training.state import drop_state

logger = logging.getLogger(__name__)

Strategy = Literal["auto", "processes", "stacked"]
Item = TypeVar("Item")
_ONE_RUN = Lock()  # the generator that initialises weights and the number of threads belong to the process


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How runs are trained; of no influence on what they are."""

    lanes: int  # runs of one model at most; 0: as many as fit in memory
    sharers: int  # processes that share this memory
    progress: bool  # show epochs


@dataclass(frozen=True, slots=True)
class FeatureRef:
    """Names of features, by which another process finds the same."""

    home: Path
    dataset: str
    manifest: str  # fingerprint
    caches: tuple[tuple[str, str], ...]  # batch key, fingerprint
    aggregate: str


class Part(NamedTuple):
    """One run of a job."""

    settings: Any  # the method's Config
    training: TrainConfig
    path: Path


@dataclass(frozen=True, slots=True)
class Job:
    """Runs to train together, or to continue until an epoch of the last phase is validated."""

    place: FeatureRef
    method: str
    seed: int
    parts: tuple[Part, ...]
    limit: float  # epochs; inf: to the end
    effort: SearchOptions


@dataclass(frozen=True, slots=True)
class Swept:
    """A grid that has been run."""

    folder: Path
    axes: tuple[str, ...]  # fields of the grid, columns of the ranking
    ranking: pd.DataFrame  # one row per cell
    winner: Mapping[str, Any]  # empty when no cell finished
    failed: Mapping[str, str]  # run -> reason


def sweep(
    grid: Grid,
    scheduler: str = "local",
    workers: int = -1,
    read_test: bool = True,
    strategy: Strategy = "auto",
    lanes: int = 0,
) -> Swept:
    """Train what is not trained yet, rank the cells on validation, and evaluate the winner on the test split.

    `workers` are processes of this machine (-1: one per core, 0: this process alone), unless `scheduler` names others. The
    strategy "stacked" trains cells of one structure as one model, at most `lanes` of them (0: as many as fit in memory),
    "processes" trains each alone, and "auto" stacks them where there are GPUs.
    """
    if scheduler != "local" and workers >= 0:
        raise ValueError("--workers are processes of this machine, --scheduler has its own: give one of them")
    if lanes and strategy == "processes":
        raise ValueError(
            "--lanes are cells of one model, and --strategy processes trains every cell by itself: give one of them"
        )
    folder = grid.create()
    board = Leaderboard(grid, folder)
    left = sum(not head.run.is_done for head in grid.heads.values())
    number = num_processes(workers, left, grid.features.num_bytes)
    with open_executor(scheduler if left else "local", number) as crew:
        stacked = strategy == "stacked" or (strategy == "auto" and crew.on_gpu)
        logger.info(f"{_size(grid, left)}: {_who(scheduler, crew)}, {_how(strategy, scheduler, stacked)}, {_products(grid)}")
        near = crew.num_workers if scheduler == "local" else 1
        effort = SearchOptions(lanes if stacked else 1, near, progress=stacked and crew.map is run_here)
        trainer = Trainer(board, crew, effort)
        trainer.train(trainer.survivors() if grid.search == "optuna" else list(grid.heads), math.inf)
        failed = {str(board.run(*pair).path): each.reason for pair, each in board.outcomes.items() if each.state == "failed"}
        best = board.finished()[:1]
        winner = board.winner({}) if best else {}
        if best and read_test and _is_decided(board):
            tests, unread = _test(board, crew, best[0])
            failed |= unread
            winner = winner if unread else board.winner(tests)
    return Swept(folder, tuple(grid.axes), board.ranking(), winner, failed)


def train_group(job: Job) -> dict[Path, str]:
    """Train runs, in whatever process; returns those that failed, and why.

    `ValueError` when this machine's files are others, or when nothing can be begun.
    """
    with _ONE_RUN:
        try:
            features = _features(job.place, job.method)
            heads = [plan_head_on(features, job.method, part.settings, part.training, job.seed) for part in job.parts]
            for head, part in zip(heads, job.parts, strict=True):
                if head.run.path != part.path:
                    raise ValueError(f"a worker would train {head.run.path} instead of {part.path}: its files are not the same")
            size = job.effort.lanes or max(1, capacity(heads[0]) // job.effort.sharers)
        except (RuntimeError, MemoryError) as error:
            raise _named(job.parts[0].path, error) from error
        failed = _train_pieces(_pieces(heads, size), job)
    return {run.path: str(error) for run, error in failed.items()}


def _train_pieces(pieces: Sequence[Sequence[HeadPlan]], job: Job) -> dict[RunFolder, ValueError]:
    """Train each of the pieces as one model, and by halves where torch gives up: memory may be short, or one run to blame."""
    failed: dict[RunFolder, ValueError] = {}
    left = list(pieces)
    while left:
        some = left.pop(0)
        try:
            failed |= train_heads(some, job.effort.progress, watch=lambda epoch, metric: epoch >= job.limit)
        except (RuntimeError, MemoryError) as error:
            if len(some) > 1:
                left[:0] = _pieces(some, math.ceil(len(some) / 2))
            else:
                failed[some[0].run] = _named(some[0].run.path, error)
    return failed


def _named(run: Path, error: RuntimeError | MemoryError) -> ValueError:
    """An error of torch as one that says whose it is, in a line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return ValueError(f"{run}: {lines[0]}")


def _pieces(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items in order, in as few pieces of at most this size as there can be, equally large but for the last."""
    each = math.ceil(len(items) / math.ceil(len(items) / size))
    return [items[start : start + each] for start in range(0, len(items), each)]


@lru_cache(maxsize=1)
def _features(place: FeatureRef, method: str) -> FeatureSet:
    """The features of a place; the last ones stay in memory, for the next run."""
    return open_features(place.home, place.dataset, method, dict(place.caches), place.aggregate)


def evaluate_run(job: tuple[Path, Path]) -> dict[str, float]:
    """Metrics on the test split of the run in a folder of a home."""
    home, path = job
    with _ONE_RUN:
        try:
            return evaluate(home, RunFolder.at(path), "test", {})["metrics"]
        except (RuntimeError, MemoryError) as error:
            raise _named(path, error) from error


@dataclass(frozen=True, slots=True)
class Trainer:
    """Brings the runs of a grid to where they shall be."""

    board: Leaderboard
    crew: Executor
    effort: SearchOptions

    def train(self, pairs: Sequence[tuple[int, int]], limit: float) -> None:
        """Bring runs to an epoch, or to their end, and note what becomes of them."""
        board, pending = self.board, []
        for pair in pairs:
            if self._is_there(*pair, limit):
                board.add(*pair, board.read(*pair))
            else:
                pending.append(pair)
        board.save()
        groups = self._groups(pending)
        jobs = [self._job(group, limit) for group in groups]
        title = "grid" if limit == math.inf else f"to epoch {limit}"
        with ProgressBar(label=title, total=len(pairs), initial=len(pairs) - len(pending), unit="run") as bar:
            bar.set_postfix_str(board.best())
            for number, finish in self.crew.map(train_group, jobs):
                try:
                    failed = finish()
                except ValueError as error:
                    failed = {part.path: str(error) for part in jobs[number].parts}
                for cell, seed in groups[number]:
                    run = board.run(cell, seed)
                    lost = run.path in failed and not run.is_done
                    board.add(cell, seed, RunOutcome("failed", failed[run.path]) if lost else board.read(cell, seed))
                if board.is_due:
                    board.save()
                    bar.set_postfix_str(board.best(), refresh=False)
                bar.update(len(groups[number]))
            bar.set_postfix_str(board.best())
        board.save()

    def _is_there(self, cell: int, seed: int, limit: float) -> bool:
        """Whether a run needs no training until this epoch, or has a damaged file that forbids it."""
        run = self.board.run(cell, seed)
        if run.is_done:
            drop_state(run)
            return True
        try:
            seen = self.board.seen(cell, seed)
        except ValueError:
            return True
        return bool(seen) and seen[-1].epoch >= limit

    def _groups(self, pairs: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
        """Runs that are trained together: of one structure and seed, not more than there may be, and some for everybody."""
        if self.effort.lanes == 1:
            return [[pair] for pair in pairs]
        alike: dict[Hashable, list[tuple[int, int]]] = {}
        for cell, seed in pairs:
            alike.setdefault((self.board.grid.structures[cell], seed), []).append((cell, seed))
        most = self.effort.lanes or len(pairs)
        return [
            group for same in alike.values() for group in _pieces(same, min(most, math.ceil(len(same) / self.crew.num_workers)))
        ]

    def _job(self, pairs: Sequence[tuple[int, int]], limit: float) -> Job:
        grid = self.board.grid
        heads = [grid.heads[pair] for pair in pairs]
        place = FeatureRef(
            home=grid.features.home,
            dataset=grid.features.manifest.dataset,
            manifest=grid.features.manifest.fingerprint(),
            caches=tuple(heads[0].config.caches.items()),
            aggregate=grid.features.aggregate,
        )
        parts = tuple(Part(head.settings, head.training, head.run.path) for head in heads)
        return Job(place, grid.method, pairs[0][1], parts, limit, self.effort)

    def survivors(self) -> list[tuple[int, int]]:
        """The runs of the cells that successive halving leaves, judged by the first seed; the others are noted as pruned."""
        board = self.board
        first, *others = board.grid.seeds
        alive = list(range(len(board.grid.cells)))
        halving = Halving([cell.training.epochs for cell in board.grid.cells])
        for limit in halving.limits:
            self.train([(cell, first) for cell in alive], limit)
            for cell in list(alive):
                reason = "" if board.outcomes[cell, first].state != "failed" else f"seed {first} failed"
                at = 0 if reason else halving.pruned_at(cell, board.seen(cell, first), limit)
                if at:
                    reason = f"pruned at epoch {at}"
                    last = up_to(board.seen(cell, first), limit)[-1]
                    board.add(cell, first, RunOutcome("pruned", reason, last.metric, last.loss))
                    _give_up(board.run(cell, first))
                if reason:
                    alive.remove(cell)
                    for seed in others:
                        board.add(cell, seed, RunOutcome("pruned", reason))
            board.save()
        return [(cell, seed) for cell in alive for seed in board.grid.seeds]


def _give_up(run: RunFolder) -> None:
    """Free the disk of a pruned run's state, unless somebody else trains it; where it is wanted after all, it starts anew."""
    if not run.is_done:
        with suppress(ValueError), lock(run.path):
            drop_state(run)


def _is_decided(board: Leaderboard) -> bool:
    """Whether no run can change the winner any more; otherwise it says that the test split is left alone."""
    open_runs = [pair for pair, outcome in board.outcomes.items() if outcome.is_open]
    if open_runs:
        logger.info(
            f"the test split is not read: {len(open_runs)} runs failed, and with them another cell may win; run it again"
        )
    return not open_runs


def _test(board: Leaderboard, crew: Executor, cell: int) -> tuple[dict[int, Mapping[str, float]], dict[str, str]]:
    """The winner's metrics on the test split by seed, and why there are none by run."""
    seeds, runs = board.grid.seeds, [board.run(cell, seed) for seed in board.grid.seeds]
    read = {head.run for head in board.grid.heads.values() if (head.run.path / "test_reads.jsonl").is_file()}
    others = len(read.difference(runs))
    once = "was read before" if read.intersection(runs) else "is read" if others else "is read once"
    more = f"; it was read before for {others} runs of other cells" if others else ""
    logger.info(f"the test split {once}, for the winner: {board.grid.cells[cell].label}{more}")
    tests: dict[int, Mapping[str, float]] = {}
    failed: dict[str, str] = {}
    for number, finish in crew.map(evaluate_run, [(board.grid.features.home, run.path) for run in runs]):
        try:
            tests[seeds[number]] = finish()
        except ValueError as error:
            failed[str(runs[number].path)] = f"not evaluated on the test split: {error}"
    return tests, failed


def _size(grid: Grid, left: int) -> str:
    size = f"{len(grid.cells)} cells × {len(grid.seeds)} seeds"
    return size if left == len(grid.heads) else f"{size}, {len(grid.heads) - left} of {len(grid.heads)} runs are there already"


def _who(scheduler: str, crew: Executor) -> str:
    if scheduler != "local":
        return f"the {crew.num_workers} workers of {scheduler}"
    return "this process alone" if crew.map is run_here else f"{crew.num_workers} single-threaded processes"


def _how(strategy: Strategy, scheduler: str, stacked: bool) -> str:
    how = "cells of one structure as one model" if stacked else "every cell by itself"
    alone = "no GPU" if scheduler == "local" else "not all of them have a GPU"
    return f"{how} ({f'--strategy {strategy}' if strategy != 'auto' else 'on the GPU' if stacked else alone})"


def _products(grid: Grid) -> str:
    formats = {"float32": "float32", "mixed": "bfloat16"}
    return " and ".join(sorted({formats[cell.training.precision] for cell in grid.cells})) + " products"
