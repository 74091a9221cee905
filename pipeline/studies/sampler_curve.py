"""Sampler curves: accuracy and time of a finished run against the number of sampling steps S, for DDIM and the papers' sampler.

The accuracies are ordinary evaluations, which are kept in the run. The times are measured on one batch of validation images,
even for the curve of another split, so that the test split is only read for evaluations.
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
from pipeline.cache.table import FeatureTable, read_table, split_samples
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.evaluate import apply_overrides, evaluate, evaluation_name, load_method, predict
from pipeline.report.sampler import draw_sampler_curve, sampler_curve_filename
from pipeline.runtime import plugins
from pipeline.runtime.device import Precision, default_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock, write_atomic
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.types import Split

CURVE_STEPS = (1, 2, 5, 10, 20, 50)  # S of DDIM; T is added to them
CURVE_DRAWS = (1, 8)  # K
MAX_USUAL_STEPS = 400  # S * K of a point that is measured unless it is asked for; the ancestral chain with one draw always is
ALL_POINTS, ANCESTRAL = "all", "ancestral"  # words of --points
VARIED_SETTINGS = ("sampler", "sample_steps", "draws")  # settings of prediction that the curve varies
TIMED_BATCH_ROWS = {"cpu": 256, "cuda": 1024}  # samples of the timed batch, by kind of device
MIN_PASSES = 5  # timed predictions for the batch, unless they take too long
MIN_TIMED_SECONDS = 0.5  # passes are repeated until they have taken this long together
MAX_TIMED_SECONDS = 10.0  # after this time no further pass begins


@dataclass(frozen=True, slots=True)
class SamplerPoint:
    """One setting of the sampler: DDIM with S steps, or the ancestral sampler with all T steps, each with K draws."""

    sampler: Literal["ddim", "ancestral"]
    steps: int
    draws: int

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings of prediction of this point; the ancestral sampler takes its number of steps from training."""
        steps = {"sample_steps": self.steps} if self.sampler == "ddim" else {}
        return {"sampler": self.sampler, "draws": self.draws, **steps}


@dataclass(frozen=True, slots=True)
class SamplerCurve:
    """The curve of a run and the files in which it was written."""

    run: Path
    table: Path  # CSV
    picture: Path  # SVG
    rows: pd.DataFrame  # sampler, steps, draws, n, metrics in percent, ms per sample …


def curve_points(num_steps: int) -> list[SamplerPoint]:
    """Return the points of a head's curve: DDIM with S of 1, 2, 5, 10, 20, 50 and T, none above T, and the ancestral sampler.

    Args:
        num_steps: T, the number of diffusion steps in training.
    """
    steps = sorted({count for count in (*CURVE_STEPS, num_steps) if count <= num_steps})
    samplers: list[tuple[Literal["ddim", "ancestral"], int]] = [*(("ddim", count) for count in steps), ("ancestral", num_steps)]
    return [SamplerPoint(sampler, count, draws) for sampler, count in samplers for draws in CURVE_DRAWS]


def parse_points(text: str, num_steps: int) -> list[SamplerPoint]:
    """Return the points that a user asks for.

    Args:
        text: "" for those of `curve_points` that are not slow: up to 400 evaluations of the network per sample, and the
            ancestral chain with one draw. "all" for all of them. Else a list of S, SxK, ancestral and ancestralxK, such as
            "1,5,20x8,ancestral".
        num_steps: T, the number of diffusion steps in training.

    Raises:
        UserError: a word is no point, or S is above T.
    """
    points = curve_points(num_steps)
    if text == ALL_POINTS:
        return points
    if not text:
        chain = SamplerPoint("ancestral", num_steps, 1)
        return [point for point in points if point.steps * point.draws <= MAX_USUAL_STEPS or point == chain]
    return list(dict.fromkeys(_parse_point(word.strip(), num_steps) for word in text.split(",")))


def _parse_point(word: str, num_steps: int) -> SamplerPoint:
    name, times, draws = word.partition("x")
    steps = str(num_steps) if name == ANCESTRAL else name
    numbers = [int(number) if number.isascii() and number.isdigit() else 0 for number in (steps, draws if times else "1")]
    if not 1 <= numbers[0] <= num_steps or numbers[1] < 1:
        raise UserError(
            f"--points {word!r}: give all, or a list of S, SxK, {ANCESTRAL} and {ANCESTRAL}xK with S steps, 1 to {num_steps}, "
            f"and K draws, such as 1,5,20x8,{ANCESTRAL}"
        )
    return SamplerPoint("ancestral" if name == ANCESTRAL else "ddim", *numbers)


