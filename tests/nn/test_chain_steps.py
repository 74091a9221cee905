"""The chain of a sampler: which steps it visits, and that a step which it leaves out changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.equation_cases import build, fitted, settings
from helpers.method_cases import StubDenoiser, make_rng
from torch import Tensor

from pipeline.nn.diffusion import ddim_sample, trailing_steps
from pipeline.nn.sampler import Sampler

T, S = 1500, 20


def all_steps() -> list[int]:
    return trailing_steps(torch.tensor(float(T)), S).tolist()


@pytest.mark.parametrize(
    ("changes", "is_trained"),
    [
        ({"stages": "dst"}, lambda n: True),
        ({"stages": "dst", "train_min_step": 0.5}, lambda n: n >= 750),
        ({"train_min_step": 0.5}, lambda n: n <= 300 or n >= 750),
        ({"train_min_step": 0.5, "stage_order": "reverse"}, lambda n: n >= 750),
        ({"stages": "dsl", "train_min_step": 0.5}, lambda n: True),
    ],
)
def test_sedas_chain_visits_the_trained_steps_of_the_grid(changes: dict[str, Any], is_trained: Callable[[int], bool]) -> None:
    sizes: dict[str, Any] = {"num_steps": T, "stage_step": 300, "sample_steps": S}
    visited = build("seda", **sizes, **changes).sampler.steps.tolist()
    assert len(visited) == S
    assert sorted(set(visited), reverse=True) == [n for n in all_steps() if is_trained(n)]
    assert visited == sorted(visited, reverse=True)
    assert build("seda", **sizes, **changes, chain_steps="all").sampler.steps.tolist() == all_steps()


def test_cdrs_chain_visits_the_trained_steps_of_the_grid() -> None:
    visited = build("cdr", num_steps=1000, sample_steps=10, train_min_step=0.35).sampler.steps.tolist()
    assert sorted(set(visited), reverse=True) == [999, 899, 799, 699, 599, 499, 399]
    assert set(build("cdr", num_steps=12, sampler="ancestral", train_min_step=0.5).sampler.steps.tolist()) == set(range(6, 12))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_that_is_left_out_changes_nothing(eta: float) -> None:
    """The chain with repeated steps is the chain of the trained steps alone, with the same noise at the same jumps."""
    method, batch = fitted("seda", stages="dst", train_min_step=0.5, num_steps=T, stage_step=300, sample_steps=S, eta=eta)
    image, rng = batch["image"], make_rng().at("draw", 0)
    kept = sorted(set(method.sampler.steps.tolist()), reverse=True)
    context, e = method.denoiser.image_context(method.condition(image)), method.denoiser.embed_step(torch.tensor(kept))

    def model(x: Tensor, k: int) -> Tensor:
        return method.denoiser(x, e[k], context)

    def noise(k: int) -> Tensor:
        return rng.at("step", k).normal(method.space.text_width)

    expected = ddim_sample(model, rng.at("start").normal(16), torch.tensor(kept), method.abar.values, eta, noise)
    torch.testing.assert_close(method.feature(image, make_rng()), expected, atol=1e-5, rtol=1e-5)


def test_the_last_prediction_is_that_of_the_lowest_trained_step() -> None:
    sampler = Sampler(settings("cdr", num_steps=10, sample_steps=10, train_min_step=0.4))
    stub = StubDenoiser("image")
    x_v = torch.randn(64, 3)
    assert sampler.steps.tolist() == [9, 8, 7, 6, 5, 4, 4, 4, 4, 4]
    torch.testing.assert_close(sampler.generate(stub, x_v, 3, torch.linspace(0.9, 0.1, 10), make_rng()), x_v)
