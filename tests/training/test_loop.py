"""The training loop: bitwise resume, the optimiser, selection on validation, and the batches of an epoch."""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_heads import caches_by_key, train_tiny
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.cache import open_cache
from pipeline.cache.table import Captions, load_split, shuffled_batches
from pipeline.evaluation.evaluate import evaluate
from pipeline.nn.method import Method
from pipeline.runtime import files, plugins
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.runtime.settings import configure
from pipeline.training import loop
from pipeline.training.config import TrainConfig
from pipeline.training.loop import Trainer
from pipeline.training.seeds import Feed
from pipeline.training.state import Score, TrainState
from pipeline.training.train import train
from pipeline.types import Batch, Phase, Predictor


def state_times(home: Path) -> set[int]:
    """The modification times of `state.pt` of the only run of a home; empty before the first save."""
    return {path.stat().st_mtime_ns for path in home.glob("runs/tiny/*/seed0/state.pt")}


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_resume_is_bitwise(method: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaging: dict[str, object] = {"weight_average": 0.9}
    undisturbed = train_tiny(Path(shutil.copytree(home, tmp_path / "undisturbed")), method, training=averaging)
    monkeypatch.setattr(loop, "STATE_SECONDS", -math.inf)
    saves = 0
    save = TrainState.save

    def save_and_die(state: TrainState) -> None:
        nonlocal saves
        save(state)
        saves += 1
        if saves % 2 == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "save", save_and_die)
    while True:
        try:
            run = train_tiny(home, method, training=averaging)
            break
        except KeyboardInterrupt:
            continue
    assert saves >= 4
    ours, theirs = load_file(run.path / "checkpoint.safetensors"), load_file(undisturbed.path / "checkpoint.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (run.path / "history.csv").read_bytes() == (undisturbed.path / "history.csv").read_bytes()


def test_sigkill_ends_in_the_same_metrics(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long: dict[str, object] = {"epochs": 60}
    undisturbed = Path(shutil.copytree(home, tmp_path / "undisturbed"))
    expected = evaluate(undisturbed, train_tiny(undisturbed, "seda", training=long), "test", {})
    monkeypatch.setattr(loop, "STATE_SECONDS", 0.0)
    for _ in range(5):
        process = get_context("fork").Process(target=train_tiny, args=(home, "seda", 0, long))
        saved = state_times(home)
        process.start()
        while state_times(home) in (saved, set()):
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run = train_tiny(home, "seda", training=long)
    assert evaluate(home, run, "test", {})["metrics"] == expected["metrics"]


class TwoPhases(Method):
    """Two linear layers, trained one after the other: the second reads the output of the first."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.needs, self.phases = ("image", "label"), (Phase("a", ("a.",)), Phase("b", ("b.",), share=0.5))
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def loss(self, batch: Batch, phase: str) -> Batch:
        hidden = torch.tanh(self.a(batch["image"]))
        error = (hidden.sum(dim=1) - batch["label"]).square().mean() if phase == "a" else self.b(hidden).square().mean() * 100
        return {"loss": error}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return self.b(torch.tanh(self.a(image)))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return torch.tanh(self.a(image))


def two_phase_source(epoch: int) -> Iterator[Batch]:
    """Three batches of five samples, in a different order in each epoch."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(15, 3, generator=generator), torch.randn(15, generator=generator)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(epoch))
    for rows in order.split(5):
        yield {"image": images[rows], "label": labels[rows], "key": rows}


TWO_PHASE_FEED = Feed(two_phase_source, lambda: iter(()))


def bare_run(home: Path) -> RunFolder:
    """Return a run that has begun: its folder with its config."""
    config = RunConfig(
        dataset="tiny", method="two", settings={}, training={}, caches={}, shapes={}, text_aggregate="mean", manifest=""
    )
    run = RunFolder.of(home, config, 0)
    run.create(config)
    return run


def test_the_loop_is_adam_with_steps_clipping_and_frozen_phases(tmp_path: Path) -> None:
    config = TrainConfig(lr=0.05, weight_decay=0.1, lr_step=2, epochs=6, grad_clip=0.5, select="last")
    torch.manual_seed(0)
    ours = TwoPhases()
    oracle = TwoPhases()
    oracle.load_state_dict(ours.state_dict())
    run = bare_run(tmp_path)
    state = TrainState(method=ours, run=run, config=config)
    assert not train([state], {0: TWO_PHASE_FEED}, lambda model, seeds: [Score(0.0, 0.0)], progress=False)
    epoch = 0
    for module, phase, epochs in ((oracle.a, "a", 6), (oracle.b, "b", 3)):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05, weight_decay=0.1)
        for number in range(epochs):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (number // 2)
            for batch in two_phase_source(epoch):
                oracle.zero_grad()
                oracle.loss(batch, phase)["loss"].backward()
                norm = torch.sqrt(
                    sum((p.grad.square().sum() for p in module.parameters() if p.grad is not None), torch.zeros(()))
                )
                for parameter in module.parameters():
                    assert parameter.grad is not None
                    parameter.grad *= min(1.0, 0.5 / (norm.item() + 1e-6))
                optimizer.step()
            epoch += 1
    kept = load_file(run.path / "checkpoint.safetensors")
    for name, tensor in oracle.state_dict().items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-4, atol=1e-5)


class Nested(Method):
    """Two parts inside one module, trained one after the other; `begin` draws."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.needs, self.phases = ("image", "label"), (Phase("a", ("parts.a.",)), Phase("b", ("parts.b.",)))
        self.parts = nn.ModuleDict({name: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)) for name in "ab"})
        self.register_buffer("drawn", torch.zeros(4))

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        self.get_buffer("drawn").copy_(torch.rand(4))

    def loss(self, batch: Batch, phase: str) -> Batch:
        return {"loss": self.parts["b"](self.parts["a"](batch["image"])).square().mean()}


def test_a_frozen_part_inside_a_module_stays_in_evaluation_mode(tmp_path: Path) -> None:
    method = Nested()
    state = TrainState(method=method, run=RunFolder(tmp_path / "nested-0" / "seed0", 0), config=TrainConfig(epochs=1))
    state.start_phase(lambda: iter(()))
    method.train()
    assert (method.training, method.get_submodule("parts.a.0").training, method.get_submodule("parts.b.0").training) == (
        True,
        True,
        False,
    )
    method.train(False)
    assert not any(module.training for module in method.modules())


def test_what_begin_draws_is_decided_by_seed_and_phase(tmp_path: Path) -> None:
    drawn = {}
    for seed, phase in ((0, 0), (0, 0), (1, 0), (0, 1)):
        method = Nested()
        state = TrainState(method=method, run=RunFolder(tmp_path / "nested-0" / f"seed{seed}", seed), config=TrainConfig())
        state.progress.phase = phase
        torch.rand(1)
        state.start_phase(lambda: iter(()))
        assert torch.equal(drawn.setdefault((seed, phase), method.get_buffer("drawn")), method.get_buffer("drawn"))
    assert len({tuple(values.tolist()) for values in drawn.values()}) == 3


def test_the_kept_weights_are_the_moving_average(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectory: list[dict[str, np.ndarray]] = []
    step = Trainer.step

    def weights(trainer: Trainer) -> dict[str, np.ndarray]:
        named = trainer.states[0].method.named_parameters()
        return {name: value.detach().double().numpy().copy() for name, value in named}

    def recorded_step(trainer: Trainer, batch: Batch, phase: str) -> Batch:
        if not trajectory:
            trajectory.append(weights(trainer))
        parts = step(trainer, batch, phase)
        trajectory.append(weights(trainer))
        return parts

    monkeypatch.setattr(Trainer, "step", recorded_step)
    run = train_tiny(home, "baseline", training={"weight_average": 0.6, "select": "last"})
    average = dict(trajectory[0])
    for number, after in enumerate(trajectory[1:], start=1):
        decay = min(0.6, (1 + number) / (10 + number))
        average = {name: decay * average[name] + (1 - decay) * value for name, value in after.items()}
    assert len(trajectory) == 1 + 4 * 3  # four epochs of 24 samples in batches of 8
    kept = load_file(run.path / "checkpoint.safetensors")
    for name, value in average.items():
        np.testing.assert_allclose(kept[name].numpy(), value, atol=1e-6)
        assert np.abs(value - trajectory[-1][name]).max() > 1e-5
    history = pd.read_csv(run.path / "history.csv")
    assert history["val_metric"].iloc[-1] == evaluate(home, run, "val", {})["metrics"]["acc1"]


@pytest.mark.parametrize(
    ("select", "best"),
    [
        ("metric", 4),
        ("loss", 1),
        ("last", 5),
    ],  # the metric is 50.0 three times: the lower loss wins, and of equal epochs the later one
)
def test_the_epoch_is_chosen_on_validation(select: str, best: int, tmp_path: Path) -> None:
    scores = iter([(50.0, 2.0), (40.0, 0.5), (50.0, 1.0), (30.0, 3.0), (50.0, 1.0), (20.0, 4.0)])
    method, validated = TwoPhases(), []

    def validate(model: Predictor, seeds: Sequence[int]) -> list[Score]:
        assert model is method
        validated.append({name: tensor.clone() for name, tensor in method.state_dict().items()})
        return [Score(*next(scores))]

    config = configure(TrainConfig, {"lr": 0.05, "epochs": 12, "select": select})
    run = bare_run(tmp_path)
    state = TrainState(method=method, run=run, config=config)
    assert not train([state], {0: TWO_PHASE_FEED}, validate, progress=False)
    kept = load_file(run.path / "checkpoint.safetensors")
    assert len(validated) == 6  # only the last phase is validated
    assert [all(torch.equal(kept[name], weights[name]) for name in kept) for weights in validated].index(True) == best


def test_killed_at_any_write_it_ends_in_the_same_metrics(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(folder: Path) -> dict[str, Any]:
        return evaluate(folder, train_tiny(folder, "ema"), "test", {})["metrics"]

    expected = finish(Path(shutil.copytree(home, tmp_path / "undisturbed")))
    write, calls = files.write_atomic, 0

    def interrupted_write(path: Path, data: bytes | str) -> None:
        nonlocal calls
        calls += 1
        if calls == interrupted_call and before:
            raise KeyboardInterrupt
        write(path, data)
        if calls == interrupted_call:
            raise KeyboardInterrupt

    for module in ("pipeline.runtime.runs", "pipeline.training.state", "pipeline.evaluation.evaluate"):
        monkeypatch.setattr(f"{module}.write_atomic", interrupted_write)
    interrupted = 0
    for interrupted_call in range(1, 20):
        for before in (True, False):
            folder, calls = Path(shutil.copytree(home, tmp_path / f"home{interrupted_call}{before}")), 0
            try:
                finish(folder)
            except KeyboardInterrupt:
                interrupted += 1
                calls = 100
            assert finish(folder) == expected
    assert interrupted >= 12  # config, checkpoint, history, done, predictions, metrics


def test_bits_do_not_depend_on_the_number_of_threads(home: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(home, tmp_path / "other"))
    first = train_tiny(home, "seda")
    torch.set_num_threads(2)
    try:
        second = train_tiny(other, "seda")
    finally:
        torch.set_num_threads(1)
    names = ("checkpoint.safetensors", "history.csv")
    assert all((first.path / name).read_bytes() == (second.path / name).read_bytes() for name in names)


def test_a_diverging_loss_names_its_epoch_and_phase(home: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite in epoch 0 of phase 'head'|that are not finite"):
        train_tiny(home, "baseline", training={"lr": 1e38, "grad_clip": 1e38, "epochs": 2})


def test_shuffling_is_named_by_seed_epoch_and_sample(tiny_home: Path) -> None:
    from pipeline.data.manifest_files import read_manifest

    manifest = read_manifest(tiny_home, "tiny")
    image = open_cache(tiny_home / "caches" / "tiny" / caches_by_key(tiny_home)["image"])
    table = load_split(manifest, {"image": image}, "train", torch.device("cpu"), "mean")
    epochs = {
        (seed, epoch): torch.cat([batch["key"] for batch in shuffled_batches(table, 5, seed)(epoch)])
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert all(len(set(keys.tolist())) == 20 for keys in epochs.values())  # 24 samples, batches of 5, the rest dropped
    assert len({tuple(keys.tolist()) for keys in epochs.values()}) == 4
    again = torch.cat([batch["key"] for batch in shuffled_batches(table, 5, 0)(1)])
    assert torch.equal(again, epochs[0, 1])


def test_random_captions_are_drawn_by_epoch_and_sample() -> None:
    features = torch.arange(12.0).reshape(6, 2)
    captions = Captions(features, torch.tensor([0, 3, 3, 6]))  # three texts, none, three texts
    rows, keys, mean = torch.tensor([2, 1, 0]), torch.tensor([30, 20, 10]), torch.full((3, 2), -1.0)
    draws = torch.stack([captions.draw(rows, keys, 0, epoch, mean) for epoch in range(300)])
    assert (draws[:, 1] == -1.0).all()  # without a text, the mean is used
    for position, own in ((0, features[3:]), (2, features[:3])):
        counts = [(draws[:, position] == text).all(dim=1).sum().item() for text in own]
        assert sum(counts) == 300
        assert all(70 <= count <= 130 for count in counts)  # 100 expected, standard deviation 8
    alone = captions.draw(rows[2:], keys[2:], 0, 7, mean[2:])
    assert torch.equal(alone[0], draws[7, 2])
