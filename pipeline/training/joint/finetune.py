"""Stage 3 as a command: train a head of stage 2 together with its encoders, then extract features with the tuned encoders."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from pipeline.evaluation.alignment import measure_alignment
from pipeline.evaluation.evaluate import evaluate, load_method
from pipeline.evaluation.inference_spec import InferenceSpec, carry_encoder_file
from pipeline.extraction.extract import ExtractOptions
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError, is_bug
from pipeline.runtime.files import lock, sha256, write_atomic
from pipeline.runtime.runs import REAL_TEXT, RECIPE, RunConfig, RunFolder
from pipeline.runtime.settings import configure, configure_run
from pipeline.training.config import TrainConfig
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.history import best_validation, read_validations
from pipeline.training.joint.ddp import DistributedContext, distributed_context
from pipeline.training.joint.export import export_encoder, extract_tuned_features, load_joint_weights, rebuild_encoder
from pipeline.training.joint.plan import JointConfig, JointOptions, JointPlan
from pipeline.training.joint.trainer import train_joint
from pipeline.training.state import delete_saved_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """The result of joint training, or of training the head on alone."""

    run: RunFolder  # the better run on validation: the joint head on features of the tuned encoders, or the head of stage 2
    metric: str  # name of the metric of `before` and `after`
    before: float  # metric of stage 2 on validation, in percent
    after: float  # metric of the kept joint epoch on validation, in percent
    weights: Mapping[str, Path]  # tuned encoders by batch key

    @property
    def is_better(self) -> bool:
        """Whether the joint run is better than the run of stage 2."""
        return self.after > self.before


def resolve_joint_settings(init: RunFolder, training: Mapping[str, Any]) -> TrainConfig:
    """Return the training config: given settings, or the defaults of joint training.

    The defaults are the learning rate of the papers for the head, ten epochs, and selection by the metric.

    Raises:
        UserError: a setting is not possible in joint training.
    """
    base = {"lr": 1e-4, "epochs": 10, "precision": init.config().training.get("precision", "float32")}
    config = configure(TrainConfig, {**base, **training})
    if config.compiled:
        raise UserError("joint training has no setting compiled: leave --train compiled out; --compile compiles the encoders")
    if config.window or init.config().training.get("window", 0):
        raise UserError("joint training keeps the features in memory: it takes no window, nor a head that was trained with one")
    return config


def finetune(home: Path, init: RunFolder, joint: JointConfig, training: TrainConfig, options: JointOptions) -> FinetuneResult:
    """Train a head and its encoders together, and return the better run of stage 2 and stage 3.

    This writes the tuned weights. If joint training is better, it also writes caches of the tuned encoders and an ordinary run
    on them. With frozen encoders, the head is trained on in the same way on the caches that it has: the control that tells what
    more epochs alone would gain. A finished joint run is not repeated, and an interrupted one resumes.

    Args:
        home: The folder of all caches and runs.
        init: The finished run of stage 2 to start from.
        joint: Which encoders are trained, and how.
        training: The training settings.
        options: How the work is carried out.

    Returns:
        The result. Under torchrun, processes other than the first return the run of stage 2.

    Raises:
        UserError: the run of stage 2 has not finished, or its encoders cannot be tuned.
    """
    init.check_done()
    options.check(joint)
    init_config = init.config()
    missing = [key for key in joint.trained_keys if key not in init_config.caches]
    if missing:
        raise UserError(f"{init_config.method} reads no {missing[0]}; choose --unfreeze image")
    if init_config.text_control != REAL_TEXT:
        raise UserError(f"{init.path} was trained on text={init_config.text_control}; joint training reads real texts alone")
    if init_config.setting("crossfit"):
        raise UserError("joint training trains all parts of a head at once, none out of fold; train the head with crossfit=0")
    config = _joint_config(init_config, joint, training)
    run, earlier = (_joint_run(home, each, init) for each in (config, replace(config, recipe=init_config.recipe)))
    if earlier.path != run.path and earlier.is_done and not run.path.exists():
        logger.warning("%s has these settings (an earlier version trained it); this trains %s", earlier.path, run.path)
    features = open_features(home, config.dataset, config.method, config.caches, config.text_aggregate, config.train_fraction)
    with distributed_context() as context:
        if not run.is_done:
            settings = configure_run(plugins.get("methods", config.method).Config, config.settings)
            head = load_method(init, init_config, settings)
            if any(phase.candidates for phase in head.phases):
                raise UserError(f"{init_config.method} chooses on validation, which joint training does not: take another head")
            plan = JointPlan(config=config, joint=joint, training=training, head=head, init=init, run=run, features=features)
            _train(plan, options, context)
        if context.rank:
            return FinetuneResult(init, "", 0.0, 0.0, {})
    return _compare_and_publish(home, init, run, config, features, joint, options)


def joint_run(home: Path, init: RunFolder, joint: JointConfig, training: TrainConfig) -> RunFolder:
    """Return the folder of the joint run that `finetune` makes, finished or not, without making it."""
    return _joint_run(home, _joint_config(init.config(), joint, training), init)


def _joint_config(init: RunConfig, joint: JointConfig, training: TrainConfig) -> RunConfig:
    """Return the config of joint training that starts from a run of this config."""
    changes = {"stage": "joint", **joint.identity(), "init": init.fingerprint()[:12]}
    return replace(init, training={**asdict(training), **changes}, recipe=RECIPE)


def _joint_run(home: Path, config: RunConfig, init: RunFolder) -> RunFolder:
    """Return the folder of a joint run, which starts from `init` and has its seed."""
    name = f"{config.method}-{config.fingerprint()[:12]}"
    return RunFolder(home / "joint" / config.dataset / name / init.path.name, init.seed)


def _train(plan: JointPlan, options: JointOptions, context: DistributedContext) -> None:
    """Train a joint run; the traceback of a bug is in `error.txt` of its folder until a later attempt ends without one."""
    try:
        train_joint(plan, options, context)
    except Exception as error:
        if is_bug(error) and not context.rank and (plan.run.path / "config.json").is_file():
            plan.run.write_traceback(error)
        raise
    if not context.rank:
        plan.run.delete_traceback()


def _compare_and_publish(
    home: Path,
    init: RunFolder,
    run: RunFolder,
    config: RunConfig,
    features: FeatureSet,
    joint: JointConfig,
    options: JointOptions,
) -> FinetuneResult:
    """Export the tuned encoders of a finished joint run; if it is better than stage 2, publish it as an ordinary run."""
    delete_saved_state(run)
    shutil.rmtree(run.path / "items", ignore_errors=True)  # gigabytes, left by this process or by one that was killed here
    metrics = evaluate(home, init, "val", {})["metrics"]
    metric = "acc1" if features.manifest.label_kind == "single" else "map"
    after = best_validation(read_validations(run), config.training["select"]).metric
    weights = {key: export_encoder(run, key) for key in joint.trained_keys}
    if not after > metrics[metric]:
        return FinetuneResult(init, metric, metrics[metric], after, weights)
    extract_options = ExtractOptions(workers=options.workers, progress=options.progress)
    caches = dict(features.caches)
    for key, path in weights.items():
        rebuilt = rebuild_encoder(caches[key])
        caches[key] = extract_tuned_features(rebuilt, path, caches[key], features.manifest, home, extract_options)
    fingerprints = dict(config.caches) | {key: cache.fingerprint for key, cache in caches.items()}
    spec = InferenceSpec.of(features.manifest, caches["image"])
    published = _publish(home, run, replace(config, caches=fingerprints), spec, weights.get("image"))
    return FinetuneResult(published, metric, metrics[metric], after, weights)


def _publish(home: Path, joint: RunFolder, config: RunConfig, spec: InferenceSpec, image_weights: Path | None) -> RunFolder:
    """Write the joint head as an ordinary run on the features of the tuned encoders, and return that run.

    Args:
        home: The folder of all runs.
        joint: The finished joint run.
        config: The config of the ordinary run.
        spec: What the run needs to classify new media.
        image_weights: The tuned weights of the image encoder, which the run then carries; None: it is not tuned.
    """
    run = RunFolder.of(home, config, joint.seed)
    with lock(run.path, wait=True):
        if not run.is_done:
            run.create(config)
            spec.write(run)
            if image_weights:
                carry_encoder_file(run, image_weights)
            state = load_joint_weights(joint, "head")
            weights = safetensors.torch.save(state)
            write_atomic(run.path / "checkpoint.safetensors", weights)
            write_atomic(run.path / "history.csv", (joint.path / "history.csv").read_bytes())
            if "text" in config.caches:
                run.write_alignment(_measure_alignment(home, config, state, run.seed))
            run.write_done({**joint.read_done(), "checkpoint_sha256": sha256(weights)})
    return run


def _measure_alignment(home: Path, config: RunConfig, state: Mapping[str, Tensor], seed: int) -> dict[str, float]:
    """Return how near the texts that a joint head generates are to the real ones, both of the tuned encoders."""
    features = open_features(home, config.dataset, config.method, config.caches, config.text_aggregate)
    plugin = plugins.get("methods", config.method)
    method = plugin(configure_run(plugin.Config, config.settings), features.shapes).to(default_device())
    method.load_state_dict(state)
    return measure_alignment(method, features.validation_pairs, seed, config.training["precision"])
