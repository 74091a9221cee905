"""A captured step trains what the step trains without a graph, bit for bit; what cannot be captured is run without one.

Without a GPU, a graph is played by a function that runs the step again with the tensors of its recording. The tests marked
`gpu` do the same with real graphs.
"""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.method_cases import batches_of, fitted, trained_phases
from torch import Tensor, nn

from pipeline.cache.table import FeatureTable
from pipeline.evaluation.evaluate import predict
from pipeline.nn.method import Method
from pipeline.runtime import plugins
from pipeline.runtime.device import reproducible
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training import captured
from pipeline.training.captured import CapturedPredictor, HostOperators
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import EnsembleTrainer
from pipeline.training.loop import Trainer, train_epoch
from pipeline.training.seeds import stacked_source
from pipeline.training.state import TrainState
from pipeline.types import Batch, Phase

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EPOCHS, BATCH_SIZE = 3, 6
CONFIG = TrainConfig(lr=1e-2, lr_step=2, grad_clip=0.5, weight_average=0.9, epochs=EPOCHS, batch_size=BATCH_SIZE)
GPU_METHODS = ("baseline", "ema", "cdr", "marnet", "seda")


class Recordings:
    """Stands for CUDA graphs on a processor: a replay runs the recorded function with the numbers that it was recorded with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        self.trainer: Trainer | None = None
        monkeypatch.setattr(captured, "on_side_stream", lambda device: nullcontext())
        monkeypatch.setattr(captured, "record", self.record)

    def record(
        self, function: Callable[[], Batch], device: torch.device, generators: Any = ()
    ) -> tuple[Callable[[], None], Batch]:
        self.number += 1
        parts: Batch = {}
        recorded_rates = self.rates()

        def replay() -> None:
            assert self.rates() == recorded_rates
            parts.update(function())

        return replay, parts

    def rates(self) -> list[Any]:
        return [optimizer.rates for optimizer in self.trainer.optimizers] if self.trainer else []


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    return Recordings(monkeypatch)


def batches(rows: Batch, sizes: list[int]) -> Callable[[int], Iterator[Batch]]:
    """A source of batches of the given sizes, other ones in each epoch."""

    def source(epoch: int) -> Iterator[Batch]:
        for step, size in enumerate(sizes):
            chosen = (torch.arange(size, device=rows["key"].device) * 7 + step * 5 + epoch) % len(rows["key"])
            yield {name: column[chosen] for name, column in rows.items()}

    return source


def trainer_of(
    name: str, phase: int, number: int, captures: bool, device: torch.device, config: TrainConfig, num_seeds: int = 1
) -> Trainer:
    """The trainer of a phase, for as many heads as one model; the last of several heads has another learning rate."""
    heads = [fitted(name, seed=seed)[0].to(device) for seed in range(number)]
    rows = rows_of(name, device)
    configs = [config] * (number - 1) + [config if number == 1 else replace(config, lr=2e-2)]
    states = [
        TrainState(method=head, run=RunFolder(Path("unused"), place % num_seeds), config=each)
        for place, (head, each) in enumerate(zip(heads, configs, strict=True))
    ]
    for state in states:
        state.progress.phase = phase
        state.start_phase(batches_of(rows))
    return Trainer(states, captures) if number == 1 else EnsembleTrainer(states, captures)


def rows_of(name: str, device: torch.device) -> Batch:
    return {key: column.to(device) for key, column in fitted(name)[1].items()}


def trained(trainer: Trainer, source: Callable[[int], Iterator[Batch]]) -> tuple[list[Any], list[dict[str, Tensor]]]:
    """Train some epochs; return the history, and the weights and the optimiser's state of every run."""
    history = []
    for _ in range(EPOCHS):
        rows = train_epoch(trainer, source)
        history += rows
        for state, row in zip(trainer.states, rows, strict=True):
            state.record_epoch(row)
        with trainer.averaged_weights():  # as a validation does
            history += [float(next(iter(state.method.parameters())).detach().sum()) for state in trainer.states]
    trainer.store_state()
    tensors = [
        {**state.method.state_dict()}
        | {f"{number}.{key}": value for number, moments in adam(state).items() for key, value in moments.items()}
        | {f"average.{number}": value for number, value in enumerate(state.optimizer_state["average"].get("values", []))}
        for state in trainer.states
    ]
    return history, tensors


def adam(state: TrainState) -> dict[int, dict[str, Tensor]]:
    return state.optimizer_state["optimizer"]["state"]


