"""Stage 2 as a command: caches and a method's settings -> a finished run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
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
from pipeline.sources import Table, find_cache, load, ordered, shuffled
from pipeline.train import PRESETS, TrainConfig, Watch, never, train
from pipeline.types import Method, Split


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
class Features:
    """What heads are trained on: a manifest and caches, opened once for any number of heads.

    Nothing is read but the manifest and the caches' identities; a split is loaded when it is first asked for, and kept.
    """

    home: Path
    manifest: Manifest
    caches: Mapping[str, Cache]  # by batch key
    aggregate: str

    @cached_property
    def train(self) -> Table:
        """The training split with everything that methods may read."""
        return self._load("train", self.caches)

    @cached_property
    def val(self) -> Table:
        """The validation split, without texts."""
        return self._load("val", {"image": self.caches["image"]})

    def _load(self, split: Split, caches: Mapping[str, Cache]) -> Table:
        table = load(self.manifest, caches, split, default_device(), self.aggregate)
        if table.excluded:
            count, first = len(table.excluded), table.excluded[0]
            print(f"{split}: {count} samples without an image feature are left out: {first} …", file=sys.stderr)
        return table

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a batch's columns, `types.Shapes`."""
        classes = (len(self.manifest.class_names),)
        label = () if self.manifest.label_kind == "single" else classes
        return {**{key: cache.feature_shape for key, cache in self.caches.items()}, "label": label, "classes": classes}


def open_features(home: Path, dataset: str, method: str, encoders: Mapping[str, str], aggregate: str = "") -> Features:
    """The features that a method needs; `ValueError` when they are not there.

    `encoders` names the caches by batch key ("image", "text"); only the keys the method needs are opened. `aggregate` says how
    several texts of a sample become one vector: mean, first or random (another one each epoch); "" is the dataset's way.
    """
    manifest = manifests.read(home, dataset)
    needs = plugins.get("methods", method).NEEDS
    caches = {key: find_cache(home, manifest, name) for key, name in encoders.items() if key in needs}
    return Features(home=home, manifest=manifest, caches=caches, aggregate=aggregate or manifest.meta["text"]["aggregate"])


def cache_names(dataset: str, image: str, text: str) -> dict[str, str]:
    """Caches by batch key: those given, else those of the dataset's encoders."""
    given = {"image": image, "text": text}
    if image and text:
        return given
    defaults = manifests.load_spec(dataset)["encoders"]
    return {key: name or defaults[key] for key, name in given.items()}


@dataclass(frozen=True, kw_only=True)
class Head:
    """What it takes to train one head."""

    run: Run
    config: RunConfig
    settings: Any  # the method's Config
    training: TrainConfig
    features: Features


def plan_head(features: Features, method: str, settings: Any, training: TrainConfig, seed: int) -> Head:
    """The run of a head on opened features, finished or not."""
    config = RunConfig(
        dataset=features.manifest.dataset,
        method=method,
        settings=asdict(settings),
        training=asdict(training),
        caches={key: cache.fingerprint for key, cache in features.caches.items()},
        shapes={key: list(shape) for key, shape in features.shapes.items()},
        text_aggregate=features.aggregate,
        manifest=features.manifest.fingerprint(),
    )
    run = Run.of(features.home, config, seed)
    return Head(run=run, config=config, settings=settings, training=training, features=features)


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
    """The run of a head, finished or not; see `open_features`."""
    return plan_head(open_features(home, dataset, method, encoders, aggregate), method, settings, training, seed)


def train_head(head: Head, progress: bool, watch: Watch = never) -> Run:
    """Train a head; a finished run is returned as it is, an interrupted one goes on, until `watch` wants no more of it."""
    run, device = head.run, default_device()
    if not run.is_done:
        with reproducible(device):
            torch.manual_seed(run.seed)
            method: Method = plugins.get("methods", head.config.method).build(head.settings, head.features.shapes)
            with lock(run.path, wait=True):
                if not run.is_done:  # another process may have finished it while we waited
                    run.create(head.config)
                    _train(head, method.to(device), progress, watch)
    return run


def _train(head: Head, method: Method, progress: bool, watch: Watch) -> None:
    run, training, table, val = head.run, head.training, head.features.train, head.features.val

    def validate() -> tuple[float, float]:
        logits, label = predict(method, val, run.seed, precision=training.precision), val.columns["label"].cpu()
        if not logits.isfinite().all():
            raise ValueError(f"{run.path} predicts numbers that are not finite: it diverges; train with a lower lr")
        summary = metrics.summary(logits, label)
        return summary["acc1" if label.ndim == 1 else "map"], -float(losses.classification(logits, label, "softmax_kl"))

    source = shuffled(table, training.batch_size, run.seed)
    train(method, source, ordered(table, run.seed), validate, training, run, progress, watch)
