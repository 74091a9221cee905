"""Stage 2: the only training loop of the project, from the step to the phase. It knows methods and sources of batches, but no
caches. `train.py` calls it for the runs of a command; `ensemble.py` has the step of several heads that are one model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import seed_step
from pipeline.training.captured import CapturedPredictor, StepGraph
from pipeline.training.compiled import compile_loss
from pipeline.training.optim import HeadOptimizer
from pipeline.training.seeds import Feed, stacked_source
from pipeline.training.state import Score, TrainState
from pipeline.types import Batch, Predictor, Source

# The pause between two saves of the resumable state is STATE_SECONDS plus SAVE_COST_FACTOR times the duration of a save.
STATE_SECONDS = 20.0
SAVE_COST_FACTOR = 10
Validate = Callable[[Predictor, Sequence[int]], Sequence[Score]]  # returns the score of each method, which has this seed
SeedStep = Callable[[str, int, int], None]  # (phase, epoch, step): seeds what a step draws from


class Trainer:
    """A head in one of its phases, with its optimiser."""

    graph: StepGraph | None = None  # through which `train_epoch` takes the steps
    generators: Sequence[torch.Generator] = ()  # what a step draws from besides torch's own

    def __init__(self, states: Sequence[TrainState], captures: bool = False) -> None:
        """Prepare the phase in which the states are; here, there is one. `captures`: as a rule the step is a CUDA graph."""
        (state,) = self.states = states
        self.model: Any = state.method
        self.predictor: Predictor = self.model  # what is validated
        self.seed_step: SeedStep = partial(seed_step, state.run.seed)
        self.parameters, self.optimizers = list[Tensor](), list[HeadOptimizer]()
        if not state.phase.candidates:  # else nothing is trained
            trained = {name: weight for name, weight in state.method.named_parameters() if weight.requires_grad}
            self.parameters, self.optimizers = list(trained.values()), [HeadOptimizer(states, trained)]
            self._prepare_step(captures)

    def _prepare_step(self, captures: bool) -> None:
        config, device = self.states[0].config, self.parameters[0].device
        self._loss = compile_loss(self.model) if config.compiled else self.model.loss
        self._precision = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "mixed", cache_enabled=True)
        if captures:
            self.graph = StepGraph(self.optimizers, device, self.generators)
            self.predictor = CapturedPredictor(self.model, device)

    def step(self, batch: Batch, phase: str) -> Batch:
        """Take one step along the gradient of the loss; return the loss and its parts, each [], or [K] for an ensemble."""
        for parameter in self.parameters:
            parameter.grad = None
        with self._precision:
            parts = self._loss(batch, phase)
        torch.clear_autocast_cache()  # it holds the bfloat16 copies of the weights, which the step will change
        parts["loss"].backward(torch.ones_like(parts["loss"]))
        self._clip_gradients()
        for optimizer in self.optimizers:
            optimizer.step()
        return parts

    def _clip_gradients(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.states[0].config.grad_clip)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside the context, runs with a moving average of their weights use the average instead of the weights."""
        self.swap_averages()
        try:
            yield
        finally:
            self.swap_averages()

    def swap_averages(self) -> None:
        """Exchange the weights and their moving average, in the runs that have one in this phase."""
        for optimizer in self.optimizers:
            optimizer.swap_average()

    def store_state(self) -> None:
        """Copy the state of the optimisers to the states of the runs."""
        for optimizer in self.optimizers:
            optimizer.store_state()


def train_epoch(trainer: Trainer, source: Source) -> list[dict[str, str | float]]:
    """Train one pass over the source and return a row for the history of each run: the means of the loss and its parts.

    The source is that of the runs' seed, or the `stacked_source` of their seeds.

    The host waits for the device only once, at the end.
    """
    trainer.model.train(True)
    first = trainer.states[0]
    phase, epoch = first.phase.name, first.progress.epoch
    names, total, step = list[str](), torch.zeros(()), 0
    # Epochs are counted over all phases, so that no two phases see the same permutation or the same caption.
    for batch in source(len(first.progress.history)):
        trainer.seed_step(phase, epoch, step)
        parts = trainer.graph.run(trainer.step, batch, phase) if trainer.graph else trainer.step(batch, phase)
        names = list(parts)
        values = torch.stack([part.detach().float() for part in parts.values()])
        total, step = values if step == 0 else total + values, step + 1
    means = (total / step).reshape(len(names), -1).T.tolist()
    rates = [rate for optimizer in trainer.optimizers for rate in optimizer.end_epoch()]
    parts = [dict(zip(names, row, strict=True)) for row in means]
    return [dict(phase=phase, epoch=epoch, lr=rate, **row) for rate, row in zip(rates, parts, strict=True)]


def train_phase(trainer: Trainer, until: int, feeds: Mapping[int, Feed], validate: Validate, bar: ProgressBar) -> None:
    """Train the runs up to epoch `until` of their phase, or until one of them fails or stops; save them from time to time."""
    states, saved_at, save_seconds = trainer.states, time.monotonic(), 0.0
    seeds = [state.run.seed for state in states]
    source = stacked_source([feeds[seed].source for seed in dict.fromkeys(seeds)])
    for _ in range(states[0].progress.epoch, until):
        started = time.monotonic()
        for state in states:
            state.attempt(state.start_epoch, feeds[state.run.seed].train_pass)
        rows = [state.choose_candidate() for state in states] if states[0].phase.candidates else train_epoch(trainer, source)
        for state, row in zip(states, rows, strict=True):
            state.attempt(state.record_epoch, row)
        if any(state.is_validation_due() for state in states if not state.failure):
            with trainer.averaged_weights():
                for state, score in zip(states, validate(trainer.predictor, seeds), strict=True):
                    state.attempt(state.record_validation, score)
        elif any(state.is_phase_over for state in states):
            trainer.swap_averages()  # candidates are tried on the averages
        for state in states:
            state.end_epoch((time.monotonic() - started) / len(states))
        if not states[0].phase.candidates:
            bar.set_postfix(loss=f"{min(float(row['loss']) for row in rows):.3f}", refresh=False)
        bar.update(len(states))
        if time.monotonic() - saved_at > STATE_SECONDS + SAVE_COST_FACTOR * save_seconds:
            started = time.monotonic()
            trainer.store_state()
            for state in (each for each in states if not each.failure):
                state.save()
            saved_at, save_seconds = time.monotonic(), time.monotonic() - started
        if any(state.failure or state.is_stopped for state in states):
            break
    trainer.store_state()
