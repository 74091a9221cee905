"""The processes that train one model together, as torchrun starts them; a process that is alone has nothing to share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.runtime.device import default_device


@dataclass(frozen=True)
class DistributedContext:
    """This process among all of them. Every one sees whole batches; what is expensive is done for its share alone."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> Tensor:
        """Positions int64 [ceil(count / size)] of this process; the last ones repeat the end, so that shares are equal."""
        each = -(-count // self.size)
        return torch.arange(self.rank * each, (self.rank + 1) * each).clamp(max=count - 1)

    def gather(self, own: Tensor, count: int) -> Tensor:
        """The rows [count, ...] of all processes from the share of each.

        Gradients flow back to the own share, `size` times what they are: `wrap` takes means over the processes.
        """
        if self.size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own.detach().contiguous())
        if own.requires_grad:
            own.register_hook(lambda gradient: gradient * self.size)
        parts[self.rank] = own
        return torch.cat(parts)[:count]

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, whose gradients become the sum over the shares of all processes; freeze parameters first."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def align(self, tensors: Iterable[Tensor]) -> None:
        """The tensors of all processes become those of the first: kernels that do not repeat their bits drive them apart."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def joined() -> Iterator[DistributedContext]:
    """The processes that torchrun started; without it, this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield DistributedContext()
        return
    on_gpu = default_device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # the others wait while the first prepares items
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    try:
        yield DistributedContext(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


def check_alone(command: str) -> None:
    """`ValueError` under torchrun: for commands of several runs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{command} runs in one process: start it without torchrun")


def is_first() -> bool:
    """Whether this process is alone or the first one, which writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"
