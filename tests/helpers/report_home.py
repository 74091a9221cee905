"""Build a home with synthetic runs, in the files that the real stages write, for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pipeline.cache import Writer
from pipeline.cache.layout import cache_path
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.runtime.files import fingerprint, lock
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.types import Sample

FEATURE_WIDTH = 12  # D of the image and text features
TRAINING_SETTINGS = {"lr": 0.001, "epochs": 4, "select": "metric"}


@dataclass
class ReportHome:
    """A home that a test fills with runs and evaluations."""

    path: Path
    manifest: Manifest
    caches: dict[str, str] = field(default_factory=dict)  # "image", "text" -> fingerprint

    @property
    def label(self) -> np.ndarray:
        """The labels of the test split: [N], or [N,C] of 0 and 1 for multi-label data."""
        samples = self.manifest.split("test")
        if self.manifest.label_kind == "single":
            return np.array([sample.labels[0] for sample in samples])
        label = np.zeros((len(samples), len(self.manifest.class_names)), np.float32)
        for row, sample in enumerate(samples):
            label[row, list(sample.labels)] = 1.0
        return label

    def config(self, method: str, settings: Mapping[str, Any], image: str = "image") -> RunConfig:
        """Return the config of a run on one of the caches; `image` is the key of the cache that gives its image features."""
        classes = len(self.manifest.class_names)
        return RunConfig(
            dataset=self.manifest.dataset,
            method=method,
            settings=dict(settings),
            training=TRAINING_SETTINGS,
            caches={"image": self.caches[image]},
            shapes={
                "image": [FEATURE_WIDTH],
                "label": [] if self.manifest.label_kind == "single" else [classes],
                "classes": [classes],
            },
            text_aggregate="mean",
            manifest=self.manifest.fingerprint(),
        )

    def train(self, config: RunConfig, seed: int, scores: Sequence[float] = (40.0, 55.0, 52.0, 51.0)) -> RunFolder:
        """Write a finished run without evaluations; `scores` are its validation metric by epoch."""
        run = RunFolder.of(self.path, config, seed)
        run.create(config)
        rows = [{"phase": "adapt", "epoch": epoch, "lr": 1e-3, "loss": 3.0 / (epoch + 1)} for epoch in (0, 1)]
        for k, score in enumerate(scores):
            row = {"phase": "head", "epoch": k, "lr": 1e-3, "loss": 2.0 / (k + 1) + 0.1 * seed}
            rows.append({**row, "val_metric": score, "val_loss": 1.0})
        pd.DataFrame(rows).to_csv(run.path / "history.csv", index=False)
        run.write_done({"seconds": 2.0 + seed, "checkpoint_sha256": "", "code": "toy"})
        return run

    def evaluate(
        self, run: RunFolder, logits: np.ndarray, name: str = "test", per_sample: dict[str, np.ndarray] | None = None
    ) -> None:
        """Write the predictions and the record of an evaluation.

        Args:
            run: The run.
            logits: Logits [N,C] of the test samples.
            name: Name of the evaluation.
            per_sample: Values [N] of each metric in percent. They must be given for multi-label data; for single-label data
                they are computed here.
        """
        if per_sample is None:
            rank = (logits > logits[np.arange(len(logits)), self.label][:, None]).sum(axis=1)
            per_sample = {"acc1": 100.0 * (rank < 1), "acc5": 100.0 * (rank < 5)}
        arrays: dict[str, Any] = {
            "ids": np.array([sample.id for sample in self.manifest.split("test")]),
            "logits": logits,
            "label": self.label,
        }
        arrays |= {"feature": logits[:2000].astype(np.float16), **per_sample}
        np.savez_compressed(run.path / f"predictions-{name}.npz", **arrays)
        config = run.config()
        record = {"dataset": config.dataset, "split": "test", "method": config.method, "seed": run.seed, "n": len(logits)}
        record |= {"metrics": {key: float(value.mean()) for key, value in per_sample.items()}, "train_seconds": 2.0 + run.seed}
        record |= {"settings": dict(config.settings), "versions": {"torch": "2.11"}, "config": config.fingerprint()}
        if self.manifest.label_kind == "multi":
            record["metrics"] |= {"map": 50.0, "overall_pre1": 42.0}  # these two are not means over samples
        path = run.path / "metrics.json"
        records = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(records | {name: record}, sort_keys=True))
        with (run.path / "test_reads.jsonl").open("a") as file:
            file.write(json.dumps({"evaluation": name, "time": f"2026-01-0{1 + run.seed}T00:00:00+00:00"}) + "\n")

    def logits(self, strength: float, seed: int) -> np.ndarray:
        """Return logits [N,C] of noise plus `strength` for the true classes: a higher strength is right more often."""
        label = self.label if self.label.ndim == 2 else np.eye(len(self.manifest.class_names))[self.label]
        return (np.random.default_rng(seed).normal(size=label.shape) + strength * label).astype(np.float32)


def make_home(
    folder: Path, class_names: Sequence[str], num_test: int = 60, id_prefix: str = "sample", **changes: Any
) -> ReportHome:
    """Make a home with a manifest, its images and two caches ("image", "text"), but no runs; `changes` are manifest fields."""
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    samples = []
    for k in range(num_test + 6):
        split = "test" if k < num_test else ("train", "val")[k % 2]
        label = k % len(class_names)
        labels = (
            (label,)
            if changes.get("label_kind", "single") == "single"
            else tuple(sorted({label, (label + k // 8) % len(class_names)}))
        )
        samples.append(Sample(f"{id_prefix} {k:03d}", split, Path(f"{k}.png"), (f"text {k:03d}",), labels, ""))
        hue = int(255 * label / len(class_names))
        Image.new("HSV", (48, 32), (hue, 140, 220)).convert("RGB").save(media / f"{k}.png")
    meta = {"media_type": "image", "licence": "CC BY 4.0", "attribution": "somebody", "sources": {"pictures": "1.0"}}
    fields: dict[str, Any] = {"dataset": "toy", "label_kind": "single", "meta": meta, "media_root": media}
    fields |= {"class_names": tuple(class_names), "samples": tuple(samples)}
    manifest = Manifest(**{**fields, **changes})
    write_manifest(manifest, folder)
    home = ReportHome(folder, manifest)
    for key in ("image", "text"):
        home.caches[key] = _write_cache(folder, manifest, key)
    return home


def _write_cache(folder: Path, manifest: Manifest, key: str) -> str:
    """Write a cache with features of noise plus a vector that depends on the class, and return its fingerprint."""
    identity = {"encoder": {"name": key}, "store_dtype": "float16", **({"text": {"sep": " "}} if key == "text" else {})}
    path = cache_path(folder, manifest.dataset, key, identity)
    ids = [sample.id for sample in manifest.samples]
    classes = [sample.labels[-1] for sample in manifest.samples]
    features = np.random.default_rng(0).normal(size=(len(ids), FEATURE_WIDTH)).astype(np.float32)
    features += 2.0 * np.eye(len(manifest.class_names), FEATURE_WIDTH)[classes].astype(np.float32)
    with lock(path):
        provenance = {"command": f"diffalign extract {manifest.dataset}", "versions": {"zarr": "3.1"}}
        writer = Writer.open(path, ids, np.zeros(0, np.int64), (FEATURE_WIDTH,), identity, provenance)
        commit = writer.commit(0, features, [], seconds=1.0, batch_size=8, device="cpu")
        writer.finish({0: commit})
    return fingerprint(identity)
