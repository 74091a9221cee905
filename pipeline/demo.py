"""The whole idea in one command: openmoji through all stages, five methods and the text-only diagnostic, three seeds each."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import manifest as manifests
from pipeline.evaluate import evaluate
from pipeline.extract import extract
from pipeline.heads import resolve, train_head
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
    for method in METHODS:
        _train(home, method, encoders, EXTRA.get(method, ()))
    # The same classifier on the texts: what they would tell if a test image had one. A diagnostic, not a competitor.
    _train(home, "baseline", {"image": encoders["text"]}, ())
    _say("4/4 the report")
    page, markdown = write_report(home, DATASET)
    shown = table(home, DATASET).to_string(index=False)
    return f"{shown}\n\nreport: {page}\ntable:  {markdown}\n{time.monotonic() - started:.0f} s"


def _train(home: Path, method: str, encoders: Mapping[str, str], extra: Sequence[Mapping[str, Any]]) -> None:
    settings, training = resolve(DATASET, method, "tuned", {}, {})
    for seed in SEEDS:
        run = train_head(home, DATASET, method, settings, training, seed, encoders, progress=True)
        for overrides in ({}, *extra):
            evaluate(home, run, "val", overrides)
            evaluate(home, run, "test", overrides)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
