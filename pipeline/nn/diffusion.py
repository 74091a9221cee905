"""The diffusion process on feature vectors as pure functions: schedules, the forward process and the sampler.

Steps are counted from 0: n = 0..T-1 is step n+1 of the papers, abar[n] is the product of alpha[0..n], and abar[-1] := 1 is the
data. The network predicts x_0 (MARNet sec. 3.3, SeDA sec. 4.1) and is an argument everywhere. Predictions are not clipped:
features are not bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["linear", "linear_scaled", "cosine"]
MAX_BETA = 0.999


def betas(schedule: Schedule, num_steps: int) -> Tensor:
    """Noise variances beta[n], float64 [T].

    "linear": 1e-4 to 0.02 for every T; "linear_scaled": the same times 1000/T; "cosine": Nichol and Dhariwal 2021, eq. 17.
    The last two are capped at 0.999. `ValueError` when num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a schedule needs at least one step")
    if schedule == "cosine":
        level = torch.cos((torch.arange(num_steps + 1, dtype=torch.float64) / num_steps + 0.008) / 1.008 * math.pi / 2).square()
        return (1.0 - level[1:] / level[:-1]).clamp(max=MAX_BETA)
    scale = 1000.0 / num_steps if schedule == "linear_scaled" else 1.0
    return (scale * torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64)).clamp(max=MAX_BETA)


def alphas_cumprod(schedule: Schedule, num_steps: int) -> Tensor:
    """abar[n] = prod_{m<=n} (1 - beta[m]), float32 [T], built in float64 and rounded once."""
    return torch.cumprod(1.0 - betas(schedule, num_steps), dim=0).to(torch.float32)


def q_sample(x0: Tensor, n: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_n = sqrt(abar_n) x_0 + sqrt(1 - abar_n) noise (MARNet eq. 15, SeDA eq. 1); x0, noise [B,D], n [B] int64, abar [T]."""
    a = abar[n].unsqueeze(-1)
    return torch.sqrt(a) * x0 + torch.sqrt(1.0 - a) * noise


def sample_steps(num_train_steps: Tensor, num_sample_steps: int) -> Tensor:
    """The trailing grid of S steps out of T, int64 [S], descending from T-1, where pure noise is the right input.

    T is a whole number [], so that stacked models may differ in it; 1 <= S <= T.
    """
    left = torch.arange(num_sample_steps, 0, -1, device=num_train_steps.device, dtype=torch.float64)
    return torch.round(num_train_steps * left / num_sample_steps).long() - 1


def posterior_variance(a: Tensor, b: Tensor) -> Tensor:
    """Variance of q(x_p | x_n, x_0) for any jump n -> p < n, a = abar_n and b = abar_p; p = n-1 is MARNet eq. 23."""
    return (1 - b) / (1 - a) * (1 - a / b)


def ddim(
    model: Callable[[Tensor, int], Tensor],
    x: Tensor,
    steps: Tensor,
    abar: Tensor,
    eta: float,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Runs the reverse process over the listed steps and returns the last prediction of x_0 [B,D].

    x [B,D] is the start; steps int64 [S] descend; abar [T]; `model(x, k)` predicts x_0 at n = steps[k]; `noise(k)` is [B,D] and
    asked for only when eta > 0. eta = 0 is deterministic (Song et al. 2021, "Denoising diffusion implicit models", eq. 12);
    eta = 1 is the posterior jump, so steps T-1..0 with eta = 1 are ancestral sampling (MARNet eq. 21-23, SeDA eq. 13-15). The
    last jump goes to the data and returns the prediction itself, for every eta.
    """
    a, b = abar[steps[:-1]].to(torch.float64), abar[steps[1:]].to(torch.float64)
    variance = eta**2 * posterior_variance(a, b)
    # x_p = sqrt(b) xhat_0 + sqrt(1 - b - variance) (x_n - sqrt(a) xhat_0) / sqrt(1 - a) + sqrt(variance) z, by coefficients
    keep = torch.sqrt((1 - b - variance).clamp(min=0.0) / (1 - a))
    predict = (torch.sqrt(b) - keep * torch.sqrt(a)).to(x.dtype)
    keep, spread = keep.to(x.dtype), torch.sqrt(variance).to(x.dtype)
    for k in range(len(steps) - 1):
        x = predict[k] * model(x, k) + keep[k] * x
        if eta > 0:
            x = x + spread[k] * noise(k)
    return model(x, len(steps) - 1)
