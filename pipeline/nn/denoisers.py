"""Denoisers: networks X_theta(x_s^n, n, x_v) that predict the clean text feature from a noisy one and the visual feature.

They share the protocol `Denoiser`, which makes sampling cheap: work that depends on the image alone or on the step alone is
done once, and each step of the chain calls only `forward`. The output of a row never depends on the other rows of the batch.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.layers import (
    MLP,
    ChunkTokens,
    ConcatLinear,
    Dropout,
    SelfAttention,
    TimeEmbedding,
    TransformerLayer,
    multi_head_attention,
)
from pipeline.runtime.errors import UserError

Interaction = Literal["concat", "self_attention", "multimodal_transformer", "cross_attention"]
Residual = Literal["visual", "text", "both", "none"]


class Denoiser(Protocol):
    """X_theta in three parts; an implementation is always an `nn.Module`."""

    def image_context(self, x_v: Tensor) -> Any:
        """Return all that the network reads of the visual features [B,Dv]: tensors [B, ...]. It is computed once per image."""
        ...

    def embed_step(self, n: Tensor) -> Tensor:
        """Return [S,E] or [B,E], all that the network reads of the steps n, int64 [S] or [B]. It is computed once per step."""
        ...

    def __call__(self, x_n: Tensor, e: Tensor, context: Any) -> Tensor:
        """Return the prediction xhat_0 [B,D] of the clean text features.

        Args:
            x_n: noisy text features [B,D].
            e: embedding of the step, one row of `embed_step` [E] for the whole batch, or [B,E].
            context: `image_context` of the visual features.
        """
        ...


class ConcatMLP(nn.Module):
    """An MLP with GELU on the concatenation [x_s^n; x_v; e_n]; MARNet has four linear layers (sec. 3.3).

    Raises:
        UserError: num_layers < 2.
    """

    def __init__(
        self,
        text_width: int,
        image_width: int,
        num_steps: int,
        hidden: int = 1024,
        num_layers: int = 4,
        time_width: int = 128,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_layers < 2:
            raise UserError(f"num_layers is {num_layers}; the denoiser needs at least 2")
        self.embed = TimeEmbedding(num_steps, time_width)
        self.first = ConcatLinear([text_width, image_width, time_width], hidden)
        self.dropout = Dropout(dropout)
        self.rest = MLP([hidden] * (num_layers - 1) + [text_width], dropout)

    def image_context(self, x_v: Tensor) -> Tensor:
        """Map [B,Dv] to the contribution of x_v to the first layer, [B,hidden]."""
        return self.first(1, x_v)

    def embed_step(self, n: Tensor) -> Tensor:
        """Map step numbers [...] to the contribution of e_n to the first layer, [..., hidden]."""
        return self.first(2, self.embed(n))

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor) -> Tensor:
        """See `Denoiser`."""
        return self.rest(self.dropout(F.gelu(self.first(0, x_n) + context + e)))


class CrossAttention(nn.Module):
    """F_t = W_o attention(Q = x_s^n, K = V = x_v) (SeDA eq. 2), where both vectors are cut into chunk tokens.

    Chunks are necessary: with one token per modality, the softmax over a single key is 1, and x_s^n has no influence.

    Raises:
        UserError: num_heads does not divide token_width, or num_tokens does not divide a width.
    """

    def __init__(self, width: int, image_width: int, num_tokens: int, token_width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or token_width % num_heads:
            raise UserError(f"token_width {token_width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = ChunkTokens(width, num_tokens, token_width)
        self.key_value = ChunkTokens(image_width, num_tokens, 2 * token_width)
        self.out = nn.Linear(num_tokens * token_width, width)

    def image_context(self, x_v: Tensor) -> Tensor:
        """Map x_v [B,Dv] to keys and values [B, num_tokens, 2 token_width]."""
        return self.key_value(x_v)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor) -> Tensor:
        """Return F_t [B,D]; the argument e is not used."""
        return self.out(multi_head_attention(self.query(x_n), context, self.num_heads).flatten(1))


class ModalitySelfAttention(nn.Module):
    """F_t = mean over tokens of single-head self-attention among three tokens of width D: x_s^n, x_v and e_n.

    Raises:
        UserError: x_v has another width.
    """

    def __init__(self, width: int, image_width: int, time_width: int) -> None:
        super().__init__()
        if image_width != width:
            raise UserError(f"self_attention has tokens of one width, not {width} and {image_width}: set condition=adapted")
        self.time_token = nn.Linear(time_width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads=1)

    def image_context(self, x_v: Tensor) -> Tensor:
        """Return x_v, which is the visual token."""
        return x_v

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor) -> Tensor:
        """Return F_t [B,D]; see `Denoiser`."""
        tokens = torch.stack([x_n, context, self.time_token(e).expand_as(x_n)], dim=1)
        return self.attention(self.norm(tokens)).mean(1)


class MultimodalTransformer(nn.Module):
    """F_t = W_o (mean over tokens) after two pre-norm transformer layers on the chunk tokens of x_s^n and x_v together."""

    def __init__(
        self, width: int, image_width: int, num_tokens: int, token_width: int, num_heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.text_tokens = ChunkTokens(width, num_tokens, token_width)
        self.image_tokens = ChunkTokens(image_width, num_tokens, token_width)
        self.layers = nn.Sequential(*(TransformerLayer(token_width, num_heads, dropout) for _ in range(2)))
        self.norm = nn.LayerNorm(token_width)
        self.out = nn.Linear(token_width, width)

    def image_context(self, x_v: Tensor) -> Tensor:
        """Map x_v [B,Dv] to visual tokens [B, num_tokens, token_width]."""
        return self.image_tokens(x_v)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor) -> Tensor:
        """Return F_t [B,D]; see `Denoiser`."""
        tokens = torch.cat([self.text_tokens(x_n), context], dim=1)
        return self.out(self.norm(self.layers(tokens)).mean(1))


class PFIN(nn.Module):
    """Progressive feature interaction network: an interaction of x_s^n and x_v, then a decoder (SeDA sec. 4.1).

    The decoder maps h_0 = [F_t; e_n] (eq. 4) through one hidden layer of width 2D.

    Args:
        width: D, of x_s^n.
        num_steps: T.
        interaction: how F_t is computed from x_s^n and x_v. "concat" computes no F_t; it has h_0 = [x_s^n; x_v; e_n].
        num_tokens: chunk tokens per vector, for "cross_attention" and "multimodal_transformer".
        token_width: width of such a token.
        num_heads: heads of the attention among such tokens.
        residual: what is added to F_t: "visual" a linear map of x_v, "text" x_s^n, "both", or "none". Attention averages
            x_v so much that beside the residual "text" it explains hardly any variance of F_t, and the decoder reads x_s^n
            alone. "none" is eq. 2 as written; "concat" has no residual.
        time_width: width of the time embedding e_n.
        dropout: its probability.
        image_width: Dv, of x_v; None: D.
    """

    def __init__(
        self,
        width: int,
        num_steps: int,
        interaction: Interaction = "cross_attention",
        num_tokens: int = 8,
        token_width: int = 128,
        num_heads: int = 4,
        residual: Residual = "visual",
        time_width: int = 128,
        dropout: float = 0.0,
        image_width: int | None = None,
    ) -> None:
        super().__init__()
        image_width = image_width or width
        self.adds_text = residual in ("text", "both")
        self.embed = TimeEmbedding(num_steps, time_width)
        if interaction == "concat":
            self.interaction = None
        elif interaction == "self_attention":
            self.interaction = ModalitySelfAttention(width, image_width, time_width)
        elif interaction == "multimodal_transformer":
            self.interaction = MultimodalTransformer(width, image_width, num_tokens, token_width, num_heads, dropout)
        else:
            self.interaction = CrossAttention(width, image_width, num_tokens, token_width, num_heads)
        adds_visual = self.interaction is not None and residual in ("visual", "both")
        self.visual = nn.Linear(image_width, width, bias=False) if adds_visual else None
        image_widths = [image_width] if interaction == "concat" else []
        self.first = ConcatLinear([width, time_width, *image_widths], 2 * width)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(2 * width, width)

    def image_context(self, x_v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the interaction's `image_context`, or for "concat" the contribution of x_v to the first layer [B,2D], and the
        visual residual [B,D].
        """
        visual = self.visual(x_v) if self.visual else None
        return self.first(2, x_v) if self.interaction is None else self.interaction.image_context(x_v), visual

    def embed_step(self, n: Tensor) -> Tensor:
        """Map step numbers [...] to e_n [..., time_width] (SeDA eq. 3)."""
        return self.embed(n)

    def forward(self, x_n: Tensor, e: Tensor, context: tuple[Tensor, Tensor | None]) -> Tensor:
        """See `Denoiser`."""
        interacting, visual = context
        if self.interaction is None:
            h = self.first(0, x_n) + interacting
        else:
            f_t = self.interaction(x_n, e, interacting)
            if visual is not None:
                f_t = f_t + visual
            h = self.first(0, f_t + x_n if self.adds_text else f_t)
        return self.out(self.dropout(F.gelu(self.first(1, e, h))))
