"""Stage 2: the only training loop of the project. It knows methods and sources of batches, but no caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.device import use_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training.optim import EnsembleOptimizer
from pipeline.training.state import Score, TrainState
from pipeline.types import Batch, Predictor, Source

# The pause between two saves of the resumable state is STATE_SECONDS plus SAVE_COST_FACTOR times the duration of a save.
STATE_SECONDS = 20.0
SAVE_COST_FACTOR = 10
Validate = Callable[[Predictor], Sequence[Score]]  # returns one score for each method in the model


def train(
    states: Sequence[TrainState], source: Source, train_pass: Callable[[], Iterator[Batch]], validate: Validate, progress: bool
) -> dict[RunFolder, UserError]:
    """Train runs through the phases of their methods and write their checkpoints.

    Runs at the same epoch are trained together as one model. Each run keeps its epoch that is best on validation. After an
    interruption, or after an early stop, a run resumes in the next call, alone or together with others. A run that is always
    trained alone ends in the same weights, bit for bit, however often it is interrupted.

    Args:
        states: The runs. Several runs must have equal `structure_key`s, one seed and equal `SHARED_SETTINGS`.
        source: Returns the training batches of an epoch.
        train_pass: Returns one ordered pass over the training split, for statistics.
        validate: Returns the validation score of each method.
        progress: Whether to show a progress bar.

    Returns:
        The runs that failed, and why. A failed run does not disturb the others. A bug is raised, and ends them all.
    """
    failed: dict[RunFolder, UserError] = {}
    remaining = list(states)
    for state in states:
        _run_or_record_failure(state, state.resume, failed)
    with _progress_bar(states, progress) as bar:
        while remaining := [state for state in remaining if _advance_or_finish(state, failed)]:
            # The runs that are behind catch up first, so that as many as possible are trained together.
            first = min(state.position for state in remaining)
            together = sorted(
                (state for state in remaining if state.position == first), key=lambda state: astuple(state.config)
            )
            phase, _ = first
            later_epochs = [s.progress.epoch for s in remaining if s.position > first and s.progress.phase == phase]
            until = min([together[0].epochs_per_phase()[phase], *later_epochs])
            _train_ensemble(together, until, source, train_pass, validate, bar, failed)
    return failed


def _run_or_record_failure(state: TrainState, action: Callable[[], None], failed: dict[RunFolder, UserError]) -> None:
    """Run an action for a state; when it raises a `UserError`, record it as the failure of the run."""
    try:
        action()
    except UserError as error:
        failed[state.run] = error


def _advance_or_finish(state: TrainState, failed: dict[RunFolder, UserError]) -> bool:
    """Return whether there is more to train; if not, write what the run has and release its folder."""
    if state.run not in failed:
        if state.is_stopped:
            state.save()
        elif state.advance():
            return True
        else:
            state.finish()
    state.folder_lock.close()
    return False


def _train_ensemble(
    states: Sequence[TrainState],
    until: int,
    source: Source,
    train_pass: Callable[[], Iterator[Batch]],
    validate: Validate,
    bar: ProgressBar,
    failed: dict[RunFolder, UserError],
) -> None:
    """Train runs at the same position as one model, up to epoch `until` of their phase or until a run fails or stops."""
    for state in states:
        _run_or_record_failure(state, partial(state.start_phase, train_pass), failed)
    active = [state for state in states if state.run not in failed]
    if not active:
        return
    optimizer, saved_at, save_seconds = EnsembleOptimizer(active), time.monotonic(), 0.0
    for _ in range(active[0].progress.epoch, until):
        started = time.monotonic()
        losses = _train_and_validate_epoch(optimizer, source, validate, failed)
        for state in active:
            state.progress.seconds += (time.monotonic() - started) / len(active)
        bar.set_postfix(loss=f"{min(losses):.3f}", refresh=False)
        bar.update(len(active))
        healthy = [state for state in active if state.run not in failed]
        if time.monotonic() - saved_at > STATE_SECONDS + SAVE_COST_FACTOR * save_seconds:
            started = time.monotonic()
            optimizer.store_state()
            for state in healthy:
                state.save()
            saved_at = time.monotonic()
            save_seconds = saved_at - started
        if len(healthy) < len(active) or any(state.is_stopped for state in active):
            break
    optimizer.store_state()


def _train_and_validate_epoch(
    optimizer: EnsembleOptimizer, source: Source, validate: Validate, failed: dict[RunFolder, UserError]
) -> list[float]:
    """Train one epoch, validate it if that is due, and record both in the states; return the loss of each run."""
    rows = train_epoch(optimizer, source)
    for state, row in zip(optimizer.states, rows, strict=True):
        _run_or_record_failure(state, partial(state.record_epoch, row), failed)
    if any(state.is_validation_due() for state in optimizer.states if state.run not in failed):
        with optimizer.averaged_weights():
            for state, score in zip(optimizer.states, validate(optimizer.model), strict=True):
                if state.run not in failed:
                    _run_or_record_failure(state, partial(state.record_validation, score), failed)
    return [row["loss"] for row in rows]


def train_epoch(optimizer: EnsembleOptimizer, source: Source) -> list[dict[str, Any]]:
    """Train one pass over the source and return the history row of each run.

    The host waits for the device only once, at the end.
    """
    optimizer.model.train()
    first = optimizer.states[0]
    phase, epoch = first.phase.name, first.progress.epoch
    totals: dict[str, Tensor] = {}
    num_steps = 0
    # Epochs are counted over all phases, so that no two phases see the same permutation or the same caption.
    for batch in source(len(first.progress.history)):
        rng = KeyedRNG.seeded(first.run.seed, batch["key"]).at("train", phase, epoch, num_steps)
        with use_precision(first.config.precision, batch["key"].device):
            parts = optimizer.loss(batch, rng, phase)
        optimizer.step(parts["loss"])
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float()
        num_steps += 1
    columns = torch.stack(list(totals.values())).reshape(len(totals), -1).tolist()
    rows = []
    for index, rate in enumerate(optimizer.learning_rates()):
        means = {name: column[index] / num_steps for name, column in zip(totals, columns, strict=True)}
        rows.append({"phase": phase, "epoch": epoch, "lr": rate, **means})
    optimizer.step_schedules()
    return rows


def _progress_bar(states: Sequence[TrainState], show: bool) -> ProgressBar:
    """Return a bar that counts the epochs of all runs together."""
    run = states[0].run
    title = f"{run.path.parent.name.rsplit('-', 1)[0]} seed {run.seed}{f' × {len(states)}' if len(states) > 1 else ''}"
    total = sum(sum(state.epochs_per_phase()) for state in states)
    done = sum(len(state.progress.history) for state in states)
    return ProgressBar(label=title, total=total, initial=done, unit="epoch", show=show, leave=None)
