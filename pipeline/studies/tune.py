"""Choose settings of methods by random search with equal budgets, on validation alone.

Every method gets the same number of points, the same seeds and the same epochs. The first point is its defaults, the others are
random points of its space. A point is a cell of a grid, so every trial is an ordinary run: nothing is trained twice, and the
same command goes on after any interruption. A trial is scored on the validation split; or on each fold of the training and
validation samples, of which none is a test sample.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from pipeline.data.folds import write_folds
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, fingerprint
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import field_types
from pipeline.runtime.version import code_version
from pipeline.studies.grid import Grid, SearchKind, plan_grid
from pipeline.studies.search import run_grid
from pipeline.studies.trial_report import write_trial_report
from pipeline.studies.tuning_space import TuningSpace
from pipeline.training.config import TRAINING_PRESETS, TrainConfig
from pipeline.training.tuned import read_tuned_entry, tuned_path, write_tuned

logger = logging.getLogger(__name__)

PRESET = "head"  # of what is not in a space


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every method gets."""

    points: int  # its defaults, and random points of its space; all of them where a space has fewer
    seeds: tuple[int, ...]  # of every point
    folds: int = 0  # of the training and validation samples; 0: points are scored on the validation split
    search: SearchKind = "all"  # all: every point is trained to its end; optuna: successive halving, on the first fold


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """The chosen settings, and where everything that was tried stands."""

    entries: Mapping[str, Mapping[str, Any]]  # by method, as `read_tuned` takes them
    tuned_file: Path
    trials: Path  # CSV, one row per trial; the same as Markdown beside it
    failed: Mapping[str, str]  # run -> reason
    bugs: frozenset[str]  # the runs among them that failed by a bug


@dataclass(frozen=True, kw_only=True)
class MethodTrials:
    """The trials of one method."""

    method: str
    grids: tuple[Grid, ...]  # of the validation split, or of each fold; all but the first without points that were given up
    table: pd.DataFrame  # one row per trial: point, split, seed, state, score, loss, seconds, run, reason, code, settings
    failed: Mapping[str, str]
    bugs: frozenset[str]

    def ranked_points(self) -> pd.DataFrame:
        """Return the points of which all trials are done, best first: point, score and loss (means), and their number."""
        done = self.table[self.table["state"] == "done"]
        points = done.groupby("point", as_index=False).agg(
            score=("score", "mean"), loss=("loss", "mean"), trials=("score", "size")
        )
        points = points[points["trials"] == sum(len(grid.seeds) for grid in self.grids)]
        return points.sort_values(["score", "loss", "point"], ascending=[False, True, True], ignore_index=True)


def tune(
    home: Path,
    dataset: str,
    methods: Sequence[str],
    space: TuningSpace,
    budget: Budget,
    *,
    image: str = "",
    text: str = "",
    scheduler: str = "local",
    workers: int = -1,
) -> TuneResult:
    """Search settings of methods, and make the best ones the home's tuned settings of the dataset.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared and extracted dataset.
        methods: Names of methods.
        space: The values to try.
        budget: What every method gets.
        image: The cache of the image features; "": that of the dataset's image encoder.
        text: The cache of the text features; "": that of the dataset's text encoder.
        scheduler: See `run_grid`.
        workers: See `run_grid`.

    Raises:
        UserError: a point cannot be trained on this dataset (the message names it), or an argument is out of its range.
    """
    if budget.points < 1:
        raise UserError(f"the number of points must be at least 1, not {budget.points}")
    names = write_folds(home, dataset, budget.folds) if budget.folds else [dataset]
    searches = {}
    for method in methods:
        axes = space.axes(method)
        options: dict[str, Any] = {
            "preset": PRESET,
            "search": budget.search,
            "defaults_first": True,
            "image": image,
            "text": text,
        }
        options["points"] = budget.points
        searches[method] = [
            plan_grid(home, name, method, axes, budget.seeds, settings={}, training={}, **options) for name in names
        ]
    identities = [asdict(budget), *(grids[0].identity() for grids in searches.values())]
    report_name = f"tune-{fingerprint(identities)[:12]}"
    trials: list[MethodTrials] = []
    entries: dict[str, Mapping[str, Any]] = {}
    report = Path()
    for method, grids in searches.items():
        logger.info("%s: %s points × %s seeds × %s", method, len(grids[0].cells), len(grids[0].seeds), describe_splits(budget))
        trials.append(_run_trials(grids, scheduler, workers))
        _warn_about_older_code(trials[-1])
        if not trials[-1].ranked_points().empty:
            entries[method] = tuned_entry(trials[-1], budget, report_name)
            write_tuned(home, dataset, {method: entries[method]})
        report = write_trial_report(home, dataset, report_name, {each.method: each.table for each in trials}, entries)
    return TuneResult(
        entries=entries,
        tuned_file=tuned_path(home, dataset),
        trials=report,
        failed={run: reason for each in trials for run, reason in each.failed.items()},
        bugs=frozenset(run for each in trials for run in each.bugs),
    )


def describe_splits(budget: Budget) -> str:
    """Return what trials are scored on, for people."""
    return f"{budget.folds} folds of train and val" if budget.folds else "the validation split"


