"""L2: its objective by hand, and a linear map without a classifier, whose optimum is that of least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.method_cases import LABEL_KINDS, ROWS, cross_entropy, fitted, make_rng, seeded_loss, to_numpy


@pytest.mark.parametrize("reduction", ["mean", "sum_dim"])
@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_objective(kind: str, reduction: str) -> None:
    method, batch = fitted("l2", kind, 10, w_mse=1.3, mse_reduction=reduction)
    rows, raw = (batch["paired"] > 0).numpy(), to_numpy(batch["text"])
    x_s = (raw - raw[rows].mean(0)) / raw[rows].std(0)
    projected = method.feature(batch["image"], make_rng())
    errors = ((to_numpy(projected) - x_s)[rows] ** 2).mean(0)
    mse = errors.mean() if reduction == "mean" else errors.sum()
    parts = seeded_loss(method, batch)
    assert projected.shape == (ROWS, 10)
    assert parts["mse"].item() == pytest.approx(mse, rel=1e-4)
    ce = cross_entropy(method.predict(batch["image"], make_rng()), batch["label"])
    assert parts["loss"].item() == pytest.approx(ce + 1.3 * mse, rel=1e-4)


def test_the_best_linear_map_is_that_of_least_squares() -> None:
    method, batch = fitted("l2", num_hidden=0)
    rows = batch["paired"] > 0
    x = torch.cat([method.image_scale(batch["image"]), torch.ones(ROWS, 1)], dim=1)[rows].double()
    solution = torch.linalg.lstsq(x, method.text_target(batch["text"])[rows].double()).solution.float()
    (layer,) = method.projector.layers
    with torch.no_grad():
        layer.weight.copy_(solution[:-1].T)
        layer.bias.copy_(solution[-1])
    gradients = torch.autograd.grad(seeded_loss(method, batch)["mse"], list(layer.parameters()))
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_what_it_generates_is_compared_with_what_it_is_trained_for() -> None:
    method, batch = fitted("l2")
    error = method.generated_text(batch["image"], make_rng()) - method.text_target(batch["text"])
    parts = seeded_loss(method, batch)
    assert parts["mse"].item() == pytest.approx(error.square().mean(1)[batch["paired"] > 0].mean().item(), rel=1e-5)
    np.testing.assert_array_equal(
        to_numpy(method.predict(batch["image"], make_rng(1))), to_numpy(method.predict(batch["image"], make_rng(2)))
    )
