"""The optimisers of a team of lanes: one model for all, and one Adam for those whose settings are equal."""

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
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.config import TrainConfig
from pipeline.training.ensemble import ModelEnsemble, clip_each
from pipeline.training.state import TrainState
from pipeline.types import Batch

BACKEND = "inductor"  # of torch.compile


class EnsembleOptimizer:
    """Lanes at the same position as one model, the method itself when there is one; lanes of equal settings stand together."""

    def __init__(self, lanes: Sequence[TrainState]) -> None:
        self.lanes = lanes
        alone = len(lanes) == 1
        self.model = lanes[0].method if alone else ModelEnsemble([lane.method for lane in lanes])
        trained = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        self._compiled = _compiled(self.model) if lanes[0].config.compiled else None
        self._leaves, factors = list(trained.values()), [lanes[0].phase.rate(name) for name in trained]
        self._limits = torch.tensor([lane.config.grad_clip for lane in lanes], device=self._leaves[0].device)
        self._ties: list[OptimizerGroup] = []
        start = 0
        for config, tied in groupby(lanes, lambda lane: lane.config):
            members = list(tied)
            rows = ... if alone else slice(start, start + len(members))
            self._ties.append(OptimizerGroup(config, members, self._leaves, rows, factors))
            start += len(members)

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """The model's losses, with no gradient left of the step before; the tensors of a compiled one live for a step."""
        for leaf in self._leaves:
            leaf.grad = None
        if not self._compiled:
            return self.model.loss(batch, rng, phase)
        torch.compiler.cudagraph_mark_step_begin()
        key = rng.key if isinstance(rng.key, Tensor) else torch.full((), rng.key, device=rng.samples.device)
        try:
            return self._compiled(batch, key, phase)
        except TorchDynamoException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"torch.compile fails, {reason}; does it have its compiler? leave --train compiled out") from error

    def step(self, loss: Tensor) -> None:
        """A step of every lane against the gradient of its own loss, of [] or [K], with its norm limited."""
        loss.sum().backward()
        if len(self.lanes) == 1:
            nn.utils.clip_grad_norm_(self._leaves, self.lanes[0].config.grad_clip)
        else:
            clip_each([leaf.grad for leaf in self._leaves if leaf.grad is not None], self._limits)
        for tie in self._ties:
            tie.step()

    def rates(self) -> list[float]:
        """The learning rate of every lane."""
        return [tie.optimizer.param_groups[0]["lr"] for tie in self._ties for _ in tie.lanes]

    def decay(self) -> None:
        """Count an epoch in the schedules of the learning rates."""
        for tie in self._ties:
            tie.scheduler.step()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the lanes that average their weights hold the average instead."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for tie in self._ties:
            if tie.average:
                tie.average.exchange()

    def store(self) -> None:
        """Hand every lane its part of what the optimisers know."""
        for tie in self._ties:
            tie.store()


def _compiled(model: Any) -> Callable[..., Batch]:
    """The model's loss as one graph of (batch, key of the random streams, phase); what was compiled before is forgotten."""
    torch.compiler.reset()

    def loss(batch: Batch, key: Tensor, phase: str) -> Batch:
        return model.loss(batch, KeyedRNG(key, batch["key"]), phase)

    mode = "reduce-overhead" if default_device().type == "cuda" else None
    return torch.compile(loss, fullgraph=True, backend=BACKEND, mode=mode)


class OptimizerGroup:
    """Lanes of equal settings: rows of the leaves that one Adam steps, which treats every number by itself."""

    def __init__(
        self,
        config: TrainConfig,
        lanes: Sequence[TrainState],
        leaves: Sequence[Tensor],
        rows: slice | EllipsisType,
        factors: Sequence[float],
    ) -> None:
        self.lanes = lanes
        self._leaves, self._rows = leaves, rows
        self._weights = [leaf.detach()[rows] for leaf in leaves]
        groups: dict[float, list[Tensor]] = {}  # by the factor of their learning rate
        for weight, factor in zip(self._weights, factors, strict=True):
            groups.setdefault(factor, []).append(weight)
        rates = [{"params": weights, "lr": config.lr * factor} for factor, weights in groups.items()]
        self.optimizer = torch.optim.Adam(rates, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, config.lr_step, config.lr_gamma)
        averages = config.weight_average > 0 and lanes[0].is_last_phase  # the one that is validated
        self.average = WeightAverage(self._weights, config.weight_average) if averages else None
        if lanes[0].learned:
            states = [lane.learned["optimizer"] for lane in lanes]
            self.optimizer.load_state_dict(states[0] if rows is ... else _joined(states))
            self.scheduler.load_state_dict(lanes[0].learned["scheduler"])
            if self.average:
                self.average.load([lane.learned["average"] for lane in lanes], rows)

    def step(self) -> None:
        for weight, leaf in zip(self._weights, self._leaves, strict=True):
            weight.grad = None if leaf.grad is None else leaf.grad[self._rows]
        self.optimizer.step()
        if self.average:
            self.average.step()

    def store(self) -> None:
        state = self.optimizer.state_dict()
        state["state"] = {
            number: {name: value.cpu() for name, value in each.items()} for number, each in state["state"].items()
        }
        rows = [...] if self._rows is ... else range(len(self.lanes))
        for lane, row, part in zip(self.lanes, rows, _parts(state, rows), strict=True):
            average = self.average.part(row) if self.average else {}
            lane.learned = {"optimizer": part, "scheduler": self.scheduler.state_dict(), "average": average}


class WeightAverage:
    """The exponential moving average of weights; at first its decay is lower, (1 + n) / (10 + n) at step n."""

    def __init__(self, weights: Sequence[Tensor], decay: float) -> None:
        self._weights, self._decay = list(weights), decay
        self._values = [weight.clone() for weight in weights]
        self._steps = 0

    def step(self) -> None:
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        get_ema_multi_avg_fn(decay)(self._values, self._weights, self._steps)

    def exchange(self) -> None:
        """The weights become their average, and the other way round."""
        for weight, value in zip(self._weights, self._values, strict=True):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)

    def part(self, row: int | EllipsisType) -> dict[str, Any]:
        """What is to be stored of one lane, in memory of its own."""
        return {"steps": self._steps, "values": [value[row].to("cpu", copy=True) for value in self._values]}

    def load(self, parts: Sequence[dict[str, Any]], rows: slice | EllipsisType) -> None:
        """Go on from what was stored."""
        self._steps = parts[0]["steps"]
        for number, value in enumerate(self._values):
            stored = [part["values"][number] for part in parts]
            value.copy_(stored[0] if rows is ... else torch.stack(stored))


def _joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Adam's state of several lanes as that of their stacked weights; they have taken the same number of steps."""
    first = states[0]
    moments = {
        number: {
            name: value if name == "step" else torch.stack([state["state"][number][name] for state in states])
            for name, value in each.items()
        }
        for number, each in first["state"].items()
    }
    return {**first, "state": moments}


def _parts(state: dict[str, Any], rows: Sequence[int | EllipsisType]) -> Iterator[dict[str, Any]]:
    """Adam's state of stacked weights as that of each row, in memory of its own."""
    for row in rows:
        moments = {
            number: {name: (value if name == "step" else value[row]).clone() for name, value in each.items()}
            for number, each in state["state"].items()
        }
        yield {**state, "state": moments}
