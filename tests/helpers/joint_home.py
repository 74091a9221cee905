"""A home for joint training: the tiny dataset, features of a small ViT and a small BERT, and heads of stage 2 on them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from helpers import encoder_cases
from helpers.tiny_heads import small_settings
from pipeline.cache import find_caches, open_cache
from pipeline.cache.layout import StoreDtype
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.encoders._weights import fixed_seed
from pipeline.evaluation.evaluate import load_method
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import configure
from pipeline.training.config import TrainConfig
from pipeline.training.features import open_features
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.finetune import FinetuneResult, finetune, resolve_joint_settings
from pipeline.training.joint.model import JointMethod
from pipeline.training.joint.plan import JointConfig, JointOptions, JointPlan
from pipeline.training.joint.trainable_encoder import TrainableEncoder, build_joint_method, open_trainable_encoder

ALONE, QUIET = DistributedContext(), JointOptions(workers=0, progress=False)
IMAGE = {"model": "test_vit", "weights": "random", "compute_dtype": "float32"}
SHORT = {"epochs": "2", "batch_size": "8", "lr": "1e-3"}


def make_home(manifest: Manifest, home: Path, store_dtype: StoreDtype = "float32", max_failures: float = 0.05) -> Path:
    """Prepare the dataset and extract image [64] and text [32] features, by default stored as float32, as they are computed."""
    write_manifest(manifest, home)
    quick = ExtractOptions(progress=False, workers=0, max_failures=max_failures)
    extract(manifest, "timm", IMAGE, home, store_dtype=store_dtype, options=quick)
    folder = home.parent / "bert"
    folder.mkdir()
    with fixed_seed():
        text = {"model": str(encoder_cases.text_folder(folder, "bert")), "max_tokens": "8"}
    extract(manifest, "transformers_text", text, home, store_dtype=store_dtype, options=quick)
    return home


def caches(home: Path) -> dict[str, str]:
    """The fingerprints by batch key of the caches of the tiny dataset that were not made by tuned encoders."""
    opened = [open_cache(path) for path in find_caches(home, "tiny")]
    first = [cache for cache in opened if "joint" not in cache.provenance["settings"].get("weights", "")]
    return {cache.identity["encoder"]["modality"]: cache.fingerprint for cache in first}


def train_small_head(home: Path, method: str, epochs: int = 3, aggregate: str = "") -> RunFolder:
    """Train a small head in stage 2."""
    settings, training = resolve_head_settings(
        "tiny", method, "head", small_settings(method), {"epochs": epochs, "batch_size": 8}
    )
    return train_head(plan_head(home, "tiny", method, settings, training, 0, caches(home), aggregate), progress=False)


def joint_plan(home: Path, init: RunFolder, joint: JointConfig, training: TrainConfig) -> JointPlan:
    """The plan that `finetune` makes."""
    config = init.config()
    features = open_features(home, "tiny", config.method, config.caches, config.text_aggregate)
    settings = configure(plugins.get("methods", config.method).Config, config.settings)
    loaded = load_method(init, config, settings)
    name = replace(config, training=asdict(joint)).fingerprint()
    run = replace(init, path=home / "joint" / "tiny" / name / "seed0")
    return JointPlan(config=config, joint=joint, training=training, head=loaded, init=init, run=run, features=features)


def build_joint(plan: JointPlan, options: JointOptions = QUIET) -> tuple[JointMethod, dict[str, TrainableEncoder]]:
    """The joint method of a plan, and its trainable encoders by batch key."""
    encoders = {key: open_trainable_encoder(plan, key, options, ALONE) for key in plan.joint.trained_keys}
    return build_joint_method(plan, encoders, ALONE), encoders


def finetune_briefly(home: Path, init: RunFolder, joint: JointConfig, **training: str) -> FinetuneResult:
    """The result of a short joint training."""
    return finetune(home, init, joint, resolve_joint_settings(init, {**SHORT, **training}), QUIET)
