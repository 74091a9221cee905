"""Instance-wise alignment of image and text (ITA), the part of MGCA that both papers compare with (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.common_space import CommonSpaceHead
from pipeline.nn.layers import BATCH_NORM_EPSILON, ScaleMode, batch_normalise, moments, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss, info_nce, same_labels
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes

NATIVE_HIDDEN, NATIVE_WIDTH = 2048, 128  # of MGCA's projectors


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of ITA. The weight of its loss beside the cross-entropy is ours."""

    native: Annotated[bool, "MGCA's projectors, of widths 2048 and 128, instead of MARNet's"] = False
    width: Annotated[int, Range(1, 65_536), "d, width of the common space; native=true does not read it"] = 768
    w_ita: Annotated[float, Range(0), "lam, weight of the alignment loss"] = 1.0
    tau: Annotated[float, Range(1e-3), "temperature of the cosine"] = 0.07
    mask_same_class: Annotated[bool, "samples with the same labels are no negatives; the original has them"] = False
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class NormalisedProjector(nn.Module):
    """Linear, batch normalisation, ReLU, Linear: MGCA's projector up to its last normalisation, a `Projector`.

    Training normalises with the batch. Prediction needs no running averages: mean and variance of a linear layer's outputs over
    the training split follow from the mean and the covariance of its inputs, W m and diag(W S W^T).
    """

    mean: Tensor
    covariance: Tensor

    def __init__(self, in_width: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_width, NATIVE_HIDDEN, bias=False)  # the normalisation would remove a bias
        self.gain, self.shift = nn.Parameter(torch.ones(NATIVE_HIDDEN)), nn.Parameter(torch.zeros(NATIVE_HIDDEN))
        self.last = nn.Linear(NATIVE_HIDDEN, NATIVE_WIDTH)
        self.register_buffer("mean", torch.zeros(in_width))
        self.register_buffer("covariance", torch.eye(in_width))

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Store the statistics of the inputs, batches [B,D] of the training split."""
        mean, covariance = moments(batches, full_covariance=True)
        self.mean.copy_(mean)
        self.covariance.copy_(covariance)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `common_space.Projector`."""
        normalised = batch_normalise(self.first(x), weight) if self.training else self._normalise(x)
        return self.last(F.relu(self.gain * normalised + self.shift))

    def _normalise(self, x: Tensor) -> Tensor:
        rows = self.first.weight
        variance = ((rows @ self.covariance) * rows).sum(1)
        return self.first(x - self.mean) * torch.rsqrt(variance + BATCH_NORM_EPSILON)


class ITA(CommonSpaceHead):
    """MARNet's EMA with a choice of the projectors; with the defaults it is EMA, as in MARNet's tables.

    With native=true, the classifier reads the projector's output before the last batch normalisation, which has no parameters
    and belongs to the contrastive loss. MGCA's token-wise and prototype alignments are left out, as in both papers.

    --preset paper has MGCA's projectors. Its learning rate of 2e-5 is one of whole encoders, and its weight decay of 0.05 that
    of another optimiser: the head keeps those of the papers.
    """

    Config = Config
    symbols: ClassVar[Mapping[str, str]] = {"lam": "w_ita", "tau": "tau", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_ita": 0.0}
    paper: ClassVar[Mapping[str, Any]] = {"native": True}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_ita": (0.1, 0.3, 1.0, 3.0), "tau": (0.03, 0.07, 0.2)}

    tau: Tensor
    w_ita: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if config.native:
            super().__init__(config, shapes, NormalisedProjector, NATIVE_WIDTH)
        else:
            super().__init__(config, shapes)
        self.native, self.mask_same_class = config.native, config.mask_same_class
        register_hyperparameters(self, tau=config.tau, w_ita=config.w_ita)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        super().begin(phase, train)
        if isinstance(self.common.image_projector, NormalisedProjector):
            self.common.image_projector.fit(self.common.image_scale(batch["image"]) for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return CE + lam L_ITA with L_ITA = L_v2s + L_s2v (MARNet eq. 9-11), and both parts."""
        paired, label = batch["paired"], batch["label"]
        h_v, h_s = self.embeddings(batch)
        ce = classification_loss(self.classifier(h_v), label, self.label_loss)
        if self.native:
            h_v, h_s = batch_normalise(h_v, torch.ones_like(paired)), batch_normalise(h_s, paired)
        v2s, s2v = info_nce(h_v, h_s, self.tau, paired, same_labels(label) if self.mask_same_class else None)
        ita = v2s + s2v
        return {"loss": ce + self.w_ita * ita, "ce": ce, "ita": ita}
