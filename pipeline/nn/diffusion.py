"""The diffusion process on feature vectors as pure functions: noise schedules, the forward process and the reverse process.

Steps are counted from 0: n = 0..T-1 is step n+1 of the papers. abar[n] is the product of alpha[0..n], and abar[-1] := 1 stands
for the data. The network predicts x_0 (MARNet sec. 3.3, SeDA sec. 4.1); the functions here receive it as an argument.
Predictions are not clipped, because features have no bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.runtime.errors import UserError

Schedule = Literal["linear", "linear_scaled", "cosine"]
MAX_BETA = 0.999


def betas(schedule: Schedule, num_steps: int) -> Tensor:
    """Return the noise variances beta[n], float64 [T].

    Args:
        schedule: "linear" goes from 1e-4 to 0.02 for every T; "linear_scaled" is "linear" times 1000/T; "cosine" is eq. 17 of
            Nichol and Dhariwal 2021. The last two are capped at 0.999.
        num_steps: T.

    Raises:
        UserError: num_steps < 1.
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; a schedule needs at least one step")
    if schedule == "cosine":
        level = torch.cos((torch.arange(num_steps + 1, dtype=torch.float64) / num_steps + 0.008) / 1.008 * math.pi / 2).square()
        return (1.0 - level[1:] / level[:-1]).clamp(max=MAX_BETA)
    scale = 1000.0 / num_steps if schedule == "linear_scaled" else 1.0
    return (scale * torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64)).clamp(max=MAX_BETA)


def alphas_cumprod(schedule: Schedule, num_steps: int) -> Tensor:
    """Return abar[n] = prod_{m<=n} (1 - beta[m]), float32 [T], computed in float64 and rounded once."""
    return torch.cumprod(1.0 - betas(schedule, num_steps), dim=0).to(torch.float32)


def noise_levels(abar: Tensor) -> Tensor:
    """Return sqrt(abar_n) and sqrt(1 - abar_n) of every step, [T,2,1], from abar [T]."""
    return torch.stack([torch.sqrt(abar), torch.sqrt(1.0 - abar)], dim=1).unsqueeze(-1)


def q_sample(x0: Tensor, n: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """Return x_n = sqrt(abar_n) x_0 + sqrt(1 - abar_n) noise (MARNet eq. 15, SeDA eq. 1).

    Args:
        x0: clean features [B,D].
        n: step of each sample, int64 [B].
        noise: standard normal numbers [B,D].
        levels: see `noise_levels`, [T,2,1].
    """
    signal, spread = levels[n].unbind(1)
    return torch.addcmul(signal * x0, spread, noise)


def trailing_steps(num_train_steps: Tensor, num_sample_steps: int) -> Tensor:
    """Choose S of the T training steps for sampling, with "trailing" spacing.

    The first chosen step is T-1, because x_{T-1} is pure noise and the chain starts from pure noise.

    Args:
        num_train_steps: T, a whole number in a tensor [], so that the models of an ensemble may differ in T.
        num_sample_steps: S, 1 <= S <= T.

    Returns:
        Steps in descending order, int64 [S].
    """
    remaining = torch.arange(num_sample_steps, 0, -1, device=num_train_steps.device, dtype=torch.float64)
    return torch.round(num_train_steps * remaining / num_sample_steps).long() - 1


def posterior_variance(a: Tensor, b: Tensor) -> Tensor:
    """Return the variance of q(x_p | x_n, x_0) for any jump n -> p with p < n; p = n-1 is MARNet eq. 23.

    Args:
        a: abar_n.
        b: abar_p.
    """
    return (1 - b) / (1 - a) * (1 - a / b)


def ddim_sample(
    model: Callable[[Tensor, int], Tensor],
    x: Tensor,
    steps: Tensor,
    abar: Tensor,
    eta: float,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Run the reverse process over the given steps and return the last prediction of x_0, [B,D].

    eta = 0 is deterministic (Song et al. 2021, "Denoising diffusion implicit models", eq. 12). eta = 1 samples from the
    posterior of each jump; therefore eta = 1 with the steps T-1..0 is ancestral sampling (MARNet eq. 21-23, SeDA eq. 13-15).
    The last jump goes to the data and returns the prediction itself, for every eta.

    Args:
        model: `model(x, k)` predicts x_0 [B,D] from x at step n = steps[k]; while a program is exported, k may be a tensor [1].
        x: start of the chain [B,D].
        steps: step numbers in descending order, int64 [S].
        abar: see `alphas_cumprod`, [T].
        eta: amount of noise, 0..1.
        noise: `noise(k)` returns standard normal numbers [B,D]; it is called only if eta > 0.
    """
    a, b = abar[steps[:-1]].to(torch.float64), abar[steps[1:]].to(torch.float64)
    variance = eta**2 * posterior_variance(a, b)
    # The update is x_p = sqrt(b) xhat_0 + sqrt(1 - b - variance) (x_n - sqrt(a) xhat_0) / sqrt(1 - a) + sqrt(variance) z.
    # It is computed as a weighted sum of xhat_0, x_n and z, with weights in float64 that are rounded once.
    weight_x = torch.sqrt((1 - b - variance).clamp(min=0.0) / (1 - a))
    weight_x0 = (torch.sqrt(b) - weight_x * torch.sqrt(a)).to(x.dtype)
    weight_x, weight_noise = weight_x.to(x.dtype), torch.sqrt(variance).to(x.dtype)
    last = len(steps) - 1

    def jump(x: Tensor, k: Any, draw: Callable[[], Tensor]) -> Tensor:
        x = weight_x0[k] * model(x, k) + weight_x[k] * x
        return x + weight_noise[k] * draw() if eta > 0 else x

    if torch.compiler.is_exporting() and last > 1:
        x = _jump_in_a_loop(jump, x, torch.stack([noise(k) for k in range(last)]) if eta > 0 else None, last)
    else:
        for k in range(last):
            x = jump(x, k, partial(noise, k))
    return model(x, last)


def _jump_in_a_loop(
    jump: Callable[[Tensor, Any, Callable[[], Tensor]], Tensor], x: Tensor, noises: Tensor | None, num_jumps: int
) -> Tensor:
    """Return what all jumps lead to, as one operator of an exported program; unrolled, tracing would take minutes."""
    from torch._higher_order_ops.scan import scan  # slow to import

    def body(x: Tensor, place: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x = jump(x, place[0], lambda: place[1])
        return x, x.new_zeros(())  # a scan returns something of each step, too

    places = torch.arange(num_jumps, device=x.device).unsqueeze(1)
    return scan(body, x.contiguous(), (places,) if noises is None else (places, noises))[0]
