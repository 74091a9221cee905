"""Phases that try candidates on validation: which one a run keeps, and that nothing cuts the search short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.tiny_grids import tiny_grid
from helpers.tiny_heads import FAST_TRAINING, caches_by_key
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.evaluation.evaluate import evaluate
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.studies.halving import validations_until
from pipeline.studies.search import run_grid
from pipeline.training import loop
from pipeline.training.config import TrainConfig
from pipeline.training.features import open_features
from pipeline.training.heads import head_capacity, plan_head_on, resolve_head_settings
from pipeline.training.history import Validation, best_validation, read_validations
from pipeline.training.seeds import Feed
from pipeline.training.state import Score, TrainState
from pipeline.training.train import train
from pipeline.types import Batch, Phase, Predictor

SCORES = [
    (40.0, 0.5),
    (50.0, 1.0),
    (50.0, 0.9),
    (50.0, 0.9),
    (30.0, 0.1),
]  # the third is the best
BEST = 2


class Chosen(Method):
    """A linear layer, and a number that is chosen after its training."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.needs = ("image", "label")
        self.phases = (Phase("fit", share=0.5), Phase("number", trains=(), candidates=len(SCORES)))
        self.layer = nn.Linear(3, 2)
        self.register_buffer("number", torch.tensor(-1.0))

    def choose(self, candidate: int) -> None:
        self.get_buffer("number").fill_(10.0 * candidate)

    def loss(self, batch: Batch, phase: str) -> Batch:
        assert phase == "fit"
        return {"loss": (self.layer(batch["image"]) - batch["label"].unsqueeze(1)).square().mean()}

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return self.layer(image) * self.get_buffer("number")

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        return image


def source(epoch: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(2):
        yield {"image": torch.randn(5, 3, generator=generator), "label": torch.randn(5, generator=generator)}


def scripted_states(folder: Path, **training: Any) -> list[TrainState]:
    torch.manual_seed(0)
    config = TrainConfig(**{"epochs": 8, "lr": 0.05, **training})
    return [TrainState(method=Chosen(), run=RunFolder(folder / "chosen-0" / "seed0", 0), config=config)]


def run_scripted(states: Sequence[TrainState], scores: Sequence[tuple[float, float]] = SCORES) -> RunFolder:
    """Train with these scores of the candidates, and return the run."""

    def validate(model: Predictor, seeds: Sequence[int]) -> list[Score]:
        assert isinstance(model, Chosen)
        return [Score(*scores[int(model.get_buffer("number") / 10)])]

    (state,) = states
    assert not train(states, {0: Feed(source, lambda: iter(()))}, validate, progress=False)
    assert state.run.is_done
    return state.run


@pytest.mark.parametrize("select", ["metric", "loss", "last"])
@pytest.mark.parametrize("validate_every", [1, 3])
def test_every_candidate_is_tried_and_the_best_metric_is_kept(select: Any, validate_every: int, tmp_path: Path) -> None:
    run = run_scripted(scripted_states(tmp_path, select=select, validate_every=validate_every))
    assert load_file(run.path / "checkpoint.safetensors")["number"].item() == 10.0 * BEST
    found = read_validations(run)
    assert [(each.epoch, each.metric, each.loss) for each in found] == [(k + 1, *score) for k, score in enumerate(SCORES)]
    assert all(each.is_candidate for each in found)
    assert best_validation(found, select).epoch == BEST + 1
    history = pd.read_csv(run.path / "history.csv")
    assert history["phase"].tolist() == ["fit"] * 4 + ["number"] * len(SCORES)
    assert history["candidate"].dropna().tolist() == list(range(len(SCORES)))
    assert history["loss"].notna().tolist() == [True] * 4 + [False] * len(SCORES)


def test_a_rule_to_stop_is_not_asked(tmp_path: Path) -> None:
    states = scripted_states(tmp_path)
    states[0].should_stop = lambda epoch, metric: pytest.fail("the search for the best candidate may not be cut short")
    run_scripted(states)


@pytest.mark.parametrize("interrupted", range(1, 9))
def test_an_interrupted_search_goes_on(interrupted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STATE_SECONDS", -np.inf)
    expected = load_file(run_scripted(scripted_states(tmp_path / "undisturbed")).path / "checkpoint.safetensors")
    save, saves = TrainState.save, 0

    def save_and_die(state: TrainState) -> None:
        nonlocal saves
        save(state)
        saves += 1
        if saves == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_scripted(scripted_states(tmp_path))
    run = run_scripted(scripted_states(tmp_path))
    kept = load_file(run.path / "checkpoint.safetensors")
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], expected[name]) for name in kept)
    assert len(read_validations(run)) == len(SCORES)


