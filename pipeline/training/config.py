"""How a head is trained: the settings of optimiser, batches, validation and number format."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

PRESETS: dict[str, dict[str, float]] = {"paper": {"lr": 1e-4}, "head": {"lr": 1e-3}}
# training settings that lanes trained together have in common
SHARED = ("epochs", "batch_size", "validate_every", "precision", "compiled", "window")


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
