"""The joint method: it starts with the loss of stage 2, gradients reach the trained parts, and statistics are updated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import joint_home
from helpers.method_cases import build, fitted, seeded_loss
from torch import Tensor, nn

from pipeline.cache.table import shuffled_batches
from pipeline.data.manifest import Manifest
from pipeline.nn.method import Method
from pipeline.runtime import plugins
from pipeline.runtime.device import Precision, use_precision
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training import compiled
from pipeline.training.config import TrainConfig
from pipeline.training.joint.model import JointMethod
from pipeline.training.joint.plan import JointConfig, JointOptions, JointPlan
from pipeline.training.joint.trainable_encoder import TrainableEncoder, build_joint_method
from pipeline.training.joint.trainer import fast_algorithms, joint_source, validate_joint
from pipeline.training.loop import Trainer
from pipeline.training.state import TrainState
from pipeline.types import Batch, Phase

CPU = torch.device("cpu")
BOTH = JointConfig(train="both")
TRAINING = TrainConfig(batch_size=8, lr=1e-3, epochs=1)


@pytest.fixture(scope="module")
def home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("joint") / "home")


def first_batch(plan: JointPlan, encoders: dict[str, TrainableEncoder], channels_last: bool = False) -> Batch:
    model = build_joint_method(plan, encoders, joint_home.ALONE)
    return next(joint_source(plan, model, encoders, joint_home.ALONE, False, channels_last)(0))


def first_losses(home: Path, method: str, precision: Precision) -> tuple[JointMethod, Tensor, Tensor]:
    """The joint method, its loss of the first batch, and the loss of the head of stage 2 on the cached features."""
    joint = BOTH if "text" in plugins.get("methods", method).needs else JointConfig(train="image")
    plan = joint_home.joint_plan(home, joint_home.train_small_head(home, method), joint, TRAINING)
    model, encoders = joint_home.build_joint(plan)
    batch = first_batch(plan, encoders)
    cached = next(shuffled_batches(plan.features.train, 8, 0)(0))
    assert torch.equal(batch["key"], cached["key"])
    model.train()
    with use_precision(precision, CPU):
        loss = seeded_loss(model, batch, "joint")["loss"]
        torch.manual_seed(0)
        phases = [phase.name for phase in plan.head.phases if phase.name != "adapt"]
        expected = sum(plan.head.train().loss(cached, phase)["loss"] for phase in phases)
    assert isinstance(expected, Tensor)
    return model, loss, expected


@pytest.mark.parametrize("method", [name for name in plugins.names("methods") if not build(name).phases[-1].candidates])
def test_the_first_loss_is_that_of_stage_2(method: str, home: Path) -> None:
    model, loss, expected = first_losses(home, method, "float32")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    for key in ("image", "text")[: 1 + ("text" in plugins.get("methods", method).needs)]:
        grads = [parameter.grad for parameter in getattr(model, key).parameters() if parameter.grad is not None]
        if (method, key) == ("l2", "text"):  # its target is data: the text encoder has no loss
            assert not grads
            continue
        assert grads
        assert all(grad.isfinite().all() for grad in grads)
        assert any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("method", ["ema", "seda"])
def test_the_first_loss_is_that_of_stage_2_up_to_rounding(
    method: str, home: Path, tiny_manifest: Manifest, tmp_path: Path
) -> None:
    """bfloat16 products have 8 bits of precision, and stored float16 features have 11."""
    _, loss, expected = first_losses(home, method, "mixed")
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
    half = joint_home.make_home(tiny_manifest, tmp_path / "half" / "home", "float16")
    _, loss, expected = first_losses(half, method, "float32")
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)


def gradients(plan: JointPlan, options: JointOptions) -> dict[str, Tensor]:
    model, encoders = joint_home.build_joint(plan, options)
    batch = first_batch(plan, encoders, options.fast)
    assert batch["image_items"].is_contiguous(memory_format=torch.channels_last) == options.fast
    seeded_loss(model, batch, "joint")["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_accumulation_and_checkpointing_change_no_gradient(home: Path) -> None:
    """The loss is contrastive: each sample of the batch is a negative of all others, also of those in other parts."""
    plan = joint_home.joint_plan(home, joint_home.train_small_head(home, "ema"), BOTH, TRAINING)
    expected = gradients(plan, joint_home.QUIET)
    assert {name.partition(".")[0] for name in expected} == {"head", "image", "text"}
    for options in (
        JointOptions(accumulate=3, workers=0, progress=False),
        JointOptions(checkpointing=True, workers=0, progress=False),
    ):
        found = gradients(plan, options)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize(("train", "trained"), [("image", {"head", "image"}), ("text", {"head", "text"})])
def test_only_the_named_encoder_is_trained(train: str, trained: set[str], home: Path) -> None:
    plan = joint_home.joint_plan(home, joint_home.train_small_head(home, "ema"), JointConfig(train=train), TRAINING)
    model, _ = joint_home.build_joint(plan)
    names = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == trained
    assert {name.partition(".")[0] for name in model.state_dict()} == trained


@pytest.mark.parametrize("joint", [BOTH, JointConfig(train="image", augment=True)])
def test_statistics_are_those_of_the_validated_encoder(joint: JointConfig, home: Path) -> None:
    """So is the drift (the cosine). Both use all images of the split, without augmentation."""
    plan = joint_home.joint_plan(home, joint_home.train_small_head(home, "ema"), joint, TRAINING)
    model, encoders = joint_home.build_joint(plan)
    (before,) = validate_joint(plan, encoders, joint_home.ALONE, model)
    assert before.facts == {f"cosine_{key}": pytest.approx(1.0, abs=1e-5) for key in joint.trained_keys}
    with torch.no_grad():
        for parameter in encoders["image"].encoder.parameters():
            parameter.mul_(1.05)  # as if training had changed the encoder
        features = encoders["image"].encode(encoders["image"].items["train"])
    (after,) = validate_joint(plan, encoders, joint_home.ALONE, model)
    state, cached = model.state_dict(), plan.features.train.columns["image"]
    torch.testing.assert_close(state["head.image_scale.mean"], features.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert (state["head.image_scale.mean"] - cached.mean(dim=0)).abs().max() > 1e-2
    assert (state["head.text_scale.mean"] - plan.features.train.columns["text"].mean(dim=0)).abs().max() < 1e-4
    assert after.facts["cosine_image"] == pytest.approx(float(F.cosine_similarity(features, cached).mean()), abs=1e-5)
    assert after.facts["cosine_image"] < 0.9999
    assert (after.metric, after.loss) != (before.metric, before.loss)


def test_learning_rates_decrease_towards_the_input(home: Path) -> None:
    joint = JointConfig(train="image", encoder_lr=1e-4, layer_decay=0.5)
    plan = joint_home.joint_plan(home, joint_home.train_small_head(home, "baseline"), joint, TRAINING)
    model, _ = joint_home.build_joint(plan)
    (phase,) = model.phases
    image: Any = model.image
    depth = len(image.network.blocks)
    rates = {name: 1e-3 * phase.rate(name) for name, parameter in model.named_parameters()}
    assert rates["head.classifier.weight"] == pytest.approx(1e-3)
    assert rates["image.network.norm.weight"] == pytest.approx(1e-4)
    assert rates["image.network.patch_embed.proj.weight"] == pytest.approx(1e-4 * 0.5**depth)
    assert rates["image.network.cls_token"] == pytest.approx(1e-4 * 0.5**depth)
    for block in range(depth):
        for name in (f"blocks.{block}.attn.qkv.weight", f"blocks.{block}.mlp.fc2.bias"):
            assert rates[f"image.network.{name}"] == pytest.approx(1e-4 * 0.5 ** (depth - 1 - block))


class TwoRates(Method):
    """Two layers; the second has a tenth of the learning rate of the first."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.needs, self.phases = ("x",), (Phase("only", rates=(("slow.", 0.1),)),)
        self.fast, self.slow = nn.Linear(3, 3), nn.Linear(3, 3)

    def loss(self, batch: Batch, phase: str) -> Batch:
        return {"loss": self.slow(torch.tanh(self.fast(batch["x"]))).square().sum()}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image


