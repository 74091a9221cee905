"""Stage 2 as a command: caches and a method's settings -> a finished run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline import losses, metrics, plugins
from pipeline import manifest as manifests
from pipeline.cache import Cache
from pipeline.devices import default_device, reproducible
from pipeline.evaluate import predict
from pipeline.manifest import Manifest
from pipeline.runs import Run, RunConfig, lock
from pipeline.sources import find_cache, load, ordered, shuffled
from pipeline.train import PRESETS, TrainConfig, train
from pipeline.types import Method


def resolve(
    dataset: str, method: str, preset: str, settings: Mapping[str, Any], training: Mapping[str, Any]
) -> tuple[Any, TrainConfig]:
    """The method's config and the training config: defaults, then the preset, then what was given.

    "paper" and "head" are learning rates; "tuned" is what the dataset's yaml holds for the method, chosen on validation.
    """
    module = plugins.get("methods", method)
    chosen: Mapping[str, Any] = {}
    base: Mapping[str, Any] = PRESETS.get(preset, {})
    if preset == "tuned":
        tuned = manifests.load_spec(dataset).get("tuned", {})
        if method not in tuned:
            raise ValueError(f"data_manifests/{dataset}.yaml has no tuned settings for {method!r}; use --preset head or paper")
        chosen, base = tuned[method].get("settings", {}), tuned[method].get("training", {})
    elif preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join([*PRESETS, 'tuned'])}")
    fields = {module.SYMBOLS.get(key, key): value for key, value in settings.items()}
    plugins.configure(module.Config, settings, module.SYMBOLS)
    return plugins.configure(module.Config, {**chosen, **fields}), plugins.configure(TrainConfig, {**base, **training})


@dataclass(frozen=True, kw_only=True)
class Head:
    """What it takes to train one head: names resolved, nothing read yet but the manifest and the caches' identities."""

    run: Run
    config: RunConfig
    settings: Any  # the method's Config
    training: TrainConfig
    manifest: Manifest
    caches: Mapping[str, Cache]  # by batch key


def plan(
    home: Path,
    dataset: str,
    method: str,
    settings: Any,
    training: TrainConfig,
    seed: int,
    encoders: Mapping[str, str],
    aggregate: str = "",
) -> Head:
    """The run of a head on cached features, finished or not.

    `encoders` names the caches by batch key ("image", "text"); only the keys the method needs are opened. `aggregate` says how
    several texts of a sample become one vector: mean, first or random (another one each epoch); "" is the dataset's way.
    """
    manifest = manifests.read(home, dataset)
    needs = plugins.get("methods", method).NEEDS
    caches = {key: find_cache(home, manifest, name) for key, name in encoders.items() if key in needs}
    config = RunConfig(
        dataset=dataset,
        method=method,
        settings=asdict(settings),
        training=asdict(training),
        caches={key: cache.fingerprint for key, cache in caches.items()},
        shapes=_shapes(manifest, caches),
        text_aggregate=aggregate or manifest.meta["text"]["aggregate"],
        manifest=manifest.fingerprint(),
    )
    run = Run.of(home, config, seed)
    return Head(run=run, config=config, settings=settings, training=training, manifest=manifest, caches=caches)


def train_head(head: Head, progress: bool) -> Run:
    """Train a head; a finished run is returned as it is, an interrupted one goes on."""
    run, device = head.run, default_device()
    if not run.is_done:
        with reproducible(device):
            torch.manual_seed(run.seed)
            shapes = {key: tuple(shape) for key, shape in head.config.shapes.items()}
            method: Method = plugins.get("methods", head.config.method).build(head.settings, shapes)
            with lock(run.path):
                if not run.is_done:  # another process may have finished it while we waited
                    run.create(head.config)
                    _train(head, method.to(device), progress)
    return run


def _shapes(manifest: Manifest, caches: Mapping[str, Cache]) -> dict[str, list[int]]:
    classes = [len(manifest.class_names)]
    label = [] if manifest.label_kind == "single" else classes
    return {**{key: list(cache.feature_shape) for key, cache in caches.items()}, "label": label, "classes": classes}


def _train(head: Head, method: Method, progress: bool) -> None:
    run, training, device = head.run, head.training, default_device()
    table = load(head.manifest, head.caches, "train", device, head.config.text_aggregate)
    val = load(head.manifest, {"image": head.caches["image"]}, "val", device, head.config.text_aggregate)
    for split, excluded in (("train", table.excluded), ("val", val.excluded)):
        if excluded:
            print(f"{split}: {len(excluded)} samples without an image feature are left out: {excluded[0]} …", file=sys.stderr)

    def validate() -> tuple[float, float]:
        logits, label = predict(method, val, run.seed), val.columns["label"].cpu()
        if not logits.isfinite().all():
            raise ValueError(f"{run.path} predicts numbers that are not finite: it diverges; train with a lower lr")
        summary = metrics.summary(logits, label)
        return summary["acc1" if label.ndim == 1 else "map"], -float(losses.classification(logits, label, "softmax_kl"))

    train(method, shuffled(table, training.batch_size, run.seed), ordered(table, run.seed), validate, training, run, progress)
