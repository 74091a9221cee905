"""The whole idea in one command: openmoji through all stages, five methods and the text-only diagnostic, three seeds each."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline import manifest as manifests
from pipeline.evaluate import evaluate, evaluation_name, read_metrics
from pipeline.extract import extract
from pipeline.heads import Head, plan, resolve, train_head
from pipeline.prepare import prepare
from pipeline.report import table, write_report

DATASET = "openmoji"
METHODS = ("baseline", "ema", "cdr", "marnet", "seda")
SEEDS = (0, 1, 2)
ONE_DRAW = {"draws": 1}  # the papers' prediction; the tuned settings average eight
EXTRA: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "cdr": (ONE_DRAW,),
    "seda": (ONE_DRAW,),
    "marnet": (ONE_DRAW, *({"fusion": fusion} for fusion in ("concat", "add", "mul", "sum"))),
}


def run_demo(home: Path) -> str:
    """Prepare, extract, train, evaluate and report what is not there yet; the table and the report's paths as text."""
    started = time.monotonic()
    spec = manifests.load_spec(DATASET)
    encoders = spec["encoders"]
    _say(f"1/4 the manifest of {DATASET}")
    prepare(DATASET, None, home, {})
    manifest = manifests.read(home, DATASET)
    for encoder in encoders.values():
        _say(f"2/4 features of {encoder}")
        extract(manifest, encoder, {}, home)
    _say(f"3/4 {len(METHODS)} methods, seeds {', '.join(map(str, SEEDS))}; settings chosen on validation")
    train_all(home, encoders)
    _say("4/4 the report")
    page, markdown = write_report(home, DATASET)
    shown = table(home, DATASET).to_string(index=False)
    return f"{shown}\n\nreport: {page}\ntable:  {markdown}\n{time.monotonic() - started:.0f} s"


def train_all(home: Path, encoders: Mapping[str, str]) -> None:
    """Train and evaluate what is not there yet, one single-threaded process per core; a GPU takes one at a time."""
    # The last one is the same classifier on the texts: what they would tell if a test image had one. A diagnostic.
    plans = [(method, encoders) for method in METHODS] + [("baseline", {"image": encoders["text"]})]
    jobs = [(home, method, seed, caches) for method, caches in plans for seed in SEEDS]
    pending = [job for job in jobs if not set(_wanted(job)) <= set(read_metrics(_head(*job).run))]
    if not pending:
        return
    num_workers = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, len(pending))
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _die_quietly) as pool:
        done = as_completed([pool.submit(_train, *job) for job in pending])
        for future in tqdm(done, total=len(pending), unit="run", file=sys.stderr):
            future.result()


def _head(home: Path, method: str, seed: int, encoders: Mapping[str, str]) -> Head:
    settings, training = resolve(DATASET, method, "tuned", {}, {})
    return plan(home, DATASET, method, settings, training, seed, encoders)


def _overrides(method: str, encoders: Mapping[str, str]) -> list[Mapping[str, Any]]:
    return [{}, *EXTRA.get(method, ())] if "text" in encoders else [{}]


def _wanted(job: tuple[Path, str, int, Mapping[str, str]]) -> list[str]:
    """Names of the evaluations a job ends with."""
    _, method, _, encoders = job
    return [evaluation_name(split, overrides) for split in ("val", "test") for overrides in _overrides(method, encoders)]


def _train(home: Path, method: str, seed: int, encoders: Mapping[str, str]) -> None:
    run = train_head(_head(home, method, seed, encoders), progress=False)
    for overrides in _overrides(method, encoders):
        evaluate(home, run, "val", overrides)
        evaluate(home, run, "test", overrides)


def _die_quietly() -> None:
    """Ctrl-C ends a worker without a traceback; its run goes on at the next start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
