"""Any head on top of the baseline: log p ~ log p_baseline + lambda log p_head, with lambda >= 0 chosen on validation.

Both are trained, each by itself, and then lambda is the best of a few values on validation. One of them is 0, the baseline
alone, so on validation the result is never below that baseline. The sum is divided by 1 + lambda: that changes the rank of no
class of a sample, but without it two predictions that agree would be taken for independent witnesses, and be far too sure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from pipeline.methods import baseline
from pipeline.nn.method import Method
from pipeline.runtime import plugins
from pipeline.runtime.assignments import parse_assignments, setting_text
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Settings, configure, flatten, recorded_settings
from pipeline.types import Batch, Phase, Shapes

HEAD_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # candidates of lambda


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of the two parts."""

    head: Annotated[str, "name of a method of this package, not stacked"] = "seda"
    head_settings: Annotated[str, "of the head: NAME=VALUE NAME=VALUE, as with --set; the others have the head's defaults"] = ""
    base: baseline.Config = field(default_factory=baseline.Config)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head == "stacked" or plugins.is_external("methods", self.head):
            raise UserError(f"head is {self.head!r}; take another method of this package: a run records no file of its head")
        settings = flatten(asdict(self.head_config))
        losses = [value for name, value in settings.items() if name.rpartition(".")[2] == "label_loss"] or ["softmax_kl"]
        if "bce" in losses and settings.get("fusion") in ("sum", "hm"):
            raise UserError("marnet's fusions sum and hm give no log-odds, which label_loss=bce adds: take fusion=concat")
        if {value == "bce" for value in (*losses, self.base.label_loss)} == {True, False}:
            raise UserError("base.label_loss and label_loss in head_settings must both be bce, or neither: scores are added")

    def recorded(self) -> dict[str, Any]:
        """Return the settings, with all those of the head, also where they have the defaults of today."""
        settings = flatten(recorded_settings(self.head_config)).items()
        return {**asdict(self), "head_settings": " ".join(f"{name}={setting_text(value)}" for name, value in settings)}

    @property
    def head_config(self) -> Any:
        """The `Config` of the head.

        Raises:
            UserError: `head` is no method, or a setting is not one of its.
        """
        method = plugins.get("methods", self.head)
        try:
            return configure(method.Config, parse_assignments(self.head_settings.split(), "it"), method.symbols)
        except UserError as error:
            raise UserError(f"head_settings of {self.head}: {error}") from error


class Stacked(Method):
    """The baseline and a head, side by side, and the weight of the head.

    The log-probabilities are those of a softmax. For multi-label data with label_loss=bce they are the log-odds of each class,
    whose sum is the same product of two predictions. A head that chooses on validation itself, such as knn, does it together
    with lambda, over all pairs.
    """

    Config = Config
    needs = ("image", "text", "paired", "label", "key")
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"base.dropout": (0.0, 0.2, 0.5)}

    head_weight: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.base = baseline.Baseline(config.base, shapes)
        self.head = plugins.get("methods", config.head)(config.head_config, shapes)
        self.class_stream = self.head.class_stream
        self.has_own_scores = config.base.label_loss == "bce" and bool(shapes["label"])
        self.register_buffer("head_weight", torch.zeros(()))
        (base_phase,), head_phases = self.base.phases, self.head.phases
        self.choices = tuple(phase for phase in head_phases if phase.candidates)  # of the head itself, at most one phase
        trained = [phase.inside("head")._replace(name=f"head.{phase.name}") for phase in head_phases if not phase.candidates]
        num_candidates = len(HEAD_WEIGHTS) * self._choices_per_weight
        weight_phase = Phase("weight", trains=(), candidates=num_candidates)
        self.phases = (base_phase.inside("base")._replace(name="base"), *trained, weight_phase)

    @property
    def _choices_per_weight(self) -> int:
        return sum(phase.candidates for phase in self.choices) or 1

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        settings = plugins.get("methods", cls.Config.head).small()
        return {"head_settings": " ".join(f"{name}={setting_text(value)}" for name, value in settings.items())}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Prepare the part that the phase trains, or that has a choice of its own."""
        if phase == "base":
            self.base.begin(self.base.phases[0].name, train)
        elif phase.startswith("head."):
            self.head.begin(phase.removeprefix("head."), train)
        else:
            for choice in self.choices:
                self.head.begin(choice.name, train)

    def begin_epoch(self, phase: str, progress: float, train: Callable[[], Iterator[Batch]]) -> None:
        """Prepare the head for an epoch of a phase of its own."""
        if phase.startswith("head."):
            self.head.begin_epoch(phase.removeprefix("head."), progress, train)

    def choose(self, candidate: int) -> None:
        """Set lambda and, within each lambda, the head's own candidate."""
        number, choice = divmod(candidate, self._choices_per_weight)
        self.head_weight.fill_(HEAD_WEIGHTS[number])
        if self.choices:
            self.head.choose(choice)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss and the parts of the method that the phase trains."""
        if phase == "base":
            return self.base.loss(batch, self.base.phases[0].name)
        return self.head.loss(batch, phase.removeprefix("head."))

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return (log p_baseline + lambda log p_head) / (1 + lambda), [B,C], from image features [B,Dv]."""
        base, head = (self._scores(part.predict(image, rng)) for part in (self.base, self.head))
        return (base + self.head_weight * head) / (1.0 + self.head_weight)

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.float() if self.has_own_scores else torch.log_softmax(logits.float(), dim=1)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the feature of the head [B,D], from image features [B,Dv]."""
        return self.head.feature(image, rng)

    def text_target(self, text: Tensor) -> Tensor | None:
        """Return that of the head."""
        return self.head.text_target(text)

    def generated_text(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return that of the head."""
        return self.head.generated_text(image, rng)
