"""Distributed data parallelism: the processes that torchrun starts train one model together."""

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
from pipeline.runtime.errors import UserError


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process among all processes; a process that runs alone is rank 0 of 1.

    Every process sees whole batches. Each one does the expensive work (the encoders) only for its own share of a batch.
    """

    rank: int = 0
    world_size: int = 1

    def local_positions(self, count: int) -> Tensor:
        """Return the positions of this process's share of `count` items, int64 [ceil(count / world_size)].

        The last shares repeat the last position, so that all shares have the same length.
        """
        length = -(-count // self.world_size)
        return torch.arange(self.rank * length, (self.rank + 1) * length).clamp(max=count - 1)

    def gather(self, local: Tensor, count: int) -> Tensor:
        """Return the rows [count, ...] of all processes, from the local share of each.

        Gradients flow back to the local share only, multiplied by `world_size`, because `wrap` takes the mean of the gradients
        over the processes.
        """
        if self.world_size == 1:
            return local
        shares = [torch.empty_like(local) for _ in range(self.world_size)]
        distributed.all_gather(shares, local.detach().contiguous())
        if local.requires_grad:
            local.register_hook(lambda gradient: gradient * self.world_size)
        shares[self.rank] = local
        return torch.cat(shares)[:count]

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module so that its gradients become the sum over the shares of all processes.

        Freeze parameters before this call.
        """
        if self.world_size == 1:
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def broadcast_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors of all processes with those of the first one.

        Without this, kernels that are not deterministic let the processes drift apart.
        """
        if self.world_size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.world_size > 1:
            distributed.barrier()


@contextmanager
def distributed_context() -> Iterator[DistributedContext]:
    """Connect the processes that torchrun started; without torchrun, this process is alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield DistributedContext()
        return
    on_gpu = default_device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The timeout is long because the other processes wait while the first one prepares the items.
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    try:
        yield DistributedContext(distributed.get_rank(), world_size)
    finally:
        distributed.destroy_process_group()


def check_single_process(command: str) -> None:
    """Refuse to run under torchrun; for commands that train several runs.

    Raises:
        UserError: torchrun has started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{command} runs in one process: start it without torchrun")


def is_first_process() -> bool:
    """Return whether this process is alone or the first one, which writes files and prints for all."""
    return os.environ.get("RANK", "0") == "0"
