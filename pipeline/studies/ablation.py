"""Ablation of the encoders to train (SeDA Table 3): none, the image encoder, or both, starting from the same heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import format_seeds
from pipeline.report.comparison import METRIC_LABELS, format_difference
from pipeline.report.pairs import judge_against
from pipeline.report.results import read_groups, read_sample_metrics
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.training.features import cache_names
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.joint.ddp import check_single_process
from pipeline.training.joint.finetune import finetune, resolve_joint_settings
from pipeline.training.joint.plan import JointConfig, JointOptions

# The title of a row -> `JointConfig.train`; "" is no joint training.
TRAINED_ENCODERS: Mapping[str, str] = {"freeze both": "", "train visual": "image", "train both": "both"}


def compare_strategies(
    home: Path,
    dataset: str,
    method: str,
    preset: str,
    seeds: Sequence[int],
    caches: Mapping[str, str],
    joint: Mapping[str, Any],
    training: Mapping[str, Any],
    options: JointOptions,
) -> pd.DataFrame:
    """Train and test a method with each choice of encoders to train.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared and extracted dataset.
        method: The name of a method that reads texts.
        preset: The preset of the heads; see `resolve_head_settings`.
        seeds: The seeds of the heads and of joint training.
        caches: The names of the caches that the heads read, by batch key; "" or missing: the dataset's encoder.
        joint: Settings of `JointConfig`.
        training: Settings of `TrainConfig` for joint training.
        options: How joint training is carried out.

    Returns:
        One row per choice with the mean and standard deviation over seeds of the metrics on the test split, the difference to
        the first row in points with its 95 % interval, and a verdict. The column "kept" says for how many seeds joint training
        was better on validation. For the other seeds, the row uses the head of stage 2.

    Raises:
        UserError: the method reads no text, or torchrun runs several processes.
    """
    check_single_process("ablate strategy")
    if "text" not in plugins.get("methods", method).needs:
        raise UserError(f"{method} reads no text, so there is no text encoder to train with it; choose a method that does")
    settings, head_training = resolve_head_settings(dataset, method, preset, {}, {}, home)
    names = cache_names(home, dataset, caches.get("image", ""), caches.get("text", ""))
    rows, values = [], []
    for title, train in TRAINED_ENCODERS.items():
        runs, records, num_kept = [], [], 0
        for seed in seeds:
            run = train_head(plan_head(home, dataset, method, settings, head_training, seed, names), options.progress)
            if train:
                outcome = finetune(
                    home, run, JointConfig(**{**joint, "train": train}), resolve_joint_settings(run, training), options
                )
                run, num_kept = outcome.run, num_kept + outcome.is_better
            runs.append(run)
            records.append(evaluate(home, run, "test", {}))
        values.append(read_sample_metrics(runs, records, "test"))
        metrics = [record["metrics"] for record in records]
        shown = [name for name in metrics[0] if not name.startswith(("overall_", "per_class_"))]
        cells = {name: format_seeds([each[name] for each in metrics]) for name in shown}
        rows.append({"strategy": title, **cells, "kept": f"{num_kept}/{len(seeds)}" if train else ""})
    frozen = next(iter(TRAINED_ENCODERS))
    judged = judge_against(values[0], values[1:], read_groups(home, dataset), f"beats {frozen}", f"falls below {frozen}")
    table = pd.DataFrame(rows)
    table[f"{METRIC_LABELS[judged[0].metric]} vs {frozen}"] = [
        "-",
        *(format_difference(*each.difference[:3]) for each in judged),
    ]
    table["verdict"] = [frozen, *(each.verdict for each in judged)]
    return table
