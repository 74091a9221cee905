"""The whole idea in one command: openmoji through all stages, five methods and the text-only diagnostic, three seeds each."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data import manifest as manifests
from pipeline.data.prepare import prepare
from pipeline.evaluation.evaluate import evaluate, evaluation_name, read_metrics
from pipeline.runtime.files import write_atomic
from pipeline.runtime.logs import ProgressBar
from pipeline.training.heads import HeadPlan, plan_head, resolve_settings, train_head

logger = logging.getLogger(__name__)

DATASET = "openmoji"
METHODS = ("baseline", "ema", "cdr", "marnet", "seda")
SEEDS = (0, 1, 2)
ONE_DRAW = {"draws": 1}  # the papers' prediction; the tuned settings average eight
Job = tuple[Path, str, int, Mapping[str, str]]  # home, method, seed, caches by batch key
EXTRA: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "cdr": (ONE_DRAW,),
    "seda": (ONE_DRAW,),
    "marnet": (ONE_DRAW, *({"fusion": fusion} for fusion in ("concat", "add", "mul", "sum"))),
}


def run_demo(home: Path) -> str:
    """Prepare, extract, train, evaluate and report what is not there yet; the table and the report's paths as text."""
    started = time.monotonic()
    encoders = manifests.load_spec(DATASET)["encoders"]
    logger.info(f"1/4 the manifest of {DATASET}")
    prepare(DATASET, None, home, {})
    jobs = _pending(home, encoders)
    if jobs:
        from pipeline.extraction.extract import extract

        manifest = manifests.read_manifest(home, DATASET)
        for encoder in encoders.values():
            logger.info(f"2/4 features of {encoder}")
            extract(manifest, encoder, {}, home)
        logger.info(f"3/4 {len(METHODS)} methods, seeds {', '.join(map(str, SEEDS))}; settings chosen on validation")
        _train_all(jobs)
    summary = home / "reports" / DATASET / "demo.txt"
    if jobs or not summary.is_file():
        from pipeline.report import table, write_report

        logger.info("4/4 the report")
        page, markdown = write_report(home, DATASET)
        shown = table(home, DATASET).to_string(index=False)
        write_atomic(summary, f"{shown}\n\nreport: {page}\ntable:  {markdown}\n")
    return f"{summary.read_text()}{time.monotonic() - started:.0f} s"


def _pending(home: Path, encoders: Mapping[str, str]) -> list[Job]:
    """The heads whose evaluations are not all there; all of them while there are no features."""
    # The last one is the same classifier on the texts: what they would tell if a test image had one. A diagnostic.
    plans = [(method, encoders) for method in METHODS] + [("baseline", {"image": encoders["text"]})]
    jobs = [(home.absolute(), method, seed, caches) for method, caches in plans for seed in SEEDS]
    try:
        return [job for job in jobs if not set(_wanted(job)) <= set(read_metrics(_head(*job).run))]
    except ValueError:  # no cache yet, or one that extract has to complete
        return jobs


def _train_all(jobs: Sequence[Job]) -> None:
    """Train and evaluate, on every core."""
    from pipeline.runtime.executor import num_processes, open_executor

    with open_executor("local", num_processes(-1, len(jobs))) as crew:
        for _, finish in ProgressBar(crew.map(_train, jobs), label="training", total=len(jobs), unit="run"):
            finish()


def _head(home: Path, method: str, seed: int, encoders: Mapping[str, str]) -> HeadPlan:
    settings, training = resolve_settings(DATASET, method, "tuned", {}, {})
    return plan_head(home, DATASET, method, settings, training, seed, encoders)


def _overrides(method: str, encoders: Mapping[str, str]) -> list[Mapping[str, Any]]:
    return [{}, *EXTRA.get(method, ())] if "text" in encoders else [{}]


def _wanted(job: Job) -> list[str]:
    """Names of the evaluations a job ends with."""
    _, method, _, encoders = job
    return [evaluation_name(split, overrides) for split in ("val", "test") for overrides in _overrides(method, encoders)]


def _train(job: Job) -> None:
    home, method, _, encoders = job
    run = train_head(_head(*job), progress=False)
    for overrides in _overrides(method, encoders):
        evaluate(home, run, "val", overrides)
        evaluate(home, run, "test", overrides)
