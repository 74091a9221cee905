"""Runs of several seeds as one model: every run gets the batches and the random numbers of its own seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.runtime.rng import seed_step
from pipeline.types import Batch, Source

_FILLS: dict[str, Callable[..., Tensor]] = {  # how the results of torch's random functions, by overload, are filled
    "aten::rand": Tensor.uniform_,
    "aten::rand_like": Tensor.uniform_,
    "aten::randn": Tensor.normal_,
    "aten::randn_like": Tensor.normal_,
    "aten::randint": Tensor.random_,
    "aten::randint.low": Tensor.random_,
    "aten::bernoulli.p": Tensor.bernoulli_,  # where p is a tensor it is another overload, and each model has its own
}


class Feed(NamedTuple):
    """What runs of one seed read."""

    source: Source  # returns the training batches of an epoch
    train_pass: Callable[[], Iterator[Batch]]  # starts one ordered pass over the training split, for statistics


def stacked_source(sources: Sequence[Source]) -> Source:
    """Return the batches of several seeds as one [S, ...]; a single source stays as it is."""
    if len(sources) == 1:
        return sources[0]

    def batches(epoch: int) -> Iterator[Batch]:
        for own in zip(*(source(epoch) for source in sources), strict=True):
            yield {name: torch.stack([batch[name] for batch in own]) for name in own[0]}

    return batches


class SeedStreams(TorchDispatchMode):
    """Inside the block, the models of an ensemble draw what each of them would draw alone, with its own seed.

    There is one generator for each seed. What torch would draw for all K models at once, [K, ...], is drawn [...] by each
    generator; the models of a seed share it.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        """Give the streams of the seeds of K models, in their order; equal seeds share one."""
        super().__init__()
        self.seeds = tuple(dict.fromkeys(seeds))
        self.generators = [torch.Generator(device) for _ in self.seeds]
        self.index = torch.tensor([self.seeds.index(seed) for seed in seeds], device=device)  # [K]
        self._first = [seeds.index(seed) for seed in self.seeds]  # a model of each seed

    def seed_step(self, phase: str, epoch: int, step: int) -> None:
        """Seed the generators for one training step, as `rng.seed_step` does for a single seed."""
        for seed, generator in zip(self.seeds, self.generators, strict=True):
            seed_step(seed, phase, epoch, step, generator)

    def for_each(self, tensor: Tensor) -> Tensor:
        """Return [K, ...], for each model what belongs to its seed, of [S, ...]."""
        return tensor.index_select(0, self.index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        name = func.name()
        if name not in _FILLS:
            raise NotImplementedError(f"models of several seeds cannot draw with {name} together")
        form = {**({"dtype": torch.int64} if _FILLS[name] is Tensor.random_ else {}), **(kwargs or {})}
        drawn = []
        for generator, first in zip(self.generators, self._first, strict=True):
            if isinstance(args[-1], list):  # a shape [K, ...]; a draw without one is like the tensor that comes first
                blank, numbers = torch.empty(args[-1][1:], **form), args[:-1]
            else:
                blank, numbers = torch.empty_like(args[0][first], **form), args[1:]
            bounds = (0, *numbers) if name == "aten::randint" else numbers
            drawn.append(_FILLS[name](blank, *bounds, generator=generator))
        return self.for_each(torch.stack(drawn))
