"""The demo of the joint stage with its controls: is a gain of joint training one of more epochs, of the encoder, or of both?

`PARTS` says what the parts are. Each is an ordinary run of each method and seed, so that an interrupted demo goes on where it
was. No encoder is chosen among methods or seeds: the deviation over seeds includes that of the encoders.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipeline.data.manifest_files import read_manifest
from pipeline.data.prepare import prepare
from pipeline.data.spec import load_spec
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import MIN_SEEDS_FOR_VERDICT, format_seeds
from pipeline.extraction.extract import extract
from pipeline.report.blocks import BulletList, Paragraph, Table
from pipeline.report.comparison import METRIC_LABELS, format_difference
from pipeline.report.markdown import render_markdown
from pipeline.report.pairs import judge_pairs
from pipeline.report.results import BASELINE, SampleMetrics, read_groups, read_sample_metrics
from pipeline.runtime.files import write_atomic
from pipeline.runtime.runs import RunFolder
from pipeline.studies.demo import train_on_all_cores
from pipeline.training.config import TrainConfig
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.joint.ddp import check_single_process
from pipeline.training.joint.finetune import finetune, resolve_joint_settings
from pipeline.training.joint.plan import NO_ENCODER, JointConfig, JointOptions

logger = logging.getLogger(__name__)

JOINT_DEMO_DATASET = "openmoji"  # few pictures: an epoch of an encoder on two cores takes seconds
JOINT_DEMO_METHODS = (BASELINE, "ema", "marnet", "seda")
JOINT_DEMO_SEEDS = tuple(range(MIN_SEEDS_FOR_VERDICT))
JOINT_DEMO_ENCODER = ("efficientnet_lite", {"side": "64", "compute_dtype": "float32"})  # small images: minutes on a CPU
JOINT_DEMO_CONFIG = JointConfig(train="image", encoder_lr=1e-4)  # better on validation than 3e-4 and than augmented images
JOINT_DEMO_TRAINING = {"epochs": 6, "lr": 3e-4, "lr_step": 3, "batch_size": 32}

FROZEN, HEAD_ONLY, JOINT = "frozen", "head-only continuation", "joint training"
OWN_ENCODER, BASELINE_ENCODER = "heads on tuned features", f"heads on the {BASELINE}'s tuned features"
PARTS = {  # the rows of each method, and what they are
    FROZEN: "the heads of stage 2",
    HEAD_ONLY: "these heads, trained on as in joint training, with the same settings and epochs, but with frozen encoders",
    JOINT: "these heads, trained on together with the image encoder",
    OWN_ENCODER: "new heads, trained as in stage 2, on the encoder that joint training of the same method and seed has tuned",
    BASELINE_ENCODER: f"new heads on the encoder that the {BASELINE} of the same seed has tuned, which no text has reached",
}
EXPLANATION = (
    "kept: in how many seeds the continuation was better on validation. In the others, the row has the head of stage 2, and a "
    f"new head has the frozen encoder. The difference is that to the {HEAD_ONLY} of the method, with its interval over seeds "
    "and samples; the p-values behind the verdicts are adjusted for all rows."
)


class Head(NamedTuple):
    """A head of stage 2 to train."""

    home: Path
    dataset: str
    method: str
    settings: Any
    training: TrainConfig
    caches: Mapping[str, str]  # names by batch key
    seed: int


class Continuation(NamedTuple):
    """Joint training to do after a head."""

    head: Head
    joint: JointConfig
    training: Mapping[str, Any]


class Continued(NamedTuple):
    """A head and its continuations; a continuation that is not kept is the head itself."""

    frozen: RunFolder
    head_only: RunFolder
    joint: RunFolder

    @property
    def image_cache(self) -> str:
        """The fingerprint of the image features of the kept encoder."""
        return self.joint.config().caches["image"]


def run_demo_joint(home: Path) -> str:
    """Do every part of the demo that is missing, and write the table to `reports/<dataset>/demo-joint.md`.

    Returns:
        The table of results on the test split, the path of the file and the duration, as text.

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
    heads = []
    for method in JOINT_DEMO_METHODS:
        settings, training = resolve_head_settings(JOINT_DEMO_DATASET, method, "tuned", {}, {})
        heads += [Head(home, JOINT_DEMO_DATASET, method, settings, training, caches, seed) for seed in JOINT_DEMO_SEEDS]
    table = compare_joint_training(heads, JOINT_DEMO_CONFIG, JOINT_DEMO_TRAINING)
    path = write_table(home, JOINT_DEMO_DATASET, table)
    return f"{table.to_string(index=False)}\ntable: {path}\n{time.monotonic() - started:.0f} s"


def write_table(home: Path, dataset: str, table: pd.DataFrame) -> Path:
    """Write the table of a dataset and what its rows are as `reports/<dataset>/demo-joint.md`, and return that file."""
    path = home / "reports" / dataset / "demo-joint.md"
    rows = tuple(map(tuple, table.itertuples(index=False)))
    parts = BulletList(tuple(f"{name}: {meaning}" for name, meaning in PARTS.items()))
    blocks = (parts, Paragraph(EXPLANATION), Table(tuple(table.columns), rows, "", num_text_columns=2))
    write_atomic(path, render_markdown(f"{dataset}: joint training and its controls, on the test split", blocks))
    return path


