"""Evaluate a finished run on a split: write its metrics and its per-sample predictions.

Only the image cache is opened, because text is privileged information of training (LUPI).
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as safetensors_load
from torch import Tensor

from pipeline.cache.reader import Cache, find_cache
from pipeline.cache.streaming import choose_window, open_split
from pipeline.cache.table import FeatureSource
from pipeline.data.corruptions import Corruption
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation import metrics
from pipeline.evaluation.calibration import read_calibration
from pipeline.nn.method import Method
from pipeline.runtime import plugins
from pipeline.runtime.device import Precision, default_device, reproducible
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import append_lines, canonical_json, lock, write_atomic
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import TEST_READS, RunConfig, RunFolder
from pipeline.runtime.settings import (
    configure_run,
    find_settings,
    flatten,
    in_the_user_s_words,
    name_settings,
    short_name,
    spellings,
)
from pipeline.runtime.version import program_version
from pipeline.types import Predictor, Split

PREDICTION_BATCH_SIZE = 1024  # samples that are predicted at once
NUM_STORED_FEATURES = 2000  # samples whose feature is stored, for figures of the feature space


@torch.no_grad()
def predict(
    model: Predictor,
    source: FeatureSource,
    seed: int | Tensor,
    batch_size: int = PREDICTION_BATCH_SIZE,
    precision: Precision = "float32",
) -> Tensor:
    """Return the logits of all samples of a source.

    Each random number is a function of the seed and the sample id, so the batch size does not change the logits. The methods
    of an ensemble may have a seed each, int64 [K].

    Returns:
        Logits float32 [N,C] on the CPU; of an ensemble of K methods [K,N,C].
    """
    model.train(False)
    parts = []
    for table in source.tables():
        image, keys = table.columns["image"], table.columns["key"]
        with reproducible(image.device, precision):
            for start in range(0, len(table), batch_size):
                batch = slice(start, start + batch_size)
                parts.append(model.predict(image[batch], KeyedRNG.seeded(seed, keys[batch]).at("predict")).float().cpu())
    return torch.cat(parts, dim=-2)


def apply_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the method's config with changed prediction settings.

    Args:
        config: the config of the run.
        overrides: values by name, alias or the papers' letter.

    Returns:
        The method's `Config`, and the values that differ from the run's own, by `short_name`: as all versions call them.

    Raises:
        UserError: a setting is unknown, or the weights depend on it: it needs a training run of its own.
    """
    module = plugins.get("methods", config.method)
    unknown = [key for key in flatten(overrides) if not find_settings(module.Config, key, module.symbols)]
    if unknown and not module.prediction:  # the settings of training are no remedy
        raise UserError(f"{unknown[0]!r} is a setting of methods that sample: prediction can change nothing of {config.method}")
    changes = name_settings(module.Config, overrides, module.symbols)
    for name, word in spellings(module.Config, overrides, module.symbols).items():
        if name not in module.prediction:
            choices = ", ".join(module.prediction) or f"nothing of {config.method}"
            said = in_the_user_s_words(name, word)
            raise UserError(f"{said!r} is a setting of training: train a run with it; prediction can change {choices}")
    settings = configure_run(module.Config, config.settings, changes)
    before, after = (flatten(asdict(each)) for each in (configure_run(module.Config, config.settings), settings))
    changed = {short_name(module.Config, name): after[name] for name in changes if after[name] != before[name]}
    return settings, dict(sorted(changed.items()))


def evaluation_name(split: str, changes: Mapping[str, Any]) -> str:
    """Return the key of an evaluation in metrics.json: the split, then the settings that differ from the run's own."""
    return f"{split}@{','.join(f'{field}={value}' for field, value in changes.items())}" if changes else split


def load_method(run: RunFolder, config: RunConfig, settings: Any) -> Method:
    """Return the trained method on the default device.

    Raises:
        UserError: the checkpoint is not the one that training wrote, the settings need weights that it does not have, or the
            file of a method from outside of this package has changed since.
    """
    if plugins.external_sha256("methods", config.method) != config.plugin_sha256:
        raise UserError(
            f"{run.path} was trained by another version of {plugins.source_file('methods', config.method)} (sha256 "
            f"{config.plugin_sha256[:12] or 'unknown'}…): bring that one back, or train again"
        )
    weights = run.read_checkpoint()
    method = plugins.get("methods", config.method)(settings, {key: tuple(shape) for key, shape in config.shapes.items()})
    try:
        method.load_state_dict(safetensors_load(weights))
    except RuntimeError as error:
        raise UserError(f"{run.path} was trained without what these settings need: train a run of its own with them") from error
    return method.to(default_device())


