"""Choose the settings of methods by cross-validation over the train and validation splits; the test split is never opened.

Random search with halving: `--points` random settings on two folds, the best third of them on
all folds. Prints the `tuned:` entry of `data_manifests/<dataset>.yaml`.

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

from pipeline import manifest as manifests
from pipeline import metrics, plugins
from pipeline.devices import default_device
from pipeline.evaluate import predict
from pipeline.runs import Run
from pipeline.sources import Table, find_cache, load, ordered, shuffled
from pipeline.streams import Streams
from pipeline.train import TrainConfig, train

FOLDS = 5
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
    # its branches take what was chosen for EMA and CDR; the operator is chosen on the same folds
    "marnet": {
        "width": (384,),
        "tau": (0.2,),
        "w_ita": (0.1,),
        "hidden": (1024,),
        "dropout_cdr": (0.3,),
        "train_min_step": (0.8,),
        "w_mse": (0.3,),
        "draws": (8,),
        "sample_steps": (10,),
    },
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
FUSIONS = ("concat", "add", "mul", "sum", "hm")


def main() -> None:
    """Search one method and print its best settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=Path("artifacts"))
    parser.add_argument("--dataset", default="openmoji")
    parser.add_argument("--method", required=True, choices=sorted(SPACES))
    parser.add_argument("--points", type=int, default=18)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, classes, shapes = load_table(arguments.home, arguments.dataset)
    folds = split_folds(table)
    scores: list[tuple[float, dict[str, Any], dict[str, Any]]] = []
    points = draw_points(arguments.method, arguments.points)
    started = time.monotonic()
    results = [[run_fold(arguments.method, *point, table, folds, fold, shapes, classes) for fold in (0, 1)] for point in points]
    ranked = sorted(range(len(points)), key=lambda index: -best_variant(results[index])[1])
    for index in ranked[: max(1, len(points) // 3)]:
        for fold in range(2, FOLDS):
            results[index].append(run_fold(arguments.method, *points[index], table, folds, fold, shapes, classes))
        variant, score = best_variant(results[index])
        scores.append((score, {**points[index][0], **variant}, points[index][1]))
    for score, settings, training in sorted(scores, key=lambda item: -item[0]):
        print(f"# {score:.2f} {settings} {training}", file=sys.stderr)
    score, settings, training = max(scores, key=lambda item: item[0])
    print(f"# {FOLDS}-fold accuracy {score:.2f}, {len(points)} points, {time.monotonic() - started:.0f} s")
    print(yaml.safe_dump({arguments.method: {"settings": settings, "training": training}}, default_flow_style=None, width=120))


def load_table(home: Path, dataset: str) -> tuple[Table, int, dict[str, tuple[int, ...]]]:
    """The train and validation splits as one table, the number of classes, and the feature shapes."""
    manifest = manifests.read(home, dataset)
    caches = {key: find_cache(home, manifest, name) for key, name in manifests.load_spec(dataset)["encoders"].items()}
    parts = [load(manifest, caches, split, default_device(), manifest.meta["text"]["aggregate"]) for split in ("train", "val")]
    columns = {key: torch.cat([part.columns[key] for part in parts]) for key in parts[0].columns}
    classes = len(manifest.class_names)
    shapes = {**{key: cache.feature_shape for key, cache in caches.items()}, "label": (), "classes": (classes,)}
    return Table(parts[0].ids + parts[1].ids, columns, ()), classes, shapes


def split_folds(table: Table) -> torch.Tensor:
    """The fold of every row [N]: each class is dealt out in an order named by the sample ids."""
    bits = Streams.seeded(0, table.columns["key"]).at("folds").bits()
    order = sorted(range(len(table)), key=lambda row: (int(table.columns["label"][row]), int(bits[row])))
    folds = torch.empty(len(table), dtype=torch.int64)
    folds[torch.tensor(order)] = torch.arange(len(table)) % FOLDS
    return folds


def draw_points(method: str, count: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Random (settings, training) pairs, the same for the same method and count."""
    generator = random.Random(f"settings of {method}")

    def draw(space: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {key: generator.choice(values) for key, values in space.items()}

    training = BRANCH_TRAINING if method == "marnet" else TRAINING
    return [(draw(SPACES[method]), draw(training)) for _ in range(count)]


def run_fold(
    name: str,
    settings: dict[str, Any],
    training: dict[str, Any],
    table: Table,
    folds: torch.Tensor,
    fold: int,
    shapes: dict[str, tuple[int, ...]],
    classes: int,
) -> dict[str, float]:
    """Accuracy on the fold of a head trained on the others; for MARNet by fusion operator, else under ""."""
    inside, outside = (_rows(table, rows) for rows in (folds != fold, folds == fold))
    module = plugins.get("methods", name)
    torch.manual_seed(fold)
    method = module.build(module.Config(**settings), shapes).to(default_device())
    config = TrainConfig(**training)
    accuracies: dict[str, float] = {}

    def validate() -> tuple[float, float]:
        return 0.0, 0.0  # the last epoch is kept

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "select-0" / "seed0", fold)
        state = train(
            method, shuffled(inside, config.batch_size, fold), ordered(inside, fold), validate, config, run, progress=False
        )
    for fusion in FUSIONS if name == "marnet" else ("",):
        variant = {"fusion": fusion} if fusion else {}
        scored = module.build(module.Config(**settings, **variant), shapes)
        scored.load_state_dict(state.best)
        logits, label = predict(scored.to(default_device()), outside, fold), outside.columns["label"].cpu()
        accuracies[fusion] = metrics.summary(logits, label)["acc1"]
    print(f"{name} fold {fold} {accuracies} {settings} {asdict(config)}", file=sys.stderr, flush=True)
    return accuracies


def _rows(table: Table, mask: torch.Tensor) -> Table:
    rows = mask.nonzero().flatten()
    return Table(tuple(table.ids[row] for row in rows), {key: column[rows] for key, column in table.columns.items()}, ())


def best_variant(results: list[dict[str, float]]) -> tuple[dict[str, Any], float]:
    """The fusion operator (if any) with the best mean over folds, and that mean."""
    means = {variant: mean(result[variant] for result in results) for variant in results[0]}
    best = max(means, key=lambda variant: means[variant])
    return ({"fusion": best} if best else {}), means[best]


if __name__ == "__main__":
    main()