def _run_trials(grids: Sequence[Grid], scheduler: str, workers: int) -> MethodTrials:
    """Train the points of a method on the first split, and on the others those that have finished there."""
    points, tables, used = list(range(len(grids[0].cells))), [], []
    failed: dict[str, str] = {}
    bugs: set[str] = set()
    for number, planned in enumerate(grids):
        grid = replace(planned, cells=tuple(planned.cells[point] for point in points), search="all") if number else planned
        result = run_grid(grid, scheduler, workers, read_test=False)
        table = _trial_table(grid, result.runs, points)
        tables.append(table)
        used.append(grid)
        failed |= result.failed
        bugs |= result.bugs
        done = table[table["state"] == "done"].groupby("point").size()
        points = [point for point in points if done.get(point, 0) == len(grid.seeds)]
        if not points:
            break
    table = pd.concat(tables, ignore_index=True)
    return MethodTrials(method=grids[0].method, grids=tuple(used), table=table, failed=failed, bugs=frozenset(bugs))


def _trial_table(grid: Grid, cells: pd.DataFrame, points: Sequence[int]) -> pd.DataFrame:
    """Return the trials of a grid that has been run, see `MethodTrials.table`.

    Args:
        grid: The grid.
        cells: The rows of its cells.csv.
        points: The number of each cell among the points of the method.
    """
    folders = [grid.features.home / run for run in cells["run"]]  # one that could not even begin has no folder
    return pd.DataFrame(
        {
            "point": [points[cell] for cell in cells["cell"]],
            "split": grid.features.manifest.dataset,
            "seed": cells["seed"],
            "state": cells["state"],
            "score": cells[f"val_{grid.metric}"],
            "loss": cells["val_loss"],
            "seconds": cells["seconds"],
            "settings": [canonical_json(dict(grid.cells[cell].point)) for cell in cells["cell"]],
            "code": [RunFolder.at(folder).read_done()["code"] if (folder / "done").is_file() else "" for folder in folders],
            "run": cells["run"],
            "reason": cells["reason"],
        }
    )


def _warn_about_older_code(trials: MethodTrials) -> None:
    """Log how many trials other code than this has trained: what they scored may not hold today."""
    done = trials.table[trials.table["state"] == "done"]
    older = done[done["code"] != code_version()]
    if len(older):
        logger.warning(
            "%s: %d of %d trials were trained by other code than this one (%s), such as %s; `diffalign tune --check` trains "
            "the chosen settings again, and a trial whose folder you delete is repeated",
            trials.method, len(older), len(done), code_version(), older["run"].iloc[0],
        )  # fmt: skip


def tuned_entry(trials: MethodTrials, budget: Budget, report_name: str) -> dict[str, Any]:
    """Return the best point of a method as an entry of tuned settings, see `pipeline.training.tuned`.

    `selection` says how it was chosen: the mean score of its trials, the budget, a digest of the space, the features, and the
    versions of the program that trained it. The best of many scores is optimistic: it is no estimate of the test score.
    """
    best = trials.ranked_points().iloc[0]
    grid = trials.grids[0]
    point = grid.cells[int(best["point"])].point
    of_training = field_types(TrainConfig).keys()
    return {
        "settings": {field: value for field, value in point.items() if field not in of_training},
        "training": {**TRAINING_PRESETS[PRESET], **{field: value for field, value in point.items() if field in of_training}},
        "selection": {
            "score": float(best["score"]),
            "metric": grid.metric,
            "scored_on": describe_splits(budget),
            **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(budget).items()},
            "space": fingerprint({field: list(values) for field, values in grid.axes.items()})[:12],
            "caches": {key: cache.path.name for key, cache in grid.features.caches.items()},
            "code": sorted(set(trials.table.loc[trials.table["point"] == best["point"], "code"])),
            "trials": report_name,
        },
    }


def reproduce_scores(home: Path, dataset: str, methods: Sequence[str], workers: int = -1) -> pd.DataFrame:
    """Train tuned settings again with the code as it stands, in a folder of their own, and score them as they were chosen.

    Args:
        home: The folder of all caches; nothing is written to it.
        dataset: The name of a dataset with tuned settings, of this home or its own.
        methods: Names of methods.
        workers: See `run_grid`.

    Returns:
        One row per method: method; recorded and today, the scores in percent; code, which gave the recorded one.

    Raises:
        UserError: a method has no tuned settings that say how they were chosen.
    """
    rows = []
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        shutil.copytree(home / "manifests", scratch / "manifests")
        (scratch / "caches").symlink_to((home / "caches").absolute())
        for method in methods:
            entry = read_tuned_entry(dataset, method, home)
            selection = entry.get("selection")
            if not selection:
                raise UserError(f"the tuned settings of {method} on {dataset} do not say how they were chosen; tune it again")
            fixed = {key: [value] for key, value in entry["settings"].items()}
            space = TuningSpace(
                file=tuned_path(home, dataset),
                training={key: [value] for key, value in entry["training"].items()},
                newcomers={},
                methods={method: fixed},
            )
            budget = Budget(points=1, seeds=tuple(selection["seeds"]), folds=selection["folds"])
            image = selection["caches"]["image"]
            text = selection["caches"].get("text", image)  # not opened for a method that reads no text
            result = tune(scratch, dataset, [method], space, budget, image=image, text=text, workers=workers)
            today = result.entries[method]["selection"]["score"] if method in result.entries else math.nan
            code = ", ".join(selection["code"])
            rows.append({"method": method, "recorded": selection["score"], "today": today, "code": code})
    return pd.DataFrame(rows)
