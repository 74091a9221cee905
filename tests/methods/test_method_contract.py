"""The contract of methods: the tests run over all plug-ins and all choices of their settings."""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, fields
from itertools import chain
from typing import Any

import pytest
import torch
from helpers.method_cases import (
    CLASSES,
    LABEL_KINDS,
    ROWS,
    another_value,
    batches_of,
    build,
    fitted,
    freeze,
    make_batch,
    make_rng,
    seeded_loss,
    settings,
    shapes,
    trained_phases,
    value_of,
    variant_id,
    variants,
    with_settings,
)
from torch import Tensor

from pipeline.runtime import plugins
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import aliases_of, configure, field_types
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import ModelEnsemble, structure_key
from pipeline.training.heads import resolve_head_settings
from pipeline.types import Batch, Phase

VARIANTS = variants()
for_all_variants = pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
for_all_methods = pytest.mark.parametrize("name", plugins.names("methods"))
for_all_label_kinds = pytest.mark.parametrize("kind", LABEL_KINDS)

# Settings in which the models of an ensemble may differ, each with a value other than the default.
CELL = {
    "num_steps": 15,
    "tau": 0.2,
    "dropout": 0.25,
    "dropout_ema": 0.25,
    "dropout_cdr": 0.25,
    "stage_step": 7,
    "train_min_step": 0.25,
}
# parts of losses that no text of a sample without text may change
TEXT_PARTS = {"ita", "mse", "sdm", "kd", "nt", "cdd", "clip", "swd", "ce_text", "tokens", "mgcc"}
TEXT_PARTS |= {"soft", "esa", "domain", "kl", "cross", "rec_text"}


def test_all_methods_are_found() -> None:
    assert {"baseline", "ema", "cdr", "marnet", "seda"} <= set(plugins.names("methods"))
    assert len(VARIANTS) > 50


@for_all_methods
def test_symbols_and_grid_name_settings(name: str) -> None:
    module = plugins.get("methods", name)
    known = field_types(module.Config).keys()
    assert set(chain(*aliases_of(module.Config).values())) <= known
    assert not aliases_of(module.Config).keys() & known
    assert set(module.symbols.values()) <= known
    assert all(letter == field for letter, field in module.symbols.items() if letter in known)
    assert set(module.grid) <= known
    for field, values in module.grid.items():
        for value in values:
            assert value_of(configure(module.Config, {field: str(value)}), field) == value


@for_all_methods
def test_the_paper_s_preset_is_of_settings_that_differ_from_the_defaults(name: str) -> None:
    module = plugins.get("methods", name)
    of_paper, training = resolve_head_settings("openmoji", name, "paper", {}, {})
    default = configure(module.Config, {})
    assert all(value_of(of_paper, key) == value != value_of(default, key) for key, value in module.paper.items())
    assert of_paper != default or not module.paper
    assert asdict(training) == {**asdict(TrainConfig()), "lr": 1e-4, **module.paper_training}
    of_papers = {**asdict(TrainConfig()), "lr": 1e-4}
    assert all(of_papers[key] != value for key, value in module.paper_training.items())


@for_all_label_kinds
@for_all_variants
def test_every_phase_trains_only_the_parameters_that_it_names(variant: tuple[str, dict[str, Any]], kind: str) -> None:
    name, changes = variant
    method, batch = build(name, kind, **changes), make_batch(kind)
    assert method.needs == plugins.get("methods", name).needs
    needed = {key: batch[key] for key in method.needs}
    learned: set[str] = set()
    for phase in method.phases:
        method.train(False)
        method.begin(phase.name, batches_of(batch))
        freeze(method, phase)
        if phase.candidates:
            _check_candidates(method, phase, batch)
            continue
        method.train()
        parts = seeded_loss(method, needed, phase.name)
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
    # the principal components of pca adapters are fitted, not trained
    assert all(key in learned or key.startswith("space.") for key, _ in method.named_parameters())
    method.train(False)
    logits, feature = method.predict(batch["image"], make_rng()), method.feature(batch["image"], make_rng())
    assert logits.shape == (ROWS, CLASSES)
    assert feature.ndim == 2
    assert len(feature) == ROWS
    assert logits.isfinite().all()
    assert feature.isfinite().all()


