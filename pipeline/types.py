"""The nouns that every stage shares. Shape letters: B batch, N rows, T tokens, D width, C classes, K grid cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import Parameter

    from pipeline.runtime.rng import KeyedRNG

Batch = dict[str, "Tensor"]  # "image" [B,Dv], "text" [B,Ds], "paired" [B], "label" [B] or [B,C], "key" [B]
Shapes = Mapping[str, tuple[int, ...]]  # key -> shape without B; "label": () or (C,) for multi-label; "classes": (C,)
Source = Callable[[int], Iterator[Batch]]  # epoch -> batches; cached and live encoders look the same

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a manifest: an image or a clip, the texts that describe it in training, and its labels."""

    id: str
    split: str
    media: Path  # relative to the manifest's media root
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    group: str  # samples of one group stay in one split; "" when there is none


class Encoder(Protocol):
    """A pretrained network with the preprocessing it was trained with."""

    modality: Literal["image", "video", "text"]
    feature_shape: tuple[int, ...]

    def identity(self) -> dict[str, Any]:
        """Everything that can change the output, as plain JSON values."""
        ...

    def prepare(self, raw: Path | str) -> Tensor:
        """One item on the CPU, deterministic and picklable; `ValueError` when it cannot be decoded."""
        ...

    def __call__(self, prepared: Tensor) -> Tensor:
        """Features [B, *feature_shape] of stacked items; differentiable."""
        ...


class Phase(NamedTuple):
    """A stretch of training: the parameters whose names start with one of `trains` learn, the rest stand still."""

    name: str
    trains: tuple[str, ...] = ("",)
    share: float = 1.0  # of the configured epochs
    rates: tuple[tuple[str, float], ...] = ()  # (beginning of a name, factor of its learning rate); the first that fits

    def rate(self, name: str) -> float:
        """The factor of a parameter's learning rate."""
        return next((factor for beginning, factor in self.rates if name.startswith(beginning)), 1.0)


WHOLE = (Phase("head"),)  # one phase that trains everything


class Predictor(Protocol):
    """What predicts: a method, or several stacked, whose logits are [K,B,C]."""

    def train(self, mode: bool = True) -> Any: ...

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [B,C] from image features [B,Dv] alone."""
        ...


class Method(Protocol):
    """A head on features; always an `nn.Module`. Text is an argument of training only (LUPI)."""

    needs: tuple[str, ...]  # batch keys it reads in training
    phases: tuple[Phase, ...]  # trained one after another, each with a fresh optimiser

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Before a phase: take statistics of the whole training split into buffers, in one or more ordered passes."""
        ...

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """{"loss": scalar, ...parts}; the parts are logged.

        Methods that are stacked run as one: nothing but operations on tensors, no number read back, no attribute assigned.
        """
        ...

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Logits [B,C] from image features [B,Dv] alone."""
        ...

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """The vector [B,D] that the classifier reads, for pictures of the feature space; from images alone."""
        ...

    # What it has from nn.Module and the stages use.
    def train(self, mode: bool = True) -> Any: ...
    def named_parameters(self) -> Iterator[tuple[str, Parameter]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
