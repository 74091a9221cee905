"""A home in which encoders can be tuned: the tiny dataset, read by a small ViT and a small BERT, and heads of stage 2 on it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from helpers import encoder_cases
from helpers.tiny_heads import SMALL
from pipeline.cache import find_caches, open_cache
from pipeline.cache.layout import StoreDtype
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.encoders._weights import seeded
from pipeline.evaluation.evaluate import load_method
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.runs import RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.features import open_features
from pipeline.training.heads import plan_head, train_head
from pipeline.training.heads import resolve_settings as resolve_head
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.finetune import FinetuneResult, finetune, resolve_joint_settings
from pipeline.training.joint.model import Joint
from pipeline.training.joint.trainer import JointConfig, JointOptions, Together, TrainableEncoder, assemble, open_live

ALONE, QUIET = DistributedContext(), JointOptions(workers=0, progress=False)
IMAGE = {"model": "test_vit", "weights": "random", "compute_dtype": "float32"}
SHORT = {"epochs": "2", "batch_size": "8", "lr": "1e-3"}


def make_home(manifest: Manifest, home: Path, store_dtype: StoreDtype = "float32", max_failures: float = 0.05) -> Path:
    """Prepare and extract; image [64] and text [32] features, by default stored as float32 like they are computed."""
    manifests.write_manifest(manifest, home)
    quick = ExtractOptions(progress=False, workers=0, max_failures=max_failures)
    extract(manifest, "timm", IMAGE, home, store_dtype=store_dtype, effort=quick)
    folder = home.parent / "bert"
    folder.mkdir()
    with seeded():
        text = {"model": str(encoder_cases.text_folder(folder, "bert")), "max_tokens": "8"}
    extract(manifest, "transformers_text", text, home, store_dtype=store_dtype, effort=quick)
    return home


def caches(home: Path) -> dict[str, str]:
    """Fingerprints of the first caches of the tiny dataset by batch key."""
    opened = [open_cache(path) for path in find_caches(home, "tiny")]
    first = [cache for cache in opened if "joint" not in cache.provenance["settings"].get("weights", "")]
    return {cache.identity["encoder"]["modality"]: cache.fingerprint for cache in first}


def head(home: Path, method: str, epochs: int = 3, aggregate: str = "") -> RunFolder:
    """A small run of stage 2."""
    settings, training = resolve_head("tiny", method, "head", SMALL[method], {"epochs": epochs, "batch_size": 8})
    return train_head(plan_head(home, "tiny", method, settings, training, 0, caches(home), aggregate), progress=False)


def together(home: Path, init: RunFolder, joint: JointConfig, training: TrainConfig) -> Together:
    """What `finetune` trains."""
    config = init.config()
    features = open_features(home, "tiny", config.method, config.caches, config.text_aggregate)
    settings = plugins.configure(plugins.get("methods", config.method).Config, config.settings)
    loaded = load_method(init, config, settings)
    name = replace(config, training=asdict(joint)).fingerprint()
    run = replace(init, path=home / "joint" / "tiny" / name / "seed0")
    return Together(config=config, joint=joint, training=training, head=loaded, init=init, run=run, features=features)


def assembled(plan: Together, work: JointOptions = QUIET) -> tuple[Joint, dict[str, TrainableEncoder]]:
    """The method that is trained, and its live encoders."""
    live = {key: open_live(plan, key, work, ALONE) for key in plan.joint.live}
    return assemble(plan, live, ALONE), live


def tuned(home: Path, init: RunFolder, joint: JointConfig, **training: str) -> FinetuneResult:
    """The outcome of a short joint training."""
    return finetune(home, init, joint, resolve_joint_settings(init, {**SHORT, **training}), QUIET)
