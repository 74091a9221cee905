"""Types that all stages share.

Letters of shapes: B batch, N rows, T tokens, D width, C classes, K cells of a grid.
"""

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
Shapes = Mapping[str, tuple[int, ...]]  # batch key -> shape without B; "label": () or, if multi-label, (C,); "classes": (C,)
Source = Callable[[int], Iterator[Batch]]  # epoch -> batches, read from a cache or made by encoders that are trained

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a manifest: an image or a video clip, the texts that describe it, and its labels."""

    id: str
    split: str
    media: Path  # relative to the manifest's media root
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    group: str  # samples of one group are in one split; "": no group


class Encoder(Protocol):
    """A pretrained network, with the preprocessing that it was trained with."""

    modality: Literal["image", "video", "text"]
    feature_shape: tuple[int, ...]

    def identity(self) -> dict[str, Any]:
        """Return everything that can change the features, as plain JSON values."""
        ...

    def prepare(self, raw: Path | str) -> Tensor:
        """Preprocess one media file or text on the CPU. The result is deterministic and can be pickled.

        Raises:
            ValueError: the file cannot be decoded.
        """
        ...

    def __call__(self, prepared: Tensor) -> Tensor:
        """Return the features [B, *feature_shape] of a batch of prepared items [B, ...]; they are differentiable."""
        ...


class Phase(NamedTuple):
    """A phase of training: only the parameters whose names start with one of `trains` are trained."""

    name: str
    trains: tuple[str, ...] = ("",)
    share: float = 1.0  # share of the configured epochs
    rates: tuple[
        tuple[str, float], ...
    ] = ()  # (prefix of a parameter name, factor of its learning rate); the first match counts

    def rate(self, name: str) -> float:
        """Return the factor of the learning rate of the parameter with this name."""
        return next((factor for prefix, factor in self.rates if name.startswith(prefix)), 1.0)


SINGLE_PHASE = (Phase("head"),)  # trains all parameters


class Predictor(Protocol):
    """A method, or an ensemble of K methods, whose logits are [K,B,C]."""

    def train(self, mode: bool = True) -> Any: ...

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv] alone."""
        ...


class Method(Protocol):
    """A head on features; always an `nn.Module`. Only training reads text (learning using privileged information, LUPI)."""

    needs: tuple[str, ...]  # batch keys that it reads in training
    phases: tuple[Phase, ...]  # trained one after another, each with a new optimiser

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Prepare for a phase: compute statistics of the training split and store them in buffers.

        Args:
            phase: name of the phase that is about to start.
            train: starts an ordered pass over the training split; it may be called more than once.
        """
        ...

    def loss(self, batch: Batch, rng: KeyedRNG, phase: str) -> Batch:
        """Return {"loss": scalar, ...parts}; the parts are logged.

        An ensemble runs several methods as one. Therefore only operations on tensors are allowed here: read no number back
        from a tensor, and assign no attribute.
        """
        ...

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv] alone."""
        ...

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the vectors [B,D] that the classifier reads, from image features alone; used to draw the feature space."""
        ...

    # Methods of nn.Module that the stages use.
    def train(self, mode: bool = True) -> Any: ...
    def named_parameters(self) -> Iterator[tuple[str, Parameter]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
