"""The sampler of diffusion heads: the papers' equations computed by hand, and random numbers per seed, sample and draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.equation_cases import fitted
from helpers.method_cases import ROWS, WIDTH, StubDenoiser, make_rng, noise_levels, to_numpy
from scipy import stats
from scipy.special import expit
from torch import Tensor

from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch

T = 12  # of the tiny settings
diffusion_heads = pytest.mark.parametrize("name", ["cdr", "seda"])
all_heads = pytest.mark.parametrize("name", ["cdr", "seda", "marnet"])


def predict_x0(method: Any, batch: Batch, x: np.ndarray, n: int) -> Tensor:
    e = method.denoiser.embed_step(torch.full((len(x),), n))
    context = method.denoiser.image_context(method.space.image(batch["image"]))
    return method.denoiser(torch.from_numpy(x).float(), e, context)


@diffusion_heads
@torch.no_grad()
def test_the_start_depends_on_seed_sample_and_draw_only(name: str) -> None:
    method, batch = fitted(name, sample_steps=1)
    method.denoiser = StubDenoiser("input")
    image, keys = batch["image"], batch["key"]
    start = method.feature(image, KeyedRNG.seeded(3, keys), 2)
    assert stats.kstest(start.flatten().numpy(), "norm").pvalue > 0.01
    assert torch.equal(method.feature(0 * image[9:10], KeyedRNG.seeded(3, keys[9:10]), 2), start[9:10])
    for other in (
        method.feature(image, KeyedRNG.seeded(4, keys), 2),
        method.feature(image, KeyedRNG.seeded(3, keys), 1),
        method.feature(image, KeyedRNG.seeded(3, keys.roll(1)), 2),
    ):
        assert abs(np.corrcoef(start.flatten(), other.flatten())[0, 1]) < 4 / np.sqrt(start.numel())


@diffusion_heads
@torch.no_grad()
def test_ancestral_sampling_follows_eq_13_to_15(name: str) -> None:
    method, batch = fitted(name, sampler="ancestral")
    abar, rng = noise_levels(T), make_rng().at("draw", 0)
    beta = np.linspace(1e-4, 0.02, T)
    x = to_numpy(rng.at("start").normal(WIDTH))
    for k, i in enumerate(reversed(range(T))):
        x_0 = to_numpy(predict_x0(method, batch, x, i))
        abar_before = abar[i - 1] if i > 0 else 1.0
        mean = (
            np.sqrt(abar_before) * beta[i] / (1 - abar[i]) * x_0 + np.sqrt(1 - beta[i]) * (1 - abar_before) / (1 - abar[i]) * x
        )
        variance = (1 - abar_before) / (1 - abar[i]) * beta[i]
        x = mean + np.sqrt(variance) * (to_numpy(rng.at("step", k).normal(WIDTH)) if i > 0 else 0.0)
    np.testing.assert_allclose(to_numpy(method.feature(batch["image"], make_rng())), x, atol=2e-3)


@diffusion_heads
@pytest.mark.parametrize(("zero_start", "eta"), [(False, 0.0), (True, 0.0), (False, 0.5)])
@torch.no_grad()
def test_ddim_equals_its_formula(name: str, zero_start: bool, eta: float) -> None:
    method, batch = fitted(name, sample_steps=4, zero_start=zero_start, eta=eta)
    abar, rng = noise_levels(T), make_rng().at("draw", 0)
    x = np.zeros((ROWS, WIDTH)) if zero_start else to_numpy(rng.at("start").normal(WIDTH))
    for k, (n, p) in enumerate([(11, 8), (8, 5), (5, 2), (2, -1)]):
        a, b = abar[n], abar[p] if p >= 0 else 1.0
        x_0 = to_numpy(predict_x0(method, batch, x, n))
        noise = (x - np.sqrt(a) * x_0) / np.sqrt(1 - a)
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        x = np.sqrt(b) * x_0 + np.sqrt(1 - b - variance) * noise
        x += np.sqrt(variance) * to_numpy(rng.at("step", k).normal(WIDTH))
    np.testing.assert_allclose(to_numpy(method.feature(batch["image"], make_rng())), x, atol=2e-3)


def logits_of_draws(name: str, method: Any, image: Tensor, rng: KeyedRNG) -> list[Tensor]:
    """Return the logits [B,C] of three draws, each by itself."""
    if name == "marnet":
        f_e = method.ema.feature(image, rng)
        return [method.fuse("concat", f_e, method.cdr.feature(image, rng, draw)) for draw in range(3)]
    return [method.classifier(method.feature(image, rng, draw)) for draw in range(3)]


@all_heads
@torch.no_grad()
def test_draws_average_class_probabilities(name: str) -> None:
    method, batch = fitted(name, draws=3)
    image, rng = batch["image"], make_rng()
    logits = logits_of_draws(name, method, image, rng)
    assert not torch.allclose(logits[0], logits[1])
    mean = torch.stack([draw_logits.softmax(1) for draw_logits in logits]).mean(0)
    torch.testing.assert_close(method.predict(image, rng).exp(), mean, atol=1e-6, rtol=1e-5)


@all_heads
@torch.no_grad()
def test_a_single_draw_is_the_classifier_on_the_feature(name: str) -> None:
    method, batch = fitted(name)
    classifier = method.fusions["concat"].classifier if name == "marnet" else method.classifier
    feature = method.feature(batch["image"], make_rng())
    torch.testing.assert_close(method.predict(batch["image"], make_rng()), classifier(feature))


@all_heads
@torch.no_grad()
def test_a_zero_start_without_noise_needs_no_random_number(name: str) -> None:
    method, batch = fitted(name, zero_start=True)
    assert torch.equal(method.predict(batch["image"], make_rng(0)), method.predict(batch["image"], make_rng(1)))


@all_heads
@torch.no_grad()
def test_draws_of_a_sigmoid_average_the_probability_of_each_class(name: str) -> None:
    method, batch = fitted(name, "multi", draws=3, label_loss="bce")
    image, rng = batch["image"], make_rng()
    logits = logits_of_draws(name, method, image, rng)
    mean = np.mean([expit(to_numpy(draw_logits)) for draw_logits in logits], axis=0)
    np.testing.assert_allclose(expit(to_numpy(method.predict(image, rng))), mean, atol=1e-5)