def test_candidates_are_tried_on_the_average_of_the_weights_before_them(tmp_path: Path) -> None:
    (state,) = scripted_states(tmp_path, weight_average=0.6)
    oracle = Chosen()
    oracle.load_state_dict(state.method.state_dict())
    run = run_scripted([state])
    optimizer = torch.optim.Adam(oracle.layer.parameters(), lr=0.05, weight_decay=1e-4)
    average, step = {name: value.detach().clone() for name, value in oracle.layer.named_parameters()}, 0
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (epoch // 4)
        for batch in source(epoch):
            optimizer.zero_grad()
            oracle.loss(batch, "fit")["loss"].backward()
            nn.utils.clip_grad_norm_(oracle.layer.parameters(), 1.0)
            optimizer.step()
            step += 1
            decay = min(0.6, (1 + step) / (10 + step))
            average = {
                name: decay * average[name] + (1 - decay) * value.detach() for name, value in oracle.layer.named_parameters()
            }
    kept = load_file(run.path / "checkpoint.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(kept[f"layer.{name}"], value, rtol=1e-4, atol=1e-6)


def test_a_search_by_halving_judges_runs_by_the_candidate_that_they_keep() -> None:
    found = [Validation(k + 1, *score, is_candidate=True) for k, score in enumerate(SCORES)]
    for rung in (1, 2, 4):
        assert validations_until(found, rung) == [Validation(rung, *SCORES[BEST], is_candidate=True)]


def test_halving_finishes_every_run_and_keeps_the_best_cells(home: Path) -> None:
    grid = tiny_grid(
        home, "knn", ("scale=per_dim,global,l2sqrtd", "tau=0.01,0.1,10.0"), search="optuna", training={"epochs": 8}
    )
    result = run_grid(grid, workers=0)
    assert all(head.run.is_done for head in grid.heads.values())
    runs = {str(head.run.path.relative_to(home)): head.run for head in grid.heads.values()}
    metrics = {name: evaluate(home, run, "val", {})["metrics"]["acc1"] for name, run in runs.items()}
    assert metrics[result.winner["runs"][0]] == max(metrics.values())
    for _, row in result.runs.iterrows():
        assert row["val_acc1"] == metrics[row["run"]]


def test_an_interrupted_run_of_a_search_is_trained_to_its_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STATE_SECONDS", -np.inf)
    grid = tiny_grid(home, "knn", ("tau=0.01,0.1",), search="optuna", training={"epochs": 8})
    save = TrainState.save

    def save_and_die(state: TrainState) -> None:
        save(state)
        if state.progress.epoch == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_grid(grid, workers=0)
    run_grid(grid, workers=0)
    assert all(head.run.is_done for head in grid.heads.values())


def test_the_memory_of_heads_counts_the_training_samples_that_they_keep(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.heads.free_bytes", lambda device: 2**40)
    features = open_features(home, "tiny", "knn", caches_by_key(home))
    settings, training = resolve_head_settings("tiny", "knn", "head", {}, dict(FAST_TRAINING))
    plan = plan_head_on(features, "knn", settings, training, 0)
    (width,), rows = features.shapes["image"], len(features.train)
    kept = rows * (4 * width + 8)
    statistics = 2 * 4 * width + 8
    own_batch = training.batch_size * (4 * width + 8 + 8)  # of its seed
    assert 0.8 * 2**40 / head_capacity(plan) == pytest.approx(6 * kept + 5 * statistics + own_batch, rel=0.05)
