"""Stage 2: the only optimisation loop in the repository. It knows sources of batches and methods, nothing of caches."""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, Literal

import pandas as pd
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.devices import computing
from pipeline.history import Validation
from pipeline.runs import Run, write_atomic
from pipeline.streams import Streams
from pipeline.types import Batch, Method, Phase, Source

PRESETS: dict[str, dict[str, float]] = {"paper": {"lr": 1e-4}, "head": {"lr": 1e-3}}
STATE_SECONDS = 20.0  # between two saves of the resumable state
Watch = Callable[[int, float], bool]  # (epochs of the last phase that are done, validation metric) -> stop here?


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Adam as in SeDA section 5.1: L2 weight decay, the learning rate halved every few epochs."""

    lr: float = 1e-3  # learning rate; the papers' band is 5e-5..1e-4, heads on frozen features train better at 1e-3
    weight_decay: float = 1e-4  # L2 in the gradient, not decoupled
    lr_step: int = 4  # epochs between two decays
    lr_gamma: float = 0.5  # factor of a decay
    epochs: int = 20  # passes over the training split per phase (times the phase's share)
    batch_size: int = 64  # samples
    grad_clip: float = 1.0  # largest gradient norm
    validate_every: int = 1  # epochs between two validations; the last epoch always has one
    select: Literal["metric", "loss", "last"] = "metric"  # which epoch's weights are kept, judged on validation
    precision: Literal["float32", "mixed"] = "float32"  # of training and prediction; mixed: bfloat16 products, float32 weights

    def __post_init__(self) -> None:
        for name in ("lr", "lr_step", "lr_gamma", "epochs", "batch_size", "grad_clip", "validate_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"training setting {name!r} must be positive, not {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError("training setting 'batch_size' must be at least 2: contrasts and batch statistics need company")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"training setting 'weight_decay' must not be negative, not {self.weight_decay}")


def never(epoch: int, metric: float) -> bool:
    """Watches nothing: training goes on to its end."""
    return False


@dataclass(slots=True)
class State:
    """What a run needs to go on after any interruption; everything else is a function of its config and seed."""

    phase: int  # index into the method's phases
    epoch: int  # epochs of this phase that are finished
    history: list[dict[str, Any]]
    best_score: tuple[float, float]
    best: dict[str, Tensor]  # the state dict kept for prediction
    seconds: float  # spent in finished epochs


def train(
    method: Method,
    source: Source,
    train_pass: Callable[[], Iterator[Batch]],
    validate: Callable[[], tuple[float, float]],
    config: TrainConfig,
    run: Run,
    progress: bool,
    watch: Watch = never,
) -> State:
    """Train through the method's phases, keep the epoch that is best on validation, write the run's checkpoint.

    `validate` returns (metric, negative loss), the larger the better. `ValueError` says where the loss is not finite. After any
    interruption, and after a stop by `watch`, the same call goes on and ends in the same weights, bit for bit.
    """
    saved = _load_state(run)
    state = State(**saved["state"]) if saved else State(0, 0, [], (-math.inf, -math.inf), {}, 0.0)
    epochs = [max(1, round(config.epochs * phase.share)) for phase in method.phases]
    title, done = f"{run.path.parent.name.rsplit('-', 1)[0]} seed {run.seed}", sum(epochs[: state.phase]) + state.epoch
    with tqdm(desc=title, total=sum(epochs), initial=done, unit="epoch", disable=not progress) as bar:
        while state.phase < len(method.phases):
            optimizer, scheduler = _start_phase(method, method.phases[state.phase], train_pass, config, saved)
            saved, saved_at = None, time.monotonic()
            while state.epoch < epochs[state.phase]:
                if _enough(state, watch):
                    _save(run, method, optimizer, scheduler, state)
                    return state
                started = time.monotonic()
                row = _epoch(method, source, state, optimizer, scheduler, config, run.seed)
                due = state.epoch % config.validate_every == 0 or state.epoch == epochs[state.phase]
                if due and state.phase == len(method.phases) - 1:
                    _select(method, validate(), config, state, row)
                state.seconds += time.monotonic() - started
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                bar.update()
                if time.monotonic() - saved_at > STATE_SECONDS:
                    _save(run, method, optimizer, scheduler, state)
                    saved_at = time.monotonic()
            state.phase, state.epoch = state.phase + 1, 0
    return _write_results(run, state)


def _load_state(run: Run) -> dict[str, Any] | None:
    """The resumable state, on the CPU; `ValueError` when it is damaged."""
    path = run.path / "state.pt"
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, IndexError, KeyError, UnpicklingError) as error:
        raise ValueError(f"{path} is damaged; {run.remedy}") from error


def _start_phase(
    method: Method, phase: Phase, train_pass: Callable[[], Iterator[Batch]], config: TrainConfig, saved: dict[str, Any] | None
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Freeze what the phase does not train; take its statistics, or everything from a saved state."""
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(name.startswith(phase.trains))
    trained = [parameter for _, parameter in method.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.lr_step, config.lr_gamma)
    if saved:
        method.load_state_dict(saved["method"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    else:
        method.train(False)
        with torch.no_grad():
            method.begin(phase.name, train_pass)
    return optimizer, scheduler


def _epoch(
    method: Method,
    source: Source,
    state: State,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: TrainConfig,
    seed: int,
) -> dict[str, Any]:
    """One pass over the source, counted in the state; returns its row of the history. One host synchronisation, at the end."""
    method.train()
    phase = method.phases[state.phase]
    totals: dict[str, Tensor] = {}
    steps = 0
    # Epochs of all phases are counted through, so that no two phases see the same permutation or the same caption.
    for batch in source(len(state.history)):
        rng = Streams.seeded(seed, batch["key"]).at("train", phase.name, state.epoch, steps)
        with computing(config.precision, batch["key"].device):
            parts = method.loss(batch, rng, phase.name)
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.grad_clip)
        optimizer.step()
        for name, value in parts.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float()
        steps += 1
    row = {"phase": phase.name, "epoch": state.epoch, "lr": optimizer.param_groups[0]["lr"]}
    row |= {name: total.item() / steps for name, total in totals.items()}
    if not math.isfinite(row["loss"]):
        raise ValueError(f"the loss is not finite in epoch {state.epoch} of phase {phase.name!r}; lower lr, or raise tau")
    scheduler.step()
    state.epoch += 1
    state.history.append(row)
    return row


def _select(method: Method, score: tuple[float, float], config: TrainConfig, state: State, row: dict[str, Any]) -> None:
    """Keep the weights when validation prefers them."""
    metric, negative_loss = score
    row |= {"val_metric": metric, "val_loss": -negative_loss}
    rank = Validation(state.epoch, metric, -negative_loss).rank(config.select)
    if rank >= state.best_score:
        state.best_score = rank
        state.best = {name: tensor.detach().cpu().clone() for name, tensor in method.state_dict().items()}


def _enough(state: State, watch: Watch) -> bool:
    """Whether the last epoch was validated and is the last one that `watch` wants."""
    row = state.history[-1] if state.history else {}
    return "val_metric" in row and watch(row["epoch"] + 1, row["val_metric"])


def _save(run: Run, method: Method, optimizer: Any, scheduler: Any, state: State) -> None:
    buffer = io.BytesIO()
    parts = {name: getattr(state, name) for name in State.__slots__}
    content = {"state": parts, "method": method.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content | {"scheduler": scheduler.state_dict()}, buffer)
    write_atomic(run.path / "state.pt", buffer.getvalue())
    _write_history(run, state)


def _write_results(run: Run, state: State) -> State:
    """The selected weights, the history, then `done`, which makes them real; the resumable state is no longer needed."""
    weights = safetensors_bytes(state.best)
    write_atomic(run.path / "checkpoint.safetensors", weights)
    _write_history(run, state)
    facts = {"seconds": round(state.seconds, 3), "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}
    write_atomic(run.path / "done", json.dumps(facts))
    (run.path / "state.pt").unlink(missing_ok=True)
    return state


def _write_history(run: Run, state: State) -> None:
    write_atomic(run.path / "history.csv", pd.DataFrame(state.history).to_csv(index=False))