def test_each_group_has_its_learning_rate_and_all_are_clipped_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, oracle = TwoRates(), TwoRates()
    oracle.load_state_dict(ours.state_dict())
    config = TrainConfig(lr=0.1, weight_decay=0.0, grad_clip=0.5)
    trainer = Trainer([TrainState(method=ours, run=RunFolder(tmp_path / "two-0" / "seed0", 0), config=config)])
    groups: list[dict[str, object]] = [
        {"params": [*oracle.fast.parameters()]},
        {"params": [*oracle.slow.parameters()], "lr": 0.01},
    ]
    adam = torch.optim.Adam(groups, lr=0.1)
    x = torch.randn(5, 3)
    for _ in range(4):
        trainer.step({"x": x}, "only")
        adam.zero_grad()
        oracle.loss({"x": x}, "only")["loss"].backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        adam.step()
    for name, tensor in oracle.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_fusion_reads_branches_without_their_dropout() -> None:
    """As in stage 2: in the phase "fusion" the branches predict, while the phases "ema" and "cdr" have dropout."""
    changes = {"ema.dropout": 0.3, "cdr.dropout": 0.3, "cdr.zero_start": True}
    head, batch = fitted("marnet", **changes)
    model = JointMethod(head, {}, {}, (), (), joint_home.ALONE).train()
    first, second = (seeded_loss(model, batch, "joint", seed) for seed in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]) == name.startswith("fusion_"), name
    assert head.ema.training is False  # the last phase was "fusion"
    assert not any(module.training for module in model.train(False).modules())


def test_fast_and_compiled_change_the_rounding_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILE_BACKEND", "eager")
    plan = joint_home.joint_plan(home, joint_home.train_small_head(home, "ema"), JointConfig(train="image"), TRAINING)
    expected = gradients(plan, joint_home.QUIET)
    options = JointOptions(fast=True, compile_encoders=True, workers=0, progress=False)
    with fast_algorithms(torch.device("cpu")):
        assert torch.backends.cudnn.enabled
        assert torch.backends.cudnn.benchmark
        found = gradients(plan, options)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name
