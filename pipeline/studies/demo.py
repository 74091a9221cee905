"""The demo of stages 1 and 2: five methods and a text-only diagnostic, three seeds each, on emoji of five vendors; a report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.data.fetch import fetch
from pipeline.data.manifest_files import read_manifest
from pipeline.data.prepare import prepare
from pipeline.data.spec import load_spec
from pipeline.evaluation.evaluate import evaluate, evaluation_name, read_metrics
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.settings import flatten, name_settings
from pipeline.training.config import TrainConfig
from pipeline.training.earlier_runs import log_earlier_runs
from pipeline.training.features import open_features
from pipeline.training.heads import HeadPlan, plan_head, resolve_head_settings, train_head

logger = logging.getLogger(__name__)

RunT = TypeVar("RunT")
ScoresT = TypeVar("ScoresT")
DEMO_DATASET = "emoji_vendors"
DEMO_METHODS = ("baseline", "ema", "cdr", "marnet", "seda")
DEMO_SEEDS = (0, 1, 2)
ONE_DRAW = {"draws": 1}  # the papers' prediction, where the defaults average several draws
EXTRA_OVERRIDES: Mapping[str, Sequence[Mapping[str, Any]]] = {  # by method, what to evaluate beside the run's own settings
    "cdr": (ONE_DRAW,),
    "seda": (ONE_DRAW,),
    "marnet": (ONE_DRAW, *({"fusion": fusion} for fusion in ("concat", "add", "mul", "sum"))),
}


class DemoRun(NamedTuple):
    """A head to train and evaluate."""

    home: Path
    method: str
    seed: int
    caches: Mapping[str, str]  # names by batch key


def run_demo(home: Path) -> str:
    """Fetch, prepare, extract, train, evaluate and report everything that is missing.

    Returns:
        The table of results, the paths of the report and the duration, as text.

    Raises:
        UserError: the packages of the dataset cannot be fetched; names the remedy.
    """
    started = time.monotonic()
    encoders = load_spec(DEMO_DATASET)["encoders"]
    logger.info("1/4 the packages and the manifest of %s", DEMO_DATASET)
    prepare(DEMO_DATASET, fetch(DEMO_DATASET, home), home, {})
    runs = _pending_runs(home, encoders)
    if runs:
        from pipeline.extraction.extract import extract

        manifest = read_manifest(home, DEMO_DATASET)
        for encoder in encoders.values():
            logger.info("2/4 features of %s", encoder)
            extract(manifest, encoder, {}, home)
        open_features(home, DEMO_DATASET, "baseline", encoders).warn_about_images()
        seeds = ", ".join(map(str, DEMO_SEEDS))
        logger.info("3/4 %s methods, seeds %s", len(DEMO_METHODS), seeds)
        train_on_all_cores(_train_and_evaluate, runs)
    summary = home / "reports" / DEMO_DATASET / "demo.txt"
    if runs or not summary.is_file():
        from pipeline.report import results_table, write_report

        logger.info("4/4 the report")
        page, markdown = write_report(home, DEMO_DATASET)
        shown = results_table(home, DEMO_DATASET).to_string(index=False)
        write_atomic(summary, f"{shown}\n\nreport: {page}\ntable:  {markdown}\n")
    return f"{summary.read_text()}{time.monotonic() - started:.0f} s"


def _pending_runs(home: Path, encoders: Mapping[str, str]) -> list[DemoRun]:
    """Return the runs that lack an evaluation, or all runs when features are missing."""
    # The last one is a diagnostic: the baseline reads the texts as if they were images. Its accuracy shows how much the texts
    # would tell if test images had any.
    plans = [(method, encoders) for method in DEMO_METHODS] + [("baseline", {"image": encoders["text"]})]
    runs = [DemoRun(home.absolute(), method, seed, caches) for method, caches in plans for seed in DEMO_SEEDS]
    try:
        heads = [_plan(run) for run in runs]
        for method in DEMO_METHODS:
            log_earlier_runs(head for head in heads if head.config.method == method)
        plans_of_runs = zip(runs, heads, strict=True)
        return [run for run, head in plans_of_runs if not set(_planned_evaluations(run)) <= set(read_metrics(head.run))]
    except UserError:  # there is no cache yet, or extract has to complete one
        return runs


def train_on_all_cores(train: Callable[[RunT], ScoresT], runs: Sequence[RunT]) -> list[ScoresT]:
    """Call `train` for every run, on all cores, and return the results in the same order; the error of a run is raised."""
    from pipeline.runtime.executor import num_processes, open_executor

    results: dict[int, ScoresT] = {}
    with open_executor("local", num_processes(-1, len(runs))) as executor:
        for number, get_result in ProgressBar(executor.map(train, runs), label="training", total=len(runs), unit="run"):
            results[number] = get_result()
    return [results[number] for number in range(len(runs))]


def demo_settings(method: str) -> tuple[Any, TrainConfig]:
    """Return the settings of a method and of its training: the defaults, which a user's own data would get."""
    return resolve_head_settings(DEMO_DATASET, method, "head", {}, {})


def _plan(run: DemoRun) -> HeadPlan:
    settings, training = demo_settings(run.method)
    return plan_head(run.home, DEMO_DATASET, run.method, settings, training, run.seed, run.caches)


def _overrides(run: DemoRun) -> list[Mapping[str, Any]]:
    """Return the changes of the settings to evaluate a run with; the diagnostic has none."""
    return [{}, *extra_overrides(run.method)] if "text" in run.caches else [{}]


def extra_overrides(method: str) -> list[Mapping[str, Any]]:
    """Return what to evaluate a method with beside its own settings, without what these are already."""
    settings, _ = demo_settings(method)
    own = flatten(asdict(settings))
    extras = EXTRA_OVERRIDES.get(method, ())
    return [
        extra for extra in extras if any(own[name] != value for name, value in name_settings(type(settings), extra).items())
    ]


def _planned_evaluations(run: DemoRun) -> list[str]:
    return [evaluation_name(split, overrides) for split in ("val", "test") for overrides in _overrides(run)]


def _train_and_evaluate(run: DemoRun) -> None:
    folder = train_head(_plan(run), progress=False)
    for overrides in _overrides(run):
        evaluate(run.home, folder, "val", overrides)
        evaluate(run.home, folder, "test", overrides)
