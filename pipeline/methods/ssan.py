"""Rival: simultaneous semantic alignment (SSAN: Li et al., ACM MM 2020); classes of texts teach those of images, as domains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.common_space import CommonSpaceHead
from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, register_hyperparameters
from pipeline.nn.losses import LabelLoss, class_sums, classification_loss, weighted_mean
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes

SLOPE = 0.2  # of SSAN's leaky ReLUs
INITIAL_STD = 0.01  # of SSAN's weights
PROBABILITY_EPSILON = 1e-5  # added to probabilities before their logarithm
ORIGINAL_CLASSES = 10  # about as many have the original's data, and it sums over them; here, losses are means over classes


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of SSAN. The weights are those of the published code, for about 10 classes, where a sum has become a mean."""

    native: Annotated[
        bool, "SSAN's projectors, of two layers and unit length, its classifier, and its initial weights, instead of MARNet's"
    ] = False
    width: Annotated[int, Range(1, 65_536), "d, width of the common embedding"] = 768
    w_ce_text: Annotated[float, Range(0), "weight of the cross-entropy of the texts"] = 1.0
    w_soft: Annotated[
        float, Range(0, ORIGINAL_CLASSES), "10 alpha, weight of the soft labels; the cross-entropy of the images has 1 - alpha"
    ] = 1.0
    w_esa: Annotated[float, Range(0), "10 beta, weight of the distance of class centres"] = 0.04
    w_domain: Annotated[float, Range(0), "gamma, weight of telling images from texts, which the embeddings work against"] = 0.1
    tau: Annotated[float, Range(0.01), "T, temperature of the soft labels"] = 5.0
    centres: Annotated[Literal["three", "two"], "class centres that are compared: of texts, of images, and of both; or two"] = (
        "three"
    )
    text_classes: Annotated[
        Literal["batch", "split"], "texts that give soft labels and centres; split: all, once per epoch, without a gradient"
    ] = "batch"
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class UnitProjector(nn.Module):
    """Two linear layers, each with a leaky ReLU, and a division by the length: SSAN's projector, a `Projector`."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        hidden = (in_width + out_width) // 2
        self.first, self.second = nn.Linear(in_width, hidden), nn.Linear(hidden, out_width)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `common_space.Projector`."""
        return F.normalize(F.leaky_relu(self.second(F.leaky_relu(self.first(x), SLOPE)), SLOPE), dim=1)


def reversal_strength(progress: Tensor) -> Tensor:
    """Return 2 / (1 + exp(-10 p)) - 1 of the progress p from 0 to 1."""
    return torch.tanh(5.0 * progress)  # the same function


def reverse_gradient(x: Tensor, strength: Tensor | float) -> Tensor:
    """Return x; its gradient is multiplied by -strength."""
    return x.detach() + strength * (x.detach() - x)


def soft_label_loss(logits: Tensor, label: Tensor, soft: Tensor, is_known: Tensor) -> Tensor:
    """Return L_soft = -sum_c q_k[c] log(softmax(z_i)[c] + 1e-5), a mean over samples i of class k, then over classes.

    Args:
        logits: of images [B,C].
        label: see `classification_loss`.
        soft: q_k, the class probabilities that samples of class k are to have [C,C].
        is_known: which rows of `soft` count, bool [C].
    """
    sums, count = class_sums(torch.log(logits.softmax(1) + PROBABILITY_EPSILON), label, len(soft))
    return _mean_of_classes(-(soft * sums).sum(1) / count.clamp(min=1.0), (count > 0) & is_known)


def centre_distance(m_s: Tensor, m_v: Tensor, n_s: Tensor, n_v: Tensor, has_three: bool) -> Tensor:
    """Return L_ESA: |m_s - m_v|^2 of each class, a mean over the classes that both have.

    With `has_three`, the distances of both to the centre of all their samples are added: with as many texts as images, half as
    much again.

    Args:
        m_s: class centres of texts [C,d].
        m_v: class centres of images [C,d].
        n_s: the number of texts of each class [C].
        n_v: the number of images of each class [C].
        has_three: see above.
    """
    share = (n_s / (n_s + n_v).clamp(min=1.0)).unsqueeze(1)
    distance = (m_s - m_v).square().sum(1)
    if has_three:
        both = share * m_s + (1.0 - share) * m_v
        distance = distance + (m_s - both).square().sum(1) + (m_v - both).square().sum(1)
    return _mean_of_classes(distance, (n_s > 0) & (n_v > 0))


def _mean_of_classes(values: Tensor, is_present: Tensor) -> Tensor:
    """Return the mean of values [C] over the classes that are present, bool [C]; 0 if none is."""
    return (values * is_present).sum() / is_present.sum().clamp(min=1)


