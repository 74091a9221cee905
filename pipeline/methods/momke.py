"""Rival: mixture of modality knowledge experts (MoMKE: Xu et al., ACM Multimedia 2024), tested with images alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import MLP, Dropout, ScaleMode, Standardise, multi_head_attention, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss
from pipeline.nn.method import Method
from pipeline.nn.tokens import paired_words, pooled_shapes, token_mean, word_mask
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Phase, Shapes

NUM_EXPERTS = 2  # of images, and of texts


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of MoMKE; width, depth and heads are those of the published scripts."""

    width: Annotated[int, Range(1, 65_536), "D_e, width of the experts"] = 256
    depth: Annotated[int, Range(1, 64), "layers of an expert"] = 4
    num_heads: Annotated[int, Range(1, 64), "heads of the attention among tokens; it divides width"] = 2
    condition: Annotated[
        Literal["image", "mixed"],
        "what the second phase sees: images alone, as prediction does, or the texts of a random half of the samples, too",
    ] = "image"
    w_ce_text: Annotated[float, Range(0), "weight of the texts' cross-entropy while each expert learns by itself"] = 1.0
    dropout: Annotated[float, Range(0, 0.99), "probability, on the projected features and on the fused ones"] = 0.2
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise UserError(f"num_heads is {self.num_heads}; choose a divisor of width, {self.width}")


class ExpertLayer(nn.Module):
    """x + o + MLP(o), where o is the attention among the tokens of a sample. A vector is one token, of weight 1: o = V x."""

    def __init__(self, width: int, num_heads: int = 0) -> None:
        """Make the layer of tokens or, with 0 heads, that of vectors."""
        super().__init__()
        self.num_heads = num_heads
        self.value, self.mlp = nn.Linear(width, width), MLP([width, width, width])
        self.query_key = nn.Linear(width, 2 * width) if num_heads else None

    def forward(self, x: Tensor, is_token: Tensor | None = None) -> Tensor:
        """Map tokens [B,T,D] or vectors [B,D] to as many; nobody attends to tokens that `is_token` [B,T] does not mark."""
        value = self.value(x)
        if self.query_key is not None:
            query, key = self.query_key(x).chunk(2, dim=-1)
            value = multi_head_attention(query, torch.cat([key, value], dim=-1), self.num_heads, is_token)
        return x + value + self.mlp(value)


class Expert(nn.Sequential):
    """Layers of one kind, one after another."""

    def forward(self, input: Tensor, is_token: Tensor | None = None) -> Tensor:
        """See `ExpertLayer`."""
        for layer in self:
            input = layer(input, is_token)
        return input


class ExpertMixture(nn.Module):
    """All experts see a vector or a token, and its router says how much each of them counts."""

    def __init__(self, width: int, depth: int, num_experts: int, num_heads: int = 0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(*(ExpertLayer(width, num_heads) for _ in range(depth))) for _ in range(num_experts))

    def forward(self, x: Tensor, router: nn.Module, is_token: Tensor | None = None) -> Tensor:
        """Map [..., D] to the sum of the experts' outputs [..., D], weighted by the softmax of the router's [..., experts].

        Nobody attends to tokens that `is_token` [B,T] does not mark.
        """
        weight = torch.softmax(router(x), dim=-1)
        return (weight.unsqueeze(-1) * torch.stack([expert(x, is_token) for expert in self.experts], dim=-2)).sum(-2)


