"""Run a grid: on every core of this machine or over dask, choose on validation, and read the test split for the winner alone.

Cells are ordinary runs: finished ones are not trained again, and the same command goes on after any interruption. A run that
fails is listed, and the others finish.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import pandas as pd
from tqdm import tqdm

from pipeline.evaluate import evaluate, read_metrics
from pipeline.grid import Grid
from pipeline.halving import Halving, up_to
from pipeline.heads import Features, open_features, plan_head, train_head
from pipeline.pool import Spread, hands, num_processes
from pipeline.ranking import Board, Outcome
from pipeline.runs import Run
from pipeline.train import TrainConfig

_ONE_RUN = Lock()  # the generator that initialises weights and the number of threads belong to the process


@dataclass(frozen=True, slots=True)
class Place:
    """Names of features, by which another process finds the same."""

    home: Path
    dataset: str
    manifest: str  # fingerprint
    caches: tuple[tuple[str, str], ...]  # batch key, fingerprint
    aggregate: str


@dataclass(frozen=True, slots=True)
class Job:
    """A run to train, or to continue until an epoch of the last phase is validated."""

    place: Place
    method: str
    settings: Any
    training: TrainConfig
    seed: int
    limit: float  # epochs; inf: to the end
    path: Path  # of the run


@dataclass(frozen=True, slots=True)
class Swept:
    """A grid that has been run."""

    folder: Path
    axes: tuple[str, ...]  # fields of the grid, columns of the ranking
    ranking: pd.DataFrame  # one row per cell
    winner: Mapping[str, Any]  # empty when no cell finished
    failed: Mapping[str, str]  # run -> reason


def sweep(grid: Grid, scheduler: str = "local", workers: int = -1, read_test: bool = True) -> Swept:
    """Train what is not trained yet, rank the cells on validation, and evaluate the winner on the test split.

    `workers` are processes of this machine (-1: one per core, 0: this process alone), unless `scheduler` names others.
    """
    if scheduler != "local" and workers >= 0:
        raise ValueError("--workers are processes of this machine, --scheduler has its own: give one of them")
    folder = grid.create()
    board = Board(grid, folder)
    left = sum(not head.run.is_done for head in grid.heads.values())
    number = num_processes(workers, left)
    _say(f"{_size(grid, left)}: {_strategy(scheduler, number)}, {_products(grid)}")
    with hands(scheduler if left else "local", number) as spread:
        _train(board, spread, _survivors(board, spread) if grid.search == "optuna" else list(grid.heads), math.inf)
        best = board.finished()[:1]
        tests = _test(board, spread, best[0]) if best and read_test else {}
    failed = {str(board.run(*pair).path): each.reason for pair, each in board.outcomes.items() if each.state == "failed"}
    return Swept(folder, tuple(grid.axes), board.ranking(), board.winner(tests) if best else {}, failed)


def train_cell(job: Job) -> None:
    """Train a run, in whatever process; `ValueError` when it diverges, or when this machine's files are others."""
    with _ONE_RUN:
        head = plan_head(_features(job.place, job.method), job.method, job.settings, job.training, job.seed)
        if head.run.path != job.path:
            raise ValueError(f"a worker would train {head.run.path} instead of {job.path}: its files are not the same")
        train_head(head, progress=False, watch=lambda epoch, metric: epoch >= job.limit)


@lru_cache(maxsize=1)
def _features(place: Place, method: str) -> Features:
    """The features of a place; the last ones stay in memory, for the next run."""
    return open_features(place.home, place.dataset, method, dict(place.caches), place.aggregate)


def evaluate_run(job: tuple[Path, Path]) -> dict[str, float]:
    """Metrics on the test split of the run in a folder of a home."""
    home, path = job
    with _ONE_RUN:
        return evaluate(home, Run.at(path), "test", {})["metrics"]


def _train(board: Board, spread: Spread, pairs: Sequence[tuple[int, int]], limit: float) -> None:
    """Bring runs to an epoch, or to their end, and note what becomes of them."""
    pending = []
    for cell, seed in pairs:
        seen = board.seen(cell, seed)
        if board.run(cell, seed).is_done or (seen and seen[-1].epoch >= limit):
            board.add(cell, seed, board.read(cell, seed))
        else:
            pending.append((cell, seed))
    jobs = [_job(board.grid, cell, seed, limit) for cell, seed in pending]
    title = "grid" if limit == math.inf else f"to epoch {limit}"
    with tqdm(desc=title, total=len(pairs), initial=len(pairs) - len(pending), unit="run", file=sys.stderr) as bar:
        bar.set_postfix_str(board.best())
        for number, finish in spread(train_cell, jobs):
            cell, seed = pending[number]
            try:
                finish()
                outcome = board.read(cell, seed)
            except ValueError as error:
                outcome = Outcome("failed", str(error))
            board.add(cell, seed, outcome)
            bar.set_postfix_str(board.best(), refresh=False)
            bar.update()


def _job(grid: Grid, cell: int, seed: int, limit: float) -> Job:
    features, head = grid.features, grid.heads[cell, seed]
    place = Place(
        home=features.home,
        dataset=features.manifest.dataset,
        manifest=features.manifest.fingerprint(),
        caches=tuple(head.config.caches.items()),
        aggregate=features.aggregate,
    )
    return Job(place, grid.method, head.settings, head.training, seed, limit, head.run.path)


def _survivors(board: Board, spread: Spread) -> list[tuple[int, int]]:
    """The runs of the cells that successive halving leaves, judged by the first seed; the others are noted as pruned."""
    first, *others = board.grid.seeds
    alive = list(range(len(board.grid.cells)))
    halving = Halving([cell.training.epochs for cell in board.grid.cells])
    for limit in halving.limits:
        _train(board, spread, [(cell, first) for cell in alive], limit)
        for cell in list(alive):
            reason = "" if board.outcomes[cell, first].state != "failed" else f"seed {first} failed"
            at = 0 if reason else halving.pruned_at(cell, board.seen(cell, first), limit)
            if at:
                reason = f"pruned at epoch {at}"
                last = up_to(board.seen(cell, first), limit)[-1]
                board.add(cell, first, Outcome("pruned", reason, last.metric, last.loss))
            if reason:
                alive.remove(cell)
                for seed in others:
                    board.add(cell, seed, Outcome("pruned", reason))
    return [(cell, seed) for cell in alive for seed in board.grid.seeds]


def _test(board: Board, spread: Spread, cell: int) -> dict[int, Mapping[str, float]]:
    """The winner's metrics on the test split, by seed."""
    seeds, runs = board.grid.seeds, [board.run(cell, seed) for seed in board.grid.seeds]
    once = "was read before" if all("test" in read_metrics(run) for run in runs) else "is read once"
    _say(f"the test split {once}, for the winner: {board.grid.cells[cell].label}")
    jobs = [(board.grid.features.home, run.path) for run in runs]
    return {seeds[number]: finish() for number, finish in spread(evaluate_run, jobs)}


def _size(grid: Grid, left: int) -> str:
    size = f"{len(grid.cells)} cells × {len(grid.seeds)} seeds"
    return size if left == len(grid.heads) else f"{size}, {len(grid.heads) - left} of {len(grid.heads)} runs are there already"


def _strategy(scheduler: str, number: int) -> str:
    if scheduler != "local":
        return f"the workers of {scheduler}"
    return f"{number} single-threaded processes" if number else "this process alone"


def _products(grid: Grid) -> str:
    formats = {"float32": "float32", "mixed": "bfloat16"}
    return " and ".join(sorted({formats[cell.training.precision] for cell in grid.cells})) + " products"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
