"""The baseline and a head in one method: its equation, its phases, its settings, and what it keeps on validation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.method_cases import LABEL_KINDS, fitted, make_rng, seeded_loss, settings, to_numpy, trained_phases
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, train_tiny
from safetensors.torch import load_file
from scipy.special import expit, log_softmax

from pipeline.evaluation.evaluate import evaluate
from pipeline.methods.knn import NEIGHBOURS
from pipeline.methods.stacked import HEAD_WEIGHTS
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import configure
from pipeline.training.config import TrainConfig
from pipeline.training.heads import plan_head, resolve_head_settings, train_head

HEADS = [name for name in plugins.names("methods") if name != "stacked" and not plugins.is_external("methods", name)]


def small_text(head: str) -> str:
    """The settings of a small head as one text."""
    return " ".join(f"{name}={value}" for name, value in plugins.get("methods", head).small().items())


def stacked_on(head: str, kind: str = "single", more: str = "", **changes: Any) -> tuple[Any, Any]:
    return fitted("stacked", kind, head=head, head_settings=f"{small_text(head)} {more}", **changes)


def config_of(**given: Any) -> Any:
    return configure(plugins.get("methods", "stacked").Config, given)


@pytest.mark.parametrize("kind", LABEL_KINDS)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_it_is_the_weighted_sum_of_the_log_probabilities(head: str, kind: str) -> None:
    model, batch = stacked_on(head, kind)
    image, rng = batch["image"], make_rng()
    assert len(HEAD_WEIGHTS) == len(set(HEAD_WEIGHTS))
    assert HEAD_WEIGHTS[0] == 0 <= min(HEAD_WEIGHTS)
    choices = len(NEIGHBOURS) if head == "knn" else 1
    assert model.phases[-1].candidates == len(HEAD_WEIGHTS) * choices
    for candidate in range(model.phases[-1].candidates):
        model.choose(candidate)
        base, own = (log_softmax(to_numpy(part.predict(image, rng)), axis=1) for part in (model.base, model.head))
        weight = HEAD_WEIGHTS[candidate // choices]
        expected = (base + weight * own) / (1 + weight)
        np.testing.assert_allclose(to_numpy(model.predict(image, rng)), expected, atol=1e-4)
        if head == "knn":
            assert model.head.k == NEIGHBOURS[candidate % choices]


@pytest.mark.parametrize("kind", LABEL_KINDS)
@torch.no_grad()
def test_without_the_head_it_is_the_baseline(kind: str) -> None:
    model, batch = stacked_on("ema", kind)
    model.choose(0)
    base, ours = (part.predict(batch["image"], make_rng()) for part in (model.base, model))
    assert torch.equal(ours, base.log_softmax(dim=1))
    assert torch.equal(ours.argsort(dim=1, stable=True), base.argsort(dim=1, stable=True))


@torch.no_grad()
def test_two_equal_predictions_are_as_sure_as_one() -> None:
    model, batch = stacked_on("baseline")
    model.head.load_state_dict(model.base.state_dict())
    alone = model.base.predict(batch["image"], make_rng()).softmax(dim=1)
    for candidate in range(len(HEAD_WEIGHTS)):
        model.choose(candidate)
        torch.testing.assert_close(model.predict(batch["image"], make_rng()).softmax(dim=1), alone)


@torch.no_grad()
def test_with_a_sigmoid_for_each_class_it_is_the_geometric_mean_of_two_predictions() -> None:
    model, batch = stacked_on("ema", "multi", "label_loss=bce", **{"base.label_loss": "bce"})
    model.choose(HEAD_WEIGHTS.index(2.0))
    rng = make_rng()
    p, q, ours = (expit(to_numpy(part.predict(batch["image"], rng))) for part in (model.base, model.head, model))
    product, rest = (p * q**2) ** (1 / 3), ((1 - p) * (1 - q) ** 2) ** (1 / 3)
    np.testing.assert_allclose(ours, product / (product + rest), atol=1e-5)
    model.choose(0)
    assert torch.equal(model.predict(batch["image"], rng), model.base.predict(batch["image"], rng))


@pytest.mark.parametrize("head", HEADS)
def test_each_part_is_trained_in_its_own_phases_by_its_own_loss(head: str) -> None:
    model, batch = stacked_on(head)
    inner = trained_phases(model.head)
    assert [phase.name for phase in model.phases] == ["base", *(f"head.{phase.name}" for phase in inner), "weight"]
    for phase, own in zip(trained_phases(model)[1:], inner, strict=True):
        assert (phase.share, phase.trains) == (own.share, tuple(f"head.{prefix}" for prefix in own.trains))
        for name, _ in model.head.named_parameters():
            assert phase.rate(f"head.{name}") == own.rate(name)
        ours, theirs = seeded_loss(model, batch, phase.name), seeded_loss(model.head, batch, own.name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(seeded_loss(model, batch, "base")["loss"], seeded_loss(model.base, batch)["loss"])


def train_on_tiny(home: Path, training: dict[str, Any], **given: Any) -> RunFolder:
    config, train_config = resolve_head_settings("tiny", "stacked", "head", given, {**FAST_TRAINING, **training})
    return train_head(plan_head(home, "tiny", "stacked", config, train_config, 0, caches_by_key(home)), progress=False)


@pytest.mark.parametrize("head", ["ema", "seda", "logreg", "knn"])
def test_a_run_keeps_the_best_weight_and_its_base_is_the_baseline(head: str, tiny_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(tiny_home, tmp_path / "home"))
    run = train_on_tiny(home, {"select": "last"}, head=head, head_settings=small_text(head))
    history = pd.read_csv(run.path / "history.csv").query("phase == 'weight'")
    best = history.sort_values(["val_metric", "val_loss", "epoch"], ascending=[False, True, True]).iloc[0]
    assert best["val_metric"] >= history["val_metric"].iloc[0]
    assert evaluate(home, run, "val", {})["metrics"]["acc1"] == best["val_metric"]
    kept = load_file(run.path / "checkpoint.safetensors")
    choices = len(history) // len(HEAD_WEIGHTS)
    assert kept["head_weight"].item() == pytest.approx(HEAD_WEIGHTS[int(best["candidate"]) // choices])
    baseline = train_tiny(home, "baseline", training={"select": "last"})
    for name, weight in load_file(baseline.path / "checkpoint.safetensors").items():
        assert torch.equal(kept[f"base.{name}"], weight)
    assert history["val_metric"].iloc[0] == evaluate(home, baseline, "val", {})["metrics"]["acc1"]


def test_a_run_records_all_settings_of_the_head_however_they_are_spelled() -> None:
    first, again = (config_of(head="ema", head_settings=text) for text in ("tau=0.10 w_ita=3", " beta=3.0   tau=.1 "))
    assert first.head_config == again.head_config == plugins.get("methods", "ema").Config(tau=0.1, w_ita=3.0)
    assert first.recorded() == again.recorded() != config_of(head="ema").recorded()
    assert config_of(**first.recorded()).recorded() == first.recorded()
    assert config_of(**first.recorded()).head_config == first.head_config
    text = config_of(head="marnet").recorded()["head_settings"]
    assert set(text.split()) >= {"fusion=concat", "ema.tau=0.07", "cdr.zero_start=false"}


def test_two_spellings_are_one_run(tiny_home: Path) -> None:
    plans = [
        plan_head(
            tiny_home, "tiny", "stacked", config_of(head="ema", head_settings=text), TrainConfig(), 0, caches_by_key(tiny_home)
        )
        for text in ("width=16 tau=0.1", "tau=.10 d=16", "tau=0.2 d=16")
    ]
    assert plans[0].run == plans[1].run != plans[2].run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": "stacked"}, "^head is 'stacked'; take another method"),
        ({"head": "own_method"}, "^head is 'own_method'; take another method of this package"),
        ({"head": "sedaa"}, "^unknown method 'sedaa'; .*did you mean 'seda'"),
        ({"head": "ema", "head_settings": "tauu=1"}, "^head_settings of ema: unknown setting 'tauu'; .*did you mean 'tau'"),
        ({"head": "ema", "head_settings": "tau=0"}, "^head_settings of ema: tau must be"),
        ({"head": "ema", "head_settings": "tau"}, "^head_settings of ema: it takes KEY=VALUE, not 'tau'"),
        ({"head": "ema", "head_settings": "tau=1 tau=2"}, "^head_settings of ema: 'tau' is given twice"),
        ({"head": "ema", "head_settings": "label_loss=bce"}, "^base.label_loss and label_loss in head_settings"),
        ({"head": "class_mean", "base.label_loss": "bce"}, "^base.label_loss and label_loss in head_settings"),
    ],
)
def test_impossible_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(**given)


def test_the_small_head_is_a_small_seda() -> None:
    assert settings("stacked").head_config == settings("seda")
