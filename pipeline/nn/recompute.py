"""Results whose gradient costs time in place of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Watcher = Callable[[Callable[..., Tensor], tuple[Tensor, ...]], None]
_WATCHERS: list[Watcher] = []


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True  # `torch.utils.checkpoint` has none, so an ensemble of models could not use it

    @staticmethod
    def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            pull_back = torch.func.vjp(ctx.function, *ctx.saved_tensors)[1]
            return None, *pull_back(*grad_outputs)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return function(*inputs), and keep nothing but the inputs for its gradient: the backward pass computes it a second time.

    It may run in `torch.vmap` and in torch.compile, and is computed without autocast, as its gradient is.

    Args:
        function: of tensors; whatever else it reads has no gradient, and may differ between the models of an ensemble.
        inputs: floating-point tensors.
    """
    for watcher in _WATCHERS:
        watcher(function, inputs)
    with torch.autocast(inputs[0].device.type, enabled=False):
        return _Recomputed.apply(function, *inputs)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside the block, tell a function of what is `recomputed`: the function and its inputs, before it is called."""
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        _WATCHERS.remove(watcher)
