"""Rival: privileged knowledge distillation from a multimodal teacher (MM-PKD: Aslam et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.common_space import LinearProjector
from pipeline.nn.feature_space import num_classes_in, paired_text
from pipeline.nn.layers import MLP, Dropout, ScaleMode, Standardise, register_hyperparameters
from pipeline.nn.losses import TINY, LabelLoss, classification_losses, weighted_mean
from pipeline.nn.method import Method
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Phase, Shapes

ATTENDED_WIDTH = 32  # of each feature in joint cross-attention


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of MM-PKD. The published code sets beta by a rule for losses of concordance; for cross-entropy it is fixed."""

    width: Annotated[int, Range(1, 65_536), "d, width of the embeddings e_T and e_S"] = 768
    teacher: Annotated[
        Literal["concat", "jca"], "how the teacher joins image and text: side by side, or by joint cross-attention before that"
    ] = "jca"
    teacher_width: Annotated[int, Range(1, 4096), "width of image and of text in the teacher"] = 128
    w_kd: Annotated[
        float, Range(0, 0.9), "beta, weight of the distance to the teacher; that of the cross-entropy is 1 - it"
    ] = 0.2
    cosine: Annotated[
        Literal["sample", "flat"], "sample: a cosine of each sample; flat: one of the whole batch, as the published code has it"
    ] = "sample"
    guard: Annotated[bool, "learn from the teacher only where its cross-entropy is below the student's"] = True
    dropout: Annotated[float, Range(0, 0.99), "probability, on the student's image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


class JointCrossAttention(nn.Module):
    """Joint cross-attention of one vector with j, that vector and another side by side; it correlates their features.

    C = tanh(a h j^T / sqrt(2d)), H = ReLU(h w^T + C W^T), and the output is H v + h.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.affinity = nn.Parameter(torch.ones(()))
        self.own = nn.Linear(1, ATTENDED_WIDTH, bias=False)
        self.correlated = nn.Linear(2 * width, ATTENDED_WIDTH, bias=False)
        self.out = nn.Linear(ATTENDED_WIDTH, 1, bias=False)

    def forward(self, h: Tensor, joint: Tensor) -> Tensor:
        """Map h [B,d] and j [B,2d] to [B,d]."""
        column = h.unsqueeze(2)
        correlation = torch.tanh(self.affinity * column * joint.unsqueeze(1) / math.sqrt(joint.shape[1]))
        return self.out(F.relu(self.own(column) + self.correlated(correlation))).squeeze(2) + h


class MultimodalTeacher(nn.Module):
    """Image and text -> embedding e_T -> logits."""

    def __init__(self, config: Config, image_width: int, text_width: int, num_classes: int) -> None:
        super().__init__()
        width = config.teacher_width
        self.image, self.text = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.attentions = nn.ModuleList(JointCrossAttention(width) for _ in range(2 if config.teacher == "jca" else 0))
        self.layers = MLP([2 * width, 2 * width, config.width])
        self.classifier = nn.Linear(config.width, num_classes)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding [B,d] and the logits [B,C] of standardised image features [B,Dv] and text features [B,Ds]."""
        parts = [F.leaky_relu(self.image(image)), F.leaky_relu(self.text(text))]
        joint = torch.cat(parts, dim=1)
        if self.attentions:
            joint = torch.cat([attend(h, joint) for attend, h in zip(self.attentions, parts, strict=True)], dim=1)
        embedding = F.leaky_relu(self.layers(joint))
        return embedding, self.classifier(embedding)


def cosine_distance(student: Tensor, teacher: Tensor, share: Tensor, weight: Tensor, is_flat: bool) -> Tensor:
    """Return the mean over the batch of share * (1 - cos) of embeddings [B,d].

    Args:
        student: e_S.
        teacher: e_T.
        share: which samples learn, 0 or 1, [B].
        weight: [B], see `nn.losses`.
        is_flat: one cosine of all rows that learn, one behind the other, times their mean share, instead of one per sample.
    """
    if not is_flat:
        return weighted_mean(share * (1.0 - F.cosine_similarity(student, teacher, dim=1)), weight)
    learns = (share * weight).unsqueeze(1)
    a, b = (student * learns).flatten(), (teacher * learns).flatten()
    return (1.0 - F.cosine_similarity(a, b, dim=0)) * (learns.sum() / weight.sum().clamp(min=TINY))


class MMPKD(Method):
    """A teacher reads image and text, is trained by itself, and is frozen. Then the student, which reads images alone, has
    (1 - w_kd) CE + w_kd (1 - cos(e_T, e_S)).
    """

    Config = Config
    needs = ("image", "text", "paired", "label")
    phases = (Phase("teacher", ("teacher.",), share=0.5), Phase("head", ("image_projector.", "classifier.")))
    symbols: ClassVar[Mapping[str, str]] = {"beta": "w_kd", "d": "width"}
    paper: ClassVar[Mapping[str, Any]] = {"width": 128}
    without_text: ClassVar[Mapping[str, Any]] = {"w_kd": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_kd": (0.1, 0.2, 0.5, 0.8), "teacher": ("concat", "jca")}

    w_kd: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        num_classes = num_classes_in(shapes)
        self.label_loss: LabelLoss = config.label_loss
        self.is_flat, self.has_guard = config.cosine == "flat", config.guard
        self.image_scale, self.text_scale = Standardise(config.scale, image_width), Standardise(config.scale, text_width)
        self.dropout, self.image_projector = Dropout(config.dropout), LinearProjector(image_width, config.width)
        self.teacher = MultimodalTeacher(config, image_width, text_width, num_classes)
        self.classifier = nn.Linear(config.width, num_classes)
        register_hyperparameters(self, w_kd=config.w_kd)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16, "teacher_width": 8}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.image_scale.fit(batch["image"] for batch in train())
        self.text_scale.fit(paired_text(batch) for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss and its parts; samples without text teach nothing.

        Args:
            batch: see `types.Batch`.
            phase: "teacher" has the teacher's cross-entropy; "head" has the student's loss, and no gradient of the teacher.
        """
        if phase == "teacher":
            _, ce_teacher = self.teach(batch)
            return {"loss": weighted_mean(ce_teacher, batch["paired"])}
        with torch.no_grad():
            e_t, ce_teacher = self.teach(batch)
        e_s = self.embed(batch["image"])
        ces = classification_losses(self.classifier(e_s), batch["label"], self.label_loss)
        learns = (ce_teacher < ces.detach()).to(ces.dtype) if self.has_guard else torch.ones_like(ces)
        kd = cosine_distance(e_s, e_t, learns, batch["paired"], self.is_flat)
        ce, ce_teacher = ces.mean(), weighted_mean(ce_teacher, batch["paired"])
        return {"loss": (1.0 - self.w_kd) * ce + self.w_kd * kd, "ce": ce, "kd": kd, "ce_teacher": ce_teacher}

    def teach(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the teacher's embeddings e_T [B,d] and the cross-entropy of each sample [B]."""
        e_t, logits = self.teacher(self.image_scale(batch["image"]), self.text_scale(batch["text"]))
        return e_t, classification_losses(logits, batch["label"], self.label_loss)

    def embed(self, image: Tensor) -> Tensor:
        """Return e_S [B,d] from image features [B,Dv]."""
        x_v = self.dropout(self.image_scale(image))
        return self.image_projector(x_v, torch.ones_like(x_v[:, 0]))

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the student's logits [B,C] from image features [B,Dv]."""
        return self.classifier(self.embed(image))

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return e_S [B,d] from image features [B,Dv]."""
        return self.embed(image)
