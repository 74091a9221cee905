"""Types that all stages share.

Letters of shapes: B batch, N rows, T tokens, D width, C classes, K cells of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

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


class Phase(NamedTuple):
    """A phase of training: only the parameters whose names start with one of `trains` are trained.

    A phase with `candidates` trains nothing: each of its epochs puts one candidate into the method (`Method.choose`) and
    validates it, and the run keeps the best on the validation metric. It is the last phase of its method, the only one that is
    validated.
    """

    name: str
    trains: tuple[str, ...] = ("",)
    share: float = 1.0  # share of the configured epochs
    rates: tuple[
        tuple[str, float], ...
    ] = ()  # (prefix of a parameter name, factor of its learning rate); the first match counts
    candidates: int = 0  # how many are tried; such a phase has trains=()
    limits: tuple[tuple[str, float], ...] = ()  # (prefix of a parameter name, the largest value that a step leaves in it)
    undecayed: tuple[str, ...] = ()  # prefixes of the names of parameters without weight decay

    def rate(self, name: str) -> float:
        """Return the factor of the learning rate of the parameter with this name."""
        return next((factor for prefix, factor in self.rates if name.startswith(prefix)), 1.0)

    def limit(self, name: str) -> float | None:
        """Return the largest value of the parameter with this name; None: it has no limit."""
        return next((limit for prefix, limit in self.limits if name.startswith(prefix)), None)

    def inside(self, part: str) -> Phase:
        """Return the phase as one of a larger method, whose parameter names have "part." in front."""

        def longer(pairs: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
            return tuple((f"{part}.{prefix}", number) for prefix, number in pairs)

        trains, undecayed = (tuple(f"{part}.{prefix}" for prefix in each) for each in (self.trains, self.undecayed))
        return self._replace(trains=trains, rates=longer(self.rates), limits=longer(self.limits), undecayed=undecayed)


class ClassStream(NamedTuple):
    """A second stream of training samples: in every step, so many classes, and so many samples of each.

    They stand in the batch as "class_image" [M,Dv], "class_text" [M,Ds] and "class_label" [M], the class drawn for.
    """

    num_classes: int
    num_samples: int


SINGLE_PHASE = (Phase("head"),)  # trains all parameters


class Predictor(Protocol):
    """A method, or an ensemble of K methods, whose logits are [K,B,C]."""

    def train(self, mode: bool = True) -> Any: ...

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv] alone."""
        ...
