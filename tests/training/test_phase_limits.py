"""What a phase says about single parameters, beside their learning rates: limits of their values, and no weight decay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.method_cases import build
from torch import nn

from pipeline.nn.method import Method
from pipeline.runtime.runs import RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import EnsembleTrainer
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.model import JointMethod
from pipeline.training.loop import Trainer
from pipeline.training.state import TrainState
from pipeline.types import Batch, Phase

CONFIG = TrainConfig(lr=0.1, weight_decay=0.5, grad_clip=1e30, epochs=1)


class Pull(Method):
    """Two numbers, each of which the loss pulls to 1: one is limited to 0.25, and the other has no weight decay."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__(None, {})
        self.limited, self.free = nn.Parameter(torch.full((2,), start)), nn.Parameter(torch.full((3,), start))
        self.needs, self.phases = ("image",), (Phase("head", limits=(("limited", 0.25),), undecayed=("free",)),)

    def loss(self, batch: Batch, phase: str) -> Batch:
        return {"loss": sum(((each - 1.0).square().sum() for each in self.parameters()), torch.zeros(()))}


def state_of(method: Method, folder: Path) -> TrainState:
    return TrainState(method=method, run=RunFolder(folder / "seed0", 0), config=CONFIG)


def expected(start: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam by itself: clamped after each step, and with its weight decay in one group alone."""
    limited, free = (torch.full((size,), start, requires_grad=True) for size in (2, 3))
    adam = torch.optim.Adam([{"params": [limited], "weight_decay": 0.5}, {"params": [free], "weight_decay": 0.0}], lr=0.1)
    for _ in range(steps):
        adam.zero_grad()
        ((limited - 1.0).square().sum() + (free - 1.0).square().sum()).backward()
        adam.step()
        limited.data.clamp_(max=0.25)
    return limited.detach(), free.detach()


@pytest.mark.parametrize("starts", [(0.0,), (0.0, -0.3)])
def test_a_step_obeys_them_also_in_an_ensemble(starts: tuple[float, ...], tmp_path: Path) -> None:
    states = [state_of(Pull(start), tmp_path / str(start)) for start in starts]
    trainer = Trainer(states) if len(states) == 1 else EnsembleTrainer(states)
    for _ in range(8):
        trainer.step({"image": torch.zeros(1, 1)}, "head")
    for start, state in zip(starts, states, strict=True):
        for found, wanted in zip(state.method.parameters(), expected(start, 8), strict=True):
            torch.testing.assert_close(found.detach(), wanted)
    first = next(states[0].method.parameters())
    assert (first == 0.25).all()


def test_they_hold_inside_of_larger_methods() -> None:
    own = build("clip").phases[0]
    assert own.limits
    (_, inside, _) = build("stacked", head="clip", head_settings="width=16").phases
    assert inside.limits == tuple((f"head.{name}", limit) for name, limit in own.limits)
    assert inside.undecayed == tuple(f"head.{name}" for name in own.undecayed)
    (joint,) = JointMethod(build("clip"), {}, {}, (), (("", 0.5),), DistributedContext()).phases
    assert (joint.limits, joint.undecayed, joint.trains) == (inside.limits, inside.undecayed, inside.trains)
    assert joint.rate("head.classifier.weight") == 0.5
    names = [name for name, _ in build("clip").named_parameters()]
    assert [name for name in names if own.limit(name) is not None] == ["similarity_scale.log"]
    assert [name for name in names if name.startswith(own.undecayed)] == ["similarity_scale.log"]
