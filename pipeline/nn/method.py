"""`Method`: the base class of all heads. A plug-in of the kind "methods" is one file with one subclass of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from pipeline.runtime.rng import KeyedRNG
from pipeline.types import SINGLE_PHASE, Batch, ClassStream, Phase, Shapes


class Method(nn.Module):
    """A head on features. Only training reads text (learning using privileged information, LUPI).

    Rules that `plugins.check_method` and the contract tests hold:

    - "a method trains and predicts": it defines `loss`, `predict` and `feature`; `choose` if it has a phase of candidates, and
      no `loss` if it has no other.
    - "settings are typed": the fields of its Config are bool, int, float, str, a Literal, or a config themselves.
    - "image is needed": `needs` names batch keys, "image" among them.
    - "text is weighted by paired": a method that needs "text" needs "paired" too, because some samples have no text.
    - "prediction reads images alone": the arguments of `predict` are image and rng.
    - "a loss takes batch and phase": its random numbers come from torch, which the loop seeds in every step.
    - "no number is read back": `loss`, `predict` and `feature` run on tensors alone. An ensemble runs them for several heads at
      once, and reading a number back waits for the GPU.
    - "numbers are tensors": a number of the config that may differ between heads of one ensemble is a buffer (see
      `layers.register_hyperparameters`), not an attribute.
    - "a sample is predicted by itself": its prediction does not depend on the other samples of the batch.
    """

    Config: ClassVar[type[Any]]  # a frozen dataclass: the settings, all with defaults; it may have parts, see `Settings`
    needs: tuple[str, ...]  # batch keys that training reads
    symbols: ClassVar[Mapping[str, str]] = {}  # letters of the papers -> settings
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {}  # the grid of the paper: settings -> values
    paper: ClassVar[Mapping[str, Any]] = {}  # settings of --preset paper where the default is another one
    paper_training: ClassVar[Mapping[str, Any]] = {}  # and training settings, where the preset's are others
    without_text: ClassVar[Mapping[str, Any]] = {}  # a head without a loss against the text, for `diffalign ablate text`
    prediction: ClassVar[tuple[str, ...]] = ()  # settings that may change after training
    reads_tokens: ClassVar[bool] = False  # features may be tokens, [B,T,D]; else `open_features` refuses all but vectors [B,D]
    phases: tuple[Phase, ...] = SINGLE_PHASE  # trained one after another, each with a new optimiser
    class_stream: ClassStream | None = None  # what stage 2 adds to every batch; stage 3 adds nothing

    def __init__(self, config: Any, shapes: Shapes) -> None:
        """Make an untrained head.

        Args:
            config: an object of the class's `Config`.
            shapes: the shapes of the columns of a batch.
        """
        super().__init__()

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head, for tests; by default none differs from the default."""
        return {}

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode; in training, parts whose parameters are all frozen stay in evaluation mode."""
        super().train(mode)
        for part in self.modules():
            trained = [parameter.requires_grad for parameter in part.parameters()]
            if mode and part is not self and trained and not any(trained):
                part.train(False)
        return self

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Prepare for a phase: compute statistics of the training split and store them in buffers. By default, do nothing.

        Random numbers come from torch's own functions: the loop seeds them with (seed, phase).

        Args:
            phase: name of the phase that is about to start.
            train: starts an ordered pass over the training split; it may be called more than once.
        """

    def begin_epoch(self, phase: str, progress: float, train: Callable[[], Iterator[Batch]]) -> None:
        """Prepare for an epoch: put what depends on it into buffers, in place as in `choose`. By default, do nothing.

        It has no gradients, draws no random numbers, and does not depend on the mode. Stage 3 does not call it.

        Args:
            phase: name of the phase.
            progress: the share of the phase that is over in the middle of the epoch, from 0 to 1.
            train: see `begin`.
        """

    def choose(self, candidate: int) -> None:
        """Put a candidate of the last phase into buffers, in place; see `Phase.candidates`.

        The loop calls it for 0, 1, ... and validates each. Of equal ones, the first is kept: let the simplest come first. An
        ensemble holds the buffers of its heads as views, so that a new tensor would not reach it.
        """
        raise NotImplementedError

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return {"loss": scalar, ...parts}; the parts are logged. A phase with candidates has no loss.

        Random numbers come from torch's own functions and layers, such as `torch.rand` and `layers.Dropout`: before every step
        the loop seeds them with (seed, phase, epoch, step).

        An ensemble runs several methods as one. Therefore only operations on tensors are allowed here: read no number back
        from a tensor, and assign no attribute.
        """
        raise NotImplementedError

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv] alone."""
        raise NotImplementedError

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the vectors [B,D] that the classifier reads, from image features alone; used to draw the feature space."""
        raise NotImplementedError

    def text_target(self, text: Tensor) -> Tensor | None:
        """Return what `generated_text` is to be like [B,D], from text features; None, the default: this head generates no text.

        Both are compared on validation samples when a run ends, to say whether the head aligns to the text.
        """
        return None

    def generated_text(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the text vectors [B,D] that a head with a `text_target` generates from images; by default, `feature`."""
        return self.feature(image, rng)
