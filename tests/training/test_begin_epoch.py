"""What a method may prepare before every epoch: it knows the progress of its phase, also after a resume and in an ensemble."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers.method_cases import batches_of, build, make_batch
from torch import Tensor, nn

from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training import loop
from pipeline.training.config import TrainConfig
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.model import JointMethod
from pipeline.training.seeds import Feed
from pipeline.training.state import Score, TrainState
from pipeline.training.train import train
from pipeline.types import Batch, Phase, Predictor

BATCH = make_batch(rows=8)


class Follower(Method):
    """Its loss is its progress, and its sum of images, both as they were put into buffers before the epoch."""

    progress: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__(None, {})
        self.needs, self.phases = ("image",), (Phase("a"), Phase("b", share=0.5))
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def begin_epoch(self, phase: str, progress: float, train: Callable[[], Iterator[Batch]]) -> None:
        self.progress.fill_(progress + (phase == "b"))
        self.total.fill_(sum(float(batch["image"].sum()) for batch in train()))

    def loss(self, batch: Batch, phase: str) -> Batch:
        return {"loss": self.progress + 0.0 * self.weight, "total": self.total}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image + self.weight

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image


def state_of(method: Method, folder: Path) -> TrainState:
    run = RunFolder(folder / "seed0", 0)
    run.path.mkdir(parents=True, exist_ok=True)
    return TrainState(method=method, run=run, config=TrainConfig(epochs=4, batch_size=4, lr=1e-2))


def train_states(states: list[TrainState]) -> list[list[dict[str, float]]]:
    def validate(model: Predictor, seeds: Sequence[int]) -> list[Score]:
        return [Score(0.0, 0.0) for _ in states]

    feed = Feed(lambda epoch: batches_of(BATCH, 4)(), batches_of(BATCH))
    failed = train(states, {0: feed}, validate, progress=False)
    assert not failed
    return [state.progress.history for state in states]


@pytest.mark.parametrize("number", [1, 2])
def test_it_knows_the_middle_of_each_epoch_and_the_training_split(number: int, tmp_path: Path) -> None:
    for history in train_states([state_of(Follower(), tmp_path / str(each)) for each in range(number)]):
        assert [row["loss"] for row in history] == [0.125, 0.375, 0.625, 0.875, 1.25, 1.75]
        assert all(row["total"] == pytest.approx(float(BATCH["image"].sum()), rel=1e-5) for row in history)


@pytest.mark.parametrize("text_classes", ["batch", "split"])
def test_a_resumed_run_of_ssan_ends_in_the_same_bits(
    text_classes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after each epoch. The statistics of all texts are taken with the weights of the last one."""
    states = [state_of(build("ssan", text_classes=text_classes), tmp_path / name) for name in ("whole", "killed")]
    (expected,) = train_states(states[:1])
    monkeypatch.setattr(loop, "STATE_SECONDS", -math.inf)
    monkeypatch.setattr(loop, "SAVE_COST_FACTOR", 0)
    save = TrainState.save

    def save_and_die(state: TrainState) -> None:
        save(state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "save", save_and_die)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                train_states([state_of(build("ssan", text_classes=text_classes), tmp_path / "killed")])
    (history,) = train_states(states[1:])
    assert history == expected
    whole, killed = (state.method.state_dict() for state in states)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_joint_training_has_the_strength_of_the_end() -> None:
    head = build("ssan")
    joint = JointMethod(head, {}, {}, (), (), DistributedContext())
    joint.begin_epoch("joint", 0.1, batches_of(BATCH))
    assert head.progress == 1.0


def test_a_stacked_head_is_prepared_too() -> None:
    stacked = build("stacked", head="ssan", head_settings="width=16")
    stacked.begin_epoch("base", 0.1, batches_of(BATCH))
    assert stacked.head.progress == 1.0
    stacked.begin_epoch("head.head", 0.25, batches_of(BATCH))
    assert stacked.head.progress == 0.25
