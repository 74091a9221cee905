"""A home with synthetic runs, written as the stages write them, for the tests of the report."""

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
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.runtime.files import fingerprint, lock
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.types import Sample

WIDTH = 12  # of the image features
TRAINING = {"lr": 0.001, "epochs": 4, "select": "metric"}


@dataclass
class Home:
    """A home under construction."""

    path: Path
    manifest: Manifest
    caches: dict[str, str] = field(default_factory=dict)  # "image", "text" -> fingerprint

    @property
    def label(self) -> np.ndarray:
        """Labels of the test split, [N] or [N,C]."""
        samples = self.manifest.split("test")
        if self.manifest.label_kind == "single":
            return np.array([sample.labels[0] for sample in samples])
        label = np.zeros((len(samples), len(self.manifest.class_names)), np.float32)
        for row, sample in enumerate(samples):
            label[row, list(sample.labels)] = 1.0
        return label

    def config(self, method: str, settings: Mapping[str, Any], image: str = "image") -> RunConfig:
        """A run's config on one of the caches."""
        classes = len(self.manifest.class_names)
        return RunConfig(
            dataset=self.manifest.dataset,
            method=method,
            settings=dict(settings),
            training=TRAINING,
            caches={"image": self.caches[image]},
            shapes={"image": [WIDTH], "label": [] if self.manifest.label_kind == "single" else [classes], "classes": [classes]},
            text_aggregate="mean",
            manifest=self.manifest.fingerprint(),
        )

    def train(self, config: RunConfig, seed: int, scores: Sequence[float] = (40.0, 55.0, 52.0, 51.0)) -> RunFolder:
        """A finished run without evaluations; `scores` are its validation metric by epoch."""
        run = RunFolder.of(self.path, config, seed)
        run.create(config)
        rows = [{"phase": "adapt", "epoch": epoch, "lr": 1e-3, "loss": 3.0 / (epoch + 1)} for epoch in (0, 1)]
        for k, score in enumerate(scores):
            row = {"phase": "head", "epoch": k, "lr": 1e-3, "loss": 2.0 / (k + 1) + 0.1 * seed}
            rows.append({**row, "val_metric": score, "val_loss": 1.0})
        pd.DataFrame(rows).to_csv(run.path / "history.csv", index=False)
        (run.path / "done").write_text(f"{2.0 + seed:.3f}\n")
        return run

    def evaluate(
        self, run: RunFolder, logits: np.ndarray, name: str = "test", terms: dict[str, np.ndarray] | None = None
    ) -> None:
        """Predictions and record of an evaluation; single-label terms are computed here, multi-label ones are given."""
        if terms is None:
            rank = (logits > logits[np.arange(len(logits)), self.label][:, None]).sum(axis=1)
            terms = {"acc1": 100.0 * (rank < 1), "acc5": 100.0 * (rank < 5)}
        arrays: dict[str, Any] = {
            "ids": np.array([sample.id for sample in self.manifest.split("test")]),
            "logits": logits,
            "label": self.label,
        }
        arrays |= {"feature": logits[:2000].astype(np.float16), **terms}
        np.savez_compressed(run.path / f"predictions-{name}.npz", **arrays)
        config = run.config()
        record = {"dataset": config.dataset, "split": "test", "method": config.method, "seed": run.seed, "n": len(logits)}
        record |= {"metrics": {key: float(value.mean()) for key, value in terms.items()}, "train_seconds": 2.0 + run.seed}
        record |= {"settings": dict(config.settings), "versions": {"torch": "2.11"}, "config": config.fingerprint()}
        if self.manifest.label_kind == "multi":
            record["metrics"] |= {"map": 50.0, "overall_pre1": 42.0}  # means over something else than samples
        path = run.path / "metrics.json"
        records = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(records | {name: record}, sort_keys=True))
        with (run.path / "test_reads.jsonl").open("a") as file:
            file.write(json.dumps({"evaluation": name, "time": f"2026-01-0{1 + run.seed}T00:00:00+00:00"}) + "\n")

    def logits(self, strength: float, seed: int) -> np.ndarray:
        """Noise plus `strength` for the true classes."""
        label = self.label if self.label.ndim == 2 else np.eye(len(self.manifest.class_names))[self.label]
        return (np.random.default_rng(seed).normal(size=label.shape) + strength * label).astype(np.float32)


def make_home(folder: Path, class_names: Sequence[str], num_test: int = 60, id_prefix: str = "sample", **changes: Any) -> Home:
    """A home with a manifest, its pictures and two caches ("image", "text"), no runs; `changes` are fields of the manifest."""
    media = folder / "media"
    media.mkdir(parents=True)
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
    manifests.write_manifest(manifest, folder)
    home = Home(folder, manifest)
    ids = [sample.id for sample in manifest.samples]
    for key in ("image", "text"):
        identity = {"encoder": {"name": key}, "store_dtype": "float16", **({"text": {"sep": " "}} if key == "text" else {})}
        path = cache_path(folder, "toy", key, identity)
        features = np.random.default_rng(0).normal(size=(len(ids), WIDTH)).astype(np.float32)
        features += 2.0 * np.eye(len(class_names), WIDTH)[[sample.labels[-1] for sample in manifest.samples]].astype(np.float32)
        with lock(path):
            provenance = {"command": "diffalign extract toy", "versions": {"zarr": "3.1"}}
            writer = Writer.open(path, ids, np.zeros(0, np.int64), (WIDTH,), identity, provenance)
            commit = writer.commit(0, features, [], seconds=1.0, batch_size=8, device="cpu")
            writer.finish({0: commit})
        home.caches[key] = fingerprint(identity)
    return home
