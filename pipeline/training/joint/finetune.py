"""Stage 3 as a command: a head of stage 2 and its encoders trained together, then a cache of the tuned encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch

from pipeline.evaluation.evaluate import evaluate, load_method
from pipeline.extraction.extract import ExtractOptions
from pipeline.runtime import plugins
from pipeline.runtime.files import lock, sha256, write_atomic
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.history import kept, validations
from pipeline.training.joint.ddp import joined
from pipeline.training.joint.export import export_encoder, extract_again, joint_weights, rebuild
from pipeline.training.joint.trainer import JointConfig, JointOptions, Together, train_together
from pipeline.training.state import drop_state


@dataclass(frozen=True)
class FinetuneResult:
    """What joint training has come to."""

    run: RunFolder  # the better one on validation: the joint head on the tuned encoders' cache, or the head of stage 2
    metric: str
    before: float  # on validation, of stage 2
    after: float  # of the kept joint epoch
    weights: Mapping[str, Path]  # tuned encoders by batch key

    @property
    def is_better(self) -> bool:
        """Whether joint training has paid off."""
        return self.after > self.before


def resolve_joint_settings(init: RunFolder, training: Mapping[str, Any]) -> TrainConfig:
    """The training config: the papers' rate for the head, ten epochs, judged by the metric; then what was given."""
    base = {"lr": 1e-4, "epochs": 10, "precision": init.config().training.get("precision", "float32")}
    config = plugins.configure(TrainConfig, {**base, **training})
    if config.compiled:
        raise ValueError("joint training is not compiled: leave --train compiled out")
    if config.window or init.config().training.get("window", 0):
        raise ValueError(
            "joint training keeps the features in memory: it takes no window, nor a head that was trained with one"
        )
    return config


def finetune(home: Path, init: RunFolder, joint: JointConfig, training: TrainConfig, work: JointOptions) -> FinetuneResult:
    """Train, keep the better of both stages, and leave tuned weights, their caches and an ordinary run on them.

    A finished joint run is not repeated and an interrupted one goes on. In a process other than the first of torchrun the
    outcome is that of stage 2. `ValueError` for a run that has not finished, or encoders that cannot be tuned.
    """
    init.check_done()
    old = init.config()
    missing = [key for key in joint.live if key not in old.caches]
    if missing:
        raise ValueError(f"{old.method} reads no {missing[0]}; choose --train image")
    if old.settings.get("adapter") == "pca":
        raise ValueError("principal components turn as the encoder moves; train the head with adapter=classifier, or none")
    changes = {"stage": "joint", **asdict(joint), "init": old.fingerprint()[:12]}
    config = replace(old, training={**asdict(training), **changes})
    run = RunFolder(
        home / "joint" / config.dataset / f"{config.method}-{config.fingerprint()[:12]}" / init.path.name, init.seed
    )
    features = open_features(home, config.dataset, config.method, config.caches, config.text_aggregate)
    with joined() as ranks:
        if not run.is_done:
            settings = plugins.configure(plugins.get("methods", config.method).Config, config.settings)
            head = load_method(init, old, settings)
            plan = Together(config=config, joint=joint, training=training, head=head, init=init, run=run, features=features)
            train_together(plan, work, ranks)
        if ranks.rank:
            return FinetuneResult(init, "", 0.0, 0.0, {})
    return _outcome(home, init, run, config, features, joint, work)


def _outcome(
    home: Path, init: RunFolder, run: RunFolder, config: RunConfig, features: FeatureSet, joint: JointConfig, work: JointOptions
) -> FinetuneResult:
    drop_state(run)
    shutil.rmtree(run.path / "items", ignore_errors=True)  # gigabytes, of this process or of one that was killed here
    metrics = evaluate(home, init, "val", {})["metrics"]
    metric = "acc1" if features.manifest.label_kind == "single" else "map"
    after = kept(validations(run), config.training["select"]).metric
    weights = {key: export_encoder(run, key) for key in joint.live}
    if not after > metrics[metric]:
        return FinetuneResult(init, metric, metrics[metric], after, weights)
    effort = ExtractOptions(workers=work.workers, progress=work.progress)
    caches = dict(config.caches)
    for key, path in weights.items():
        cache = features.caches[key]
        caches[key] = extract_again(rebuild(cache), path, cache, features.manifest, home, effort).fingerprint
    return FinetuneResult(_publish(home, run, replace(config, caches=caches)), metric, metrics[metric], after, weights)


def _publish(home: Path, joint: RunFolder, config: RunConfig) -> RunFolder:
    """The joint head as an ordinary run on the tuned encoders' features."""
    run = RunFolder.of(home, config, joint.seed)
    with lock(run.path, wait=True):
        if not run.is_done:
            run.create(config)
            weights = safetensors.torch.save(joint_weights(joint, "head"))
            write_atomic(run.path / "checkpoint.safetensors", weights)
            write_atomic(run.path / "history.csv", (joint.path / "history.csv").read_bytes())
            facts = {**joint.done(), "checkpoint_sha256": sha256(weights)}
            write_atomic(run.path / "done", json.dumps(facts))
    return run
