"""The repeated blocks of any encoder, found by running it: their order, how deep a parameter lies, and recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def executed(encoder: nn.Module, prepared: Tensor) -> list[nn.Module]:
    """The modules that run on a batch, in the order in which they start; one that runs twice is there twice."""
    ran: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in encoder.modules()]
    try:
        with torch.no_grad():
            encoder(prepared)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def blocks(ran: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks among the modules that ran: those of the class that repeats and holds the most parameters.

    That is what layers of transformers, residual blocks and the stages of hierarchies have in common. `ValueError` when
    nothing repeats.
    """
    groups: dict[type, list[nn.Module]] = {}
    for module in dict.fromkeys(ran):
        if next(module.children(), None) is not None and not type(module).__module__.startswith("torch.nn"):
            groups.setdefault(type(module), []).append(module)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        raise ValueError("this encoder has no repeated blocks; train all of it, without --layer-decay and --checkpointing")
    return max(repeated, key=lambda group: sum(parameter.numel() for module in group for parameter in module.parameters()))


def depths(encoder: nn.Module, ran: Sequence[nn.Module], parts: Sequence[nn.Module]) -> dict[str, int]:
    """How many of the blocks `parts` have started when the module of each parameter starts, by the parameter's name.

    0 for embeddings and the stem, i for the i-th block, all of them for what follows the last one.
    """
    started, first = 0, {}
    for module in ran:
        started += module in parts and module not in first
        first.setdefault(module, started)
    depth: dict[str, int] = {}
    for name, module in encoder.named_modules():  # parents come first, and stand in for modules that are not called
        depth[name] = first.get(module, depth.get(name.rpartition(".")[0], 0))
    return {name: depth[name.rpartition(".")[0]] for name, _ in encoder.named_parameters()}


def recomputed(parts: Sequence[nn.Module]) -> None:
    """Let blocks keep their inputs alone for the backward pass, in which they are run again: less memory, more time."""
    for block in parts:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
