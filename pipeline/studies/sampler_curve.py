"""What the steps and draws of a sampler buy: accuracy and time of one finished run against S, beside the papers' sampler.

The accuracies are evaluations like any other, kept in the run. The times are of predictions for one batch of validation images,
whatever the split, so that the test split is read for its evaluations alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pandas as pd
import torch

from pipeline.cache.reader import find_cache
from pipeline.cache.table import FeatureTable, gather, samples_of
from pipeline.data import manifest as manifests
from pipeline.evaluation.evaluate import evaluate, evaluation_name, load_method, overridden, predict
from pipeline.report.sampler import curve_name, drawing
from pipeline.runtime import plugins
from pipeline.runtime.device import Precision, default_device
from pipeline.runtime.files import lock, write_atomic
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.types import Split

STEPS = (1, 2, 5, 10, 20, 50)  # S of ddim, besides T
DRAWS = (1, 8)  # K
VARIED = ("sampler", "sample_steps", "draws")  # settings of prediction that the curve varies
TIMED_ROWS = {"cpu": 256, "cuda": 1024}  # samples of the timed batch
PASSES = 5  # over it, more while they have taken less than
LEAST_SECONDS = 0.5
MOST_SECONDS = 10.0  # after which no other begins


@dataclass(frozen=True, slots=True)
class Point:
    """One way to sample: DDIM with S steps, or the ancestral chain of all T, each with K draws."""

    sampler: Literal["ddim", "ancestral"]
    steps: int
    draws: int

    @property
    def overrides(self) -> dict[str, Any]:
        """What `evaluate --set` is given for it; the ancestral chain has its steps from training."""
        steps = {"sample_steps": self.steps} if self.sampler == "ddim" else {}
        return {"sampler": self.sampler, "draws": self.draws, **steps}


@dataclass(frozen=True, slots=True)
class SamplerCurve:
    """Where the curve of a run was written, and its rows."""

    run: Path
    table: Path  # CSV
    picture: Path  # SVG
    rows: pd.DataFrame  # sampler, steps, draws, n, metrics in percent, ms per sample …


def points(num_steps: int) -> list[Point]:
    """The curve of a head trained with T steps: S of 1, 2, 5, 10, 20, 50 and T, none above T, and the ancestral chain."""
    steps = sorted({count for count in (*STEPS, num_steps) if count <= num_steps})
    ways: list[tuple[Literal["ddim", "ancestral"], int]] = [*(("ddim", count) for count in steps), ("ancestral", num_steps)]
    return [Point(sampler, count, draws) for sampler, count in ways for draws in DRAWS]


def sampler_curve(
    home: Path, run: RunFolder, split: Split, overrides: Mapping[str, Any], progress: bool = True
) -> SamplerCurve:
    """Evaluate and time a run at every point, and write `sampler-curve-<split>.csv` and `.svg` into its folder.

    `overrides` are other settings of prediction (eta, zero_start …). `ValueError` for a head that does not sample.
    """
    config = run.config()
    _, changes = overridden(config, overrides)
    _check(run, config, [field for field in overrides if field in VARIED])
    asked = points(int(config.settings["num_steps"]))
    batch = _timed_batch(home, config)
    total = sum(point.steps * point.draws for point in asked)
    rows = []
    with ProgressBar(label="sampler curve", total=total, unit="step", show=progress) as bar:
        for number, point in enumerate(asked):
            bar.set_postfix_str(f"{point.sampler} S={point.steps} K={point.draws}")
            record = evaluate(home, run, split, {**overrides, **point.overrides})
            if number == 0:
                _passes(run, config, overrides, point, batch)  # the first use of every kernel is slow
            times = _passes(run, config, overrides, point, batch)
            rows.append(_row(point, record, times, batch))
            bar.update(point.steps * point.draws)
    frame = pd.DataFrame(rows)
    name = curve_name(evaluation_name(split, changes))
    table, picture = run.path / name, (run.path / name).with_suffix(".svg")
    with lock(run.path):
        write_atomic(table, frame.to_csv(index=False))
        write_atomic(picture, drawing(frame))
    return SamplerCurve(run.path, table, picture, frame)


def _check(run: RunFolder, config: RunConfig, repeated: list[str]) -> None:
    run.check_done()
    if not _samples(config.method) or config.settings.get("denoiser") == "regression":
        able = ", ".join(name for name in plugins.names("methods") if _samples(name))
        raise ValueError(f"{run.path} predicts without a sampler, so there is no curve; methods that sample: {able}")
    if repeated:
        raise ValueError(f"--sampler-curve varies {', '.join(VARIED)}: leave {', '.join(repeated)} out of --set")


def _samples(method: str) -> bool:
    return set(VARIED) <= set(plugins.get("methods", method).PREDICTION)


def _timed_batch(home: Path, config: RunConfig) -> FeatureTable:
    """The first samples of the validation split, on the device."""
    device = default_device()
    manifest = manifests.read_manifest(home, config.dataset)
    cache = find_cache(home, manifest, config.caches["image"])
    samples = samples_of(manifest, "val")[: TIMED_ROWS[device.type]]
    return gather(manifest, {"image": cache}, samples, device, config.text_aggregate)


def _passes(run: RunFolder, config: RunConfig, overrides: Mapping[str, Any], point: Point, batch: FeatureTable) -> list[float]:
    """Seconds of predictions for the batch, one after another; `predict` returns when the device has finished."""
    settings, _ = overridden(config, {**overrides, **point.overrides})
    method = load_method(run, config, settings)
    precision: Precision = config.training.get("precision", "float32")
    seconds: list[float] = []
    while sum(seconds) < LEAST_SECONDS or (len(seconds) < PASSES and sum(seconds) < MOST_SECONDS):
        if default_device().type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        predict(method, batch, run.seed, batch_size=len(batch), precision=precision)
        seconds.append(time.perf_counter() - started)
    return seconds


def _row(point: Point, record: Mapping[str, Any], seconds: list[float], batch: FeatureTable) -> dict[str, Any]:
    per_sample = [1000.0 * each / len(batch) for each in seconds]
    return {
        "sampler": point.sampler,
        "steps": point.steps,
        "draws": point.draws,
        "n": record["n"],
        **record["metrics"],
        "ms": median(per_sample),
        "ms_min": min(per_sample),
        "ms_max": max(per_sample),
        "passes": len(seconds),
        "batch": len(batch),
        "threads": 1,  # `predict` computes on one
        "device": str(default_device()),
    }