def _check_candidates(method: Any, phase: Phase, batch: Batch) -> None:
    """Each candidate is put into buffers in place, predicts numbers, and may be put there again."""
    assert phase is method.phases[-1]
    assert not any(value.requires_grad for value in method.parameters())
    places = {key: buffer.data_ptr() for key, buffer in method.named_buffers()}
    before = {key: value.clone() for key, value in method.named_parameters()}
    predicted = []
    for candidate in (*range(phase.candidates), 0):
        method.choose(candidate)
        predicted.append(method.predict(batch["image"], make_rng()))
    assert all(each.isfinite().all() for each in predicted)
    assert torch.equal(predicted[0], predicted[-1])
    assert any(not torch.equal(predicted[0], each) for each in predicted)
    assert {key: buffer.data_ptr() for key, buffer in method.named_buffers()} == places
    assert all(torch.equal(value, before[key]) for key, value in method.named_parameters())


@for_all_methods
def test_numbers_are_tensors(name: str) -> None:
    """Heads that differ in a float, such as a weight, can be trained as one model; settings of prediction are exempt.

    A head whose number is 0 may leave out what the number belongs to, such as dropout.
    """
    method, default = plugins.get("methods", name), settings(name)
    for field, kind in field_types(method.Config).items():
        if kind is float and field not in method.prediction:
            first = another_value(default, field, float)
            second = another_value(with_settings(default, **{field: first}), field, float)
            keys = [structure_key(build(name, **{field: value})) for value in (first, second)]
            assert keys[0] == keys[1], f"numbers are tensors, but {field} is an attribute"


@for_all_methods
def test_text_is_weighted_by_paired(name: str) -> None:
    """The loss changes when samples lose their texts, by "paired" alone."""
    method, batch = fitted(name)
    if "text" not in method.needs:
        return
    assert "paired" in method.needs
    fewer = {**batch, "paired": batch["paired"] * (torch.arange(ROWS) % 2 == 0)}
    losses = [[seeded_loss(method, each, phase.name)["loss"] for phase in trained_phases(method)] for each in (batch, fewer)]
    assert any(not torch.equal(*pair) for pair in zip(*losses, strict=True)), (
        "text is weighted by paired, but paired is not read"
    )


@for_all_methods
def test_features_of_different_widths(name: str) -> None:
    method, batch = fitted(name, text_width=10)
    for phase in trained_phases(method):
        assert seeded_loss(method, batch, phase.name)["loss"].isfinite()
    assert method.predict(batch["image"], make_rng()).shape == (ROWS, CLASSES)


