"""The diffusion process, compared with closed forms and with the schedulers of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from pipeline.nn.diffusion import (
    Schedule,
    alphas_cumprod,
    betas,
    ddim_sample,
    noise_levels,
    posterior_variance,
    q_sample,
    trailing_steps,
)

SCHEDULES = get_args(Schedule)
LINEAR: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
ORACLE: dict[str, Any] = {**LINEAR, "prediction_type": "sample", "clip_sample": False}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_list(num_train_steps: int, num_sample_steps: int) -> list[int]:
    return trailing_steps(torch.tensor(float(num_train_steps)), num_sample_steps).tolist()


def no_noise(k: int) -> Tensor:
    raise AssertionError(f"noise was requested in step {k}")


def trace(
    predict: Callable[[Tensor, int], Tensor],
    x: Tensor,
    steps: Sequence[int],
    abar: Tensor,
    eta: float = 0.0,
    noise: Callable[[int], Tensor] = no_noise,
) -> list[Tensor]:
    """Return the states x_n of a chain at each step, and its result."""
    states: list[Tensor] = []

    def model(x_n: Tensor, k: int) -> Tensor:
        states.append(x_n)
        return predict(x_n, k)

    result = ddim_sample(model, x, torch.tensor(steps), abar, eta, noise)
    return [*states, result]


class TestSchedules:
    @pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
    @pytest.mark.parametrize("num_steps", [10, 900, 1500])
    def test_betas_equal_diffusers(self, ours: Schedule, theirs: Any, num_steps: int) -> None:
        oracle = DDPMScheduler(num_train_timesteps=num_steps, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
        np.testing.assert_allclose(betas(ours, num_steps), oracle.betas, rtol=1e-4, atol=1e-7)

    def test_linear_scaled_keeps_the_total_noise(self) -> None:
        assert torch.equal(betas("linear_scaled", 1000), betas("linear", 1000))
        torch.testing.assert_close(betas("linear_scaled", 500), 2 * betas("linear", 500))
        assert betas("linear_scaled", 4).max() == 0.999
        ends = [alphas_cumprod("linear_scaled", num_steps)[-1].log() for num_steps in (250, 1000, 1800)]
        assert max(ends) - min(ends) < 0.5

    @pytest.mark.parametrize(
        ("num_steps", "end"), [(900, 1.1e-4), (1000, 4.0e-5), (1200, 5.3e-6), (1500, 2.6e-7), (1800, 1.2e-8)]
    )
    def test_the_linear_schedule_ends_in_noise(self, num_steps: int, end: float) -> None:
        assert float(alphas_cumprod("linear", num_steps)[-1]) == pytest.approx(end, rel=0.05)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("num_steps", [1, 2, 300, 1800])
    def test_abar_decreases_within_0_and_1(self, schedule: Schedule, num_steps: int) -> None:
        abar = alphas_cumprod(schedule, num_steps)
        assert abar.dtype == torch.float32
        assert abar.shape == (num_steps,)
        assert 0.0 < abar[-1] <= abar[0] < 1.0
        assert (abar.diff() < 0).all()

    def test_feature_scale_decides_where_the_signal_is_lost(self) -> None:
        abar = alphas_cumprod("linear", 1500).double()
        for variance, crossing in ((1.0, 315), (1 / 768, 8)):
            snr = abar * variance / (1 - abar)
            assert abs(int((snr > 1).sum()) - crossing) <= 1

    def test_a_schedule_without_steps_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one step"):
            betas("linear", 0)


class TestForward:
    def test_q_sample_equals_diffusers(self) -> None:
        oracle = DDPMScheduler(num_train_timesteps=1000, **LINEAR)
        x0, noise = normal(5, 8).float(), normal(5, 8, seed=1).float()
        n: Any = torch.tensor([0, 3, 500, 998, 999])
        expected = oracle.add_noise(x0, noise, n)
        torch.testing.assert_close(
            q_sample(x0, n, noise, noise_levels(alphas_cumprod("linear", 1000))), expected, atol=1e-4, rtol=0
        )

    def test_unit_variance_stays_unit_variance(self) -> None:
        x0, noise = normal(4, 20_000), normal(4, 20_000, seed=1)
        x_n = q_sample(x0, torch.tensor([0, 100, 500, 999]), noise, noise_levels(alphas_cumprod("cosine", 1000).double()))
        torch.testing.assert_close(x_n.var(dim=1), torch.ones(4, dtype=torch.float64), atol=0.04, rtol=0)

    def test_vmap_over_schedules_equals_a_loop(self) -> None:
        x0, noise, n = normal(5, 3), normal(5, 3, seed=1), torch.tensor([0, 1, 2, 30, 49])
        tables = torch.stack([noise_levels(alphas_cumprod(schedule, 50)) for schedule in SCHEDULES])
        stacked = torch.func.vmap(lambda levels: q_sample(x0, n, noise, levels))(tables)
        torch.testing.assert_close(stacked, torch.stack([q_sample(x0, n, noise, levels) for levels in tables]))


class TestSampleSteps:
    @pytest.mark.parametrize("num_train_steps", [7, 300, 1000, 1500])
    def test_the_steps_equal_the_trailing_spacing_of_diffusers(self, num_train_steps: int) -> None:
        for num_sample_steps in {1, 2, 3, 5, 7, min(40, num_train_steps), num_train_steps}:
            oracle = DDIMScheduler(num_train_timesteps=num_train_steps, timestep_spacing="trailing")
            oracle.set_timesteps(num_sample_steps)
            # the floating-point range of diffusers may have one entry too many, -1
            assert step_list(num_train_steps, num_sample_steps) == oracle.timesteps.tolist()[:num_sample_steps]

    def test_the_steps_descend_from_the_last_one(self) -> None:
        for num_train_steps in range(1, 60):
            for num_sample_steps in range(1, num_train_steps + 1):
                steps = step_list(num_train_steps, num_sample_steps)
                assert steps == sorted(set(steps), reverse=True)
                assert (len(steps), steps[0]) == (num_sample_steps, num_train_steps - 1)
                assert steps[-1] >= 0

    @pytest.mark.parametrize(("train", "sample", "last"), [(1500, 10, 149), (1500, 20, 74), (1500, 50, 29), (1000, 10, 99)])
    def test_the_lowest_step(self, train: int, sample: int, last: int) -> None:
        assert step_list(train, sample)[-1] == last

    def test_signal_at_the_lowest_step(self) -> None:
        assert float(alphas_cumprod("linear", 1500)[149]) == pytest.approx(0.849, abs=5e-4)
        assert float(alphas_cumprod("linear", 1500)[74]) == pytest.approx(0.957, abs=5e-4)
        assert float(alphas_cumprod("linear", 1000)[99]) == pytest.approx(0.897, abs=5e-4)

    def test_number_of_steps_in_the_early_stage(self) -> None:
        assert [n for n in step_list(1500, 5) if n <= 300] == [299]
        assert [n for n in step_list(1500, 20) if n <= 300] == [299, 224, 149, 74]

    def test_vmap_over_the_number_of_steps_equals_a_loop(self) -> None:
        steps = torch.tensor([1500.0, 900.0, 7.0])
        stacked = torch.func.vmap(lambda num_steps: trailing_steps(num_steps, 7))(steps)
        assert stacked.tolist() == [step_list(1500, 7), step_list(900, 7), step_list(7, 7)]


def jump_weights(n: int, p: int, abar: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of xhat_0, x_n and the noise in the jump n -> p, measured with unit inputs."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def probe(x0_hat: Tensor, x_n: Tensor, z: Tensor) -> Tensor:
        return trace(lambda x, k: x0_hat, x_n, [n, p], abar, eta=eta, noise=lambda k: z)[1].squeeze()

    return probe(one, zero, zero), probe(zero, one, zero), probe(zero, zero, one)


class TestJump:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize(("n", "p"), [(1, 0), (2, 1), (999, 998), (999, 949), (700, 3)])
    def test_eta_1_equals_the_posterior(self, schedule: Schedule, n: int, p: int) -> None:
        abar = alphas_cumprod(schedule, 1000)
        a, b = abar[n].double(), abar[p].double()
        weight_x0, weight_x_n, weight_noise = jump_weights(n, p, abar, eta=1.0)
        torch.testing.assert_close(weight_x0, b.sqrt() * (1 - a / b) / (1 - a), atol=1e-12, rtol=0)
        torch.testing.assert_close(weight_x_n, (a / b).sqrt() * (1 - b) / (1 - a), atol=1e-12, rtol=0)
        torch.testing.assert_close(weight_noise.square(), (1 - b) / (1 - a) * (1 - a / b), atol=1e-12, rtol=0)

    def test_one_step_equals_the_posterior_of_the_papers(self) -> None:
        beta = betas("linear", 1000)
        abar = torch.cumprod(1 - beta, 0)
        for n in (1, 2, 500, 999):
            weight_x0, weight_x_n, weight_noise = jump_weights(n, n - 1, abar, eta=1.0)
            rest = 1 - abar[n]
            torch.testing.assert_close(weight_x0, abar[n - 1].sqrt() * beta[n] / rest, atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(weight_x_n, (1 - beta[n]).sqrt() * (1 - abar[n - 1]) / rest, atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(weight_noise.square(), beta[n] * (1 - abar[n - 1]) / rest, atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(posterior_variance(abar[n], abar[n - 1]), weight_noise.square(), atol=1e-15, rtol=1e-9)

    @pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize(("n", "p"), [(1, 0), (999, 949), (700, 3)])
    def test_a_jump_keeps_the_marginals_of_q(self, n: int, p: int, eta: float) -> None:
        abar = alphas_cumprod("linear", 1000)
        a, b = abar[n].double(), abar[p].double()
        weight_x0, weight_x_n, weight_noise = jump_weights(n, p, abar, eta)
        torch.testing.assert_close(weight_x0 + weight_x_n * a.sqrt(), b.sqrt(), atol=1e-12, rtol=0)
        torch.testing.assert_close(weight_x_n.square() * (1 - a) + weight_noise.square(), 1 - b, atol=1e-12, rtol=0)

    def test_the_jump_to_the_data_has_no_variance(self) -> None:
        assert posterior_variance(alphas_cumprod("linear", 1000), torch.ones(1000)).abs().max() == 0.0


class TestChain:
    @pytest.mark.parametrize("eta", [0.0, 1.0])
    @pytest.mark.parametrize("num_sample_steps", [1, 2, 5, 10, 40, 50, 1500])
    def test_a_constant_prediction_is_returned_exactly(self, num_sample_steps: int, eta: float) -> None:
        constant, abar = normal(3, 4).float(), alphas_cumprod("linear", 1500)
        steps = step_list(1500, num_sample_steps)
        result = ddim_sample(
            lambda x, k: constant,
            normal(3, 4, seed=1).float(),
            torch.tensor(steps),
            abar,
            eta,
            lambda k: normal(3, 4, seed=k).float(),
        )
        assert torch.equal(result, constant)

    @pytest.mark.parametrize("num_sample_steps", [1, 7, 20, 300])
    def test_with_the_true_x0_every_state_equals_q_sample(self, num_sample_steps: int) -> None:
        x0, noise, abar = normal(3, 4), normal(3, 4, seed=1), alphas_cumprod("cosine", 300)
        steps = step_list(300, num_sample_steps)

        def forward(n: int) -> Tensor:
            return abar[n].double().sqrt() * x0 + (1 - abar[n].double()).sqrt() * noise

        *states, result = trace(lambda x, k: x0, forward(299), steps, abar)
        torch.testing.assert_close(torch.stack(states), torch.stack([forward(n) for n in steps]), atol=1e-9, rtol=0)
        assert torch.equal(result, x0)

    @pytest.mark.parametrize("eta", [0.0, 1.0])
    def test_the_optimal_predictor_of_gaussian_data_generates_their_distribution(self, eta: float) -> None:
        std, num_steps = 0.6, 300
        abar = alphas_cumprod("linear_scaled", num_steps).double()
        gain = std**2 * abar.sqrt() / (abar * std**2 + 1 - abar)  # E[x_0 | x_n] / x_n
        steps = step_list(num_steps, num_steps)
        x = normal(20_000, 1)
        result = ddim_sample(
            lambda x, k: gain[steps[k]] * x, x, torch.tensor(steps), abar, eta, lambda k: normal(20_000, 1, seed=k + 1)
        )
        assert float(result.std()) == pytest.approx(std, rel=0.02)

    def test_the_model_is_called_at_each_step_and_noise_between_steps(self) -> None:
        calls: list[tuple[str, int]] = []

        def model(x: Tensor, k: int) -> Tensor:
            calls.append(("model", k))
            return x

        def noise(k: int) -> Tensor:
            calls.append(("noise", k))
            return torch.zeros(1, 2)

        ddim_sample(model, torch.zeros(1, 2), torch.tensor([9, 4, 1]), alphas_cumprod("linear", 10), 0.5, noise)
        assert calls == [("model", 0), ("noise", 0), ("model", 1), ("noise", 1), ("model", 2)]

    def test_vmap_over_starts_and_tables_equals_a_loop(self) -> None:
        starts, tables = normal(3, 4, 2).float(), torch.stack([alphas_cumprod(schedule, 50) for schedule in SCHEDULES])

        def run(x: Tensor, abar: Tensor) -> Tensor:
            return ddim_sample(
                lambda x, k: torch.tanh(x), x, torch.tensor(step_list(50, 7)), abar, 1.0, lambda k: torch.ones(4, 2)
            )

        expected = torch.stack([run(x, abar) for x, abar in zip(starts, tables, strict=True)])
        torch.testing.assert_close(torch.func.vmap(run)(starts, tables), expected)


class TestDiffusersOracle:
    """diffusers computes the previous step as n - T//S, so only an S that divides T can be compared. Its tables are float32."""

    @staticmethod
    def model(x: Tensor, n: int) -> Tensor:
        return torch.tanh(x @ normal(6, 6, seed=9).float() * 0.4 + math.cos(n))

    @pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
    @pytest.mark.parametrize(("num_train_steps", "num_sample_steps"), [(1500, 10), (1000, 50), (300, 300), (1500, 1)])
    def test_ddim(self, num_train_steps: int, num_sample_steps: int, eta: float) -> None:
        oracle = DDIMScheduler(
            num_train_timesteps=num_train_steps, **ORACLE, set_alpha_to_one=True, timestep_spacing="trailing"
        )
        oracle.set_timesteps(num_sample_steps)
        start, abar = normal(4, 6).float(), alphas_cumprod("linear", num_train_steps)
        steps = step_list(num_train_steps, num_sample_steps)
        expected = start
        for k, n in enumerate(oracle.timesteps.tolist()):
            z = normal(4, 6, seed=100 + k).float()
            expected = oracle.step(self.model(expected, n), n, expected, eta=eta, variance_noise=z, return_dict=False)[0]
        ours = ddim_sample(
            lambda x, k: self.model(x, steps[k]),
            start,
            torch.tensor(steps),
            abar,
            eta,
            lambda k: normal(4, 6, seed=100 + k).float(),
        )
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("num_steps", [50, 1000])
    def test_eta_1_over_all_steps_equals_ddpm(self, num_steps: int) -> None:
        oracle = DDPMScheduler(num_train_timesteps=num_steps, **ORACLE, variance_type="fixed_small")
        oracle.set_timesteps(num_steps)
        theirs, ours = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        start, abar = normal(4, 6).float(), alphas_cumprod("linear", num_steps)
        steps = step_list(num_steps, num_steps)
        expected = start
        for n in oracle.timesteps.tolist():
            expected = oracle.step(self.model(expected, n), n, expected, generator=theirs, return_dict=False)[0]
        result = ddim_sample(
            lambda x, k: self.model(x, steps[k]),
            start,
            torch.tensor(steps),
            abar,
            1.0,
            lambda k: torch.randn(4, 6, generator=ours),
        )
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)
