"""The feature space of diffusion heads has unit scale on the training split; its adapters are fitted there and then frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.equation_cases import build, fitted
from helpers.method_cases import batches_of, make_batch, make_rng, seeded_loss, to_numpy


def test_adapters_are_used_if_the_widths_differ() -> None:
    assert [phase.name for phase in build("seda").phases] == ["head"]
    method = build("seda", text_width=10)  # with 4 tokens: principal components to the largest width that they divide
    assert ([phase.name for phase in method.phases], method.space.kind) == (["head"], "pca")
    assert (method.space.image_width, method.space.text_width) == (8, 8)
    for adapter in ("auto", "classifier", "contrastive"):
        method = build("seda", text_width=10, adapter=adapter)
        assert [phase.name for phase in method.phases] == ["adapt", "head"]
        assert (method.space.image_width, method.space.text_width) == (12, 12)


@pytest.mark.parametrize("adapter", ["none", "classifier", "pca", "contrastive"])
def test_the_training_split_has_unit_scale(adapter: str) -> None:
    method, batch = fitted("seda", adapter=adapter)
    is_paired = (batch["paired"] > 0).numpy()
    for x in (to_numpy(method.space.image(batch["image"])), to_numpy(method.space.text(batch["text"]))[is_paired]):
        np.testing.assert_allclose(x.mean(0), 0.0, atol=1e-4)
        np.testing.assert_allclose(x.std(0), 1.0, atol=1e-3)


def test_pca_adapters_equal_a_singular_value_decomposition() -> None:
    method, batch = fitted("seda", adapter="pca")
    text = to_numpy(batch["text"])
    is_paired = (batch["paired"] > 0).numpy()
    x = (text - text[is_paired].mean(0)) / text[is_paired].std(0)
    components = x @ np.linalg.svd(x[is_paired], full_matrices=False)[2][:12].T
    expected = components / components[is_paired].std(0)
    np.testing.assert_allclose(np.abs(to_numpy(method.space.text(batch["text"]))), np.abs(expected), atol=1e-3)


def test_classifier_adapters_learn_the_labels_and_are_then_frozen() -> None:
    method, batch = fitted("seda", adapter="classifier")
    adapters = [parameter for name, parameter in method.named_parameters() if name.startswith("space.")]
    losses = []
    for _ in range(40):
        loss = seeded_loss(method, batch, "adapt")["loss"]
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter, gradient in zip(adapters, torch.autograd.grad(loss, adapters), strict=True):
                parameter -= 0.5 * gradient
    assert losses[-1] < 0.3 * losses[0]
    before = {name: value.clone() for name, value in method.state_dict().items() if name.startswith("space.")}
    seeded_loss(method, make_batch(seed=1))
    method.predict(10 * batch["image"], make_rng())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items() if name in before)


def test_contrastive_adapters_learn_what_ema_learns_and_are_then_frozen() -> None:
    method, batch = fitted("seda", adapter="contrastive", width=12)
    ema, _ = fitted("ema", width=12)
    for ours, theirs in ((method.space.image_adapter, ema.image_projector), (method.space.text_adapter, ema.text_projector)):
        theirs.load_state_dict(ours.project.state_dict())
    ema.classifier.load_state_dict(method.space.image_adapter.classifier.state_dict())
    expected, parts = seeded_loss(ema, batch), seeded_loss(method, batch, "adapt")
    torch.testing.assert_close(parts["loss"], expected["loss"])
    torch.testing.assert_close(parts["ita"], expected["ita"])
    assert not any(name.startswith("space.") for phase in method.phases[1:] for name in phase.trains)


def test_principal_components_stay_when_statistics_are_taken_again() -> None:
    method, batch = fitted("seda", adapter="pca")
    before = method.space.image_adapter.project.weight.clone()
    moved = {**batch, "image": 2.0 * batch["image"].flip(1) + 1.0}
    method.begin("head", batches_of(moved))
    torch.testing.assert_close(method.space.image_adapter.project.weight, before, rtol=0, atol=0)
    x_v = to_numpy(method.space.image(moved["image"]))
    np.testing.assert_allclose(x_v.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(x_v.std(0), 1.0, atol=1e-3)
