"""A head and its encoders as one method: it starts where stage 2 ended, gradients reach what is trained, statistics follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import joint_home
from torch import Tensor, nn

from pipeline.cache.table import shuffled
from pipeline.data.manifest import Manifest
from pipeline.runtime import plugins
from pipeline.runtime.device import Precision, computing
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.joint.model import Joint
from pipeline.training.joint.trainer import JointConfig, JointOptions, source_of, validate
from pipeline.training.optim import EnsembleOptimizer
from pipeline.training.state import TrainState
from pipeline.types import Batch, Phase

CPU = torch.device("cpu")
BOTH = JointConfig(train="both")
TRAINING = TrainConfig(batch_size=8, lr=1e-3, epochs=1)


@pytest.fixture(scope="module")
def home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("joint") / "home")


def first_batch(plan: joint_home.Together, live: dict[str, joint_home.TrainableEncoder]) -> Batch:
    model = joint_home.assemble(plan, live, joint_home.ALONE)
    return next(source_of(plan, model, live, joint_home.ALONE, progress=False)(0))


def first_losses(home: Path, method: str, precision: Precision) -> tuple[Joint, Tensor, Tensor]:
    """The joint model, its loss of the first batch, and that of the head of stage 2 on the cached features."""
    joint = BOTH if "text" in plugins.get("methods", method).NEEDS else JointConfig(train="image")
    plan = joint_home.together(home, joint_home.head(home, method), joint, TRAINING)
    model, live = joint_home.assembled(plan)
    batch = first_batch(plan, live)
    cached = next(shuffled(plan.features.train, 8, 0)(0))
    assert torch.equal(batch["key"], cached["key"])
    rng = KeyedRNG.seeded(0, batch["key"]).at("train", "joint", 0, 0)
    model.train()
    with computing(precision, CPU):
        loss = model.loss(batch, rng, "joint")["loss"]
        phases = [phase.name for phase in plan.head.phases if phase.name != "adapt"]
        expected = sum(plan.head.loss(cached, rng.at(phase), phase)["loss"] for phase in phases)
    assert isinstance(expected, Tensor)
    return model, loss, expected


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_the_first_loss_is_that_of_stage_2(method: str, home: Path) -> None:
    model, loss, expected = first_losses(home, method, "float32")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    for key in ("image", "text")[: 1 + ("text" in plugins.get("methods", method).NEEDS)]:
        grads = [parameter.grad for parameter in getattr(model, key).parameters() if parameter.grad is not None]
        assert grads
        assert all(grad.isfinite().all() for grad in grads)
        assert any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("method", ["ema", "seda"])
def test_the_first_loss_is_that_of_stage_2_within_the_formats(
    method: str, home: Path, tiny_manifest: Manifest, tmp_path: Path
) -> None:
    """bfloat16 products have eight bits, and features are stored in eleven."""
    _, loss, expected = first_losses(home, method, "mixed")
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
    half = joint_home.make_home(tiny_manifest, tmp_path / "half" / "home", "float16")
    _, loss, expected = first_losses(half, method, "float32")
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)


def gradients(plan: joint_home.Together, work: JointOptions) -> dict[str, Tensor]:
    model, live = joint_home.assembled(plan, work)
    batch = first_batch(plan, live)
    model.loss(batch, KeyedRNG.seeded(0, batch["key"]), "joint")["loss"].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_parts_and_recomputation_change_no_gradient(home: Path) -> None:
    """A contrastive loss: every sample of the batch is a negative of every other, in whichever part it went through."""
    plan = joint_home.together(home, joint_home.head(home, "ema"), BOTH, TRAINING)
    expected = gradients(plan, joint_home.QUIET)
    assert {name.partition(".")[0] for name in expected} == {"head", "image", "text"}
    for work in (
        JointOptions(accumulate=3, workers=0, progress=False),
        JointOptions(checkpointing=True, workers=0, progress=False),
    ):
        found = gradients(plan, work)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize(("train", "trained"), [("image", {"head", "image"}), ("text", {"head", "text"})])
def test_only_what_is_named_is_trained(train: str, trained: set[str], home: Path) -> None:
    plan = joint_home.together(home, joint_home.head(home, "ema"), JointConfig(train=train), TRAINING)
    model, _ = joint_home.assembled(plan)
    names = {name.partition(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == trained
    assert {name.partition(".")[0] for name in model.state_dict()} == trained


@pytest.mark.parametrize("joint", [BOTH, JointConfig(train="image", augment=True)])
def test_statistics_are_those_of_the_encoder_that_is_validated(joint: JointConfig, home: Path) -> None:
    """And so is the drift; pictures are taken as they are, and all of them."""
    plan = joint_home.together(home, joint_home.head(home, "ema"), joint, TRAINING)
    model, live = joint_home.assembled(plan)
    (before,) = validate(plan, live, joint_home.ALONE, model)
    assert before.facts == {f"cosine_{key}": pytest.approx(1.0, abs=1e-5) for key in joint.live}
    with torch.no_grad():
        for parameter in live["image"].encoder.parameters():
            parameter.mul_(1.05)  # a moving encoder
        features = live["image"].encode(live["image"].items["train"])
    (after,) = validate(plan, live, joint_home.ALONE, model)
    state, cached = model.state_dict(), plan.features.train.columns["image"]
    torch.testing.assert_close(state["head.image_scale.mean"], features.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert (state["head.image_scale.mean"] - cached.mean(dim=0)).abs().max() > 1e-2
    assert (state["head.text_scale.mean"] - plan.features.train.columns["text"].mean(dim=0)).abs().max() < 1e-4
    assert after.facts["cosine_image"] == pytest.approx(float(F.cosine_similarity(features, cached).mean()), abs=1e-5)
    assert after.facts["cosine_image"] < 0.9999
    assert (after.metric, after.loss) != (before.metric, before.loss)


def test_learning_rates_fall_towards_the_input(home: Path) -> None:
    joint = JointConfig(train="image", encoder_lr=1e-4, layer_decay=0.5)
    plan = joint_home.together(home, joint_home.head(home, "baseline"), joint, TRAINING)
    model, _ = joint_home.assembled(plan)
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


class Two(nn.Module):
    """Two parameters, of which one learns at a tenth of the rate."""

    def __init__(self) -> None:
        super().__init__()
        self.needs, self.phases = ("x",), (Phase("only", rates=(("slow.", 0.1),)),)
        self.fast, self.slow = nn.Linear(3, 3), nn.Linear(3, 3)

    def begin(self, phase: str, train: object) -> None: ...

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        return {"loss": self.slow(torch.tanh(self.fast(batch["x"]))).square().sum()}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image


def test_the_loop_learns_at_each_groups_rate_and_clips_them_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours, oracle = Two(), Two()
    oracle.load_state_dict(ours.state_dict())
    config = TrainConfig(lr=0.1, weight_decay=0.0, grad_clip=0.5)
    learner = EnsembleOptimizer([TrainState(method=ours, run=RunFolder(tmp_path / "two-0" / "seed0", 0), config=config)])
    groups: list[dict[str, object]] = [
        {"params": [*oracle.fast.parameters()]},
        {"params": [*oracle.slow.parameters()], "lr": 0.01},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    x = torch.randn(5, 3)
    for _ in range(4):
        learner.step(learner.loss({"x": x}, KeyedRNG.seeded(0, torch.arange(5)), "only")["loss"])
        optimizer.zero_grad()
        oracle.loss({"x": x}, KeyedRNG.seeded(0, torch.arange(5)), "only")["loss"].backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        optimizer.step()
    for name, tensor in oracle.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
