"""Stage 2 as a command: caches and a method's settings -> a finished run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.streaming import fitting
from pipeline.cache.table import ordered, shuffled
from pipeline.data import manifest as manifests
from pipeline.evaluation import metrics
from pipeline.evaluation.evaluate import PREDICTED, predict
from pipeline.nn import losses
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device, free_bytes, reproducible
from pipeline.runtime.files import lock
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.training.config import PRESETS, TrainConfig
from pipeline.training.ensemble import lane_bytes
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.loop import train
from pipeline.training.state import Score, TrainState, Watch, drop_state, never
from pipeline.types import Method, Predictor

MEMORY_SHARE = 0.8  # of the free memory that heads trained together may take
KEPT = 5  # times its weights: what a lane keeps on the CPU, which is its best ones and what is being saved


def resolve_settings(
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
class HeadPlan:
    """What it takes to train one head."""

    run: RunFolder
    config: RunConfig
    settings: Any  # the method's Config
    training: TrainConfig
    features: FeatureSet


def plan_head_on(features: FeatureSet, method: str, settings: Any, training: TrainConfig, seed: int) -> HeadPlan:
    """The run of a head on opened features, finished or not; features that do not fit in memory are read in windows."""
    if not training.window:
        training = replace(training, window=fitting(features.caches, features.aggregate, default_device()))
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
    run = RunFolder.of(features.home, config, seed)
    return HeadPlan(run=run, config=config, settings=settings, training=training, features=features)


def plan_head(
    home: Path,
    dataset: str,
    method: str,
    settings: Any,
    training: TrainConfig,
    seed: int,
    encoders: Mapping[str, str],
    aggregate: str = "",
) -> HeadPlan:
    """The run of a head, finished or not; see `open_features`."""
    return plan_head_on(open_features(home, dataset, method, encoders, aggregate), method, settings, training, seed)


def train_head(head: HeadPlan, progress: bool, watch: Watch = never) -> RunFolder:
    """Train a head; a finished run is returned as it is, an interrupted one goes on, until `watch` wants no more of it."""
    for error in train_heads([head], progress, watch).values():
        raise error
    return head.run


def train_heads(heads: Sequence[HeadPlan], progress: bool, watch: Watch = never) -> dict[RunFolder, ValueError]:
    """Train heads on the same features as one model, all of one `stack.structure`, seed and `lane.SHARED`; see `train_head`.

    Returns the runs that failed, and why; the others are not disturbed.
    """
    device, lanes = default_device(), []
    with reproducible(device), ExitStack() as all_held:
        for head in sorted(heads, key=lambda head: head.run.path):  # whoever waits for folders waits in this order
            if head.run.is_done:
                drop_state(head.run)
            else:
                method = _build(head, device)
                held = all_held.enter_context(ExitStack())
                held.enter_context(lock(head.run.path, wait=True))
                if head.run.is_done:  # another process has finished it while we waited
                    held.close()
                else:
                    head.run.create(head.config)
                    lanes.append(TrainState(method=method, run=head.run, config=head.training, watch=watch, held=held))
        return _train(heads[0], lanes, progress) if lanes else {}


def _build(head: HeadPlan, device: torch.device) -> Method:
    torch.manual_seed(head.run.seed)
    method: Method = plugins.get("methods", head.config.method).build(head.settings, head.features.shapes)
    return method.to(device)


def _train(head: HeadPlan, lanes: Sequence[TrainState], progress: bool) -> dict[RunFolder, ValueError]:
    """Train lanes on the features of this head, with what they share."""
    seed, training = head.run.seed, head.training
    rows, val = head.features.splits(training.window)
    label = val.label

    def validate(model: Predictor) -> list[Score]:
        logits = predict(model, val, seed, precision=training.precision)
        return [score(each, label) for each in logits.reshape(-1, *logits.shape[-2:])]

    source = shuffled(rows, training.batch_size, seed)
    return train(lanes, source, ordered(rows, seed), validate, progress)


def score(logits: Tensor, label: Tensor) -> Score:
    """The metric that selects, and the loss of logits [N,C]; both NaN when one of these is not finite: that ranks nothing."""
    if not logits.isfinite().all():
        return Score(math.nan, math.nan)
    metric = metrics.summary_metrics(logits, label)["acc1" if label.ndim == 1 else "map"]
    return Score(metric, float(losses.classification(logits, label, "softmax_kl")))


def capacity(head: HeadPlan) -> int:
    """How many heads like this one can be trained together in the free memory of the device and this machine; at least 1."""
    device, training = default_device(), head.training
    size = training.batch_size
    rows, _ = head.features.splits(training.window)
    batch = next(shuffled(rows, size, head.run.seed)(0))
    computed = 2 * size + PREDICTED  # a gradient is not larger than what it is taken of
    with reproducible(device, training.precision):
        method = _build(head, device)
        each = {device.type: lane_bytes(method, batch, KeyedRNG.seeded(head.run.seed, batch["key"]), computed)}
    weights = sum(tensor.nbytes for tensor in method.state_dict().values())
    each[device.type] += weights * (training.weight_average > 0)
    each["cpu"] = each.get("cpu", 0) + KEPT * weights
    return max(1, min(int(MEMORY_SHARE * free_bytes(torch.device(kind)) / needed) for kind, needed in each.items()))
