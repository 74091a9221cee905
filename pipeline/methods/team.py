"""TEAM as a head: CLIP's loss, and tokens of the text that look for their counterparts in the image (Xie et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.common_space import CommonSpaceHead, LearnedScale, scaled_phase
from pipeline.nn.layers import MLP, Dropout, ScaleMode, multi_head_attention, register_hyperparameters
from pipeline.nn.losses import (
    MASKED_LOGIT,
    LabelLoss,
    classification_loss,
    info_nce,
    same_labels,
    weighted_mean,
)
from pipeline.nn.tokens import (
    fit_token_layers,
    make_token_layer,
    pooled,
    pooled_batches,
    pooled_shapes,
    pooled_text,
    token_mean,
    token_source,
    word_mask,
)
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes

SCORE_WIDTH = 512  # of the space in which retrieved tokens are compared with those of the text


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of TEAM. The original has words and patches, and 6 blocks; the other defaults are ours."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common space"] = 768
    w_team: Annotated[float, Range(0), "lam, weight of the contrastive loss and of the mean token loss of a block"] = 1.0
    tau: Annotated[float, Range(0.01), "initial temperature of both losses; each learns its own, at least 0.01"] = 0.07
    num_tokens: Annotated[int, Range(1, 1_024), "chunks that a vector is cut into, its tokens; it divides width"] = 8
    token_width: Annotated[int, Range(1, 65_536), "width of a token"] = 256
    num_heads: Annotated[int, Range(1, 64), "heads of the attention; it divides token_width"] = 4
    num_blocks: Annotated[int, Range(1, 16), "blocks of attention"] = 2
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    dropout_tokens: Annotated[float, Range(0, 0.99), "probability, in the blocks"] = 0.1
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_width % self.num_heads:
            raise UserError(f"num_heads is {self.num_heads}; choose a divisor of token_width, {self.token_width}")


class Attention(nn.Module):
    """Multi-head attention with layers for query, key, value and output."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, is_key: Tensor | None = None) -> Tensor:
        """Map [B,Tq,D], [B,Tk,D] and [B,Tk,D] to [B,Tq,D]; `is_key` [B,Tk] says which keys count."""
        key_value = torch.cat([self.key(key), self.value(value)], dim=-1)
        return self.out(multi_head_attention(self.query(query), key_value, self.num_heads, is_key))


