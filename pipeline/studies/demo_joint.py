"""The demo of the joint stage: heads on frozen features, joint training, then new heads on the tuned encoder's features."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipeline.data.manifest_files import read_manifest
from pipeline.data.prepare import prepare
from pipeline.data.spec import load_spec
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import format_seeds
from pipeline.extraction.extract import extract
from pipeline.runtime.runs import RunFolder
from pipeline.studies.demo import DEMO_SEEDS, train_on_all_cores
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.joint.ddp import check_single_process
from pipeline.training.joint.finetune import finetune, resolve_joint_settings
from pipeline.training.joint.plan import JointConfig, JointOptions

logger = logging.getLogger(__name__)

JOINT_DEMO_DATASET = "openmoji"  # few pictures: an epoch of an encoder on two cores takes seconds
JOINT_DEMO_METHODS = ("baseline", "ema", "marnet", "seda")
JOINT_DEMO_ENCODER = ("efficientnet_lite", {"side": "64", "compute_dtype": "float32"})  # small images: minutes on a CPU
JOINT_DEMO_CONFIG = JointConfig(train="image", encoder_lr=1e-4)  # better on validation than 3e-4 and than augmented images
JOINT_DEMO_TRAINING = {"epochs": 6, "lr": 3e-4, "lr_step": 3, "batch_size": 32}


class JointDemoRun(NamedTuple):
    """A head to train, perhaps with joint training after it."""

    home: Path
    method: str
    seed: int
    caches: Mapping[str, str]  # names by batch key
    has_joint_stage: bool


class JointDemoScores(NamedTuple):
    """The accuracies of a run in percent, and the cache of its better head."""

    frozen: float  # on test, of the head on the frozen encoder
    joint: float  # on test, after joint training; equal to `frozen` when that was better on validation
    joint_val: float  # on validation, after joint training; 0 when the head of stage 2 was better
    image_cache: str  # fingerprint of the image cache that the better head reads


def run_demo_joint(home: Path) -> str:
    """Do every part of the demo that is missing.

    Returns:
        The table of accuracies on the test split and the duration, as text.

    Raises:
        UserError: torchrun runs several processes.
    """
    check_single_process("demo-joint")
    started = time.monotonic()
    home = home.absolute()
    prepare(JOINT_DEMO_DATASET, None, home, {})
    manifest = read_manifest(home, JOINT_DEMO_DATASET)
    encoder, encoder_settings = JOINT_DEMO_ENCODER
    logger.info("1/3 features of %s at %s pixels, and of the texts", encoder, encoder_settings["side"])
    text = load_spec(JOINT_DEMO_DATASET)["encoders"]["text"]
    caches = {
        "image": extract(manifest, encoder, encoder_settings, home).name,
        "text": extract(manifest, text, {}, home).name,
    }
    logger.info("2/3 %s: on frozen features, then together with the image encoder", ", ".join(JOINT_DEMO_METHODS))
    runs = _runs(home, caches, has_joint_stage=True)
    first = train_on_all_cores(train_and_score, runs)
    best, best_run = max(zip(first, runs, strict=True), key=lambda pair: pair[0].joint_val)
    rows = {"frozen": [scores.frozen for scores in first], "joint": [scores.joint for scores in first]}
    if best.joint_val:
        logger.info("3/3 heads on the encoder that was tuned with %s, the best on validation", best_run.method)
        second = train_on_all_cores(train_and_score, _runs(home, {**caches, "image": best.image_cache}, has_joint_stage=False))
        rows["heads on tuned features"] = [scores.frozen for scores in second]
    else:
        logger.info("3/3 left out: nothing gained on validation, so there is no tuned encoder")
    table = _format_table(rows, [scores.joint_val > 0 for scores in first])
    title = f"acc1 on test, mean ± deviation over {len(DEMO_SEEDS)} seeds"
    return f"{title}\n{table}\n{time.monotonic() - started:.0f} s"


def _runs(home: Path, caches: Mapping[str, str], has_joint_stage: bool) -> list[JointDemoRun]:
    """Return the runs of all methods and seeds; the seeds vary fastest."""
    return [JointDemoRun(home, method, seed, caches, has_joint_stage) for method in JOINT_DEMO_METHODS for seed in DEMO_SEEDS]


def train_and_score(run: JointDemoRun) -> JointDemoScores:
    """Train and evaluate a head, and then train its image encoder with it if the run has a joint stage."""
    settings, training = resolve_head_settings(JOINT_DEMO_DATASET, run.method, "tuned", {}, {})
    head = plan_head(run.home, JOINT_DEMO_DATASET, run.method, settings, training, run.seed, run.caches)
    folder = train_head(head, progress=False)
    frozen = _test_accuracy(run.home, folder)
    if not run.has_joint_stage:
        return JointDemoScores(frozen, 0.0, 0.0, head.config.caches["image"])
    joint_training = resolve_joint_settings(folder, JOINT_DEMO_TRAINING)
    outcome = finetune(run.home, folder, JOINT_DEMO_CONFIG, joint_training, JointOptions(workers=0, progress=False))
    joint_val = outcome.after if outcome.is_better else 0.0
    return JointDemoScores(frozen, _test_accuracy(run.home, outcome.run), joint_val, outcome.run.config().caches["image"])


def _test_accuracy(home: Path, run: RunFolder) -> float:
    return evaluate(home, run, "test", {})["metrics"]["acc1"]


def _format_table(rows: Mapping[str, Sequence[float]], is_joint_better: Sequence[bool]) -> str:
    """Return a table with a column per method: mean and deviation over the seeds, and how often joint training was better.

    Args:
        rows: The accuracies of all runs, by the title of the row, in the order of `_runs`.
        is_joint_better: For each run, whether joint training was better on validation.
    """
    shape = (len(JOINT_DEMO_METHODS), len(DEMO_SEEDS))
    cells = [[format_seeds(values) for values in np.reshape(row, shape)] for row in rows.values()]
    table = pd.DataFrame(cells, index=pd.Index(rows), columns=pd.Index(JOINT_DEMO_METHODS))
    num_better = np.reshape(is_joint_better, shape).sum(axis=1)
    table.loc["seeds in which joint training is kept"] = [f"{count} of {len(DEMO_SEEDS)}" for count in num_better]
    return table.to_string()