def evaluate(
    home: Path, run: RunFolder, split: Split, overrides: Mapping[str, Any], corrupted: Cache | None = None
) -> dict[str, Any]:
    """Return the record of an evaluation in the run's metrics.json; it is computed only when it is not there yet.

    Args:
        home: folder of all artifacts.
        run: a run that has finished training.
        split: the split to predict.
        overrides: changed prediction settings, see `apply_overrides`.
        corrupted: features of corrupted copies of the split by the encoder of the run's image features, which are predicted
            instead; see `extraction.corrupted`. Only the metrics of each sample are stored then, without logits and features.
    """
    run.check_done()
    config = run.config()
    settings, changes = apply_overrides(config, overrides)
    name = evaluation_name(split, changes)
    caches = dict(config.caches)
    if corrupted:
        caches["image"] = corrupted.fingerprint
        name = Corruption.of_identity(corrupted.identity).evaluation(name)
    with lock(run.path, wait=True):
        records = read_metrics(run)
        if name not in records or (corrupted and records[name]["caches"] != caches):
            record = _evaluate(home, run, config, settings, split, name, corrupted)
            corruption = {"corruption": corrupted.identity["corruption"]} if corrupted else {}
            records[name] = {**record, "caches": caches, **corruption}
            if name == "val":  # before the record, so that a run with the record has it
                read_calibration(run, config.is_multi_label)
            write_atomic(run.path / "metrics.json", json.dumps(records, indent=1, sort_keys=True))
    return records[name]


def _evaluate(
    home: Path, run: RunFolder, config: RunConfig, settings: Any, split: Split, name: str, corrupted: Cache | None
) -> dict[str, Any]:
    """Predict a split, write the predictions, and return the record of the evaluation."""
    manifest = read_manifest(home, config.dataset)
    if config.manifest != manifest.fingerprint():
        raise UserError(
            f"{run.path} was trained on other samples of {config.dataset} than are prepared now; prepare the earlier files, "
            f"or train it again: diffalign train-head --dataset {config.dataset} --method {config.method}"
        )
    cache = corrupted or find_cache(home, manifest, config.caches["image"])
    method = load_method(run, config, settings)
    if split == "test":  # logged before it is read
        log_test_read(run, name)
    caches, device = {"image": cache}, default_device()
    window = config.training.get("window", 0) or choose_window(caches, config.text_aggregate, device)
    source = open_split(manifest, caches, split, device, config.text_aggregate, window)
    started = time.perf_counter()
    precision = config.training.get("precision", "float32")  # old runs do not name it: they all used float32
    logits = predict(method, source, run.seed, precision=precision)
    seconds = time.perf_counter() - started
    label = source.label
    if not logits.isfinite().all():
        raise UserError(f"{run.path} predicts numbers that are not finite: it diverged in training; train with a lower lr")
    arrays = {"label": label}
    if not corrupted:
        features = _first_features(method, source, run.seed, precision)
        arrays = {"logits": logits, "label": label, "feature": features}
    _write_predictions(run, name, source.ids, arrays | metrics.per_example(logits, label, label_loss=config.label_loss))
    done = run.read_done()
    return {
        "dataset": config.dataset,
        "split": split,
        "method": config.method,
        "seed": run.seed,
        "metrics": metrics.summary_metrics(logits, label, label_loss=config.label_loss),
        "n": len(label),
        "excluded": len(source.excluded),
        "seconds": seconds,
        "train_seconds": done["seconds"],
        "settings": asdict(settings),
        "config": config.fingerprint(),
        "device": str(default_device()),
        "versions": {"torch": torch.__version__, "diffalign": program_version()},
    }


def read_metrics(run: RunFolder) -> dict[str, Any]:
    """Return all evaluations of a run by name; empty when there is none.

    Raises:
        UserError: the file is damaged.
    """
    path = run.path / "metrics.json"
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and evaluate again") from error


def log_test_read(run: RunFolder, name: str) -> None:
    """Append a line to the run's log of all reads of the test split; `name` is that of the evaluation or of a figure."""
    line = canonical_json({"evaluation": name, "time": datetime.now(UTC).isoformat(timespec="seconds")})
    append_lines(run.path / TEST_READS, [line])


@torch.no_grad()
def _first_features(method: Method, source: FeatureSource, seed: int, precision: Precision) -> Tensor:
    """Return the method's features float16 [M,D] of the first samples, at most NUM_STORED_FEATURES."""
    features: list[Tensor] = []
    for table in source.tables():
        first = slice(NUM_STORED_FEATURES - sum(map(len, features)))
        image, keys = table.columns["image"][first], table.columns["key"][first]
        with reproducible(image.device, precision):
            features.append(method.feature(image, KeyedRNG.seeded(seed, keys).at("predict")).half().cpu())
        if sum(map(len, features)) == NUM_STORED_FEATURES:
            break
    return torch.cat(features)


def _write_predictions(run: RunFolder, name: str, ids: Sequence[str], arrays: Mapping[str, Tensor]) -> None:
    """Write predictions-<name>.npz: ids, labels, the metrics of each sample and, of clean pictures, logits and features."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, ids=np.array(ids), **{key: value.numpy() for key, value in arrays.items()})
    write_atomic(run.path / f"predictions-{name}.npz", buffer.getvalue())
