"""Training settings: optimiser, batches, validation and number format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

TRAINING_PRESETS: dict[str, dict[str, float]] = {"paper": {"lr": 1e-4}, "head": {"lr": 1e-3}}
# settings that must be equal for all heads that are trained together as one model
SHARED_SETTINGS = ("epochs", "batch_size", "validate_every", "precision", "compiled", "window")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run.

    The defaults follow SeDA, section 5.1: Adam with L2 weight decay, and a learning rate that is halved every few epochs.
    """

    lr: float = 1e-3  # learning rate; the papers use 5e-5 to 1e-4, but heads on frozen features train better at 1e-3
    weight_decay: float = 1e-4  # L2 penalty added to the gradient (not decoupled as in AdamW)
    lr_step: int = 4  # epochs between two decays of the learning rate
    lr_gamma: float = 0.5  # factor of each decay of the learning rate
    epochs: int = 20  # passes over the training split in each phase, multiplied by the phase's share
    batch_size: int = 64  # samples per step
    grad_clip: float = 1.0  # largest allowed norm of the gradient
    weight_average: float = 0.0  # decay of the moving average of the last phase's weights, which the run keeps; 0: no average
    validate_every: int = 1  # epochs between two validations; the last epoch is always validated
    select: Literal["metric", "loss", "last"] = "metric"  # rule that chooses the epoch to keep, on validation
    precision: Literal["float32", "mixed"] = "float32"  # for training and prediction; mixed: bfloat16 products, float32 weights
    compiled: bool = False  # run the loss through torch.compile (a CUDA graph on a GPU); it rounds differently
    window: int = 0  # samples in memory at a time, shuffled with each other; 0: all, if they fit in half of the memory

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
