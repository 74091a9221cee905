"""How many heads fit in memory together."""

from __future__ import annotations

from collections.abc import Callable, Container, Set
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from pipeline.nn.method import Method
from pipeline.nn.recompute import watched
from pipeline.types import Batch


def bytes_per_method(method: Method, batch: Batch, num_rows: int) -> int:
    """Return the memory that one more method in an ensemble needs.

    This counts the weights, the gradients, Adam's two moments, and the tensors that the loss of `num_rows` samples saves for
    the backward pass. The last part is measured: the loss of `batch` is computed in every phase, and the largest result is
    scaled to `num_rows`. What the backward pass computes again, one part at a time, is counted once, with its gradients. What
    `bytes_kept` returns is not counted.
    """
    weights = sum(parameter.nbytes for parameter in method.parameters())
    own_tensors = chain(method.parameters(), method.buffers())
    known = {tensor.untyped_storage().data_ptr() for tensor in chain(batch.values(), own_tensors)}
    with torch.random.fork_rng([tensor.device for tensor in batch.values() if tensor.is_cuda][:1]):  # a loss draws
        losses = [partial(method.loss, batch, phase.name) for phase in method.phases if not phase.candidates]
        measured = [_bytes_saved_for_backward(loss, known) for loss in losses]
    largest = max((kept * num_rows // len(batch["key"]) + 2 * again for kept, again in measured), default=0)
    return 4 * weights + largest


def bytes_kept(method: Method, batch: Batch) -> int:
    """Return the memory of the training samples that a method keeps in buffers, if it were trained on this batch alone."""
    before = sum(buffer.nbytes for buffer in method.buffers())
    for phase in method.phases:
        if phase.candidates:
            method.begin(phase.name, lambda: iter([batch]))
    return sum(buffer.nbytes for buffer in method.buffers()) - before


def _bytes_saved_for_backward(loss: Callable[[], Batch], known: Set[int]) -> tuple[int, int]:
    """Return the bytes that a loss saves for its gradient, and the most that one `recomputed` part saves in that gradient.

    Storages whose addresses are in `known` do not count.
    """
    again = [0]

    def measure(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        own = [tensor.detach().requires_grad_() for tensor in inputs]
        again.append(_bytes_saved(partial(function, *own), known | {tensor.untyped_storage().data_ptr() for tensor in own}))

    with watched(measure):
        kept = _bytes_saved(lambda: loss()["loss"], known)
    return kept, max(again)


def _bytes_saved(compute: Callable[[], Tensor], known: Container[int]) -> int:
    """Return the bytes that a result saves for its gradient, without the storages whose addresses are in `known`."""
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        result = compute()
    # The graph is still alive here, so no address was freed and used for a second storage.
    assert result.requires_grad
    return sum(saved.values())
