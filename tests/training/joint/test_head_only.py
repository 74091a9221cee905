"""The control of joint training: the head is trained on alone, with frozen encoders, for as long and in the same way."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import joint_home
from helpers.tiny_heads import small_settings
from safetensors.torch import load_file

from pipeline.cache import find_caches
from pipeline.data.manifest import Manifest
from pipeline.evaluation.alignment import measure_alignment
from pipeline.evaluation.evaluate import evaluate, load_method
from pipeline.runtime import plugins
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import configure_run
from pipeline.training.features import open_features
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.joint.plan import JointConfig


@pytest.fixture(scope="module")
def prepared_home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("head_only") / "home")


@pytest.fixture
def home(prepared_home: Path, tmp_path: Path) -> Path:
    """A copy of the prepared home that a test may write to."""
    return Path(shutil.copytree(prepared_home, tmp_path / "home"))


def joint_runs(home: Path) -> set[RunFolder]:
    return {RunFolder(path, 0) for path in (home / "joint" / "tiny").glob("*/seed0")}


@pytest.mark.parametrize("method", ["ema", "marnet", "seda"])
def test_frozen_encoders_are_joint_training_at_a_learning_rate_of_zero(method: str, home: Path) -> None:
    """The head is trained on by the same steps. Without clipping, since the norm that is clipped has the encoder's gradient."""
    steps = {"epochs": "4", "grad_clip": "1e9"}
    init = joint_home.train_small_head(home, method, epochs=1)
    caches = find_caches(home, "tiny")
    alone = joint_home.finetune_briefly(home, init, JointConfig(train="none"), **steps)
    assert (alone.weights, find_caches(home, "tiny")) == ({}, caches)
    (first,) = joint_runs(home)
    still = joint_home.finetune_briefly(home, init, JointConfig(train="image", encoder_lr=1e-12), **steps)
    (second,) = joint_runs(home) - {first}
    ours, theirs = (
        pd.read_csv(run.path / "history.csv").drop(columns="cosine_image", errors="ignore") for run in (first, second)
    )
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-3, atol=1e-4)
    assert len(ours) == 4
    assert alone.after == still.after
    found, expected = load_file(first.path / "checkpoint.safetensors"), load_file(second.path / "checkpoint.safetensors")
    assert found.keys() == {name for name in expected if name.startswith("head.")}
    before = load_file(init.path / "checkpoint.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)
    assert any(not torch.equal(tensor, before[name.removeprefix("head.")]) for name, tensor in found.items())


def test_a_head_that_was_trained_on_alone_is_an_ordinary_run_on_the_same_features(home: Path) -> None:
    init = joint_home.train_small_head(home, "ema", epochs=1)
    outcome = joint_home.finetune_briefly(home, init, JointConfig(train="none"), epochs="8", lr="1e-2")
    assert outcome.is_better
    config, before = outcome.run.config(), init.config()
    assert (config.caches, config.settings) == (before.caches, before.settings)
    assert (config.training["stage"], config.training["train"], config.training["epochs"]) == ("joint", "none", 8)
    assert evaluate(home, outcome.run, "val", {})["metrics"]["acc1"] == outcome.after
    other_rate = JointConfig(train="none", encoder_lr=1e-3)  # a rate of no encoder makes no other run
    assert joint_home.finetune_briefly(home, init, other_rate, epochs="8", lr="1e-2") == outcome


@pytest.mark.parametrize("train", ["none", "both"])
def test_what_is_published_says_how_near_its_texts_are(train: str, home: Path) -> None:
    """As the heads of stage 2 do; the figures are those of the published weights on the texts of its own caches."""
    init = joint_home.train_small_head(home, "seda", epochs=1)
    assert init.read_alignment()
    run = joint_home.finetune_briefly(home, init, JointConfig(train=train, encoder_lr=1e-3), epochs="8", lr="1e-2").run
    assert run != init
    config = run.config()
    assert (config.caches["text"] == init.config().caches["text"]) == (train == "none")
    features = open_features(home, "tiny", "seda", config.caches, config.text_aggregate)
    method = load_method(run, config, configure_run(plugins.get("methods", "seda").Config, config.settings))
    assert run.read_alignment() == measure_alignment(method, features.validation_pairs, run.seed)
    assert run.read_alignment() != init.read_alignment()


def test_a_fusion_out_of_fold_is_not_trained_jointly(home: Path) -> None:
    settings, training = resolve_head_settings(
        "tiny", "marnet", "head", {**small_settings("marnet"), "crossfit": 2}, {"epochs": 1, "batch_size": 8}
    )
    plan = plan_head(home, "tiny", "marnet", settings, training, 0, joint_home.caches(home))
    with pytest.raises(ValueError, match="train the head with crossfit=0"):
        joint_home.finetune_briefly(home, train_head(plan, progress=False), JointConfig(train="image"))
