"""Heads of the same structure as one model: their tensors are stacked to [K, ...] and run through torch.func; and its step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from pipeline.nn.layers import LookupTable
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG, seed_step
from pipeline.training.loop import Trainer
from pipeline.training.optim import HeadOptimizer
from pipeline.training.seeds import SeedStreams
from pipeline.training.state import TrainState
from pipeline.types import Batch

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def structure_key(method: Method) -> Hashable:
    """Return a key that is equal for two methods exactly when they can be stacked into one ensemble.

    Such methods have the same classes with the same attributes, and tensors of the same shapes. A setting reaches the code of
    a method in one of two ways: as a number in a tensor, which may differ between stacked methods, or as an attribute, which
    may not. An attribute that cannot be compared by value equals no other attribute, so its method is trained alone.
    """
    parts = []
    for name, module in method.named_modules():
        attributes = {key: _comparable(value) for key, value in vars(module).items() if key not in _MODULE_ATTRIBUTES}
        tensors = chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        num_free = 1 if isinstance(module, LookupTable) else 0  # leading dimensions in which stacked methods may differ
        shapes = tuple((key, tensor.dtype, tensor.shape[num_free:]) for key, tensor in tensors)
        parts.append((name, type(module), tuple(attributes.items()), shapes))
    return tuple(parts)


def _comparable(value: Any) -> Hashable:
    """Return what stands for the value of an attribute when structures are compared."""
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_comparable, value))
    if isinstance(value, dict):
        return dict, tuple((key, _comparable(item)) for key, item in value.items())
    if isinstance(value, Tensor) or type(value).__hash__ is None:
        return object()
    return type(value), value


class ModelEnsemble:
    """K methods of the same structure as one model, with one loss and one prediction for all of them at once.

    The methods stay usable: their parameters and buffers become views of the stacked tensors.
    """

    def __init__(self, methods: Sequence[Method], streams: SeedStreams | None = None) -> None:
        """Stack the methods, which must have equal `structure_key`s; `streams`: those of their seeds, if there are several."""
        self._streams = streams
        self._template = _MethodModule(methods[0])
        tensors_by_method = [dict(_named_tensors(_MethodModule(method))) for method in methods]
        self._tensors = {name: _stack([tensors[name] for tensors in tensors_by_method]) for name in tensors_by_method[0]}
        for index, tensors in enumerate(tensors_by_method):
            for name, tensor in tensors.items():
                tensor.data = self._tensors[name].detach()[index][tuple(slice(size) for size in tensor.shape)]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the stacked parameters [K, ...], under the names that they have in each method."""
        yield from ((name.removeprefix("method."), self._tensors[name]) for name, _ in self._template.named_parameters())

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode, as `nn.Module.train` does."""
        self._template.train(mode)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the losses [K] and their parts; all methods see the same batch and the same random numbers.

        With several seeds, these are those of a method's own seed; then the columns of the batch are [S, ...].
        """
        if not self._streams:
            return self._call_each(lambda method: method.loss(batch, phase))
        own_batches = {name: self._streams.for_each(column) for name, column in batch.items()}
        with self._streams:
            return self._call_each(lambda method, own: method.loss(own, phase), own_batches, randomness="different")

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the logits [K,B,C] of image features [B,D]. The random numbers may be those of one seed, or of K, key [K]."""
        if not (isinstance(rng.key, Tensor) and rng.key.ndim):
            return self._call_each(lambda method: method.predict(image, rng))
        return self._call_each(lambda method, key: method.predict(image, KeyedRNG(key, rng.samples)), rng.key)

    def _call_each(self, use: Callable[..., Any], *given: Any, randomness: str = "same") -> Any:
        """Return what `use` returns for each method; `given`: what it gets besides, [K, ...]."""

        def call(tensors: dict[str, Tensor], *own: Any) -> Any:
            return functional_call(self._template, tensors, (lambda method: use(method, *own),))

        with sdpa_kernel(SDPBackend.MATH):  # vmap runs the fused kernels of a processor one by one
            return torch.vmap(call, randomness=randomness)(self._tensors, *given)


class _MethodModule(nn.Module):
    """A module whose forward pass is any call of a method: `functional_call` can call nothing but `forward`."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, use: Callable[[Any], Any]) -> Any:
        return use(self.method)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one [K, ...]; lookup tables of different lengths are padded with NaN."""
    values = [tensor.detach() for tensor in tensors]
    if len({value.shape for value in values}) == 1:
        return torch.stack(values).requires_grad_(tensors[0].requires_grad)
    return pad_sequence(values, batch_first=True, padding_value=math.nan)


def clip_gradients_per_model(gradients: Sequence[Tensor], limits: Tensor) -> None:
    """Clip the gradient norm of each of K models by itself, in place, as `clip_grad_norm_` does for one model.

    Args:
        gradients: Stacked gradients, each [K, ...].
        limits: The largest allowed norm of each model, [K].
    """
    norms = torch.stack([torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients])
    scale = (limits / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.reshape(-1, *(1 for _ in gradient.shape[1:])))


class EnsembleTrainer(Trainer):
    """Several heads as one model, and one optimiser for each group of them whose training settings are equal."""

    def __init__(self, states: Sequence[TrainState], captures: bool = False) -> None:
        """Prepare the phase in which the states are; states with equal settings must stand next to each other."""
        self.states, first = states, states[0]
        streams, self.seed_step = None, partial(seed_step, first.run.seed)
        seeds = [state.run.seed for state in states]
        if len(set(seeds)) > 1:
            streams = SeedStreams(seeds, device=next(tensor.device for _, tensor in _named_tensors(first.method)))
            self.seed_step, self.generators = streams.seed_step, streams.generators
        self.model = self.predictor = ModelEnsemble([state.method for state in states], streams)
        self.parameters, self.optimizers, self._slices = [], [], []
        if first.phase.candidates:  # nothing is trained
            return
        trained = {name: stacked for name, stacked in self.model.named_parameters() if stacked.requires_grad}
        self.parameters = list(trained.values())
        for _, equal_states in groupby(states, lambda state: state.config):
            members = list(equal_states)
            start = self._slices[-1].stop if self._slices else 0
            self._slices.append(slice(start, start + len(members)))
            weights = {name: stacked.detach()[self._slices[-1]] for name, stacked in trained.items()}
            self.optimizers.append(HeadOptimizer(members, weights, is_stacked=True))
        self._limits = torch.tensor([state.config.grad_clip for state in states], device=self.parameters[0].device)
        self._prepare_step(captures)

    def _clip_gradients(self) -> None:
        """Clip the gradients of every head by themselves, and give each optimiser those of its heads."""
        clip_gradients_per_model([stacked.grad for stacked in self.parameters if stacked.grad is not None], self._limits)
        for optimizer, rows in zip(self.optimizers, self._slices, strict=True):
            for weight, stacked in zip(optimizer.weights, self.parameters, strict=True):
                weight.grad = None if stacked.grad is None else stacked.grad[rows]
