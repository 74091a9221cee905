"""The settings of joint training: what is trained, how the work is done, and the plan of one run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pipeline.nn.method import Method
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.runtime.settings import POSITIVE, Range, Settings
from pipeline.training.config import TrainConfig
from pipeline.training.features import FeatureSet
from pipeline.training.tracking import MakeTracker

NO_ENCODER = "none"  # the control of joint training: the head alone is trained on, as long and in the same way
ENCODERS_BY_OPTION: Mapping[str, tuple[str, ...]] = {
    "image": ("image",),
    "text": ("text",),
    "both": ("image", "text"),
    NO_ENCODER: (),
}


@dataclass(frozen=True, kw_only=True)
class JointConfig(Settings):
    """Which encoders are trained together with the head, and how."""

    train: Annotated[str, "image, text, both, last:K (the last K blocks of the image encoder), none (the head alone)"] = "image"
    encoder_lr: Annotated[float, POSITIVE, "learning rate of the encoders; the papers use 5e-5 to 1e-4"] = 5e-5
    layer_decay: Annotated[
        float, Range(0, 1, open_low=True), "factor of the learning rate for each block towards the input"
    ] = 1.0
    augment: Annotated[bool, "random crops and mirrored images in training"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train not in ENCODERS_BY_OPTION and not re.fullmatch(r"last:[1-9][0-9]*", self.train):
            raise UserError(f"--unfreeze takes image, text, both or last:K, not {self.train!r}; none trains the head alone")
        if self.augment and not self.trained_keys:
            raise UserError("--unfreeze none reads the cached features, which no image is encoded for; leave --augment out")
        if self.augment and self.num_blocks:
            raise UserError("last:K stores what reaches the last blocks of each image once; --augment needs --unfreeze image")

    @staticmethod
    def label_of(field: str) -> str:
        """Return how messages about ranges call a field: by its option."""
        return f"--{field.replace('_', '-')}"

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change the numbers of a run; without a trained encoder the others change nothing."""
        return asdict(self) if self.trained_keys else {"train": self.train}

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
    fast: bool = False  # a GPU may take kernels whose last bits differ from run to run
    compile_encoders: bool = False  # run whole encoders through torch.compile in training
    workers: int = -1  # processes that decode; -1: one per core
    progress: bool = True  # show progress bars
    trackers: tuple[MakeTracker, ...] = ()  # are told the epochs of the run as they come

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.workers < -1:
            raise UserError(f"accumulate must be >= 1 and workers >= -1, not {self.accumulate} and {self.workers}")

    def check(self, joint: JointConfig) -> None:
        """Raise `UserError` if these encoders cannot be trained in this way."""
        if self.compile_encoders and (joint.num_blocks or not joint.trained_keys):
            raise UserError(f"--compile takes whole encoders: --unfreeze image, text or both, not {joint.train}")

    @property
    def kernels(self) -> list[str]:
        """The fields that choose kernels whose last bits are others, which a run records."""
        return [name for name in ("fast", "compile_encoders") if getattr(self, name)]


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