def write_sampler_curve(
    home: Path, run: RunFolder, split: Split, overrides: Mapping[str, Any], progress: bool = True, points: str = ""
) -> SamplerCurve:
    """Evaluate and time a run at every point, and write `sampler-curve-<split>.csv` and `.svg` into its folder.

    Args:
        home: The folder of all caches and runs.
        run: A finished run.
        split: The split of the accuracies.
        overrides: Other settings of prediction (eta, zero_start …).
        progress: Whether to show a progress bar.
        points: Which points, see `parse_points`.

    Raises:
        UserError: the head does not sample, the run is not finished, `overrides` has a setting that the curve varies, or
            `points` are none.
    """
    config = run.config()
    _, changes = apply_overrides(config, overrides)
    _check_run(run, config, overrides)
    chosen = parse_points(points, int(config.setting("num_steps")))
    batch = _timed_batch(home, config)
    total = 2 * sum(point.steps * point.draws for point in chosen)  # of the evaluation, and of its timing
    rows = []
    with ProgressBar(label="sampler curve", total=total, unit="step", show=progress) as bar:
        for number, point in enumerate(chosen):
            bar.set_postfix_str(f"{point.sampler} S={point.steps} K={point.draws}")
            record = evaluate(home, run, split, {**overrides, **point.overrides})
            bar.update(point.steps * point.draws)
            if number == 0:
                _time_passes(run, config, overrides, point, batch)  # the first use of every kernel is slow
            times = _time_passes(run, config, overrides, point, batch)
            rows.append(_row(point, record, times, batch))
            bar.update(point.steps * point.draws)
    frame = pd.DataFrame(rows)
    name = sampler_curve_filename(evaluation_name(split, changes))
    table, picture = run.path / name, (run.path / name).with_suffix(".svg")
    with lock(run.path):
        write_atomic(table, frame.to_csv(index=False))
        write_atomic(picture, draw_sampler_curve(frame))
    return SamplerCurve(run.path, table, picture, frame)


def _check_run(run: RunFolder, config: RunConfig, overrides: Mapping[str, Any]) -> None:
    """Raise `UserError` for a run that is not finished or does not sample, and for overrides that the curve varies."""
    run.check_done()
    if not _has_sampler(config.method) or config.setting("denoiser") == "regression":
        able = ", ".join(name for name in plugins.names("methods") if _has_sampler(name))
        raise UserError(f"{run.path} predicts without a sampler, so there is no curve; methods that sample: {able}")
    repeated = [key for key in overrides if _setting_of(key) in VARIED_SETTINGS]
    if repeated:
        raise UserError(f"--sampler-curve varies {', '.join(VARIED_SETTINGS)}: leave {', '.join(repeated)} out of --set")


def _has_sampler(method: str) -> bool:
    return set(VARIED_SETTINGS) <= set(map(_setting_of, plugins.get("methods", method).prediction))


def _setting_of(name: str) -> str:
    """Return the name of a setting inside its part: "draws" for "cdr.draws"."""
    return name.rpartition(".")[2]


def _timed_batch(home: Path, config: RunConfig) -> FeatureTable:
    """Return the first samples of the validation split, on the device that computes."""
    device = default_device()
    manifest = read_manifest(home, config.dataset)
    cache = find_cache(home, manifest, config.caches["image"])
    samples = split_samples(manifest, "val")[: TIMED_BATCH_ROWS[device.type]]
    return read_table(manifest, {"image": cache}, samples, device, config.text_aggregate)


def _time_passes(
    run: RunFolder, config: RunConfig, overrides: Mapping[str, Any], point: SamplerPoint, batch: FeatureTable
) -> list[float]:
    """Return the seconds of each prediction for the batch; `predict` returns after the device has finished."""
    settings, _ = apply_overrides(config, {**overrides, **point.overrides})
    method = load_method(run, config, settings)
    precision: Precision = config.training.get("precision", "float32")
    seconds: list[float] = []
    while sum(seconds) < MIN_TIMED_SECONDS or (len(seconds) < MIN_PASSES and sum(seconds) < MAX_TIMED_SECONDS):
        if default_device().type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        predict(method, batch, run.seed, batch_size=len(batch), precision=precision)
        seconds.append(time.perf_counter() - started)
    return seconds


def _row(point: SamplerPoint, record: Mapping[str, Any], seconds: list[float], batch: FeatureTable) -> dict[str, Any]:
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
        "threads": 1,  # `predict` uses one
        "device": str(default_device()),
    }