def compare_joint_training(heads: Sequence[Head], joint: JointConfig, training: Mapping[str, Any]) -> pd.DataFrame:
    """Train and test heads and their continuations; see `PARTS`.

    Args:
        heads: The heads of all methods, among them the baseline, with the same seeds on the same features; seeds vary fastest.
        joint: How the encoders are trained; it must name the image encoder or blocks of it.
        training: Settings of `TrainConfig` for both continuations.

    Returns:
        A row for each method and part with the metrics on the test split, mean and standard deviation over seeds, and the
        difference to the head-only continuation of the method with its 95 % interval and a verdict.
    """
    logger.info("2/3 heads, each trained on alone, and together with the image encoder")
    continued = train_on_all_cores(train_continued, [Continuation(head, joint, training) for head in heads])
    encoders = {(head.method, head.seed): each.image_cache for head, each in zip(heads, continued, strict=True)}
    logger.info("3/3 new heads on the tuned encoders of each seed")
    new_heads = {  # the two are equal for the baseline
        (title, head.method, head.seed): head._replace(caches={**head.caches, "image": encoders[source, head.seed]})
        for head in heads
        for title, source in {OWN_ENCODER: head.method, BASELINE_ENCODER: BASELINE}.items()
        if title == OWN_ENCODER or head.method != BASELINE
    }
    runs = dict(zip(new_heads, train_on_all_cores(train_and_test, list(new_heads.values())), strict=True))
    for head, each in zip(heads, continued, strict=True):
        for title, run in zip((FROZEN, HEAD_ONLY, JOINT), each, strict=True):
            runs[title, head.method, head.seed] = run
    return _compare(heads, runs)


def train_and_test(head: Head) -> RunFolder:
    """Train a head, evaluate it on the test split, and return its run."""
    plan = plan_head(head.home, head.dataset, head.method, head.settings, head.training, head.seed, head.caches)
    run = train_head(plan, progress=False)
    evaluate(head.home, run, "test", {})
    return run


def train_continued(plan: Continuation) -> Continued:
    """Train a head, and then train it on twice, alone and with its encoder; evaluate all three on the test split."""
    home, frozen = plan.head.home, train_and_test(plan.head)
    training, options = resolve_joint_settings(frozen, plan.training), JointOptions(workers=0, progress=False)
    kept = [finetune(home, frozen, joint, training, options).run for joint in (JointConfig(train=NO_ENCODER), plan.joint)]
    for run in kept:
        evaluate(home, run, "test", {})
    return Continued(frozen, *kept)


def _compare(heads: Sequence[Head], runs: Mapping[tuple[str, str, int], RunFolder]) -> pd.DataFrame:
    """Return the table of `compare_joint_training` from the runs by part, method and seed."""
    home, dataset = heads[0].home, heads[0].dataset
    seeds = list(dict.fromkeys(head.seed for head in heads))
    parts = [
        (method, title)
        for method in dict.fromkeys(head.method for head in heads)
        for title in PARTS
        if (title, method, seeds[0]) in runs
    ]
    scored = {(method, title): _score(home, [runs[title, method, seed] for seed in seeds]) for method, title in parts}
    compared = [part for part in parts if part[1] != HEAD_ONLY]
    pairs = [(scored[part].samples, scored[part[0], HEAD_ONLY].samples) for part in compared]
    verdicts = judge_pairs(pairs, read_groups(home, dataset), f"above {HEAD_ONLY}", f"below {HEAD_ONLY}")
    judged = dict(zip(compared, verdicts, strict=True))
    rows = []
    for part in parts:
        method, title = part
        num_kept = sum(runs[title, method, seed] != runs[FROZEN, method, seed] for seed in seeds)
        kept = "-" if title == FROZEN else f"{num_kept} of {len(seeds)}"
        difference = format_difference(*judged[part].difference[:3]) if part in judged else "-"
        columns = {**scored[part].shown, f"{METRIC_LABELS[verdicts[0].metric]} vs {HEAD_ONLY}": difference}
        verdict = judged[part].verdict if part in judged else "-"
        rows.append({"method": method, "head": title, "kept": kept, **columns, "verdict": verdict})
    return pd.DataFrame(rows)


class _Scored(NamedTuple):
    shown: Mapping[str, str]  # mean and deviation over seeds, by name of the metric
    samples: SampleMetrics


def _score(home: Path, runs: Sequence[RunFolder]) -> _Scored:
    records = [evaluate(home, run, "test", {}) for run in runs]
    metrics = [record["metrics"] for record in records]
    shown = {
        METRIC_LABELS[name]: format_seeds([each[name] for each in metrics]) for name in METRIC_LABELS if name in metrics[0]
    }
    return _Scored(shown, read_sample_metrics(runs, records, "test"))
