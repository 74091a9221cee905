"""The loss of a head as one graph of torch.compile, and the encoders of joint training through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import make_streams_compilable
from pipeline.types import Batch

COMPILE_BACKEND = "inductor"  # backend of torch.compile


def compile_loss(model: Any) -> Callable[[Batch, str], Batch]:
    """Return the loss of a method or an ensemble as one compiled graph; all earlier compilations are dropped.

    The graph draws other random numbers than the loss does, also a function of the seed alone. The tensors that the compiled
    loss returns are valid until its next call.

    Raises:
        UserError: by the compiled loss, when torch.compile fails.
    """
    torch.compiler.reset()
    make_streams_compilable()
    mode = "reduce-overhead" if default_device().type == "cuda" else None
    compiled = torch.compile(model.loss, fullgraph=True, backend=COMPILE_BACKEND, mode=mode)

    def loss(batch: Batch, phase: str) -> Batch:
        torch.compiler.cudagraph_mark_step_begin()
        with _explained("--train compiled"):
            return compiled(batch, phase)

    return loss


def compile_encoder(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return an encoder, prepared items [B, ...] -> features [B, *shape], through torch.compile; its weights stay its own.

    Raises:
        UserError: by the compiled encoder, when torch.compile fails.
    """
    compiled = torch.compile(encode, backend=COMPILE_BACKEND)

    def run(items: Tensor) -> Tensor:
        with _explained("--compile"):
            return compiled(items)

    return run


@contextmanager
def _explained(option: str) -> Iterator[None]:
    """Turn a failure of torch.compile into a `UserError` that names the option."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"torch.compile fails, {reason}; does it have its compiler? leave {option} out") from error
