"""The optimiser of runs with equal settings: Adam, the schedule of its learning rate, and a moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from pipeline.training.state import TrainState


class HeadOptimizer:
    """One Adam for runs with equal settings. Adam treats every number by itself, so the runs do not influence each other."""

    def __init__(self, states: Sequence[TrainState], weights: Mapping[str, Tensor], is_stacked: bool = False) -> None:
        """Create the optimiser, and resume it if the states bring an optimiser state.

        Args:
            states: The runs; their settings are equal.
            weights: The trained weights by name, those of one run or, stacked, of several runs [K, ...].
            is_stacked: Whether they are stacked.
        """
        self.states, self.weights = states, list(weights.values())
        self._rows: list[EllipsisType] | range = range(len(states)) if is_stacked else [...]
        config, phase = states[0].config, states[0].phase
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, weight in weights.items():
            decay = 0.0 if name.startswith(phase.undecayed) else config.weight_decay
            groups.setdefault((phase.rate(name), decay), []).append(weight)
        parameters = [
            {"params": group, "lr": config.lr * rate, "weight_decay": decay} for (rate, decay), group in groups.items()
        ]
        self._adam = torch.optim.Adam(parameters, lr=config.lr, fused=True)
        limits = {name: phase.limit(name) for name in weights}
        self._limits = [(weights[name].detach(), limit) for name, limit in limits.items() if limit is not None]
        self._schedule = torch.optim.lr_scheduler.StepLR(self._adam, config.lr_step, config.lr_gamma)
        self._average = WeightAverage(self.weights, config.weight_average) if states[0].has_average else None
        if states[0].optimizer_state:
            self._resume([state.optimizer_state for state in states], is_stacked)

    def _resume(self, saved: Sequence[dict[str, Any]], is_stacked: bool) -> None:
        adam_states = [each["optimizer"] for each in saved]
        self._adam.load_state_dict(_stack_adam_states(adam_states) if is_stacked else adam_states[0])
        self._schedule.load_state_dict(saved[0]["scheduler"])
        if self._average:
            self._average.load([each["average"] for each in saved], is_stacked)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the groups of weights."""
        return tuple(group["lr"] for group in self._adam.param_groups)

    def step(self) -> None:
        """Take one step with the gradients of the weights, and put those above the limits of the phase back to them."""
        is_recorded = self.weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
        for group in self._adam.param_groups:
            group["capturable"] = is_recorded  # fused, Adam computes the same; it checks that it is told
        self._adam.step()
        for weight, limit in self._limits:
            weight.clamp_(max=limit)
        if self._average:
            self._average.step()

    def end_epoch(self) -> list[float]:
        """Count one epoch in the schedule; return the learning rate that each run had in it."""
        rate = self._adam.param_groups[0]["lr"]
        self._schedule.step()
        return [rate for _ in self.states]

    def swap_average(self) -> None:
        """Exchange the weights and their moving average, if there is one."""
        if self._average:
            self._average.swap()

    def store_state(self) -> None:
        """Copy to every `TrainState` its part of the state of optimiser, schedule and moving average."""
        adam_state = self._adam.state_dict()
        adam_state["state"] = {
            number: {name: value.cpu() for name, value in moments.items()} for number, moments in adam_state["state"].items()
        }
        for state, row, part in zip(self.states, self._rows, _split_adam_state(adam_state, self._rows), strict=True):
            average = self._average.part(row) if self._average else {}
            state.optimizer_state = {"optimizer": part, "scheduler": self._schedule.state_dict(), "average": average}


class WeightAverage:
    """The exponential moving average of weights.

    In the first steps the decay is lower: it is at most (1 + n) / (10 + n) at step n.
    """

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self._weights, self._decay = [weight.detach() for weight in weights], decay
        self._values = [weight.clone() for weight in self._weights]
        # a tensor, in float64 as Python's numbers: a step that is replayed takes nothing from the host
        self._steps = torch.zeros((), dtype=torch.float64, device=weights[0].device)

    def step(self) -> None:
        """Count a step and move the average towards the weights."""
        self._steps += 1.0
        decay = ((1.0 + self._steps) / (10.0 + self._steps)).clamp(max=self._decay)
        share = (1.0 - decay).to(self._values[0].dtype)
        for value, weight in zip(self._values, self._weights, strict=True):
            value.lerp_(weight, share)

    def swap(self) -> None:
        """Exchange the weights and their average."""
        for weight, value in zip(self._weights, self._values, strict=True):
            copied = weight.clone()
            weight.copy_(value)
            value.copy_(copied)

    def part(self, row: int | EllipsisType) -> dict[str, Any]:
        """Return a copy of the state of one run, to be stored."""
        return {"steps": int(self._steps), "values": [value[row].to("cpu", copy=True) for value in self._values]}

    def load(self, parts: Sequence[dict[str, Any]], is_stacked: bool) -> None:
        """Restore the stored states of all runs."""
        self._steps.fill_(parts[0]["steps"])
        for number, value in enumerate(self._values):
            stored = [part["values"][number] for part in parts]
            value.copy_(torch.stack(stored) if is_stacked else stored[0])


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
