"""What a reproduction costs: how many runs there are, how many are done, and about how long the others take.

The time of a head is that of a finished run with the same settings. Where there is none, one epoch is trained on a part of the
data, in a folder that is deleted again. Joint training is estimated from the time that extraction took.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.cache import info
from pipeline.cache.reader import Cache
from pipeline.evaluation.evaluate import evaluate, read_metrics
from pipeline.runtime.executor import START_SECONDS, num_processes
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunFolder
from pipeline.training.heads import HeadPlan, plan_head_on, train_head

logger = logging.getLogger(__name__)

PROBE_SAMPLES = 2000  # training samples of a probe, about
JOINT_FACTOR = 3.0  # passes through an encoder that a training step takes, forward and backward, in units of extraction


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The work of a reproduction."""

    num_runs: int
    num_done: int
    num_waiting: int  # runs on features that are not there yet, whose time cannot be told
    seconds: float  # of the runs that are left but for the waiting ones

    def describe(self, name: str, dataset: str) -> str:
        """Return one line for people."""
        left = self.num_runs - self.num_done
        waiting = f"; {self.num_waiting} of them wait for features, and their time is not counted" if self.num_waiting else ""
        time = f", about {_describe_seconds(self.seconds)}{waiting}" if left else ""
        return f"{name} on {dataset}: {self.num_runs} runs, {self.num_done} are there already, {left} are left{time}"


def _describe_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{math.ceil(seconds / 10) * 10} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def estimate_heads(home: Path, heads: Sequence[HeadPlan], workers: int, is_alike: bool = False) -> float:
    """Return about how many seconds the unfinished heads take on this machine, with the start of its processes.

    Args:
        home: The folder of all caches and runs.
        heads: The heads.
        workers: See `num_processes`.
        is_alike: The heads cost the same, such as cells of a grid, so that one probe tells the time of all.
    """
    left = [head for head in heads if not head.run.is_done]
    if not left:
        return 0.0
    by_folder: dict[Path, list[HeadPlan]] = {}
    for head in left:
        by_folder.setdefault(head.run.path.parent, []).append(head)
    recorded = {folder: _recorded_seconds(folder) for folder in by_folder}
    unknown = [folder for folder, seconds in recorded.items() if math.isnan(seconds)]
    probed = unknown[:1] if is_alike else unknown
    with _scratch_home(home) as scratch:
        for folder in ProgressBar(probed, label="timing one epoch of each row", show=bool(probed)):
            recorded[folder] = _probe_seconds(by_folder[folder][0], scratch)
    if is_alike and unknown:
        recorded |= dict.fromkeys(unknown, recorded[probed[0]])
    total = sum(seconds * len(by_folder[folder]) for folder, seconds in recorded.items() if not math.isnan(seconds))
    number = num_processes(workers, len(left), left[0].features.num_bytes)
    return total / max(1, number) + START_SECONDS * (number > 0)


def _recorded_seconds(folder: Path) -> float:
    """Return the mean seconds of training and evaluation of the finished seeds in a folder; NaN without any."""
    times = []
    for path in folder.glob("seed*/done"):
        run = RunFolder.at(path.parent)
        evaluations = read_metrics(run).values()
        times.append(run.read_done()["seconds"] + max((each["seconds"] for each in evaluations), default=0.0))
    return float(np.mean(times)) if times else math.nan


@contextmanager
def _scratch_home(home: Path) -> Iterator[Path]:
    """Yield a home with the same manifests and caches whose runs are deleted afterwards."""
    with TemporaryDirectory() as folder:
        shutil.copytree(home / "manifests", Path(folder) / "manifests")
        (Path(folder) / "caches").symlink_to((home / "caches").absolute())
        yield Path(folder)


def _probe_seconds(head: HeadPlan, scratch: Path) -> float:
    """Train one epoch of a head on a part of the data, and return about what all of it takes; NaN if it cannot be trained."""
    fraction = min(1.0, PROBE_SAMPLES / max(1, head.features.num_train))
    features = replace(head.features, home=scratch, fraction=fraction)
    probe = plan_head_on(features, head.config.method, head.settings, replace(head.training, epochs=1), head.run.seed)
    try:
        run = train_head(probe, progress=False)
        prediction = evaluate(scratch, run, "val", {})["seconds"]
    except Exception as error:
        if isinstance(error, OSError):
            raise
        return math.nan  # what it is, the run itself will say, and become a row that could not be had
    epoch = max(0.0, run.read_done()["seconds"] - prediction) / fraction
    num_validations = math.ceil(head.training.epochs / head.training.validate_every)
    splits = {split: len(features.manifest.split(split)) for split in ("val", "test")}
    test = prediction * splits["test"] / max(1, splits["val"])
    return epoch * head.training.epochs + prediction * num_validations + test


def estimate_joint(caches: Sequence[Cache], num_train: int, num_samples: int, epochs: int) -> float:
    """Return about how many seconds joint training takes, and the extraction of the tuned encoders' features after it.

    Args:
        caches: The features of the encoders that are trained.
        num_train: Training samples.
        num_samples: All samples.
        epochs: Passes over the training samples.
    """
    per_sample = sum(info(cache.path)["seconds"] / max(1, len(cache.ids)) for cache in caches)
    return per_sample * (JOINT_FACTOR * num_train * epochs + num_samples)
