"""Train the runs of a command: which of them are trained together, and what happens when one of them ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple

import torch

from pipeline.runtime.errors import UserError
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.runs import RunFolder
from pipeline.training.ensemble import EnsembleTrainer
from pipeline.training.loop import Trainer, Validate, train_phase
from pipeline.training.seeds import Feed
from pipeline.training.state import TrainState


def train(
    states: Sequence[TrainState],
    feeds: Mapping[int, Feed],
    validate: Validate,
    progress: bool,
    captures: bool = False,
) -> dict[RunFolder, UserError]:
    """Train runs through the phases of their methods and write their checkpoints.

    Runs at the same epoch are trained together as one model. Each run keeps its epoch that is best on validation. After an
    interruption, or after an early stop, a run resumes in the next call, alone or together with others. A run that is always
    trained alone ends in the same weights, bit for bit, however often it is interrupted.

    Args:
        states: The runs. Several runs must have equal `structure_key`s and equal `SHARED_SETTINGS`.
        feeds: What the runs read, by their seed; batches of the same step have the same shapes in all of them.
        validate: Returns the validation score of each method.
        progress: Whether to show a progress bar.
        captures: Whether a training step becomes a CUDA graph.

    Returns:
        The runs that failed, and why. A failed run does not disturb the others. A bug is raised, and ends them all.
    """
    remaining = list(states)
    for state in states:
        state.attempt(state.resume)
        state.trackers.open(state.run, state.progress.history)
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _closed_trackers(states), _progress_bar(states, progress) as bar, torch.random.fork_rng(gpus):
        while remaining := [state for state in remaining if _advance_or_finish(state)]:
            # The runs that are behind catch up first, so that as many as possible are trained together.
            first = min(state.position for state in remaining)
            together = sorted(
                (state for state in remaining if state.position == first), key=lambda state: astuple(state.config)
            )
            phase, _ = first
            later_epochs = [s.progress.epoch for s in remaining if s.position > first and s.progress.phase == phase]
            until = min([together[0].epochs_per_phase()[phase], *later_epochs])
            for state in together:
                state.attempt(state.start_phase, feeds[state.run.seed].train_pass)
            active = [state for state in together if not state.failure]
            if active:
                trainer = Trainer(active, captures) if len(active) == 1 else EnsembleTrainer(active, captures)
                train_phase(trainer, until, feeds, validate, bar)
    return {state.run: state.failure for state in states if state.failure}


@contextmanager
def _closed_trackers(states: Sequence[TrainState]) -> Iterator[None]:
    """Tell the trackers the end, whatever ends the training: Ctrl-C, a bug, lack of memory."""
    try:
        yield
    finally:
        for state in states:
            state.trackers.close()


def _advance_or_finish(state: TrainState) -> bool:
    """Return whether there is more to train; if not, write what the run has and release its folder."""
    if not state.failure:
        if state.is_stopped:
            state.save()
        elif state.advance():
            return True
        else:
            state.finish()
    state.trackers.close()
    state.folder_lock.close()
    return False


def _progress_bar(states: Sequence[TrainState], show: bool) -> ProgressBar:
    """Return a bar that counts the epochs of all runs together."""
    run, seeds = states[0].run, sorted({state.run.seed for state in states})
    of_seeds = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    together = f" × {len(states)}" if len(states) > 1 else ""
    title = f"training {run.path.parent.name.rsplit('-', 1)[0]} {of_seeds}{together}"
    total = sum(sum(state.epochs_per_phase()) for state in states)
    done = sum(len(state.progress.history) for state in states)
    return ProgressBar(label=title, total=total, initial=done, unit="epoch", show=show, leave=None)
