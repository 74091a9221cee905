"""The settings of joint training: what is trained, how the work is done, and the plan of one run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.features import FeatureSet
from pipeline.types import Method

ENCODERS_BY_OPTION: Mapping[str, tuple[str, ...]] = {"image": ("image",), "text": ("text",), "both": ("image", "text")}


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Which encoders are trained together with the head, and how."""

    train: str = "image"  # image, text, both, or last:K, the last K blocks of the image encoder
    encoder_lr: float = 5e-5  # learning rate of the encoders; the papers use 5e-5 to 1e-4
    layer_decay: float = 1.0  # factor of the learning rate for each block towards the input, above 0 and at most 1
    augment: bool = False  # random crops and mirrored images in training

    def __post_init__(self) -> None:
        if self.train not in ENCODERS_BY_OPTION and not re.fullmatch(r"last:[1-9][0-9]*", self.train):
            raise ValueError(f"--train takes image, text, both or last:K, not {self.train!r}")
        if not self.encoder_lr > 0 or not 0 < self.layer_decay <= 1:
            raise ValueError("--encoder-lr must be positive, and --layer-decay above 0 and at most 1")
        if self.augment and self.num_blocks:
            raise ValueError("last:K stores what reaches the last blocks of each image once; --augment needs --train image")

    @property
    def trained_keys(self) -> tuple[str, ...]:
        """The batch keys of the encoders that are trained."""
        return ENCODERS_BY_OPTION.get(self.train, ("image",))

    @property
    def num_blocks(self) -> int:
        """K of last:K; 0 for whole encoders."""
        return int(self.train.partition(":")[2] or 0)


@dataclass(frozen=True, kw_only=True)
class JointOptions:
    """How the training is carried out. No field changes a result beyond the rounding of its last bits."""

    accumulate: int = 1  # parts in which a batch goes through the encoders; one part is in memory at a time
    checkpointing: bool = False  # store only the inputs of blocks, and run the blocks again in the backward pass
    workers: int = -1  # processes that decode; -1: one per core
    progress: bool = True  # show progress bars


@dataclass(frozen=True, kw_only=True)
class JointPlan:
    """Everything that is needed for one joint run."""

    config: RunConfig
    joint: JointConfig
    training: TrainConfig
    head: Method  # trained in stage 2
    init: RunFolder  # the run of stage 2 that trained the head
    run: RunFolder  # the joint run
    features: FeatureSet  # the features that the head was trained on
