"""What every method promises, whatever its settings: the tests run over all plug-ins and all their choices."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    KINDS,
    ROWS,
    build,
    data,
    fitted,
    freeze,
    passes,
    settings,
    shapes,
    streams,
    variant_id,
    variants,
)
from torch import Tensor

from pipeline.runtime import plugins
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.ensemble import ModelEnsemble, structure
from pipeline.types import Batch

VARIANTS = variants()
over_variants = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
over_methods = pytest.mark.parametrize("name", plugins.names("methods"))
over_kinds = pytest.mark.parametrize("kind", KINDS)

# What a grid may vary among stacked models: another value for every such field of a config.
CELL = {
    "num_steps": 15,
    "tau": 0.2,
    "dropout": 0.25,
    "dropout_ema": 0.25,
    "dropout_cdr": 0.25,
    "stage_step": 7,
    "train_min_step": 0.25,
}


def test_there_are_methods() -> None:
    assert {"baseline", "ema", "cdr", "marnet", "seda"} <= set(plugins.names("methods"))
    assert len(VARIANTS) > 50


@over_methods
def test_letters_and_grid_name_settings(name: str) -> None:
    module = plugins.get("methods", name)
    known = {field.name for field in fields(module.Config)}
    assert set(module.SYMBOLS.values()) <= known
    assert all(letter == field for letter, field in module.SYMBOLS.items() if letter in known)
    assert set(module.GRID) <= known
    for field, values in module.GRID.items():
        for value in values:
            assert getattr(plugins.configure(module.Config, {field: str(value)}), field) == value


@over_kinds
@over_variants
def test_every_phase_trains_what_it_names_and_nothing_else(variant: tuple[str, dict[str, Any]], kind: str) -> None:
    name, changes = variant
    method, batch = build(name, kind, **changes), data(kind)
    assert method.needs == plugins.get("methods", name).NEEDS
    needed = {key: batch[key] for key in method.needs}
    learned: set[str] = set()
    for number, phase in enumerate(method.phases):
        method.train(False)
        method.begin(phase.name, passes(batch))
        method.train()
        freeze(method, phase)
        parts = method.loss(needed, streams().at("train", number), phase.name)
        assert all(part.shape == () and part.isfinite() for part in parts.values()), parts
        parts["loss"].backward()
        before = {key: value.detach().clone() for key, value in method.named_parameters()}
        trained = {key: value for key, value in method.named_parameters() if key.startswith(phase.trains)}
        assert trained
        with torch.no_grad():
            for value in trained.values():
                value -= 0.1 * value.grad
        for key, value in method.named_parameters():
            assert (value.grad is not None) == (key in trained), key
            assert key not in trained or value.grad.isfinite().all(), key
            assert key in trained or torch.equal(value, before[key]), key
        assert any(not torch.equal(value, before[key]) for key, value in trained.items())
        learned |= set(trained)
    # principal components are taken, not learned
    assert all(key in learned or key.startswith("space.") for key, _ in method.named_parameters())
    method.train(False)
    logits, feature = method.predict(batch["image"], streams()), method.feature(batch["image"], streams())
    assert logits.shape == (ROWS, CLASSES)
    assert feature.ndim == 2
    assert len(feature) == ROWS
    assert logits.isfinite().all()
    assert feature.isfinite().all()


@over_methods
def test_features_of_different_widths(name: str) -> None:
    method, batch = fitted(name, text_width=10)
    for phase in method.phases:
        assert method.loss(batch, streams(), phase.name)["loss"].isfinite()
    assert method.predict(batch["image"], streams()).shape == (ROWS, CLASSES)


@over_variants
def test_training_reads_only_what_it_needs(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    method, batch = fitted(name, **changes)
    poisoned = {key: value if key in method.needs else torch.full_like(value.float(), math.nan) for key, value in batch.items()}
    for phase in method.train().phases:
        kept, read = (method.loss(each, streams(), phase.name)["loss"] for each in (batch, poisoned))
        assert torch.equal(kept, read)


@over_methods
def test_text_is_no_argument_of_prediction(name: str) -> None:
    method = build(name)
    assert list(inspect.signature(method.predict).parameters) == ["image", "rng"]
    asked, *rest = inspect.signature(method.feature).parameters.values()
    assert (asked.name, rest[0].name) == ("image", "rng")
    assert all(isinstance(other.default, int) for other in rest[1:])


@over_variants
@torch.no_grad()
def test_a_prediction_is_a_function_of_its_own_sample(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    method, batch = fitted(name, **changes)
    image, keys = batch["image"], batch["key"]
    whole = method.predict(image, streams())
    assert torch.equal(method.predict(image, streams()), whole)
    for size in (1, 7):
        for start in (0, 7, ROWS - size):
            rows = slice(start, start + size)
            torch.testing.assert_close(
                method.predict(image[rows], KeyedRNG.seeded(0, keys[rows])), whole[rows], atol=1e-5, rtol=0
            )
    others = image.clone()
    others[1:] = -100.0 * others[1:].flip(0)
    torch.testing.assert_close(method.predict(others, streams())[0], whole[0], atol=1e-5, rtol=0)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(method.predict(image[order], KeyedRNG.seeded(0, keys[order])), whole[order], atol=1e-5, rtol=0)


@over_variants
def test_randomness_is_the_argument_alone(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    method, batch = fitted(name, **changes)
    method.train()
    for phase in method.phases:
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = method.loss(batch, streams(3), phase.name)
        method.predict(batch["image"], streams(3))
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        again = method.loss(batch, streams(3), phase.name)
        assert all(torch.equal(first[key], again[key]) for key in first)


@over_variants
@torch.no_grad()
def test_a_checkpoint_holds_all_that_prediction_needs(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    method, batch = fitted(name, **changes)
    other = build(name, seed=1, **changes)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.train(False).predict(batch["image"], streams()), method.predict(batch["image"], streams()))


@over_kinds
@over_variants
def test_a_sample_without_text_has_no_part_in_the_terms_on_text(variant: tuple[str, dict[str, Any]], kind: str) -> None:
    name, changes = variant
    batch = data(kind)
    garbage = torch.where(batch["paired"][:, None] > 0, batch["text"], 1e3 * torch.randn_like(batch["text"]))
    outcomes = []
    for each in (batch, {**batch, "text": garbage}):
        method = build(name, kind, **changes)
        for phase in method.phases:
            method.begin(phase.name, passes(each))
        outcomes.append({})
        for phase in method.train().phases:
            parts = method.loss(each, streams(), phase.name)
            for part in {"ita", "mse"} & set(parts):
                gradients = torch.autograd.grad(parts[part], list(method.parameters()), allow_unused=True, retain_graph=True)
                outcomes[-1][part] = [parts[part], *(g for g in gradients if g is not None)]
    clean, dirty = outcomes
    assert ("paired" in method.needs) == bool(clean)
    torch.testing.assert_close(dirty, clean, atol=1e-5, rtol=1e-4)


@over_variants
def test_stacked_models_compute_what_each_does_alone(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    known = {field.name for field in fields(type(settings(name)))}
    cell = {field: 0.7 for field in known if field.startswith("w_")} | {k: v for k, v in CELL.items() if k in known}
    models = [fitted(name, **changes)[0], fitted(name, seed=1, **{**cell, **changes})[0]]
    assert (structure(models[0]) == structure(models[1])) == (changes.get("sampler") != "ancestral")  # whose length is T
    batch, rng = data(), streams()
    predicted = [model.train(False).predict(batch["image"], rng) for model in models]
    for phase in models[0].phases:
        alone = []
        for model in models:
            freeze(model.train(), phase)
            value = model.loss(batch, rng, phase.name)
            trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
            gradients = torch.autograd.grad(value["loss"], list(trained.values()), allow_unused=True, materialize_grads=True)
            alone.append((value, dict(zip(trained, gradients, strict=True))))
        if structure(models[0]) == structure(models[1]):
            _assert_stacked(ModelEnsemble(models), alone, predicted, phase.name)


def _assert_stacked(stack: ModelEnsemble, alone: list[tuple[Batch, Batch]], predicted: list[Tensor], phase: str) -> None:
    """Losses, their parts, gradients and predictions are those of each model by itself."""
    torch.testing.assert_close(stack.predict(data()["image"], streams()), torch.stack(predicted), atol=1e-4, rtol=1e-4)
    stack.train()
    values = stack.loss(data(), streams(), phase)
    values["loss"].sum().backward()
    gradients = {key: leaf.grad for key, leaf in stack.named_parameters() if leaf.requires_grad}
    for k, (parts, own) in enumerate(alone):
        torch.testing.assert_close({key: value[k] for key, value in values.items()}, parts, atol=1e-5, rtol=1e-4)
        assert gradients.keys() == own.keys()
        for key, gradient in gradients.items():
            row = torch.zeros_like(own[key]) if gradient is None else gradient[k]
            torch.testing.assert_close(row, own[key], atol=1e-4, rtol=1e-3)


def test_shapes_carry_the_label_kind() -> None:
    assert shapes("single")["label"] == ()
    assert shapes("multi")["label"] == (CLASSES,)
