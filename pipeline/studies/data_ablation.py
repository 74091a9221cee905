"""Ablation of the training data: a method beside the baseline on nested parts of the training split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.statistics import format_seeds
from pipeline.report.comparison import METRIC_LABELS, format_difference
from pipeline.report.pairs import judge_pairs
from pipeline.report.results import BASELINE, SampleMetrics, read_groups, read_sample_metrics
from pipeline.runtime.errors import UserError
from pipeline.training.features import cache_names, open_features
from pipeline.training.heads import plan_head_on, resolve_head_settings, train_head
from pipeline.types import Split


def compare_fractions(
    home: Path,
    dataset: str,
    method: str,
    preset: str,
    seeds: Sequence[int],
    fractions: Sequence[float],
    caches: Mapping[str, str],
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    split: Split = "test",
    progress: bool = True,
) -> pd.DataFrame:
    """Train and test a method and the baseline on fractions of every class of the training split.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared and extracted dataset.
        method: The name of a method.
        preset: See `resolve_head_settings`.
        seeds: The seeds of every row.
        fractions: Above 0 and at most 1; see `by_fraction`.
        caches: The names of the caches that the heads read, by batch key; "" or missing: the dataset's encoder.
        settings: Settings of the method. The baseline has those of the preset.
        training: Settings of `TrainConfig`, for both.
        split: The split that is evaluated; every read of "test" is logged.
        progress: Whether to show progress bars.

    Returns:
        One row per fraction: the number of training samples; the deciding metric of both heads, mean and standard deviation
        over seeds; their difference in points with its 95 % interval; and a verdict, adjusted for the number of rows.

    Raises:
        UserError: the method is the baseline, or a fraction is not possible.
    """
    if method == BASELINE:
        raise UserError(f"this study compares a method with the {BASELINE}: choose another method")
    names = cache_names(home, dataset, caches.get("image", ""), caches.get("text", ""))
    pairs: list[tuple[SampleMetrics, SampleMetrics]] = []
    counts = []
    for fraction in fractions:
        samples = []
        for name, given in ((method, settings), (BASELINE, {})):
            keys = names if name == method else {"image": names["image"]}
            features = open_features(home, dataset, name, keys, fraction=fraction)
            config, train_config = resolve_head_settings(dataset, name, preset, given, training, home)
            heads = [plan_head_on(features, name, config, train_config, seed) for seed in seeds]
            runs = [train_head(head, progress) for head in heads]
            samples.append(read_sample_metrics(runs, [evaluate(home, run, split, {}) for run in runs], split))
            counts.append(features.num_train)
        pairs.append((samples[0], samples[1]))
    judged = judge_pairs(pairs, read_groups(home, dataset), f"beats the {BASELINE}", f"falls below the {BASELINE}")
    metric = judged[0].metric
    means = [[format_seeds(each.by_metric[metric].mean(axis=1)) for each in pair] for pair in pairs]
    return pd.DataFrame(
        {
            "fraction": list(fractions),
            "training samples": counts[::2],
            f"{METRIC_LABELS[metric]} {method}": [own for own, _ in means],
            f"{METRIC_LABELS[metric]} {BASELINE}": [base for _, base in means],
            "difference": [format_difference(*each.difference[:3]) for each in judged],
            "verdict": [each.verdict for each in judged],
        }
    )
