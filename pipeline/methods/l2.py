"""One-step L2 alignment: the image feature is mapped to the text's by a squared error, and classified (SeDA Fig. 4a)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in, paired_text
from pipeline.nn.layers import MLP, Dropout, ScaleMode, Standardise, register_hyperparameters
from pipeline.nn.losses import LabelLoss, MSEReduction, classification_loss, mse_loss
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of the L2 alignment. The paper gives none."""

    hidden: Annotated[int, Range(1, 65_536), "width of the hidden layers"] = 1024
    num_hidden: Annotated[int, Range(0, 16), "number of hidden layers; 0: a linear map"] = 1
    w_mse: Annotated[float, Range(0), "lam, weight of the squared error"] = 1.0
    mse_reduction: Annotated[MSEReduction, "over the text dimensions"] = "mean"
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features and after every hidden layer"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class L2(Method):
    """CE of f(x_v) + lam |f(x_v) - x_s|^2, for a map f with GELU between its layers: one step, and no random number.

    The target x_s is the text feature as it is, standardised: nothing that is learned could collapse.
    """

    Config = Config
    needs = ("image", "text", "paired", "label")
    symbols: ClassVar[Mapping[str, str]] = {"lam": "w_mse"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_mse": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_mse": (0.1, 0.3, 1.0, 3.0), "num_hidden": (0, 1, 3)}

    w_mse: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        self.label_loss: LabelLoss = config.label_loss
        self.mse_reduction: MSEReduction = config.mse_reduction
        self.image_scale, self.text_scale = Standardise(config.scale, image_width), Standardise(config.scale, text_width)
        self.dropout = Dropout(config.dropout)
        self.projector = MLP([image_width, *[config.hidden] * config.num_hidden, text_width], config.dropout)
        self.classifier = nn.Linear(text_width, num_classes_in(shapes))
        register_hyperparameters(self, w_mse=config.w_mse)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"hidden": 16}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.image_scale.fit(batch["image"] for batch in train())
        self.text_scale.fit(paired_text(batch) for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return CE + lam L_MSE, and both parts."""
        projected = self.project(batch["image"])
        ce = classification_loss(self.classifier(projected), batch["label"], self.label_loss)
        target = self.text_target(batch["text"]).detach()  # data, also if it is trained
        mse = mse_loss(projected, target, self.mse_reduction, batch["paired"])
        return {"loss": ce + self.w_mse * mse, "ce": ce, "mse": mse}

    def project(self, image: Tensor) -> Tensor:
        """Return f(x_v) [B,Ds] from image features [B,Dv]."""
        return self.projector(self.dropout(self.image_scale(image)))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return f(x_v) [B,Ds] from image features [B,Dv]."""
        return self.project(image)

    def text_target(self, text: Tensor) -> Tensor:
        """Return x_s [B,Ds] from text features."""
        return self.text_scale(text)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.classifier(self.project(image))