class RetrievalBlock(nn.Module):
    """Self-attention among what the text's tokens have retrieved, cross-attention to the image's tokens, and an MLP."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.own, self.cross = Attention(width, num_heads), Attention(width, num_heads)
        self.mlp = MLP([width, 2 * width, width], dropout)
        self.dropout = Dropout(dropout)

    def forward(self, retrieved: Tensor, text: Tensor, image: Tensor, is_word: Tensor | None = None) -> Tensor:
        """Return what is retrieved now, [B,T,D], from what was [B,T,D] and the tokens of text [B,T,D] and image [B,Ti,D].

        Of the text's tokens, only those that `is_word` [B,T] marks count; None: all.
        """
        norm_own, norm_cross, norm_mlp = self.norms
        r = norm_own(retrieved)
        retrieved = retrieved + self.dropout(self.own(text + r, text + r, r, is_word))
        retrieved = retrieved + self.dropout(self.cross(text + norm_cross(retrieved), image, image))
        return retrieved + self.dropout(self.mlp(norm_mlp(retrieved)))


class TokenMatching(nn.Module):
    """Scores pairs of a text and an image, once after each block: do the text's tokens retrieve themselves from the image?"""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__()
        width = config.token_width
        self.text_tokens, self.image_tokens = (
            make_token_layer(shapes[key], config.width, config.num_tokens, width, config.scale) for key in ("text", "image")
        )
        self.blocks = nn.ModuleList(
            RetrievalBlock(width, config.num_heads, config.dropout_tokens) for _ in range(config.num_blocks)
        )
        self.retrieved_layer, self.text_layer = (nn.Linear(width, SCORE_WIDTH, bias=False) for _ in range(2))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Return scores from -1 to 1, [num_blocks,B], of pairs.

        Args:
            text: vectors h_s [B,d], or features that are tokens [B,T,Ds].
            image: vectors h_v [B,d], or features that are tokens [B,T,Dv].
        """
        text_tokens, image_tokens, is_word = self.text_tokens(text), self.image_tokens(image), word_mask(text)
        wanted, retrieved, scores = self.text_layer(text_tokens), torch.zeros_like(text_tokens), []
        for block in self.blocks:
            retrieved = block(retrieved, text_tokens, image_tokens, is_word)
            scores.append(token_mean(F.cosine_similarity(self.retrieved_layer(retrieved), wanted, dim=-1), is_word))
        return torch.stack(scores)


def draw_negatives(similarity: Tensor, allowed: Tensor) -> Tensor:
    """Return for each row one column that it allows, drawn with the probabilities of a softmax, int64 [B].

    The largest sum of a logit and a Gumbel number is such a draw. A row that allows no column gets column 0.

    Args:
        similarity: logits [B,B].
        allowed: bool [B,B].
    """
    uniform = torch.rand(similarity.shape, device=similarity.device).clamp(min=1e-30)
    return (similarity - torch.log(-torch.log(uniform))).masked_fill(~allowed, MASKED_LOGIT).argmax(1)


def token_loss(scores: Tensor, scale: Tensor | float, weight: Tensor | None = None) -> Tensor:
    """Return -log softmax(scale scores)[0], a mean over blocks and samples.

    Args:
        scores: of the pair, of the text with another image, and of the image with another text, [3,L,B].
        scale: of the scores.
        weight: of the samples [B], see `losses`.
    """
    losses = -torch.log_softmax(scale * scores.float(), dim=0)[0]
    return weighted_mean(losses.mean(0), weight)


class TEAM(CommonSpaceHead):
    """A classifier on the image's vector, CLIP's loss, and a loss on tokens, which are chunks of the vectors of both.

    Features that are tokens, patches or words of a cache with tokens=true, are the tokens, and their mean is the vector.
    The token loss knows each pair from two hard negatives: the text with another image and the image with another text, drawn
    where the global similarity is high. A sample with the same labels, or without text, is no negative. A sample that has no
    negative in its batch does not count.

    --preset paper has the published 6 blocks and batches of 240, and a rate that falls to a tenth every 10 epochs: that of the
    papers, with Adam in place of LAMB. The token loss stays a mean over the blocks, where the published code has their sum.
    """

    Config = Config
    symbols: ClassVar[Mapping[str, str]] = {"lam": "w_team", "tau": "tau", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_team": 0.0}
    paper: ClassVar[Mapping[str, Any]] = {"num_blocks": 6}
    paper_training: ClassVar[Mapping[str, Any]] = {"lr_step": 10, "lr_gamma": 0.1, "batch_size": 240}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_team": (0.1, 0.3, 1.0, 3.0), "tau": (0.03, 0.07, 0.2)}
    phases = (scaled_phase("global_scale", "token_scale"),)
    reads_tokens = True

    w_team: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, pooled_shapes(shapes))
        self.matching = TokenMatching(config, shapes)
        self.global_scale, self.token_scale = LearnedScale(config.tau), LearnedScale(config.tau)
        register_hyperparameters(self, w_team=config.w_team)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16, "num_tokens": 4, "token_width": 8, "num_heads": 2, "num_blocks": 1}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.common.fit(pooled_batches(train))
        fit_token_layers(self.matching.image_tokens, self.matching.text_tokens, train)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return CE + lam (L_CLIP + the mean token loss of a block), and the three parts."""
        image, text, paired, label = batch["image"], batch["text"], batch["paired"], batch["label"]
        h_v, h_s = self.common.image(pooled(image)), self.common.text(pooled_text(text), paired)
        v2s, s2v = info_nce(h_v, h_s, 1.0 / self.global_scale(), paired)
        ce, clip = classification_loss(self.classifier(h_v), label, self.label_loss), (v2s + s2v) / 2.0
        allowed = (paired > 0) & ~same_labels(label)
        other_image, other_text = self._draw_negatives(h_v, h_s, allowed)
        image, text = token_source(image, h_v), token_source(text, h_s)
        scores = self.matching(torch.cat([text, text, text[other_text]]), torch.cat([image, image[other_image], image]))
        scores = scores.unflatten(1, (3, -1)).transpose(0, 1)
        tokens = token_loss(scores, self.token_scale(), paired * allowed.any(1))
        return {"loss": ce + self.w_team * (clip + tokens), "ce": ce, "clip": clip, "tokens": tokens}

    def _draw_negatives(self, h_v: Tensor, h_s: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each text another image and for each image another text, int64 [B] each, of those allowed [B,B]."""
        with torch.no_grad(), torch.autocast(h_v.device.type, enabled=False):
            a, b = (F.normalize(h.float(), dim=1) for h in (h_s, h_v))
            similarity = self.global_scale() * (a @ b.T)
        return draw_negatives(similarity, allowed), draw_negatives(similarity.T, allowed)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return h_v [B,d] from image features [B,Dv] or [B,T,Dv]."""
        return self.common.image(pooled(image))
