"""Runs of several seeds that are trained as one model are those that are trained alone, each with its own seed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.method_cases import fitted, trained_phases
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, papers_methods_or_all, small_settings
from torch import Tensor, nn

from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime import plugins
from pipeline.runtime.rng import KeyedRNG, seed_step
from pipeline.runtime.runs import RunFolder
from pipeline.studies.search_worker import SearchOptions, group_job, train_group
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import EnsembleTrainer
from pipeline.training.features import open_features
from pipeline.training.heads import HeadPlan, can_stack_seeds, plan_head_on, resolve_head_settings, train_head, train_heads
from pipeline.training.loop import Trainer
from pipeline.training.seeds import SeedStreams, stacked_source
from pipeline.training.state import TrainState
from pipeline.types import Batch

TOLERANCE = 1e-5  # of logits, that of heads that are stacked, see test_ensemble_training.py
SEEDS = (3, 0, 3, 2**62)
CPU = torch.device("cpu")


def draws(x: Tensor) -> list[Tensor]:
    """One draw of every kind that heads use."""
    return [
        torch.rand(3),
        torch.rand(()),
        torch.randn(2, 3),
        torch.randint(2**62, ()),
        torch.randint(1, 50, (4,)),
        torch.rand_like(x, dtype=torch.float32),
        torch.randn_like(x.T),
        nn.functional.dropout(torch.ones_like(x), 0.5),
    ]


def test_each_model_draws_what_it_draws_alone() -> None:
    streams, x = SeedStreams(SEEDS, CPU), torch.randn(len(SEEDS), 5, 2)
    assert streams.seeds == (3, 0, 2**62)
    for step in range(2):
        streams.seed_step("phase", 4, step)
        with streams:
            together = torch.vmap(draws, randomness="different")(x)
        for number, seed in enumerate(SEEDS):
            seed_step(seed, "phase", 4, step)
            for ours, alone in zip(together, draws(x[number]), strict=True):
                assert torch.equal(ours[number], alone)


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("multinomial", lambda p: torch.multinomial(p, 1)),
        ("bernoulli", torch.bernoulli),
        ("bernoulli_.Tensor", lambda p: torch.empty_like(p).bernoulli_(p)),
        ("normal.Tensor_float", lambda p: torch.normal(p, 1.0)),
        ("normal.float_Tensor", lambda p: torch.normal(0.0, p)),
        ("normal.Tensor_Tensor", lambda p: torch.normal(p, p)),
        ("normal.float_float", lambda _: torch.normal(2.0, 1.0, (3,))),
        ("randint_like", lambda p: torch.randint_like(p, 9)),
        ("randint_like.low_dtype", lambda p: torch.randint_like(p, 2, 9)),
        ("poisson", torch.poisson),
        ("exponential_", lambda p: torch.empty_like(p).exponential_()),
        ("randperm", lambda _: torch.randperm(3)),
    ],
)
def test_what_cannot_be_drawn_for_several_seeds_is_refused(name: str, draw: Callable[[Tensor], Tensor]) -> None:
    with SeedStreams(SEEDS, CPU), pytest.raises(NotImplementedError, match=f"draw with aten::{name} together"):
        torch.vmap(draw, randomness="different")(torch.full((4, 3), 0.1))


def test_a_probability_in_numbers_is_that_of_every_model() -> None:
    with SeedStreams(SEEDS, CPU) as streams:
        streams.seed_step("phase", 0, 0)
        drawn = torch.vmap(lambda x: torch.bernoulli(x, 0.1), randomness="different")(torch.ones(len(SEEDS), 10_000))
    assert drawn.mean(dim=1).tolist() == pytest.approx([0.1] * len(SEEDS), abs=0.02)


def test_batches_of_several_seeds_are_stacked_step_by_step() -> None:
    def source(start: int) -> Any:
        return lambda epoch: iter([{"x": torch.tensor([start, epoch, step])} for step in range(2)])

    batches = list(stacked_source([source(10), source(20)])(7))
    assert [batch["x"].tolist() for batch in batches] == [[[10, 7, step], [20, 7, step]] for step in range(2)]
    assert stacked_source([source]) is source


@pytest.mark.parametrize("name", papers_methods_or_all())
def test_a_step_of_several_seeds_is_that_of_each_alone(name: str) -> None:
    """Loss, weights after the step, and predictions."""
    rows = fitted(name)[1]
    per_seed = [{key: column.roll(shift, 0) for key, column in rows.items()} for shift in range(3)]
    for phase, _ in enumerate(trained_phases(fitted(name)[0])):
        trainer, *alone = trainer_of(name, SEEDS, phase), *(trainer_of(name, (seed,), phase) for seed in SEEDS)
        (batch,) = stacked_source([lambda epoch, own=own: iter([own]) for own in per_seed])(0)
        label = trainer.states[0].phase.name
        trainer.seed_step(label, 0, 5)
        parts = trainer.step(batch, label)
        trainer.model.train(False)
        key = KeyedRNG.seeded(torch.tensor(SEEDS), rows["key"]).at("predict")
        with torch.no_grad():
            logits = trainer.model.predict(rows["image"], key)
        for number, (seed, single) in enumerate(zip(SEEDS, alone, strict=True)):
            single.seed_step(label, 0, 5)
            own_parts = single.step(per_seed[list(dict.fromkeys(SEEDS)).index(seed)], label)
            single.model.train(False)
            for part, value in own_parts.items():
                torch.testing.assert_close(parts[part][number].detach(), value.detach(), atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                own_logits = single.model.predict(rows["image"], KeyedRNG.seeded(seed, rows["key"]).at("predict"))
            torch.testing.assert_close(logits[number], own_logits, atol=1e-4, rtol=1e-4)


def trainer_of(name: str, seeds: tuple[int, ...], phase: int) -> Trainer:
    """The trainer of heads with equal weights and other seeds."""
    states = [TrainState(method=fitted(name)[0], run=RunFolder(Path("unused"), seed), config=TrainConfig()) for seed in seeds]
    for state in states:
        state.progress.phase = phase
        for parameter_name, parameter in state.method.named_parameters():
            parameter.requires_grad_(parameter_name.startswith(state.phase.trains))
        state.method.train()
    return Trainer(states) if len(states) == 1 else EnsembleTrainer(states)


@pytest.fixture
def other_home(tiny_home: Path, tmp_path: Path) -> Path:
    """Another copy of the tiny home, in which heads are trained alone."""
    return Path(shutil.copytree(tiny_home, tmp_path / "other"))


def planned(home: Path, method: str, text: str = "", **training: Any) -> list[HeadPlan]:
    """Plans of two cells with three seeds each, in the order of a grid."""
    caches = caches_by_key(home)
    features = open_features(home, "tiny", method, {**caches, "text": text or caches["text"]})
    plans = []
    for rate in (1e-3, 1e-2):
        given = {**FAST_TRAINING, "weight_average": 0.9, "lr": rate, **training}
        settings, config = resolve_head_settings("tiny", method, "head", small_settings(method), given)
        plans += [plan_head_on(features, method, settings, config, seed) for seed in (0, 5, 2)]
    return plans


@pytest.mark.parametrize("method", ["baseline", "seda"])
def test_whole_runs_of_several_seeds_resume_and_are_those_trained_alone(method: str, home: Path, other_home: Path) -> None:
    heads, alone = planned(home, method), planned(other_home, method)
    stopped: list[int] = []

    def stop_once(epoch: int, metric: float) -> bool:
        stopped.append(epoch)
        return epoch == 2 and len(stopped) % 3 == 0

    assert train_heads(heads, False, stop_once) == {}
    assert not all(head.run.is_done for head in heads)
    assert train_heads(heads[::-1], False) == {}
    for head, other in zip(heads, alone, strict=True):
        train_head(other, progress=False)
        for split in ("val", "test"):
            ours, theirs = (evaluate(each.features.home, each.run, split, {})["metrics"] for each in (head, other))
            assert ours == pytest.approx(theirs, abs=0.1)
        first, second = (np.load(each.run.path / "predictions-test.npz")["logits"] for each in (head, other))
        np.testing.assert_allclose(first, second, atol=TOLERANCE, rtol=0)
        history, expected = (pd.read_csv(each.run.path / "history.csv") for each in (head, other))
        pd.testing.assert_frame_equal(history, expected, atol=TOLERANCE, rtol=1e-4)


def test_a_method_whose_draws_no_two_seeds_can_share_is_trained_by_seed(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(method: Any, batch: Batch, phase: str) -> Batch:
        order = torch.randperm(len(batch["label"]))
        return {"loss": nn.functional.cross_entropy(method.classifier(batch["image"])[order], batch["label"][order])}

    monkeypatch.setattr(plugins.get("methods", "baseline"), "loss", loss)
    heads, sizes = planned(home, "baseline"), list[int]()
    options = SearchOptions(max_ensemble_size=6, num_local_workers=1, progress=False)
    original = train_heads
    monkeypatch.setattr(
        "pipeline.studies.search_worker.train_heads", lambda heads, *more: sizes.append(len(heads)) or original(heads, *more)
    )
    assert train_group(group_job(heads, float("inf"), options)) == {}
    assert sizes == [6, 2, 2, 2]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "6 runs of 3 seeds" in warning
    assert "cannot draw with aten::randperm together" in warning
    assert all(head.run.is_done for head in heads)


def test_seeds_with_training_samples_of_their_own_stay_apart(home: Path) -> None:
    assert can_stack_seeds(planned(home, "ema")[0])
    assert not can_stack_seeds(planned(home, "ema", window=16)[0])
    assert not can_stack_seeds(planned(home, "ema", compiled=True)[0])
    assert not can_stack_seeds(planned(home, "ema", text=f"{caches_by_key(home)['text']}:noise")[0])
