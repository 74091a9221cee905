"""A run on its way through training: its settings, where it stands, and the files that let it go on after any interruption."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pipeline.history import Validation
from pipeline.runs import Run, write_atomic
from pipeline.types import Batch, Method, Phase

PRESETS: dict[str, dict[str, float]] = {"paper": {"lr": 1e-4}, "head": {"lr": 1e-3}}
# training settings that lanes trained together have in common
SHARED = ("epochs", "batch_size", "validate_every", "precision", "compiled", "window")
DIVERGED = "not finite"  # in the reason why a run fails whose numbers do so: it would fail again
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
    weight_average: float = 0.0  # decay of a moving average of the last phase's weights, which is what is kept; 0: none
    validate_every: int = 1  # epochs between two validations; the last epoch always has one
    select: Literal["metric", "loss", "last"] = "metric"  # which epoch's weights are kept, judged on validation
    precision: Literal["float32", "mixed"] = "float32"  # of training and prediction; mixed: bfloat16 products, float32 weights
    compiled: bool = False  # the loss as one graph of torch.compile, on a GPU a CUDA graph; its rounding is its own
    window: int = 0  # samples in memory at a time, shuffled among each other; 0: all, if half of the memory holds them

    def __post_init__(self) -> None:
        for name in ("lr", "lr_step", "lr_gamma", "epochs", "batch_size", "grad_clip", "validate_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"training setting {name!r} must be positive, not {getattr(self, name)}")
        if self.batch_size < 2:
            raise ValueError("training setting 'batch_size' must be at least 2: contrasts and batch statistics need company")
        if not 0 <= self.weight_average < 1:
            raise ValueError(f"training setting 'weight_average' must be at least 0 and below 1, not {self.weight_average}")
        if self.window and self.window < self.batch_size:
            raise ValueError(
                f"a window of {self.window} samples holds no batch of {self.batch_size}: raise window, or lower batch_size"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"training setting 'weight_decay' must not be negative, not {self.weight_decay}")


class Score(NamedTuple):
    """What validation says of a method."""

    metric: float  # percent; NaN, like the loss, when a logit is not finite
    loss: float
    facts: Mapping[str, float] = {}  # more columns of the history


def never(epoch: int, metric: float) -> bool:
    """Watches nothing: training goes on to its end."""
    return False


@dataclass(slots=True)
class State:
    """Where a run stands."""

    phase: int = 0  # index into the method's phases
    epoch: int = 0  # epochs of this phase that are finished
    history: list[dict[str, Any]] = field(default_factory=list)
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    best: dict[str, Tensor] = field(default_factory=dict)  # the state dict kept for prediction
    seconds: float = 0.0  # spent in finished epochs; those trained together share them


@dataclass(eq=False, slots=True, kw_only=True)
class Lane:
    """A run that is trained, alone or beside others."""

    method: Method
    run: Run
    config: TrainConfig
    watch: Watch = never
    held: ExitStack = field(default_factory=ExitStack)  # closed when the run is left: the lock of its folder
    state: State = field(default_factory=State)
    learned: dict[str, Any] = field(default_factory=dict)  # what the optimiser knows, on the CPU; empty at a phase's start
    stopped: bool = False  # its watch has seen enough

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self.method.phases[self.state.phase]

    @property
    def is_last_phase(self) -> bool:
        """Whether the phase under way is the one whose epochs are validated."""
        return self.state.phase == len(self.method.phases) - 1

    def epochs(self) -> list[int]:
        """How many each phase has."""
        return [max(1, round(self.config.epochs * phase.share)) for phase in self.method.phases]

    @property
    def position(self) -> tuple[int, int]:
        """Phase and epoch: lanes at the same position meet the same batches."""
        return self.state.phase, self.state.epoch

    def resume(self) -> None:
        """Go on where the run's folder says that it stands; `ValueError` when that is damaged."""
        path = self.run.path / "state.pt"
        if not path.is_file():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.state = State(**saved.pop("state"))
            self.method.load_state_dict(saved.pop("method"))
            self.learned = {name: saved[name] for name in ("optimizer", "scheduler", "average")} if saved else {}
            _ = self.phase  # is there
        except (RuntimeError, EOFError, LookupError, TypeError, AttributeError, UnpicklingError) as error:
            raise ValueError(f"{path} is damaged; {self.run.remedy}") from error
        self._ask()

    def begin(self, train_pass: Callable[[], Iterator[Batch]]) -> None:
        """Freeze what the phase does not train, and take its statistics if it is new."""
        for name, parameter in self.method.named_parameters():
            parameter.requires_grad_(name.startswith(self.phase.trains))
        if self.state.epoch == 0:
            self.method.train(False)
            with torch.no_grad():
                self.method.begin(self.phase.name, train_pass)

    def note(self, row: dict[str, Any]) -> None:
        """Count an epoch by its row of the history; `ValueError` when its loss is not finite."""
        if not math.isfinite(row["loss"]):
            place = f"epoch {row['epoch']} of phase {row['phase']!r}"
            raise ValueError(f"the loss is {DIVERGED} in {place}; lower lr, or raise tau")
        self.state.epoch += 1
        self.state.history.append(row)

    def is_due(self) -> bool:
        """Whether the epoch that was noted last is one to validate."""
        epoch, epochs = self.state.epoch, self.epochs()[self.state.phase]
        return self.is_last_phase and (epoch % self.config.validate_every == 0 or epoch == epochs)

    def select(self, score: Score) -> None:
        """Note a validation, and keep the weights when it prefers them; `ValueError` when its loss is not finite."""
        if not math.isfinite(score.loss):
            raise ValueError(f"{self.run.path} predicts numbers that are {DIVERGED}: it diverges; train with a lower lr")
        self.state.history[-1] |= {"val_metric": score.metric, "val_loss": score.loss, **score.facts}
        rank = Validation(self.state.epoch, score.metric, score.loss).rank(self.config.select)
        if rank >= self.state.best_score:
            self.state.best_score = rank
            self.state.best = _copied(self.method.state_dict())
        self._ask()

    def _ask(self) -> None:
        """Ask the watch whether the run stops after its last epoch, if that was validated and is not the end."""
        row = self.state.history[-1] if self.state.history else {}
        more = self.state.epoch < self.epochs()[self.state.phase]
        self.stopped = more and "val_metric" in row and self.watch(row["epoch"] + 1, row["val_metric"])

    def move_on(self) -> bool:
        """Go to the next phase when this one is over; whether there is anything left to train."""
        if self.state.epoch == self.epochs()[self.state.phase]:
            self.state.phase, self.state.epoch, self.learned = self.state.phase + 1, 0, {}
        return self.state.phase < len(self.method.phases)

    def save(self) -> None:
        """Write the resumable state; `learned` is that of the last epoch."""
        content = {"state": {each.name: getattr(self.state, each.name) for each in fields(State)}}
        buffer = io.BytesIO()
        torch.save({**content, "method": _copied(self.method.state_dict()), **self.learned}, buffer)
        write_atomic(self.run.path / "state.pt", buffer.getvalue())
        self._write_history()

    def finish(self) -> None:
        """Write the selected weights and the history, then `done`, which makes them real; drop the resumable state."""
        weights = safetensors_bytes(self.state.best)
        write_atomic(self.run.path / "checkpoint.safetensors", weights)
        self._write_history()
        facts = {"seconds": round(self.state.seconds, 3), "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}
        write_atomic(self.run.path / "done", json.dumps(facts))
        drop_state(self.run)

    def _write_history(self) -> None:
        write_atomic(self.run.path / "history.csv", pd.DataFrame(self.state.history).to_csv(index=False))


def drop_state(run: Run) -> None:
    """Free the disk of the resumable state of a run that has ended, or of one that was killed at its end."""
    path = run.path / "state.pt"
    if path.is_file():  # in a folder that may be read only, there is none
        path.unlink(missing_ok=True)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, in memory of their own: the tensors of lanes that are trained together are parts of larger ones."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
