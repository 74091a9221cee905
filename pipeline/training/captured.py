"""A training step, and the prediction of a batch, as one CUDA graph: a GPU gets all of its kernels with a single call.

A head is so small that a GPU waits for the processor, which launches hundreds of kernels in every step. They are the same in
each step, on the same memory, so they can be recorded once and replayed. The results are those of the steps without a graph:
the steps before the recording are steps of the training like any other, recording runs nothing, and a replay draws what torch
draws after `seed_step`.

What a step takes from the host is fixed in its graph. Therefore a new graph is recorded when a learning rate, the phase or the
shapes of the batch change; what changes in every step is in tensors. A step that reads a number back from the device, or draws
on the processor, cannot be recorded: it is run without a graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.runtime.device import default_device
from pipeline.runtime.errors import describe_error
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.config import TrainConfig
from pipeline.training.optim import HeadOptimizer
from pipeline.types import Batch, Predictor

logger = logging.getLogger(__name__)

WARM_UP_STEPS = 3  # steps of the same kind before one is recorded: libraries prepare themselves, and Adam makes its state
ON_GPU = True  # whether the steps of heads on a GPU are captured
Step = Callable[[Batch, str], Batch]


def is_captured(config: TrainConfig) -> bool:
    """Return whether the steps of heads with these settings are captured."""
    return ON_GPU and default_device().type == "cuda" and not config.compiled


class StepGraph:
    """The CUDA graph of a training step, which is recorded once the step has been taken a few times.

    It does not keep the step, which has the weights: nothing that holds a graph is to be part of a cycle.
    """

    def __init__(
        self,
        optimizers: Sequence[HeadOptimizer],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        name: str = "training step",
    ) -> None:
        """Begin without a graph.

        Args:
            optimizers: The optimisers of the step, whose learning rates are numbers of the host.
            device: Where the tensors of a batch are.
            generators: What the step draws from besides torch's own generator.
            name: What the log calls the step.
        """
        self._optimizers, self._device, self._generators, self._name = optimizers, device, generators, name
        self._kind: Hashable = None  # of the latest steps that were not replayed, and how many of them there were in a row
        self._count = 0
        self._recorded_kind: Hashable = None
        self._replay: Callable[[], None] = _nothing
        self._batch: Batch = {}
        self._parts: Batch = {}
        self.refusal = ""  # why the step cannot be captured

    @property
    def is_recorded(self) -> bool:
        """Whether there is a graph."""
        return self._recorded_kind is not None

    def run(self, step: Step, batch: Batch, phase: str) -> Batch:
        """Take a step; return the loss and its parts, without their graph of gradients. They are valid until the next call."""
        if self.refusal:
            return _detached(step(batch, phase))
        rates = tuple(optimizer.rates for optimizer in self._optimizers)
        kind = phase, rates, tuple((name, column.shape, column.dtype) for name, column in batch.items())
        if kind != self._recorded_kind:
            self._count = self._count + 1 if kind == self._kind else 1
            self._kind = kind
            if self._count <= WARM_UP_STEPS:
                return self._warm_up(step, batch, phase)
            self._record(step, batch, phase)
            if self.refusal:
                return _detached(step(batch, phase))
            self._recorded_kind = kind
        for name, column in batch.items():
            self._batch[name].copy_(column)
        self._replay()
        return self._parts

    def _warm_up(self, step: Step, batch: Batch, phase: str) -> Batch:
        """Take a step on a stream of its own; the last one looks for what cannot be recorded."""
        with on_side_stream(self._device):
            if self._count < WARM_UP_STEPS:
                return _detached(step(batch, phase))
            with HostOperators(self._device) as found:
                parts = _detached(step(batch, phase))
        if found.names:
            self._refuse(f"it uses {', '.join(sorted(found.names))}, for which the processor waits for the GPU or works for it")
        return parts

    def _record(self, step: Step, batch: Batch, phase: str) -> None:
        self._replay, self._parts = _nothing, {}  # frees the memory of the previous graph
        self._batch = {name: column.clone() for name, column in batch.items()}
        started = time.monotonic()
        try:
            self._replay, self._parts = record(lambda: _detached(step(self._batch, phase)), self._device, self._generators)
        except RuntimeError as error:  # also what torch raises for CUDA
            first: BaseException = error
            while first.__context__:  # the end of a failed recording is an error of its own
                first = first.__context__
            self._refuse(describe_error(first))
        else:
            seconds = time.monotonic() - started
            logger.debug("the %s of phase %s is a CUDA graph, recorded in %.2f s", self._name, phase, seconds)

    def _refuse(self, reason: str) -> None:
        self.refusal, self._batch = reason, {}
        logger.warning("the %s is not captured as a CUDA graph, which makes it slower: %s", self._name, reason)


class CapturedPredictor:
    """A model whose predictions are a CUDA graph: those of batches of the first size; the others are made without one."""

    def __init__(self, model: Predictor, device: torch.device) -> None:
        """Begin without a graph; the model's tensors must stay where they are."""
        self._model, self._size = model, 0
        self._graph = StepGraph((), device, name="prediction")

    def train(self, mode: bool = True) -> None:
        """Set the mode of the model; only predictions in evaluation mode are asked for."""
        self._model.train(mode)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the logits of the model; they are valid until the next call."""
        self._size = self._size or len(image)
        if len(image) != self._size:
            return self._model.predict(image, rng)
        batch, key = {"image": image, "samples": rng.samples}, rng.key
        if isinstance(key, Tensor):
            batch["key"] = key

        def step(given: Batch, _: str) -> Batch:
            return {"logits": self._model.predict(given["image"], KeyedRNG(given.get("key", key), given["samples"]))}

        return self._graph.run(step, batch, f"key {key}" if isinstance(key, int) else "keys")["logits"]


def _nothing() -> None:
    """Replay no graph."""


def _detached(parts: Batch) -> Batch:
    """Return tensors without their graph of gradients: while it lives, torch adds up gradients on the stream where it began."""
    return {name: part.detach() for name, part in parts.items()}


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of warm-ups and recordings; cuBLAS keeps memory for every stream that it has worked on."""
    return torch.cuda.Stream(device)


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Inside the block, a GPU works on another stream, which waits for the current one; afterwards that one waits for it."""
    current, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


def record(
    function: Callable[[], Batch], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> tuple[Callable[[], None], Batch]:
    """Record the kernels that a function launches, without running them.

    Args:
        function: What is recorded.
        device: The GPU.
        generators: Those that the function draws from besides torch's own; a replay draws from them as they are seeded then.

    Returns:
        A function that runs them, and the tensors that they fill.

    Raises:
        RuntimeError: the function does what cannot be recorded.
    """
    drawn_from = [torch.cuda.default_generators[device.index or 0], *generators]
    states = [generator.get_state() for generator in drawn_from]  # seed and offset of each
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        # other threads may read features meanwhile; the first block is for torch, which stays on the stream of a failed capture
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, stream=side_stream(device), capture_error_mode="thread_local"),
        ):
            parts = function()
    except RuntimeError:
        # torch leaves a generator in the state of a recording, in which it draws no more numbers: it gets another one
        for generator, state in zip(drawn_from, states, strict=True):
            another = torch.Generator(device)
            another.set_state(state)
            generator.graphsafe_set_state(another.graphsafe_get_state())
        raise
    return graph.replay, parts


class HostOperators(TorchDispatchMode):
    """Collects the operators inside the block that cannot be part of a graph.

    They give the host a number of the device or a shape that depends on one, move a tensor to or from the device, or draw on
    the processor, where a replay would not draw again.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.names = device, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_host_operator(func, args, result):
            self.names.add(func.name())
        return result

    def _is_host_operator(self, func: Any, args: Any, result: Any) -> bool:
        if torch.Tag.data_dependent_output in func.tags:
            return True
        if torch.Tag.dynamic_output_shape in func.tags:
            is_index = func.overloadpacket is torch.ops.aten.index
            return not is_index or any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if not isinstance(result, Tensor):
            return False
        is_drawn = torch.Tag.nondeterministic_seeded in func.tags
        sources = args[1:2] if func.overloadpacket is torch.ops.aten.copy_ else args[:1]
        is_moved = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy) and any(
            isinstance(source, Tensor) and source.device.type != result.device.type for source in sources
        )
        return is_moved or (is_drawn and result.device.type != self.device.type)
