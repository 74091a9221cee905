"""Methods of one structure as one model: tensors [K, ...] behind the methods' own code, through torch.func."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from pipeline.nn.layers import LookupTable
from pipeline.runtime.rng import KeyedRNG
from pipeline.types import Batch, Method

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def structure(method: Method) -> Hashable:
    """Equal for methods that can be stacked: the same classes with the same attributes, and tensors of the same shapes.

    A setting reaches a method's code as a number in a tensor, in which stacked methods may differ, or as an attribute, in which
    they may not. An attribute that cannot be compared by its value equals no other: its method is trained alone.
    """
    parts = []
    for name, module in _module(method).named_modules():
        attributes = {key: _value(value) for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
        tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        free = 1 if isinstance(module, LookupTable) else 0  # dimensions in which stacked methods may differ
        shapes = tuple((key, tensor.dtype, tensor.shape[free:]) for key, tensor in tensors)
        parts.append((name, type(module), tuple(attributes.items()), shapes))
    return tuple(parts)


def _value(value: Any) -> Hashable:
    """What stands for an attribute's value in a comparison."""
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_value, value))
    if isinstance(value, dict):
        return dict, tuple((key, _value(each)) for key, each in value.items())
    if isinstance(value, Tensor) or type(value).__hash__ is None:
        return object()
    return type(value), value


class ModelEnsemble:
    """K methods of one structure as one: it has one loss and one prediction, of all of them at once.

    The methods go on working: their parameters and buffers become views of the stack's.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self._whole = _Whole(methods[0])
        own = [dict(_tensors(_Whole(method))) for method in methods]
        self._tensors = {name: _stacked([tensors[name] for tensors in own]) for name in own[0]}
        for row, tensors in enumerate(own):
            for name, tensor in tensors.items():
                tensor.data = self._tensors[name].detach()[row][tuple(slice(size) for size in tensor.shape)]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters [K, ...] under their names in each of the methods."""
        yield from ((name.removeprefix("method."), self._tensors[name]) for name, _ in self._whole.named_parameters())

    def train(self, mode: bool = True) -> None:
        """As of a module."""
        self._whole.train(mode)

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """The losses [K] of the same batch and the same random numbers, and their parts."""
        return self._each(lambda method: method.loss(batch, rng, phase))

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [K,B,C]."""
        return self._each(lambda method: method.predict(image, rng))

    def _each(self, use: Callable[[Method], Any]) -> Any:
        return torch.vmap(lambda tensors: functional_call(self._whole, tensors, (use,)))(self._tensors)


class _Whole(nn.Module):
    """A method whose forward pass is any use of it: `functional_call` knows no other functions."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = _module(method)

    def forward(self, use: Callable[[Any], Any]) -> Any:
        return use(self.method)


def _module(method: Method) -> nn.Module:
    assert isinstance(method, nn.Module)
    return method


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[K, ...] of tensors that are equally long, or of the values of tables."""
    values = [tensor.detach() for tensor in tensors]
    if len({value.shape for value in values}) == 1:
        return torch.stack(values).requires_grad_(tensors[0].requires_grad)
    return pad_sequence(values, batch_first=True, padding_value=math.nan)


def clip_each(gradients: Sequence[Tensor], limits: Tensor) -> None:
    """`clip_grad_norm_` of each of K models: scales gradients [K, ...] in place so that every norm is within its limit [K]."""
    norms = torch.stack([torch.linalg.vector_norm(each.reshape(len(each), -1), dim=1) for each in gradients])
    scale = (limits / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for each in gradients:
        each.mul_(scale.reshape(-1, *(1 for _ in each.shape[1:])))


def lane_bytes(method: Method, batch: Batch, rng: KeyedRNG, num_rows: int) -> int:
    """The memory of one more method in a stack: weights, gradients, Adam's two moments, and what `num_rows` rows leave behind.

    The last is found by computing the loss of a batch, in every phase.
    """
    weights = sum(parameter.nbytes for _, parameter in method.named_parameters())
    known = {tensor.untyped_storage().data_ptr() for tensor in chain(batch.values(), dict(_tensors(_module(method))).values())}
    largest = max(_left_behind(partial(method.loss, batch, rng, phase.name), known) for phase in method.phases)
    return 4 * weights + largest * num_rows // len(batch["key"])


def _left_behind(loss: Callable[[], Batch], known: Container[int]) -> int:
    """Bytes that a loss keeps for its gradient, in storages other than those known."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graph = loss()
    assert graph["loss"].requires_grad  # it is alive: no storage has been used twice
    return sum(kept.values())
