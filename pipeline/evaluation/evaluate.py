"""A finished run and a split -> metrics.json and per-example predictions. It opens the image cache and no other (LUPI)."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as safetensors_load
from torch import Tensor

from pipeline.cache.reader import find_cache
from pipeline.cache.streaming import fitting, open_rows
from pipeline.cache.table import FeatureSource
from pipeline.data import manifest as manifests
from pipeline.evaluation import metrics
from pipeline.runtime import plugins
from pipeline.runtime.device import Precision, default_device, reproducible
from pipeline.runtime.files import canonical_json, lock, write_atomic
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.types import Method, Predictor, Split

PREDICTED = 1024  # rows at a time
NUM_FEATURES = 2000  # rows of the method's feature that are kept for pictures


@torch.no_grad()
def predict(
    model: Predictor, rows: FeatureSource, seed: int, batch_size: int = PREDICTED, precision: Precision = "float32"
) -> Tensor:
    """Logits float32 [N,C] on the CPU, of stacked methods [K,N,C].

    Every random number is named by (seed, sample id), so batches do not matter.
    """
    model.train(False)
    parts = []
    for table in rows.pieces():
        image, keys = table.columns["image"], table.columns["key"]
        with reproducible(image.device, precision):
            for start in range(0, len(table), batch_size):
                some = slice(start, start + batch_size)
                parts.append(model.predict(image[some], KeyedRNG.seeded(seed, keys[some]).at("predict")).float().cpu())
    return torch.cat(parts, dim=-2)


def overridden(config: RunConfig, overrides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The method's config with settings of prediction changed, and the changes by field name.

    `ValueError` for a setting that the weights depend on: only a run of its own can answer for it.
    """
    module = plugins.get("methods", config.method)
    changes = {module.SYMBOLS.get(key, key): value for key, value in overrides.items()}
    for field in changes:
        if field in config.settings and field not in module.PREDICTION:
            choices = ", ".join(module.PREDICTION) or f"nothing of {config.method}"
            raise ValueError(f"{field!r} is a setting of training: train a run with it; prediction can change {choices}")
    plugins.configure(module.Config, overrides, module.SYMBOLS)  # names an unknown or repeated key
    settings = plugins.configure(module.Config, {**config.settings, **changes})
    values = asdict(settings)
    return settings, {field: values[field] for field in sorted(changes) if values[field] != config.settings[field]}


def evaluation_name(split: str, changes: Mapping[str, Any]) -> str:
    """The key of an evaluation in metrics.json: the split, then what differs from the run's own settings."""
    return "@".join([split, *([",".join(f"{field}={value}" for field, value in changes.items())] if changes else [])])


def load_method(run: RunFolder, config: RunConfig, settings: Any) -> Method:
    """The trained method; `ValueError` when its weights are not those that training wrote."""
    weights = run.weights()
    build = plugins.get("methods", config.method).build
    method: Method = build(settings, {key: tuple(shape) for key, shape in config.shapes.items()})
    try:
        method.load_state_dict(safetensors_load(weights))
    except RuntimeError as error:
        raise ValueError(
            f"{run.path} was trained without what these settings need: train a run of its own with them"
        ) from error
    return method.to(default_device())


def evaluate(home: Path, run: RunFolder, split: Split, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a run on a split, as in its metrics.json; a finished evaluation is read, not computed again."""
    run.check_done()
    config = run.config()
    settings, changes = overridden(config, overrides)
    name = evaluation_name(split, changes)
    with lock(run.path, wait=True):
        records = read_metrics(run)
        if name not in records:
            records[name] = _evaluate(home, run, config, settings, split, name)
            write_atomic(run.path / "metrics.json", json.dumps(records, indent=1, sort_keys=True))
    return records[name]


def _evaluate(home: Path, run: RunFolder, config: RunConfig, settings: Any, split: Split, name: str) -> dict[str, Any]:
    """Predict, write the predictions, and return the record of an evaluation; the test split is logged before it is read."""
    manifest = manifests.read_manifest(home, config.dataset)
    cache = find_cache(home, manifest, config.caches["image"])
    method = load_method(run, config, settings)
    if split == "test":
        _log_test_read(run, name)
    caches, device = {"image": cache}, default_device()
    window = config.training.get("window", 0) or fitting(caches, config.text_aggregate, device)
    rows = open_rows(manifest, caches, split, device, config.text_aggregate, window)
    started = time.perf_counter()
    precision = config.training.get("precision", "float32")  # the only one before it was a setting
    logits = predict(method, rows, run.seed, precision=precision)
    seconds = time.perf_counter() - started
    label = rows.label
    if not logits.isfinite().all():
        raise ValueError(f"{run.path} predicts numbers that are not finite: it diverged in training; train with a lower lr")
    _write_predictions(run, name, rows, logits, label, method, precision)
    done = run.done()
    return {
        "dataset": config.dataset,
        "split": split,
        "method": config.method,
        "seed": run.seed,
        "metrics": metrics.summary_metrics(logits, label),
        "n": len(label),
        "excluded": len(rows.excluded),
        "seconds": seconds,
        "train_seconds": done["seconds"],
        "settings": asdict(settings),
        "caches": dict(config.caches),
        "config": config.fingerprint(),
        "device": str(default_device()),
        "versions": {"torch": torch.__version__, "diffalign": importlib.metadata.version("diffalign")},
    }


def read_metrics(run: RunFolder) -> dict[str, Any]:
    """All evaluations of a run by name; empty when there is none; `ValueError` when the file is damaged."""
    path = run.path / "metrics.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and evaluate again") from error


def _log_test_read(run: RunFolder, name: str) -> None:
    """Every read of the test split leaves a line in the run."""
    line = canonical_json({"evaluation": name, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    with (run.path / "test_reads.jsonl").open("a") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


@torch.no_grad()
def _write_predictions(
    run: RunFolder, name: str, rows: FeatureSource, logits: Tensor, label: Tensor, method: Method, precision: Precision
) -> None:
    features: list[Tensor] = []
    for table in rows.pieces():
        some = slice(NUM_FEATURES - sum(map(len, features)))
        image, keys = table.columns["image"][some], table.columns["key"][some]
        with reproducible(image.device, precision):
            features.append(method.feature(image, KeyedRNG.seeded(run.seed, keys).at("predict")).half().cpu())
        if sum(map(len, features)) == NUM_FEATURES:
            break
    arrays = {
        "ids": np.array(rows.ids),
        "logits": logits.numpy(),
        "label": label.numpy(),
        "feature": torch.cat(features).numpy(),
    }
    arrays |= {key: value.numpy() for key, value in metrics.per_example(logits, label).items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(run.path / f"predictions-{name}.npz", buffer.getvalue())
