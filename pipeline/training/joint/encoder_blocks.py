"""Find the repeated blocks of any encoder by running it: their order, the depth of each parameter, and checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.runtime.errors import UserError

MIN_CHANNELS_WITH_STRIDE = 16  # see `avoid_strided_convolutions`


def modules_in_execution_order(encoder: nn.Module, prepared: Tensor) -> list[nn.Module]:
    """Run the encoder and return its modules in the order in which they start.

    A module that runs twice appears twice.

    Args:
        encoder: The encoder.
        prepared: A batch of prepared items [B, ...].
    """
    started: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: started.append(module)) for module in encoder.modules()]
    try:
        with torch.no_grad():
            encoder(prepared)
    finally:
        for handle in handles:
            handle.remove()
    return started


def find_blocks(executed: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the blocks of an encoder in execution order.

    The blocks are the modules of one class: of all classes that occur more than once, the class with the most parameters. This
    rule finds the layers of transformers, residual blocks and the stages of hierarchical networks.

    Args:
        executed: The result of `modules_in_execution_order`.

    Raises:
        UserError: no class occurs more than once.
    """
    groups: dict[type, list[nn.Module]] = {}
    for module in dict.fromkeys(executed):
        if next(module.children(), None) is not None and not type(module).__module__.startswith("torch.nn"):
            groups.setdefault(type(module), []).append(module)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        raise UserError("this encoder has no repeated blocks; train all of it, without --layer-decay and --checkpointing")
    return max(repeated, key=lambda group: sum(parameter.numel() for module in group for parameter in module.parameters()))


def parameter_depths(encoder: nn.Module, executed: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> dict[str, int]:
    """Return the depth of each parameter by its name: how many blocks have started when its module starts.

    The depth is 0 for embeddings and the stem, i for the i-th block, and the number of blocks for everything after the last
    block.
    """
    num_started, first_depth = 0, {}
    for module in executed:
        num_started += module in blocks and module not in first_depth
        first_depth.setdefault(module, num_started)
    depth: dict[str, int] = {}
    # Parents come before their children, and a module that is never called has the depth of its parent.
    for name, module in encoder.named_modules():
        depth[name] = first_depth.get(module, depth.get(name.rpartition(".")[0], 0))
    return {name: depth[name.rpartition(".")[0]] for name, _ in encoder.named_parameters()}


def enable_checkpointing(blocks: Sequence[nn.Module]) -> None:
    """Let blocks store only their inputs and run again in the backward pass, which needs less memory but more time."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def avoid_strided_convolutions(encoder: nn.Module) -> None:
    """Let 1x1 convolutions with a stride read the positions that they use, without a stride; they compute the same.

    On x86 processors oneDNN (of torch 2.15; its #6035) writes the gradient of such weights past the end of its memory if there
    are fewer than 16 input channels, channels last, and the process crashes later, anywhere. RepVGG has such a convolution.
    """
    for module in encoder.modules():
        if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or module.padding != (0, 0):
            continue
        if module.stride != (1, 1) and module.in_channels // module.groups < MIN_CHANNELS_WITH_STRIDE:
            module.register_forward_pre_hook(partial(_skip_positions, stride=module.stride))
            module.stride = (1, 1)


def _skip_positions(module: nn.Module, inputs: tuple[Tensor], stride: tuple[int, ...]) -> tuple[Tensor]:
    """Return the inputs of a convolution [B,C,H,W] at every `stride`-th position."""
    return (inputs[0][..., :: stride[0], :: stride[1]],)
