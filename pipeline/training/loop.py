"""Stage 2: the only optimisation loop in the repository. It knows sources of batches and methods, nothing of caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.runtime.device import computing
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.training.optim import EnsembleOptimizer
from pipeline.training.state import Score, TrainState
from pipeline.types import Batch, Predictor, Source

STATE_SECONDS = 20.0  # between two saves of the resumable state, besides
SAVE_SHARE = 10  # times as long as a save takes
Validate = Callable[[Predictor], Sequence[Score]]  # of every method in the model


def train(
    lanes: Sequence[TrainState], source: Source, train_pass: Callable[[], Iterator[Batch]], validate: Validate, progress: bool
) -> dict[RunFolder, ValueError]:
    """Train runs through their methods' phases, keep of each the epoch that is best on validation, write their checkpoints.

    Several lanes are of one `stack.structure`, one seed and equal `lane.SHARED`: those at the same epoch are trained as one
    model. Returns the runs that failed, and why; the others are not disturbed. After any interruption, and after a stop by its
    watch, a run goes on in the same call, beside any others; one that is always alone ends in the same weights, bit for bit.
    """
    failed: dict[RunFolder, ValueError] = {}
    left = list(lanes)
    for lane in lanes:
        _attempt(lane, lane.resume, failed)
    with _bar(lanes, progress) as bar:
        while left := [lane for lane in left if _stays(lane, failed)]:
            now = min(lane.position for lane in left)
            team = sorted((lane for lane in left if lane.position == now), key=lambda lane: astuple(lane.config))
            phase, _ = now
            stops = [lane.state.epoch for lane in left if lane.position > now and lane.state.phase == phase]
            _train_team(team, min([team[0].epochs()[phase], *stops]), source, train_pass, validate, bar, failed)
    return failed


def _attempt(lane: TrainState, do: Callable[[], None], failed: dict[RunFolder, ValueError]) -> None:
    """Do something for a lane, or note why it fails."""
    try:
        do()
    except ValueError as error:
        failed[lane.run] = error


def _stays(lane: TrainState, failed: dict[RunFolder, ValueError]) -> bool:
    """Whether there is more to train; a lane that leaves has written what it has, and lets go of its folder."""
    if lane.run not in failed:
        if lane.stopped:
            lane.save()
        elif lane.move_on():
            return True
        else:
            lane.finish()
    lane.held.close()
    return False


def _train_team(
    lanes: Sequence[TrainState],
    until: int,
    source: Source,
    train_pass: Callable[[], Iterator[Batch]],
    validate: Validate,
    bar: ProgressBar,
    failed: dict[RunFolder, ValueError],
) -> None:
    """Train lanes that stand at the same epoch up to another one of their phase, or until one of them leaves."""
    for lane in lanes:
        _attempt(lane, partial(lane.begin, train_pass), failed)
    team = [lane for lane in lanes if lane.run not in failed]
    if not team:
        return
    learner, saved_at, save_seconds = EnsembleOptimizer(team), time.monotonic(), 0.0
    for _ in range(team[0].state.epoch, until):
        started = time.monotonic()
        losses = _epoch(learner, source, validate, failed)
        for lane in team:
            lane.state.seconds += (time.monotonic() - started) / len(team)
        bar.set_postfix(loss=f"{min(losses):.3f}", refresh=False)
        bar.update(len(team))
        sound = [lane for lane in team if lane.run not in failed]
        if time.monotonic() - saved_at > STATE_SECONDS + SAVE_SHARE * save_seconds:
            started = time.monotonic()
            learner.store()
            for lane in sound:
                lane.save()
            saved_at = time.monotonic()
            save_seconds = saved_at - started
        if len(sound) < len(team) or any(lane.stopped for lane in team):
            break
    learner.store()


def _epoch(learner: EnsembleOptimizer, source: Source, validate: Validate, failed: dict[RunFolder, ValueError]) -> list[float]:
    """One pass over the source, and validation when it is due, noted in the lanes; returns their losses."""
    rows = _pass(learner, source)
    for lane, row in zip(learner.lanes, rows, strict=True):
        _attempt(lane, partial(lane.note, row), failed)
    if any(lane.is_due() for lane in learner.lanes if lane.run not in failed):
        with learner.averaged():
            for lane, score in zip(learner.lanes, validate(learner.model), strict=True):
                if lane.run not in failed:
                    _attempt(lane, partial(lane.select, score), failed)
    return [row["loss"] for row in rows]


def _pass(learner: EnsembleOptimizer, source: Source) -> list[dict[str, Any]]:
    """One pass over the source; returns every lane's row of the history. One host synchronisation, at the end."""
    learner.model.train()
    lead = learner.lanes[0]
    phase, epoch = lead.phase.name, lead.state.epoch
    totals: dict[str, Tensor] = {}
    steps = 0
    # Epochs of all phases are counted through, so that no two phases see the same permutation or the same caption.
    for batch in source(len(lead.state.history)):
        rng = KeyedRNG.seeded(lead.run.seed, batch["key"]).at("train", phase, epoch, steps)
        with computing(lead.config.precision, batch["key"].device):
            parts = learner.loss(batch, rng, phase)
        learner.step(parts["loss"])
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float()
        steps += 1
    columns = torch.stack(list(totals.values())).reshape(len(totals), -1).tolist()
    rows = []
    for number, rate in enumerate(learner.rates()):
        means = {name: column[number] / steps for name, column in zip(totals, columns, strict=True)}
        rows.append({"phase": phase, "epoch": epoch, "lr": rate, **means})
    learner.decay()
    return rows


def _bar(lanes: Sequence[TrainState], progress: bool) -> ProgressBar:
    """Epochs of all lanes together."""
    run = lanes[0].run
    title = f"{run.path.parent.name.rsplit('-', 1)[0]} seed {run.seed}{f' × {len(lanes)}' if len(lanes) > 1 else ''}"
    total, done = sum(sum(lane.epochs()) for lane in lanes), sum(len(lane.state.history) for lane in lanes)
    return ProgressBar(label=title, total=total, initial=done, unit="epoch", show=progress, leave=None)
