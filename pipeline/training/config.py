"""Training settings: optimiser, batches, validation and number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import POSITIVE, Range, Settings

TRAINING_PRESETS: dict[str, dict[str, float]] = {"paper": {"lr": 1e-4}, "head": {"lr": 1e-3}}
# settings that must be equal for all heads that are trained together as one model
SHARED_SETTINGS = ("epochs", "batch_size", "validate_every", "precision", "compiled", "window")


def paper_training(method: Any) -> dict[str, Any]:
    """Return the training settings of --preset paper for a method, a class or a module: those of the papers, or its own."""
    return {**TRAINING_PRESETS["paper"], **getattr(method, "paper_training", {})}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """The settings of a training run.

    The defaults follow SeDA, section 5.1: Adam with L2 weight decay, and a learning rate that is halved every few epochs.
    """

    lr: Annotated[
        float, POSITIVE, "learning rate; the papers use 5e-5 to 1e-4, but heads on frozen features train better at 1e-3"
    ] = 1e-3
    weight_decay: Annotated[float, Range(0), "L2 penalty added to the gradient (not decoupled as in AdamW)"] = 1e-4
    lr_step: Annotated[int, POSITIVE, "epochs between two decays of the learning rate"] = 4
    lr_gamma: Annotated[float, POSITIVE, "factor of each decay of the learning rate"] = 0.5
    epochs: Annotated[int, POSITIVE, "passes over the training split in each phase, multiplied by the phase's share"] = 20
    batch_size: Annotated[int, Range(2), "samples per step; contrasts and batch statistics need company"] = 64
    grad_clip: Annotated[float, POSITIVE, "largest allowed norm of the gradient"] = 1.0
    weight_average: Annotated[
        float,
        Range(0, 1, open_high=True),
        "decay of the moving average of the weights of the last phase that trains any; the run keeps it; 0: no average",
    ] = 0.0
    validate_every: Annotated[int, POSITIVE, "epochs between two validations; the last epoch is always validated"] = 1
    select: Annotated[Literal["metric", "loss", "last"], "rule that chooses the epoch to keep, on validation"] = "metric"
    precision: Annotated[
        Literal["float32", "mixed"], "for training and prediction; mixed: bfloat16 products, float32 weights"
    ] = "float32"
    compiled: Annotated[bool, "run the loss through torch.compile (a CUDA graph on a GPU); it rounds differently"] = False
    window: Annotated[
        int, Range(0), "samples in memory at a time, shuffled with each other; 0: all, if they fit in half of the memory"
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window and self.window < self.batch_size:
            raise UserError(
                f"a window of {self.window} samples holds no batch of {self.batch_size}: raise window, or lower batch_size"
            )

    @staticmethod
    def label_of(field: str) -> str:
        """Return how messages about ranges call a field."""
        return f"training setting {field!r}"