class MoMKE(Method):
    """An expert of images and one of texts learn by themselves, each with a classifier of its own. Then every modality that is
    there goes through both experts, weighted by its router, and a classifier reads the two results side by side.

    Features that are tokens, patches or words of a cache with tokens=true, attend to each other; a mean follows the experts.
    Prediction has no text, whose place is 0. What it knows of texts is what their expert has learned; all goes on learning in
    the second phase, as in the original. The epoch is chosen on validation, the original's on test.

    --preset paper has the dropout and the training of the published scripts: a rate of 1e-4 that stays what it is, batches of
    32, and 150 epochs of the second phase. The first phase has half as many as the second, and in the scripts as many.
    """

    Config = Config
    needs = ("image", "text", "paired", "label")
    symbols: ClassVar[Mapping[str, str]] = {"D_e": "width"}
    paper: ClassVar[Mapping[str, Any]] = {"dropout": 0.5}
    paper_training: ClassVar[Mapping[str, Any]] = {"weight_decay": 1e-5, "lr_gamma": 1.0, "epochs": 150, "batch_size": 32}
    without_text: ClassVar[Mapping[str, Any]] = {"w_ce_text": 0.0, "condition": "image"}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"condition": ("image", "mixed"), "dropout": (0.0, 0.2, 0.5)}

    reads_tokens = True

    w_ce_text: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.has_tokens = any(len(shapes[key]) > 1 for key in ("image", "text"))
        shapes = pooled_shapes(shapes)
        (image_width,), (text_width,) = shapes["image"], shapes["text"]
        width, num_classes = config.width, num_classes_in(shapes)
        self.label_loss: LabelLoss = config.label_loss
        self.reads_texts = config.condition == "mixed"
        self.image_scale, self.text_scale = Standardise(config.scale, image_width), Standardise(config.scale, text_width)
        self.image_projector, self.text_projector = nn.Linear(image_width, width), nn.Linear(text_width, width)
        self.dropout = Dropout(config.dropout)
        self.mixture = ExpertMixture(width, config.depth, NUM_EXPERTS, config.num_heads if self.has_tokens else 0)
        self.image_classifier, self.text_classifier = (nn.Linear(width, num_classes) for _ in range(2))
        self.image_router = MLP([width, width, NUM_EXPERTS])
        self.fusion, self.classifier = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, num_classes)
        head = ("image_projector.", "mixture.", "image_router.", "fusion.", "classifier.")
        if self.reads_texts:
            self.text_router = MLP([width, width, NUM_EXPERTS])
            head = (*head, "text_projector.", "text_router.")
        experts = ("image_projector.", "text_projector.", "mixture.", "image_classifier.", "text_classifier.")
        self.phases = (Phase("experts", experts, share=0.5), Phase("head", head))
        register_hyperparameters(self, w_ce_text=config.w_ce_text)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 8, "depth": 2}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.image_scale.fit(batch["image"].flatten(0, -2) for batch in train())
        self.text_scale.fit(paired_words(batch) for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss of a phase and its parts.

        Args:
            batch: see `types.Batch`.
            phase: "experts" has the cross-entropies of both experts, "head" that of the prediction.
        """
        label, paired = batch["label"], batch["paired"]
        x_v = self._project_image(batch["image"])
        if phase == "head" and not self.reads_texts:
            return {"loss": classification_loss(self.classifier(self.fuse(x_v)), label, self.label_loss)}
        x_s, is_word = self._project_text(batch["text"]), word_mask(batch["text"])
        if phase == "head":
            is_there = paired * (torch.rand_like(paired) < 0.5)
            joint = self.fuse(x_v, x_s, is_there, is_word)
            return {"loss": classification_loss(self.classifier(joint), label, self.label_loss)}
        image_expert, text_expert = self.mixture.experts
        v, s = self._pool(image_expert(x_v)), self._pool(text_expert(x_s, is_word), is_word)
        ce = classification_loss(self.image_classifier(v), label, self.label_loss)
        ce_text = classification_loss(self.text_classifier(s), label, self.label_loss, paired)
        return {"loss": ce + self.w_ce_text * ce_text, "ce": ce, "ce_text": ce_text}

    def fuse(
        self, x_v: Tensor, x_s: Tensor | None = None, is_there: Tensor | None = None, is_word: Tensor | None = None
    ) -> Tensor:
        """Return what the classifier reads [B,2D] of projected images and texts, vectors [B,D] or tokens [B,T,D].

        Without texts, or where `is_there` [B] is 0 and not 1, their half is 0 before the fusion. Of their tokens, those count
        that `is_word` [B,T] marks.
        """
        image = self._pool(self.mixture(x_v, self.image_router))
        text = torch.zeros_like(image)
        if x_s is not None and is_there is not None:
            text = is_there.unsqueeze(1) * self._pool(self.mixture(x_s, self.text_router, is_word), is_word)
        joint = torch.cat([image, text], dim=1)
        return joint + self.dropout(F.relu(self.fusion(joint)))

    def _pool(self, x: Tensor, is_token: Tensor | None = None) -> Tensor:
        return token_mean(x, is_token) if self.has_tokens else x

    def _project_image(self, image: Tensor) -> Tensor:
        return self._as_tokens(self.dropout(self.image_projector(self.image_scale(image))))

    def _project_text(self, text: Tensor) -> Tensor:
        return self._as_tokens(self.dropout(self.text_projector(self.text_scale(text))))

    def _as_tokens(self, x: Tensor) -> Tensor:
        """Return vectors [B,D] as one token each [B,1,D], if the other modality has tokens."""
        return x.unsqueeze(1) if self.has_tokens and x.ndim == 2 else x

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return what the classifier reads [B,2D] from image features [B,Dv] or [B,T,Dv]."""
        return self.fuse(self._project_image(image))

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv] or [B,T,Dv]."""
        return self.classifier(self.feature(image, rng))
