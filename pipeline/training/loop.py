"""Stage 2: the only training loop of the project, from the step to the phase. It knows methods and sources of batches, but no
caches. `train.py` calls it for the runs of a command; `ensemble.py` has the step of several heads that are one model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import seed_step
from pipeline.training.compiled import compile_loss
from pipeline.training.optim import HeadOptimizer
from pipeline.training.state import Score, TrainState
from pipeline.types import Batch, Predictor, Source

# The pause between two saves of the resumable state is STATE_SECONDS plus SAVE_COST_FACTOR times the duration of a save.
STATE_SECONDS = 20.0
SAVE_COST_FACTOR = 10
Validate = Callable[[Predictor], Sequence[Score]]  # returns one score for each method in the model


class Trainer:
    """A head in one of its phases, with its optimiser."""

    def __init__(self, states: Sequence[TrainState]) -> None:
        """Prepare the phase in which the states are; here, there is one state."""
        (state,) = self.states = states
        self.model: Predictor = state.method
        self.parameters: list[Tensor] = []
        self.optimizers: list[HeadOptimizer] = []
        if state.phase.candidates:  # nothing is trained
            return
        trained = {name: weight for name, weight in state.method.named_parameters() if weight.requires_grad}
        self.parameters = list(trained.values())
        self.optimizers = [HeadOptimizer(states, trained)]
        self._loss = compile_loss(state.method) if state.config.compiled else state.method.loss
        self._grad_clip = state.config.grad_clip
        device, is_mixed = self.parameters[0].device.type, state.config.precision == "mixed"
        self._precision = torch.autocast(device, torch.bfloat16, enabled=is_mixed, cache_enabled=True)

    def step(self, batch: Batch, phase: str) -> Batch:
        """Take one step of the optimiser along the gradient of the loss; return the loss and its parts, each []."""
        for parameter in self.parameters:
            parameter.grad = None
        with self._precision:
            parts = self._loss(batch, phase)
        torch.clear_autocast_cache()  # it holds the bfloat16 copies of the weights, which the step will change
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters, self._grad_clip)
        self.optimizers[0].step()
        return parts

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


def try_candidate(trainer: Trainer) -> list[dict[str, str | float]]:
    """Put the next candidate of the phase into each run, and return a row for the history of each."""
    phase, candidate = trainer.states[0].phase.name, trainer.states[0].progress.epoch
    with torch.no_grad():
        for state in trainer.states:
            state.method.choose(candidate)
    untrained = {"lr": math.nan, "loss": math.nan}
    return [{"phase": phase, "epoch": candidate, **untrained, "candidate": candidate} for _ in trainer.states]


def train_epoch(trainer: Trainer, source: Source) -> list[dict[str, str | float]]:
    """Train one pass over the source and return a row for the history of each run: the means of the loss and its parts.

    The host waits for the device only once, at the end.
    """
    trainer.model.train(True)
    first = trainer.states[0]
    phase, epoch, seed = first.phase.name, first.progress.epoch, first.run.seed
    names: list[str] = []
    total, step = torch.zeros(()), 0
    # Epochs are counted over all phases, so that no two phases see the same permutation or the same caption.
    for batch in source(len(first.progress.history)):
        seed_step(seed, phase, epoch, step)
        parts = trainer.step(batch, phase)
        names = list(parts)
        values = torch.stack([part.detach().float() for part in parts.values()])
        total, step = values if step == 0 else total + values, step + 1
    means = (total / step).reshape(len(names), -1).T.tolist()
    rates = [rate for optimizer in trainer.optimizers for rate in optimizer.end_epoch()]
    return [
        {"phase": phase, "epoch": epoch, "lr": rate, **dict(zip(names, row, strict=True))}
        for rate, row in zip(rates, means, strict=True)
    ]


def train_phase(trainer: Trainer, until: int, source: Source, validate: Validate, bar: ProgressBar) -> None:
    """Train the runs up to epoch `until` of their phase, or until one of them fails or stops; save them from time to time."""
    states = trainer.states
    saved_at, save_seconds = time.monotonic(), 0.0
    for _ in range(states[0].progress.epoch, until):
        started = time.monotonic()
        rows = try_candidate(trainer) if states[0].phase.candidates else train_epoch(trainer, source)
        for state, row in zip(states, rows, strict=True):
            state.attempt(state.record_epoch, row)
        if any(state.is_validation_due() for state in states if not state.failure):
            with trainer.averaged_weights():
                for state, score in zip(states, validate(trainer.model), strict=True):
                    state.attempt(state.record_validation, score)
        elif any(state.is_phase_over for state in states):
            trainer.swap_averages()  # candidates are tried on the averages
        for state in states:
            state.progress.seconds += (time.monotonic() - started) / len(states)
        if not states[0].phase.candidates:
            bar.set_postfix(loss=f"{min(float(row['loss']) for row in rows):.3f}", refresh=False)
        bar.update(len(states))
        if time.monotonic() - saved_at > STATE_SECONDS + SAVE_COST_FACTOR * save_seconds:
            started = time.monotonic()
            trainer.store_state()
            for state in states:
                if not state.failure:
                    state.save()
            saved_at = time.monotonic()
            save_seconds = saved_at - started
        if any(state.failure or state.is_stopped for state in states):
            break
    trainer.store_state()