@for_all_variants
def test_training_reads_only_the_keys_in_needs(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    method, batch = fitted(name, **changes)
    poisoned = {key: value if key in method.needs else torch.full_like(value.float(), math.nan) for key, value in batch.items()}
    for phase in trained_phases(method.train()):
        clean_loss, poisoned_loss = (seeded_loss(method, each, phase.name)["loss"] for each in (batch, poisoned))
        assert torch.equal(clean_loss, poisoned_loss)


@for_all_methods
def test_prediction_has_no_argument_for_text(name: str) -> None:
    method = build(name)
    assert list(inspect.signature(method.predict).parameters) == ["image", "rng"]
    first, *rest = inspect.signature(method.feature).parameters.values()
    assert (first.name, rest[0].name) == ("image", "rng")
    assert all(isinstance(other.default, int) for other in rest[1:])


@for_all_variants
@torch.no_grad()
def test_a_prediction_depends_on_its_own_sample_only(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    method, batch = fitted(name, **changes)
    image, keys = batch["image"], batch["key"]
    full_batch = method.predict(image, make_rng())
    assert torch.equal(method.predict(image, make_rng()), full_batch)
    for size in (1, 7):
        for start in (0, 7, ROWS - size):
            rows = slice(start, start + size)
            torch.testing.assert_close(
                method.predict(image[rows], KeyedRNG.seeded(0, keys[rows])), full_batch[rows], atol=1e-5, rtol=0
            )
    others = image.clone()
    others[1:] = -100.0 * others[1:].flip(0)
    torch.testing.assert_close(method.predict(others, make_rng())[0], full_batch[0], atol=1e-5, rtol=0)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        method.predict(image[order], KeyedRNG.seeded(0, keys[order])), full_batch[order], atol=1e-5, rtol=0
    )


@for_all_variants
def test_a_seed_decides_every_random_number(variant: tuple[str, dict[str, Any]]) -> None:
    """A loss draws from torch's generator, which the loop seeds in every step; a prediction draws from its argument alone."""
    name, changes = variant
    method, batch = fitted(name, **changes)
    state = torch.get_rng_state()
    method.predict(batch["image"], make_rng(3))
    method.feature(batch["image"], make_rng(3))
    assert torch.equal(torch.get_rng_state(), state)
    method.train()
    for phase in trained_phases(method):
        first, again = (seeded_loss(method, batch, phase.name, seed=3) for _ in range(2))
        assert all(torch.equal(first[key], again[key]) for key in first)


@for_all_variants
@torch.no_grad()
def test_a_checkpoint_contains_everything_that_prediction_needs(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    method, batch = fitted(name, **changes)
    other = build(name, seed=1, **changes)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.train(False).predict(batch["image"], make_rng()), method.predict(batch["image"], make_rng()))


@for_all_label_kinds
@for_all_variants
def test_a_sample_without_text_does_not_change_the_text_losses(variant: tuple[str, dict[str, Any]], kind: str) -> None:
    name, changes = variant
    batch = make_batch(kind)
    garbage = torch.where(batch["paired"][:, None] > 0, batch["text"], 1e3 * torch.randn_like(batch["text"]))
    outcomes = []
    for each in (batch, {**batch, "text": garbage}):
        method = build(name, kind, **changes)
        for phase in method.phases:
            method.begin(phase.name, batches_of(each))
        outcomes.append({})
        for phase in trained_phases(method.train()):
            parts = seeded_loss(method, each, phase.name)
            for part in TEXT_PARTS & set(parts):
                gradients = torch.autograd.grad(parts[part], list(method.parameters()), allow_unused=True, retain_graph=True)
                outcomes[-1][part] = [parts[part], *(g for g in gradients if g is not None)]
    clean, dirty = outcomes
    # the parts have these names in the methods of this package; `test_text_is_weighted_by_paired` needs no names
    assert plugins.is_external("methods", name) or ("paired" in method.needs) == bool(clean)
    torch.testing.assert_close(dirty, clean, atol=1e-5, rtol=1e-4)


@for_all_variants
def test_an_ensemble_computes_the_same_as_each_of_its_models(variant: tuple[str, dict[str, Any]]) -> None:
    name, changes = variant
    known = {field.name for field in fields(type(settings(name)))}
    cell = {field: 0.7 for field in known if field.startswith("w_")} | {k: v for k, v in CELL.items() if k in known}
    base = {field: 0.1 for field in known if field.startswith("dropout")}  # without dropout a head has another structure
    models = [fitted(name, **{**base, **changes})[0], fitted(name, seed=1, **{**cell, **changes})[0]]
    assert (structure_key(models[0]) == structure_key(models[1])) == (
        changes.get("sampler") != "ancestral"  # an ancestral chain has T steps, and T differs here
    )
    is_alike = structure_key(models[0]) == structure_key(models[1])
    batch, rng = make_batch(), make_rng()
    for number, model in enumerate(models):
        if candidates := model.phases[-1].candidates:
            model.choose(candidates // 2 + number)
    predicted = [model.train(False).predict(batch["image"], rng) for model in models]
    if is_alike:
        _assert_ensemble_predicts(ModelEnsemble(models), predicted)
    for phase in trained_phases(models[0]):
        alone = []
        for model in models:
            freeze(model, phase)
            model.train()
            value = seeded_loss(model, batch, phase.name)
            trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
            gradients = torch.autograd.grad(value["loss"], list(trained.values()), allow_unused=True, materialize_grads=True)
            alone.append((value, dict(zip(trained, gradients, strict=True))))
        if is_alike:
            ensemble = ModelEnsemble(models)
            _assert_ensemble_predicts(ensemble, predicted)
            _assert_ensemble_trains(ensemble, alone, phase.name)


def _assert_ensemble_predicts(ensemble: ModelEnsemble, predicted: list[Tensor]) -> None:
    """Assert that the ensemble has the predictions of its models."""
    ensemble.train(False)
    torch.testing.assert_close(
        ensemble.predict(make_batch()["image"], make_rng()), torch.stack(predicted), atol=1e-4, rtol=1e-4
    )


def _assert_ensemble_trains(ensemble: ModelEnsemble, alone: list[tuple[Batch, Batch]], phase: str) -> None:
    """Assert that the ensemble has the losses and gradients of its models."""
    ensemble.train()
    values = seeded_loss(ensemble, make_batch(), phase)
    values["loss"].sum().backward()
    gradients = {key: parameter.grad for key, parameter in ensemble.named_parameters() if parameter.requires_grad}
    for k, (parts, expected_gradients) in enumerate(alone):
        torch.testing.assert_close({key: value[k] for key, value in values.items()}, parts, atol=1e-5, rtol=1e-4)
        assert gradients.keys() == expected_gradients.keys()
        for key, gradient in gradients.items():
            row = torch.zeros_like(expected_gradients[key]) if gradient is None else gradient[k]
            torch.testing.assert_close(row, expected_gradients[key], atol=1e-4, rtol=1e-3)


def test_shapes_depend_on_the_label_kind() -> None:
    assert shapes("single")["label"] == ()
    assert shapes("multi")["label"] == (CLASSES,)
