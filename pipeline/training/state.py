"""A run on its way through training: its settings, where it stands, and the files that let it go on after any interruption."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pickle import UnpicklingError
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pipeline.runtime.files import sha256, write_atomic
from pipeline.runtime.runs import RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.history import Validation
from pipeline.types import Batch, Method, Phase

DIVERGED = "not finite"  # in the reason why a run fails whose numbers do so: it would fail again
Watch = Callable[[int, float], bool]  # (epochs of the last phase that are done, validation metric) -> stop here?


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
class TrainState:
    """A run that is trained, alone or beside others."""

    method: Method
    run: RunFolder
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
        facts = {"seconds": round(self.state.seconds, 3), "checkpoint_sha256": sha256(weights)}
        write_atomic(self.run.path / "done", json.dumps(facts))
        drop_state(self.run)

    def _write_history(self) -> None:
        write_atomic(self.run.path / "history.csv", pd.DataFrame(self.state.history).to_csv(index=False))


def drop_state(run: RunFolder) -> None:
    """Free the disk of the resumable state of a run that has ended, or of one that was killed at its end."""
    path = run.path / "state.pt"
    if path.is_file():  # in a folder that may be read only, there is none
        path.unlink(missing_ok=True)


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, in memory of their own: the tensors of lanes that are trained together are parts of larger ones."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
