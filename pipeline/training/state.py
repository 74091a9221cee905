"""The state of one training run: its settings, its progress, and the files from which it resumes after any interruption."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pickle import UnpicklingError
from typing import Any, NamedTuple

import pandas as pd
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from pipeline.nn.method import Method
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256, write_atomic
from pipeline.runtime.rng import seed_step
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.version import code_version
from pipeline.training.config import TrainConfig
from pipeline.training.history import Validation
from pipeline.training.tracking import RunTrackers
from pipeline.types import Batch, Phase

DIVERGED = "not finite"  # part of the error message of every run that diverged: such a run would diverge again
Measure = Callable[[Method], Mapping[str, float]]  # how near a trained method's text is to the real one
StopCheck = Callable[[int, float], bool]  # (finished epochs of the last phase, validation metric) -> whether to stop now


class Score(NamedTuple):
    """The result of validating a method."""

    metric: float  # percent; metric and loss are NaN when a logit is not finite
    loss: float
    facts: Mapping[str, float] = {}  # additional columns for the history


def never_stop(epoch: int, metric: float) -> bool:
    """Return False: a `StopCheck` that lets training run to its end."""
    return False


def measure_nothing(method: Method) -> Mapping[str, float]:
    """Return no facts: a `Measure`."""
    return {}


@dataclass(slots=True)
class RunProgress:
    """How far a run has come. `state.pt` stores the fields under these names."""

    phase: int = 0  # index into the method's phases
    epoch: int = 0  # finished epochs of this phase
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per finished epoch
    best_score: tuple[float, ...] = (-math.inf,)  # `Validation.rank` of the kept epoch
    best: dict[str, Tensor] = field(default_factory=dict)  # state dict of the kept epoch
    seconds: float = 0.0  # time spent in finished epochs; runs that are trained together share it equally


@dataclass(eq=False, slots=True, kw_only=True)
class TrainState:
    """A run during training, alone or together with other runs."""

    method: Method
    run: RunFolder
    config: TrainConfig
    should_stop: StopCheck = never_stop
    measure: Measure = measure_nothing
    trackers: RunTrackers = field(default_factory=RunTrackers)
    kernels: Sequence[str] = ()  # what `RunFolder.read_done` tells of the last attempt
    folder_lock: ExitStack = field(default_factory=ExitStack)  # holds the lock of the run's folder; closed when the run ends
    progress: RunProgress = field(default_factory=RunProgress)
    optimizer_state: dict[str, Any] = field(default_factory=dict)  # on the CPU; empty at the start of a phase
    is_stopped: bool = False  # `should_stop` has ended the run early
    failure: UserError | None = None  # why the run cannot go on

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.method.phases[self.progress.phase]

    @property
    def is_last_phase(self) -> bool:
        """Whether the current phase is the last one, the only one whose epochs are validated."""
        return self.progress.phase == len(self.method.phases) - 1

    @property
    def has_average(self) -> bool:
        """Whether the current phase averages its weights: the last one that trains any, whose weights the run keeps."""
        following = self.method.phases[self.progress.phase + 1 :]
        return self.config.weight_average > 0 and not self.phase.candidates and all(phase.candidates for phase in following)

    @property
    def is_phase_over(self) -> bool:
        """Whether all epochs of the current phase are finished."""
        return self.progress.epoch == self.epochs_per_phase()[self.progress.phase]

    def epochs_per_phase(self) -> list[int]:
        """Return the number of epochs of each phase; a candidate takes one."""
        return [phase.candidates or max(1, round(self.config.epochs * phase.share)) for phase in self.method.phases]

    @property
    def position(self) -> tuple[int, int]:
        """The current phase and epoch: runs at the same position read the same batches."""
        return self.progress.phase, self.progress.epoch

    def attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        """Call a function; a `UserError` that it raises becomes the failure of the run."""
        try:
            action(*arguments)
        except UserError as error:
            self.failure = error

    def resume(self) -> None:
        """Load the progress that is saved in the run's folder, if there is any.

        Raises:
            UserError: the saved state is damaged.
        """
        path = self.run.path / "state.pt"
        if not path.is_file():
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.progress = RunProgress(**saved.pop("state"))
            self.method.load_state_dict(saved.pop("method"))
            self.optimizer_state = {name: saved[name] for name in ("optimizer", "scheduler", "average")} if saved else {}
            _ = self.phase  # raises IndexError when the method has no such phase
        except (ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, UnpicklingError) as error:
            raise UserError(f"{path} is damaged; {self.run.remedy}") from error
        self._check_stop()

    def start_phase(self, train_pass: Callable[[], Iterator[Batch]]) -> None:
        """Freeze the parameters that the phase does not train; in a new phase, let the method take its statistics.

        Args:
            train_pass: Returns one ordered pass over the training split.
        """
        for name, parameter in self.method.named_parameters():
            parameter.requires_grad_(name.startswith(self.phase.trains))
        if self.progress.epoch == 0:
            self.method.train(False)
            seed_step(self.run.seed, self.phase.name, 0, -1)  # for methods that draw in `begin`, such as initial centres
            with torch.no_grad():
                self.method.begin(self.phase.name, train_pass)

    def start_epoch(self, train_pass: Callable[[], Iterator[Batch]]) -> None:
        """Let the method prepare for the next epoch; a phase of candidates has none that it could prepare for.

        Args:
            train_pass: Returns one ordered pass over the training split.
        """
        if not self.phase.candidates:
            num_epochs = self.epochs_per_phase()[self.progress.phase]
            with torch.no_grad():
                self.method.begin_epoch(self.phase.name, (self.progress.epoch + 0.5) / num_epochs, train_pass)

    def choose_candidate(self) -> dict[str, str | float]:
        """Put the next candidate of the phase into the method, and return a row for the history."""
        candidate = self.progress.epoch
        with torch.no_grad():
            self.method.choose(candidate)
        return dict(phase=self.phase.name, epoch=candidate, lr=math.nan, loss=math.nan, candidate=candidate)

    def record_epoch(self, row: dict[str, Any]) -> None:
        """Count a finished epoch and append its row to the history.

        Raises:
            UserError: its loss is not finite.
        """
        if not (math.isfinite(row["loss"]) or self.phase.candidates):
            position = f"epoch {row['epoch']} of phase {row['phase']!r}"
            raise UserError(f"the loss is {DIVERGED} in {position}; lower lr, or raise tau")
        self.progress.epoch += 1
        self.progress.history.append(row)

    def end_epoch(self, seconds: float) -> None:
        """Count the time of a finished epoch, and tell the trackers its row."""
        self.progress.seconds += seconds
        if not self.failure:
            self.trackers.log(len(self.progress.history), self.progress.history[-1])

    def is_validation_due(self) -> bool:
        """Return whether the epoch that was recorded last is one to validate; every candidate is."""
        is_chosen = self.progress.epoch % self.config.validate_every == 0 or self.phase.candidates > 0
        return self.is_last_phase and (is_chosen or self.is_phase_over)

    def record_validation(self, score: Score) -> None:
        """Add a score to the history, keep the weights if they are the best so far, and check for an early stop.

        Raises:
            UserError: the validation loss is not finite.
        """
        if not math.isfinite(score.loss):
            raise UserError(f"{self.run.path} predicts numbers that are {DIVERGED}: it diverges; train with a lower lr")
        self.progress.history[-1] |= {"val_metric": score.metric, "val_loss": score.loss, **score.facts}
        validation = Validation(self.progress.epoch, score.metric, score.loss, self.phase.candidates > 0)
        rank = validation.rank(self.config.select)
        if rank > self.progress.best_score:
            self.progress.best_score = rank
            self.progress.best = _copy_to_cpu(self.method.state_dict())
        self._check_stop()

    def _check_stop(self) -> None:
        """Ask `should_stop`, if the last epoch was validated and is not the end of the run.

        The search for the best candidate is never cut short: the training before it is done, and the best may come last.
        """
        row = self.progress.history[-1] if self.progress.history else {}
        may_stop = not (self.is_phase_over or self.phase.candidates)
        self.is_stopped = may_stop and "val_metric" in row and self.should_stop(row["epoch"] + 1, row["val_metric"])

    def advance(self) -> bool:
        """Go to the next phase if this one is finished; return whether anything is left to train."""
        if self.is_phase_over:
            self.progress.phase, self.progress.epoch, self.optimizer_state = self.progress.phase + 1, 0, {}
        return self.progress.phase < len(self.method.phases)

    def save(self) -> None:
        """Write `state.pt` and the history; `optimizer_state` must be that of the last epoch."""
        content = {"state": {each.name: getattr(self.progress, each.name) for each in fields(RunProgress)}}
        buffer = io.BytesIO()
        torch.save({**content, "method": _copy_to_cpu(self.method.state_dict()), **self.optimizer_state}, buffer)
        write_atomic(self.run.path / "state.pt", buffer.getvalue())
        self._write_history()

    def finish(self) -> None:
        """Write the kept weights, their alignment to the text and the history, then the file `done`, which makes the run valid;
        delete `state.pt`.
        """
        weights = safetensors_bytes(self.progress.best)
        write_atomic(self.run.path / "checkpoint.safetensors", weights)
        self._write_history()
        self.method.load_state_dict(self.progress.best)
        self.run.write_alignment(self.measure(self.method))
        seconds = round(self.progress.seconds, 3)
        facts = {"seconds": seconds, "checkpoint_sha256": sha256(weights), "code": code_version()}
        self.run.write_done({**facts, **({"kernels": list(self.kernels)} if self.kernels else {})})
        delete_saved_state(self.run)
        self.trackers.close(self.run)

    def _write_history(self) -> None:
        write_atomic(self.run.path / "history.csv", pd.DataFrame(self.progress.history).to_csv(index=False))


def delete_saved_state(run: RunFolder) -> None:
    """Delete `state.pt` of a finished run; it is still there when the run was killed just before its end."""
    path = run.path / "state.pt"
    if path.is_file():  # the folder of a finished run may be read-only; then there is nothing to delete
        path.unlink(missing_ok=True)


def _copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to own memory on the CPU: the tensors of methods that are trained together are views of larger ones."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
