"""Which encoders to train (SeDA Table 3): none of them, the image encoder, or both, from the same heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import format_seeds
from pipeline.runtime import plugins
from pipeline.training.features import cache_names
from pipeline.training.heads import plan_head, train_head
from pipeline.training.heads import resolve_settings as resolve_head
from pipeline.training.joint.ddp import check_alone
from pipeline.training.joint.finetune import finetune, resolve_joint_settings
from pipeline.training.joint.trainer import JointConfig, JointOptions

ROWS: Mapping[str, str] = {"freeze both": "", "train visual": "image", "train both": "both"}


def strategies(
    home: Path,
    dataset: str,
    method: str,
    preset: str,
    seeds: Sequence[int],
    caches: Mapping[str, str],
    joint: Mapping[str, Any],
    training: Mapping[str, Any],
    work: JointOptions,
) -> pd.DataFrame:
    """Mean and deviation over seeds of the method's metrics on the test split, one row per strategy.

    `caches` are those that the heads read, `joint` and `training` are settings of `JointConfig` and `TrainConfig`. `kept` is
    the share of seeds in which validation preferred joint training; in the others the row has the head of stage 2.
    """
    check_alone("ablate strategy")
    if "text" not in plugins.get("methods", method).NEEDS:
        raise ValueError(f"{method} reads no text, so there is no text encoder to train with it; choose a method that does")
    settings, head_training = resolve_head(dataset, method, preset, {}, {})
    names = cache_names(dataset, caches.get("image", ""), caches.get("text", ""))
    rows = []
    for title, train in ROWS.items():
        records, kept = [], 0
        for seed in seeds:
            run = train_head(plan_head(home, dataset, method, settings, head_training, seed, names), work.progress)
            if train:
                outcome = finetune(
                    home, run, JointConfig(**{**joint, "train": train}), resolve_joint_settings(run, training), work
                )
                run, kept = outcome.run, kept + outcome.is_better
            records.append(evaluate(home, run, "test", {})["metrics"])
        shown = [name for name in records[0] if not name.startswith(("overall_", "per_class_"))]
        cells = {name: format_seeds([record[name] for record in records]) for name in shown}
        rows.append({"strategy": title, **cells, "kept": f"{kept}/{len(seeds)}" if train else ""})
    return pd.DataFrame(rows)
