"""The optimisers of runs that are trained together: one model for all, and one Adam for runs with equal settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.runtime.device import default_device
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG, make_streams_compilable
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import ModelEnsemble, clip_gradients_per_model
from pipeline.training.state import TrainState
from pipeline.types import Batch

COMPILE_BACKEND = "inductor"  # backend of torch.compile


class EnsembleOptimizer:
    """Runs at the same position as one model, and the optimisers that train it.

    The model of a single run is its method itself; several runs become a `ModelEnsemble`.
    """

    def __init__(self, states: Sequence[TrainState]) -> None:
        """Create the optimisers; runs with equal settings must stand next to each other in `states`."""
        self.states = states
        is_alone = len(states) == 1
        self.model = states[0].method if is_alone else ModelEnsemble([state.method for state in states])
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._compiled_loss = _compile_loss(self.model) if states[0].config.compiled else None
        self._parameters, factors = list(trained.values()), [states[0].phase.rate(name) for name in trained]
        self._limits = torch.tensor([state.config.grad_clip for state in states], device=self._parameters[0].device)
        self._groups: list[OptimizerGroup] = []
        start = 0
        for config, equal_states in groupby(states, lambda state: state.config):
            members = list(equal_states)
            index = ... if is_alone else slice(start, start + len(members))
            self._groups.append(OptimizerGroup(config, members, self._parameters, index, factors))
            start += len(members)

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """Clear the gradients and return the losses of the model, [] for one run or [K] for several, with their parts.

        The tensors that a compiled loss returns are valid until the next call.

        Raises:
            UserError: torch.compile fails.
        """
        for parameter in self._parameters:
            parameter.grad = None
        if not self._compiled_loss:
            return self.model.loss(batch, rng, phase)
        torch.compiler.cudagraph_mark_step_begin()
        key = rng.key if isinstance(rng.key, Tensor) else torch.full((), rng.key, device=rng.samples.device)
        try:
            return self._compiled_loss(batch, key, phase)
        except TorchDynamoException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"torch.compile fails, {reason}; does it have its compiler? leave --train compiled out") from error

    def step(self, loss: Tensor) -> None:
        """Take one step with the gradient of each run's own loss, [] or [K], after clipping the norm of each gradient."""
        loss.sum().backward()
        if len(self.states) == 1:
            nn.utils.clip_grad_norm_(self._parameters, self.states[0].config.grad_clip)
        else:
            gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            clip_gradients_per_model(gradients, self._limits)
        for group in self._groups:
            group.step()

    def learning_rates(self) -> list[float]:
        """Return the learning rate of each run."""
        return [group.optimizer.param_groups[0]["lr"] for group in self._groups for _ in group.states]

    def step_schedules(self) -> None:
        """Count one epoch in the learning-rate schedules."""
        for group in self._groups:
            group.scheduler.step()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside the context, runs with a moving average of their weights use the average instead of the weights."""
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        for group in self._groups:
            if group.average:
                group.average.swap()

    def store_state(self) -> None:
        """Copy to every `TrainState` its part of the state of the optimisers."""
        for group in self._groups:
            group.store_state()


def _compile_loss(model: Any) -> Callable[..., Batch]:
    """Return the loss as one compiled graph of (batch, key of the random streams, phase); drop all earlier compilations."""
    torch.compiler.reset()
    make_streams_compilable()

    def loss(batch: Batch, key: Tensor, phase: str) -> Batch:
        return model.loss(batch, KeyedRNG(key, batch["key"]), phase)

    mode = "reduce-overhead" if default_device().type == "cuda" else None
    return torch.compile(loss, fullgraph=True, backend=COMPILE_BACKEND, mode=mode)


class OptimizerGroup:
    """One Adam for runs with equal settings. Adam treats every number by itself, so the runs do not influence each other."""

    def __init__(
        self,
        config: TrainConfig,
        states: Sequence[TrainState],
        parameters: Sequence[Tensor],
        index: slice | EllipsisType,
        factors: Sequence[float],
    ) -> None:
        """Create the optimiser, and resume it if the states bring an optimiser state.

        Args:
            config: The settings of all runs of the group.
            states: The runs.
            parameters: The trained parameters of the whole model: [K, ...] if it has several runs.
            index: The rows of the parameters that belong to the group; `...` if the model is a single run.
            factors: A factor of the learning rate for each parameter.
        """
        self.states = states
        self._parameters, self._index = parameters, index
        self._weights = [parameter.detach()[index] for parameter in parameters]
        weights_by_factor: dict[float, list[Tensor]] = {}
        for weight, factor in zip(self._weights, factors, strict=True):
            weights_by_factor.setdefault(factor, []).append(weight)
        param_groups = [{"params": weights, "lr": config.lr * factor} for factor, weights in weights_by_factor.items()]
        self.optimizer = torch.optim.Adam(param_groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, config.lr_step, config.lr_gamma)
        has_average = config.weight_average > 0 and states[0].is_last_phase  # only this phase is validated and kept
        self.average = WeightAverage(self._weights, config.weight_average) if has_average else None
        if states[0].optimizer_state:
            self._resume()

    def _resume(self) -> None:
        saved = [state.optimizer_state for state in self.states]
        adam_states = [each["optimizer"] for each in saved]
        self.optimizer.load_state_dict(adam_states[0] if self._index is ... else _stack_adam_states(adam_states))
        self.scheduler.load_state_dict(saved[0]["scheduler"])
        if self.average:
            self.average.load([each["average"] for each in saved], self._index)

    def step(self) -> None:
        for weight, parameter in zip(self._weights, self._parameters, strict=True):
            weight.grad = None if parameter.grad is None else parameter.grad[self._index]
        self.optimizer.step()
        if self.average:
            self.average.step()

    def store_state(self) -> None:
        """Copy to every `TrainState` its part of the state of optimiser, schedule and moving average."""
        adam_state = self.optimizer.state_dict()
        adam_state["state"] = {
            number: {name: value.cpu() for name, value in moments.items()} for number, moments in adam_state["state"].items()
        }
        rows = [...] if self._index is ... else range(len(self.states))
        for state, row, part in zip(self.states, rows, _split_adam_state(adam_state, rows), strict=True):
            average = self.average.part(row) if self.average else {}
            state.optimizer_state = {"optimizer": part, "scheduler": self.scheduler.state_dict(), "average": average}


class WeightAverage:
    """The exponential moving average of weights.

    In the first steps the decay is lower: it is at most (1 + n) / (10 + n) at step n.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self._weights, self._decay = list(weights), decay
        self._values = [weight.clone() for weight in weights]
        self._steps = 0

    def step(self) -> None:
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        get_ema_multi_avg_fn(decay)(self._values, self._weights, self._steps)

    def swap(self) -> None:
        """Exchange the weights and their average."""
        for weight, value in zip(self._weights, self._values, strict=True):
            copied = weight.clone()
            weight.copy_(value)
            value.copy_(copied)

    def part(self, row: int | EllipsisType) -> dict[str, Any]:
        """Return a copy of the state of one run, to be stored."""
        return {"steps": self._steps, "values": [value[row].to("cpu", copy=True) for value in self._values]}

    def load(self, parts: Sequence[dict[str, Any]], index: slice | EllipsisType) -> None:
        """Restore the stored states of all runs; `index` is `...` for a single run."""
        self._steps = parts[0]["steps"]
        for number, value in enumerate(self._values):
            stored = [part["values"][number] for part in parts]
            value.copy_(stored[0] if index is ... else torch.stack(stored))


def _stack_adam_states(adam_states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the Adam states of several runs as that of their stacked weights; all must have taken as many steps."""
    first = adam_states[0]
    moments = {
        number: {
            name: value if name == "step" else torch.stack([state["state"][number][name] for state in adam_states])
            for name, value in each.items()
        }
        for number, each in first["state"].items()
    }
    return {**first, "state": moments}


def _split_adam_state(adam_state: dict[str, Any], rows: Sequence[int | EllipsisType]) -> Iterator[dict[str, Any]]:
    """Yield a copy of the Adam state of each row of stacked weights."""
    for row in rows:
        moments = {
            number: {name: (value if name == "step" else value[row]).clone() for name, value in each.items()}
            for number, each in adam_state["state"].items()
        }
        yield {**adam_state, "state": moments}
