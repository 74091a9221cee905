"""A finished run and a split -> metrics.json and per-example predictions. It opens the image cache and no other (LUPI)."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline import manifest as manifests
from pipeline import metrics, plugins
from pipeline.devices import default_device
from pipeline.runs import Run, RunConfig, canonical_json, write_atomic
from pipeline.sources import Table, find_cache, load
from pipeline.streams import Streams
from pipeline.types import Method, Split

NUM_FEATURES = 2000  # rows of the method's feature that are kept for pictures


@torch.no_grad()
def predict(method: Method, table: Table, seed: int, batch_size: int = 1024) -> Tensor:
    """Logits [N,C] on the CPU; every random number is named by (seed, sample id), so batches do not matter."""
    method.train(False)
    image, keys = table.columns["image"], table.columns["key"]
    parts = []
    for start in range(0, len(table), batch_size):
        rows = slice(start, start + batch_size)
        parts.append(method.predict(image[rows], Streams.seeded(seed, keys[rows]).at("predict")).cpu())
    return torch.cat(parts)


def evaluation_name(split: str, overrides: Mapping[str, Any]) -> str:
    """The key of an evaluation in metrics.json: the split, then what differs from the run's own settings."""
    changes = ",".join(f"{key}={value}" for key, value in sorted(overrides.items()))
    return f"{split}@{changes}" if changes else split


def load_method(run: Run, config: RunConfig, overrides: Mapping[str, Any]) -> tuple[Method, Any]:
    """The trained method and its config, with settings of prediction overridden; `ValueError` if one changes the weights."""
    module = plugins.get("methods", config.method)
    settings = plugins.configure(module.Config, {**config.settings, **_fields(module, overrides)})
    method = module.build(settings, {key: tuple(shape) for key, shape in config.shapes.items()})
    try:
        method.load_state_dict(load_file(run.path / "checkpoint.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"{dict(overrides)} changes the weights of {run.path}: train a run of its own with it") from error
    return method.to(default_device()), settings


def _fields(module: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides by field name; letters of the papers are resolved and values read by the config's types."""
    plugins.configure(module.Config, overrides, module.SYMBOLS)
    return {module.SYMBOLS.get(key, key): value for key, value in overrides.items()}


def evaluate(home: Path, run: Run, split: Split, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a run on a split, as in its metrics.json; a finished evaluation is read, not computed again."""
    if not run.is_done:
        raise ValueError(f"{run.path} has not finished training; run the same train-head command again to complete it")
    name = evaluation_name(split, overrides)
    records = read_metrics(run)
    if name in records:
        return records[name]
    config = run.config()
    manifest = manifests.read(home, config.dataset)
    cache = find_cache(home, manifest, config.caches["image"])
    table = load(manifest, {"image": cache}, split, default_device(), config.text_aggregate)
    method, settings = load_method(run, config, overrides)
    if split == "test":
        _log_test_read(run, name)
    started = time.perf_counter()
    logits = predict(method, table, run.seed)
    seconds = time.perf_counter() - started
    label = table.columns["label"].cpu()
    record = {
        "dataset": config.dataset,
        "split": split,
        "method": config.method,
        "seed": run.seed,
        "metrics": metrics.summary(logits, label),
        "n": len(table),
        "excluded": len(table.excluded),
        "seconds": seconds,
        "train_seconds": float((run.path / "done").read_text()),
        "settings": asdict(settings),
        "caches": dict(config.caches),
        "config": config.fingerprint(),
        "versions": {"torch": torch.__version__},
    }
    _write_predictions(run, name, table, logits, label, method)
    write_atomic(run.path / "metrics.json", json.dumps(records | {name: record}, indent=1, sort_keys=True))
    return record


def read_metrics(run: Run) -> dict[str, Any]:
    """All evaluations of a run by name; empty when there is none."""
    path = run.path / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _log_test_read(run: Run, name: str) -> None:
    """Every read of the test split leaves a line in the run."""
    path = run.path / "test_reads.jsonl"
    lines = path.read_text() if path.is_file() else ""
    line = canonical_json({"evaluation": name, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    write_atomic(path, f"{lines}{line}\n")


@torch.no_grad()
def _write_predictions(run: Run, name: str, table: Table, logits: Tensor, label: Tensor, method: Method) -> None:
    image, keys = table.columns["image"][:NUM_FEATURES], table.columns["key"][:NUM_FEATURES]
    feature = method.feature(image, Streams.seeded(run.seed, keys).at("predict"))
    arrays = {
        "ids": np.array(table.ids),
        "logits": logits.numpy(),
        "label": label.numpy(),
        "feature": feature.half().cpu().numpy(),
    }
    arrays |= {key: value.numpy() for key, value in metrics.per_example(logits, label).items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(run.path / f"predictions-{name}.npz", buffer.getvalue())
