"""Both generations of a cache in one command: heads on frozen features, joint training, heads on what it has tuned."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd

from pipeline.data import manifest as manifests
from pipeline.data.prepare import prepare
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import format_seeds
from pipeline.extraction.extract import extract
from pipeline.runtime.executor import num_processes, open_executor
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunFolder
from pipeline.training.heads import plan_head, train_head
from pipeline.training.heads import resolve_settings as resolve_head
from pipeline.training.joint.ddp import check_alone
from pipeline.training.joint.finetune import finetune, resolve_joint_settings
from pipeline.training.joint.trainer import JointConfig, JointOptions

logger = logging.getLogger(__name__)

DATASET = "openmoji"
METHODS = ("baseline", "ema", "marnet", "seda")
SEEDS = (0, 1, 2)
IMAGE = ("efficientnet_lite", {"side": "64", "compute_dtype": "float32"})  # small pictures: minutes on a processor
JOINT = JointConfig(train="image", encoder_lr=1e-4)  # on validation better than 3e-4, and than augmented pictures
TRAINING = {"epochs": 6, "lr": 3e-4, "lr_step": 3, "batch_size": 32}
Job = TypeVar("Job")
Result = TypeVar("Result")


class Trained(NamedTuple):
    """A head to train: its features by batch key, and whether joint training follows."""

    home: Path
    method: str
    seed: int
    caches: Mapping[str, str]
    jointly: bool


class Scores(NamedTuple):
    """Accuracies in percent on the test split, and where joint training has led to."""

    frozen: float
    joint: float  # that of the frozen encoder when validation preferred it
    after: float  # on validation, of joint training; 0 when the head of stage 2 stayed the result
    image: str  # fingerprint of the cache that the better head reads


def run_demo_joint(home: Path) -> str:
    """Do what is not there yet; the table as text."""
    check_alone("demo-joint")
    started = time.monotonic()
    home = home.absolute()
    prepare(DATASET, None, home, {})
    manifest = manifests.read_manifest(home, DATASET)
    logger.info(f"1/3 features of {IMAGE[0]} at {IMAGE[1]['side']} pixels, and of the texts")
    text = manifests.load_spec(DATASET)["encoders"]["text"]
    caches = {"image": extract(manifest, *IMAGE, home).name, "text": extract(manifest, text, {}, home).name}
    logger.info(f"2/3 {', '.join(METHODS)}: on frozen features, then together with the image encoder")
    first = _spread(do, [Trained(home, method, seed, caches, True) for method in METHODS for seed in SEEDS])
    best, teacher = max(zip(first, _columns(), strict=True), key=lambda pair: pair[0].after)
    rows = {"frozen": [scores.frozen for scores in first], "joint": [scores.joint for scores in first]}
    if best.after:
        logger.info(f"3/3 heads on the encoder that was tuned with {teacher}, the best on validation")
        again = {**caches, "image": best.image}
        second = _spread(do, [Trained(home, method, seed, again, False) for method in METHODS for seed in SEEDS])
        rows["heads on tuned features"] = [scores.frozen for scores in second]
    else:
        logger.info("3/3 left out: nothing gained on validation, so there is no tuned encoder")
    table = pd.DataFrame([_cells(values) for values in rows.values()], index=pd.Index(rows), columns=pd.Index(METHODS))
    better = np.reshape([scores.after > 0 for scores in first], (len(METHODS), len(SEEDS))).sum(axis=1)
    table.loc["seeds in which joint training is kept"] = [f"{count} of {len(SEEDS)}" for count in better]
    return f"acc1 on test, mean ± deviation over {len(SEEDS)} seeds\n{table.to_string()}\n{time.monotonic() - started:.0f} s"


def do(job: Trained) -> Scores:
    """Train and evaluate a head, and then, if it is wanted, its image encoder with it."""
    settings, training = resolve_head(DATASET, job.method, "tuned", {}, {})
    head = plan_head(job.home, DATASET, job.method, settings, training, job.seed, job.caches)
    run = train_head(head, progress=False)
    frozen = _test(job.home, run)
    if not job.jointly:
        return Scores(frozen, 0.0, 0.0, head.config.caches["image"])
    outcome = finetune(job.home, run, JOINT, resolve_joint_settings(run, TRAINING), JointOptions(workers=0, progress=False))
    after = outcome.after if outcome.is_better else 0.0
    return Scores(frozen, _test(job.home, outcome.run), after, outcome.run.config().caches["image"])


def _test(home: Path, run: RunFolder) -> float:
    return evaluate(home, run, "test", {})["metrics"]["acc1"]


def _spread(task: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """The results, in the order of the jobs, by every core."""
    results: dict[int, Result] = {}
    with open_executor("local", num_processes(-1, len(jobs))) as crew:
        for number, finish in ProgressBar(crew.map(task, jobs), label="training", total=len(jobs), unit="run"):
            results[number] = finish()
    return [results[number] for number in range(len(jobs))]


def _columns() -> list[str]:
    """The method of every job."""
    return [method for method in METHODS for _ in SEEDS]


def _cells(values: Sequence[float]) -> list[str]:
    """Mean and deviation over the seeds of every method."""
    return [format_seeds(row) for row in np.reshape(values, (len(METHODS), len(SEEDS)))]