def assert_equal(ours: tuple[list[Any], list[dict[str, Tensor]]], theirs: tuple[list[Any], list[dict[str, Tensor]]]) -> None:
    assert ours[0] == theirs[0]
    for first, second in zip(ours[1], theirs[1], strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("number", [1, 3], ids=["alone", "stacked"])
@pytest.mark.parametrize("name", plugins.names("methods"))
def test_on_a_processor_a_captured_step_is_the_step(name: str, number: int, recordings: Recordings) -> None:
    source = batches(rows_of(name, CPU), [BATCH_SIZE] * 6)
    for phase in range(len(trained_phases(fitted(name)[0]))):
        expected = trained(trainer_of(name, phase, number, False, CPU, CONFIG), source)
        trainer = recordings.trainer = trainer_of(name, phase, number, True, CPU, CONFIG)
        recordings.number, first_rates = 0, trainer.optimizers[0].rates
        assert_equal(trained(trainer, source), expected)
        assert trainer.graph
        assert trainer.graph.refusal == ""
        assert recordings.number == 1 + (trainer.optimizers[0].rates != first_rates)  # they change after two epochs


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
def test_a_captured_step_of_several_seeds_is_the_step(device: torch.device, request: pytest.FixtureRequest) -> None:
    recordings = request.getfixturevalue("recordings") if device == CPU else None
    with reproducible(device):
        own = batches(rows_of("seda", device), [BATCH_SIZE] * 6)
        source = stacked_source([own, lambda epoch: own(epoch + 3)])
        expected = trained(trainer_of("seda", 0, 3, False, device, CONFIG, num_seeds=2), source)
        trainer = trainer_of("seda", 0, 3, True, device, CONFIG, num_seeds=2)
        assert_equal(trained(trainer, source), expected)
        assert trainer.graph
        assert trainer.graph.refusal == ""
        assert recordings is None or recordings.number == 2


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize(("name", "number", "num_seeds"), [("seda", 1, 1), ("marnet", 3, 1), ("ema", 3, 2)])
def test_captured_predictions_are_the_predictions(
    name: str, number: int, num_seeds: int, device: torch.device, request: pytest.FixtureRequest
) -> None:
    recordings = request.getfixturevalue("recordings") if device == CPU else None
    rows = rows_of(name, device)
    trainer = trainer_of(name, 0, number, True, device, CONFIG, num_seeds)
    columns = {"image": rows["image"].repeat(2, 1), "key": torch.arange(2 * len(rows["key"]), device=device)}
    table = FeatureTable(ids=tuple(map(str, columns["key"].tolist())), columns=columns, excluded=())
    seed = 4 if num_seeds == 1 else torch.tensor([state.run.seed for state in trainer.states], device=device)
    size = len(table) // 3 + 1  # so that the last batch is smaller
    with reproducible(device):
        for _ in range(3):
            expected = predict(trainer.model, table, seed, size)
            assert torch.equal(predict(trainer.predictor, table, seed, size), expected)
            with torch.no_grad():
                for parameter in trainer.model.parameters() if number == 1 else dict(trainer.model.named_parameters()).values():
                    parameter.mul_(0.9)
    assert isinstance(trainer.predictor, CapturedPredictor)
    assert recordings is None or recordings.number == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("number", [1, 3], ids=["alone", "stacked"])
@pytest.mark.parametrize("name", GPU_METHODS)
def test_on_a_gpu_a_captured_step_is_the_step(name: str, number: int, precision: Any) -> None:
    config = replace(CONFIG, precision=precision)
    with reproducible(GPU):
        source = batches(rows_of(name, GPU), [BATCH_SIZE] * 6)
        for phase in range(len(trained_phases(fitted(name)[0]))):
            expected = trained(trainer_of(name, phase, number, False, GPU, config), source)
            trainer = trainer_of(name, phase, number, True, GPU, config)
            assert_equal(trained(trainer, source), expected)
            assert trainer.graph
            assert trainer.graph.refusal == ""
            assert trainer.graph.is_recorded


def test_a_batch_of_another_size_is_not_captured(recordings: Recordings) -> None:
    sizes = [BATCH_SIZE] * 5 + [4]
    config = replace(CONFIG, lr_step=EPOCHS)
    source = batches(rows_of("seda", CPU), sizes)
    expected = trained(trainer_of("seda", 0, 1, False, CPU, config), source)
    assert_equal(trained(trainer_of("seda", 0, 1, True, CPU, config), source), expected)
    assert recordings.number == 1


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
def test_a_trainer_is_freed_at_once(device: torch.device) -> None:
    """Weights and graphs fill the memory of a GPU: they must not wait for Python to look for cycles."""
    trainer = trainer_of("seda", 0, 3, device == GPU, device, CONFIG)
    source = batches(rows_of("seda", device), [BATCH_SIZE] * 6)
    gc.collect()
    gc.disable()
    try:
        trained(trainer, source)
        weight = weakref.ref(trainer.parameters[0])
        del trainer
        assert weight() is None
    finally:
        gc.enable()


class Reader(Method):
    """A head whose loss does what a graph cannot, in the way that its test sets."""

    def __init__(self, way: str) -> None:
        super().__init__(None, {})
        self.needs, self.phases, self.way = ("image",), (Phase("only"),), way
        self.layer = nn.Linear(3, 3)

    def loss(self, batch: Batch, phase: str) -> Batch:
        loss = self.layer(batch["image"] + torch.randn_like(batch["image"])).square().mean()
        if self.way == "item":
            return {"loss": loss * (2.0 if loss.item() > 1 else 1.0)}
        if self.way == "mask":
            return {"loss": loss + self.layer(batch["image"])[batch["image"][:, 0] > 0].square().sum()}
        if self.way == "fails":
            self.fail()
        return {"loss": loss}

    def fail(self) -> None:
        """Replaced in a test."""

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return self.layer(image)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image


def reader_steps(way: str, captures: bool, device: torch.device) -> tuple[Trainer, list[float]]:
    """A trainer, and the losses of a few steps."""
    torch.manual_seed(0)
    method, image = Reader(way).to(device), torch.randn(5, 3).to(device)
    trainer = Trainer([TrainState(method=method, run=RunFolder(Path("unused"), 0), config=TrainConfig())], captures)
    losses = []
    for step in range(8):
        torch.manual_seed(step)
        batch = {"image": image + step}
        parts = trainer.graph.run(trainer.step, batch, "only") if trainer.graph else trainer.step(batch, "only")
        losses.append(float(parts["loss"].detach()))
    return trainer, losses


@pytest.mark.parametrize(("way", "operator"), [("item", "aten::_local_scalar_dense"), ("mask", "aten::index.Tensor")])
@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
def test_a_method_that_reads_numbers_back_is_not_captured(
    way: str, operator: str, device: torch.device, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    recordings = request.getfixturevalue("recordings") if device == CPU else None
    expected = reader_steps(way, False, device)[1]
    with caplog.at_level(logging.WARNING):
        assert reader_steps(way, True, device)[1] == expected
    (message,) = caplog.messages
    assert message.startswith("the training step is not captured as a CUDA graph, which makes it slower: it uses ")
    assert operator in message
    assert recordings is None or recordings.number == 0


@pytest.mark.parametrize("device", [CPU, pytest.param(GPU, marks=pytest.mark.gpu)], ids=str)
def test_where_a_recording_fails_training_goes_on_without_a_graph(
    device: torch.device, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(function: Callable[[], Batch], device: torch.device, generators: Any) -> Any:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error")

    expected, expected_without_failure = (reader_steps(way, False, device)[1] for way in ("fails", "draws"))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        if device == CPU:
            Recordings(patch)
            patch.setattr(captured, "record", refused)
        else:  # waits for the device where no operator of torch's dispatcher says so
            patch.setattr(Reader, "fail", lambda self: torch.cuda.synchronize())
        assert reader_steps("fails", True, device)[1] == expected
    (message,) = caplog.messages
    assert "is not captured as a CUDA graph, which makes it slower: " in message
    assert "when stream is capturing" in message
    if device == CPU:
        Recordings(monkeypatch)
    else:
        torch.cuda.empty_cache()
    trainer, losses = reader_steps("draws", True, device)  # and another step can be recorded
    assert losses == expected_without_failure
    assert trainer.graph
    assert trainer.graph.refusal == ""


def test_drawing_on_the_processor_for_a_gpu_is_found() -> None:
    with HostOperators(GPU) as found:
        torch.rand(2)
        torch.zeros(2)[torch.tensor([0, 1])].add_(1)
        random.random()
    assert found.names == {"aten::rand"}
    with HostOperators(CPU) as found:
        torch.rand(2)
    assert not found.names


def test_a_move_to_another_device_is_found() -> None:
    with HostOperators(CPU) as found:
        torch.zeros(2).to("meta")
        torch.zeros(2).double()
    assert found.names == {"aten::_to_copy"}
