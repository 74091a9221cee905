"""Choose settings of methods without reading the test split: on the validation split, or by cross-validation.

A random search with halving: `--points` random settings run on the first trials, and the best third of them on all trials. A
trial is a fold of the training and validation splits together (`--by folds`; groups of samples are not divided),
or a seed that is scored on the validation split (`--by val`). Prints the `tuned:` entry of `data_manifests/<dataset>.yaml`. The
branches of MARNet use the settings that the yaml holds for EMA and CDR.

    python benchmarks/select_settings.py --home artifacts --dataset openmoji --method ema
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml

from pipeline.cache.reader import find_cache
from pipeline.cache.table import FeatureTable, load_split, ordered_batches, shuffled_batches
from pipeline.data import splits
from pipeline.data.manifest_files import read_manifest
from pipeline.data.spec import load_spec
from pipeline.evaluation import metrics
from pipeline.evaluation.evaluate import predict
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import configure
from pipeline.training.config import TrainConfig
from pipeline.training.state import Score, TrainState
from pipeline.training.train import train
from pipeline.types import Predictor

FOLDS = 5
SEEDS = 3
TRAINING = {
    "lr": (3e-4, 1e-3, 3e-3),
    "lr_step": (4, 8),
    "epochs": (20, 40),
    "weight_decay": (1e-5, 1e-4, 1e-3),
    "select": ("last",),
    "validate_every": (10,),
}
DIFFUSION = {
    "dropout": (0.1, 0.3, 0.5),
    "train_min_step": (0.0, 0.5, 0.8),
    "w_mse": (0.1, 0.3, 1.0),
    "draws": (8,),
    "sample_steps": (10,),
}
SPACES: dict[str, dict[str, tuple[Any, ...]]] = {
    "baseline": {"dropout": (0.0, 0.2, 0.5)},
    "ema": {"dropout": (0.0, 0.2, 0.5), "w_ita": (0.1, 0.3, 1.0), "tau": (0.03, 0.07, 0.2), "width": (384, 768)},
    "cdr": {**DIFFUSION, "hidden": (512, 1024), "w_ce": (1.0,)},
    "marnet": {},  # uses the settings of EMA and CDR; the fusion operator is chosen on the same trials
    "seda": {
        **DIFFUSION,
        "sample_steps": (20,),
        "adapter": ("classifier", "pca"),
        "width": (384,),
        "scale": ("per_dim", "global"),
        "stage_order": ("literal", "reverse"),
        "train_min_step": (0.0, 0.5, 0.7),
        "w_ce_dst": (0.5, 1.0, 1.5, 2.0),
        "w_sc": (0.1, 0.5, 1.0),
    },
}
BRANCH_TRAINING = {**TRAINING, "lr": (3e-3,), "lr_step": (8,), "epochs": (40,), "weight_decay": (1e-4, 1e-3)}
BRANCH_SETTINGS = {
    "ema": ("width", "tau", "w_ita"),
    "cdr": ("hidden", "train_min_step", "w_mse", "draws", "sample_steps", "dropout"),
}
FUSIONS = ("concat", "add", "mul", "sum", "hm")


def main() -> None:
    """Search the settings of one method and print the best ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("artifacts"))
    parser.add_argument("--dataset", default="openmoji")
    parser.add_argument("--method", required=True, choices=sorted(SPACES))
    parser.add_argument("--points", type=int, default=18)
    parser.add_argument("--by", choices=("folds", "val"), default="folds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, num_train, shapes = load_table(arguments.home, arguments.dataset)
    if arguments.by == "val":
        trials, num_first = [torch.arange(len(table)) >= num_train] * SEEDS, 1
    else:
        trials, num_first = split_folds(table, arguments.home, arguments.dataset), 2
    scores: list[tuple[float, dict[str, Any], dict[str, Any]]] = []
    points = draw_points(arguments.dataset, arguments.method, arguments.points)
    started = time.monotonic()

    def run(point: tuple[dict[str, Any], dict[str, Any]], number: int) -> dict[str, float]:
        return run_trial(arguments.method, *point, table, trials[number], number, shapes)

    results = [[run(point, number) for number in range(num_first)] for point in points]
    ranked = sorted(range(len(points)), key=lambda index: -best_variant(results[index])[1])
    for index in ranked[: max(1, len(points) // 3)]:
        results[index] += [run(points[index], number) for number in range(num_first, len(trials))]
        variant, score = best_variant(results[index])
        scores.append((score, {**points[index][0], **variant}, points[index][1]))
    for score, settings, training in sorted(scores, key=lambda item: -item[0]):
        print(f"# {score:.2f} {settings} {training}", file=sys.stderr)
    score, settings, training = max(scores, key=lambda item: item[0])
    print(f"# {score:.2f} over {len(trials)} trials, {len(points)} points, {time.monotonic() - started:.0f} s")
    print(yaml.safe_dump({arguments.method: {"settings": settings, "training": training}}, default_flow_style=None, width=120))


def load_table(home: Path, dataset: str) -> tuple[FeatureTable, int, dict[str, tuple[int, ...]]]:
    """Return the training and validation splits as one table, the number of training rows, and the feature shapes."""
    manifest = read_manifest(home, dataset)
    caches = {key: find_cache(home, manifest, name) for key, name in load_spec(dataset)["encoders"].items()}
    parts = [
        load_split(manifest, caches, split, default_device(), manifest.meta["text"]["aggregate"]) for split in ("train", "val")
    ]
    columns = {key: torch.cat([part.columns[key] for part in parts]) for key in parts[0].columns}
    classes = len(manifest.class_names)
    label = () if manifest.label_kind == "single" else (classes,)
    shapes = {**{key: cache.feature_shape for key, cache in caches.items()}, "label": label, "classes": (classes,)}
    return FeatureTable(parts[0].ids + parts[1].ids, columns, ()), len(parts[0]), shapes


def split_folds(table: FeatureTable, home: Path, dataset: str) -> list[torch.Tensor]:
    """Return the rows [N] of every fold; groups of samples are not divided, see `splits.by_fold`."""
    samples = {sample.id: sample for sample in read_manifest(home, dataset).samples}
    folds = torch.tensor(splits.by_fold([samples[sample_id] for sample_id in table.ids], FOLDS))
    return [folds == fold for fold in range(FOLDS)]


def draw_points(dataset: str, method: str, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Draw distinct random pairs (settings, training).

    The pairs are the same each time for the same method. There are fewer than `count` if the space is too small.
    """
    tuned = load_spec(dataset).get("tuned", {})
    space = SPACES[method]
    if method == "marnet":
        branches = BRANCH_SETTINGS.items()
        space = {f"{branch}.{key}": (tuned[branch]["settings"][key],) for branch, keys in branches for key in keys}
    generator = random.Random(f"settings of {method}")

    def draw(space: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {key: generator.choice(values) for key, values in space.items()}

    training = BRANCH_TRAINING if method == "marnet" else TRAINING
    distinct = {repr(point): point for point in ((draw(space), draw(training)) for _ in range(100 * count))}
    return list(distinct.values())[:count]


def run_trial(
    name: str,
    settings: dict[str, Any],
    training: dict[str, Any],
    table: FeatureTable,
    held_out: torch.Tensor,
    seed: int,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, float]:
    """Train a head on the rows that are not held out, and score it on the held-out rows.

    Returns:
        Acc-1 (multi-label: mAP); for MARNet by fusion operator, else under "".
    """
    inside, outside = (_rows(table, rows) for rows in (~held_out, held_out))
    module = plugins.get("methods", name)
    torch.manual_seed(seed)
    method = module(configure(module.Config, settings), shapes).to(default_device())
    config = TrainConfig(**training)
    scores: dict[str, float] = {}

    def validate(model: Predictor) -> list[Score]:
        return [Score(0.0, 0.0)]  # no score: the last epoch is kept

    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "select-0" / "seed0", seed)
        state = TrainState(method=method, run=run, config=config)
        source = shuffled_batches(inside, config.batch_size, seed)
        for error in train([state], source, ordered_batches(inside, seed), validate, progress=False).values():
            raise error
    for fusion in FUSIONS if name == "marnet" else ("",):
        variant = {"fusion": fusion} if fusion else {}
        scored = module(configure(module.Config, settings | variant), shapes)
        scored.load_state_dict(state.progress.best)
        logits, label = predict(scored.to(default_device()), outside, seed), outside.columns["label"].cpu()
        scores[fusion] = metrics.summary_metrics(logits, label)["acc1" if label.ndim == 1 else "map"]
    print(f"{name} trial {seed} {scores} {settings} {asdict(config)}", file=sys.stderr, flush=True)
    return scores


def _rows(table: FeatureTable, mask: torch.Tensor) -> FeatureTable:
    rows = mask.nonzero().flatten()
    return FeatureTable(tuple(table.ids[row] for row in rows), {key: column[rows] for key, column in table.columns.items()}, ())


def best_variant(results: list[dict[str, float]]) -> tuple[dict[str, Any], float]:
    """Return the fusion operator (if any) with the best mean over the trials, and that mean."""
    means = {variant: mean(result[variant] for result in results) for variant in results[0]}
    best = max(means, key=lambda variant: means[variant])
    return ({"fusion": best} if best else {}), means[best]


if __name__ == "__main__":
    main()
