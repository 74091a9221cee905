"""The loss of a model as one graph of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    from torch._dynamo.exc import TorchDynamoException

    torch.compiler.reset()
    make_streams_compilable()
    mode = "reduce-overhead" if default_device().type == "cuda" else None
    compiled = torch.compile(model.loss, fullgraph=True, backend=COMPILE_BACKEND, mode=mode)

    def loss(batch: Batch, phase: str) -> Batch:
        torch.compiler.cudagraph_mark_step_begin()
        try:
            return compiled(batch, phase)
        except TorchDynamoException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"torch.compile fails, {reason}; does it have its compiler? leave --train compiled out") from error

    return loss