class SSAN(CommonSpaceHead):
    """(1 - alpha) CE of the images + w_ce_text CE of the texts, by one classifier,
    + w_soft L_soft + w_esa L_ESA + w_domain L_D.

    Texts are the source domain and images the target, whose classes are known here: there are no pseudo-labels.

    - L_soft, implicit alignment: images of a class have the probabilities that its texts have on average at temperature T.
    - L_ESA, explicit alignment: the class centres of texts and images come together.
    - L_D: a layer tells images from texts, and the reversed gradient lets it fail. The strength of the reversal grows with the
      progress of the phase from 0 to 1, 2 / (1 + exp(-10 p)) - 1, p in the middle of the epoch; in stage 3 it is that at p = 1.

    L_ESA and L_D read embeddings at unit length. Multi-label: a sample counts in each of its classes.
    """

    Config = Config
    symbols: ClassVar[Mapping[str, str]] = {"gamma": "w_domain", "T": "tau", "d": "width"}
    paper: ClassVar[Mapping[str, Any]] = {"native": True, "width": 256}
    without_text: ClassVar[Mapping[str, Any]] = {"w_ce_text": 0.0, "w_soft": 0.0, "w_esa": 0.0, "w_domain": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_soft": (0.3, 1.0, 3.0), "w_esa": (0.0, 0.04, 0.4)}

    progress: Tensor
    tau: Tensor
    text_centres: Tensor
    text_count: Tensor
    text_soft: Tensor
    w_ce_text: Tensor
    w_domain: Tensor
    w_esa: Tensor
    w_soft: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes, partial(UnitProjector, out_width=config.width) if config.native else None)
        self.num_classes, self.native = num_classes_in(shapes), config.native
        self.has_three, self.has_split = config.centres == "three", config.text_classes == "split"
        self.discriminator = nn.Linear(config.width, 1)
        if config.native:
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=INITIAL_STD)
                    nn.init.zeros_(layer.bias)
        if self.has_split:
            self.register_buffer("text_soft", torch.zeros(self.num_classes, self.num_classes))
            self.register_buffer("text_centres", torch.zeros(self.num_classes, config.width))
            self.register_buffer("text_count", torch.zeros(self.num_classes))
        register_hyperparameters(self, w_ce_text=config.w_ce_text, w_soft=config.w_soft, w_esa=config.w_esa)
        register_hyperparameters(self, w_domain=config.w_domain, tau=config.tau, progress=1.0)

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        super().begin(phase, train)
        self._update_text_classes(train)

    def begin_epoch(self, phase: str, progress: float, train: Callable[[], Iterator[Batch]]) -> None:
        """Store the progress, and compute soft labels and centres if they are those of all texts."""
        self.progress.fill_(progress)
        self._update_text_classes(train)

    @torch.no_grad()
    def _update_text_classes(self, train: Callable[[], Iterator[Batch]]) -> None:
        if not self.has_split:
            return
        totals = [torch.zeros_like(each) for each in (self.text_soft, self.text_centres, self.text_count)]
        for batch in train():
            h_s = self.common.text(batch["text"], batch["paired"])
            for total, sums in zip(totals, self._text_sums(h_s, batch["label"], batch["paired"]), strict=True):
                total += sums
        count = totals[-1].clamp(min=1.0).unsqueeze(1)
        self.text_soft.copy_(totals[0] / count)
        self.text_centres.copy_(totals[1] / count)
        self.text_count.copy_(totals[2])

    def _text_sums(self, h_s: Tensor, label: Tensor, paired: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over the texts of each class: of softmax(z_s / T) [C,C], of unit embeddings [C,d], and of ones [C]."""
        soft, count = class_sums((self.logits(h_s) / self.tau).softmax(1).detach(), label, self.num_classes, paired)
        centres, _ = class_sums(F.normalize(h_s, dim=1), label, self.num_classes, paired)
        return soft, centres, count

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss and its parts."""
        label, paired = batch["label"], batch["paired"]
        h_v, h_s = self.embeddings(batch)
        z_v = self.logits(h_v)
        ce = classification_loss(z_v, label, self.label_loss)
        ce_text = classification_loss(self.logits(h_s), label, self.label_loss, paired)
        with torch.autocast(h_v.device.type, enabled=False):  # a small distance is a difference of large numbers
            soft, esa = self.semantic_losses(h_v.float(), h_s.float(), z_v.float(), label, paired)
        domain = self.domain_loss(h_v, h_s, paired)
        loss = self.w_ce_text * ce_text + (1.0 - self.w_soft / ORIGINAL_CLASSES) * ce
        loss = loss + self.w_soft * soft + self.w_esa * esa + self.w_domain * domain
        return {"loss": loss, "ce": ce, "ce_text": ce_text, "soft": soft, "esa": esa, "domain": domain}

    def semantic_losses(self, h_v: Tensor, h_s: Tensor, z_v: Tensor, label: Tensor, paired: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_soft and L_ESA of embeddings h_v and h_s [B,d], and of the images' logits z_v [B,C]."""
        sums, n_v = class_sums(F.normalize(h_v, dim=1), label, self.num_classes)
        m_v = sums / n_v.clamp(min=1.0).unsqueeze(1)
        if self.has_split:  # as many texts as images, as in a batch
            q, m_s, n_s = self.text_soft, self.text_centres, n_v * (self.text_count > 0)
        else:
            soft, centres, n_s = self._text_sums(h_s, label, paired)
            q, m_s = (each / n_s.clamp(min=1.0).unsqueeze(1) for each in (soft, centres))
        return soft_label_loss(z_v, label, q, n_s > 0), centre_distance(m_s, m_v, n_s, n_v, self.has_three)

    def domain_loss(self, h_v: Tensor, h_s: Tensor, paired: Tensor) -> Tensor:
        """Return L_D, the binary cross-entropy of telling images from texts; each of the two counts half."""
        strength = reversal_strength(self.progress)
        d_v, d_s = (self.discriminator(reverse_gradient(F.normalize(h, dim=1), strength)).squeeze(1) for h in (h_v, h_s))
        return 0.5 * (F.softplus(d_v).mean() + weighted_mean(F.softplus(-d_s), paired))

    def logits(self, h: Tensor) -> Tensor:
        """Return logits [B,C] of embeddings [B,d]."""
        z = self.classifier(h)
        return F.leaky_relu(z, SLOPE) if self.native else z

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        return self.logits(self.feature(image, rng))
