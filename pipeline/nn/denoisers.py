"""Networks X_theta(x_s^n, n, x_v) that predict the clean text feature from a noisy one and the visual feature.

All follow one protocol, made for sampling: what depends on the image alone or on the step alone is computed once, and a step
of the chain is only `forward`. No output depends on the other rows of a batch.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.layers import MLP, ChunkTokens, ConcatLinear, EncoderLayer, SelfAttention, TimeEmbedding, attention, dropout
from pipeline.runtime.rng import KeyedRNG

Interaction = Literal["concat", "self_attention", "multimodal_transformer", "cross_attention"]


class Denoiser(Protocol):
    """X_theta in three parts; always an `nn.Module`."""

    def condition(self, x_v: Tensor) -> Tensor:
        """What the network needs of the visual features [B,Dv], [B, ...]; once per image."""
        ...

    def time(self, n: Tensor) -> Tensor:
        """What it needs of the steps n int64 [S] or [B], [S, E] or [B, E]; once per table."""
        ...

    def __call__(self, x_n: Tensor, e: Tensor, context: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """xhat_0 [B,D] from x_n [B,D], e = time(n) [E] or [B,E] and context = condition(x_v).

        p [] is the dropout probability; rng None predicts, without dropout.
        """
        ...


class ConcatMLP(nn.Module):
    """Linear layers with GELU between them on [x_s^n; x_v; e_n] (MARNet sec. 3.3: four layers)."""

    def __init__(
        self, text_width: int, image_width: int, hidden: int = 1024, num_layers: int = 4, time_width: int = 128
    ) -> None:
        super().__init__()
        if num_layers < 2:
            raise ValueError(f"num_layers is {num_layers}; the denoiser needs at least 2")
        self.embed = TimeEmbedding(time_width)
        self.first = ConcatLinear([text_width, image_width, time_width], hidden)
        self.rest = MLP([hidden] * (num_layers - 1) + [text_width])

    def condition(self, x_v: Tensor) -> Tensor:
        """[B,Dv] to [B,hidden]."""
        return self.first(1, x_v)

    def time(self, n: Tensor) -> Tensor:
        """[...] to [..., hidden]."""
        return self.first(2, self.embed(n))

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """See `Denoiser`."""
        h = F.gelu(self.first(0, x_n) + context + e)
        return self.rest(dropout(h, p, rng and rng.at("first"), self.training), rng, p)


class CrossAttention(nn.Module):
    """F_t = W_o attention(x_s^n as query, x_v as key and value) (SeDA eq. 2) among chunk tokens of the two vectors.

    With one token per modality the softmax is 1 and x_s^n would have no influence; hence the chunks.
    """

    def __init__(self, width: int, num_tokens: int, token_width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or token_width % num_heads:
            raise ValueError(f"token_width {token_width} is not divisible by num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = ChunkTokens(width, num_tokens, token_width)
        self.key_value = ChunkTokens(width, num_tokens, 2 * token_width)
        self.out = nn.Linear(num_tokens * token_width, width)

    def condition(self, x_v: Tensor) -> Tensor:
        """Keys and values [B, num_tokens, 2 token_width]."""
        return self.key_value(x_v)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """F_t [B,D]; the step e and dropout play no part here."""
        key, value = context.chunk(2, dim=-1)
        return self.out(attention(self.query(x_n), key, value, self.num_heads).flatten(1))


class TokenSelfAttention(nn.Module):
    """F_t = mean over the tokens of single-head self-attention among x_s^n, x_v and e_n, each a token of width D."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.time_token = nn.Linear(time_width, width)
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads=1)

    def condition(self, x_v: Tensor) -> Tensor:
        """The visual token, x_v itself."""
        return x_v

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """F_t [B,D]."""
        tokens = torch.stack([x_n, context, self.time_token(e).expand_as(x_n)], dim=1)
        return self.attention(self.norm(tokens)).mean(1)


class MultimodalTransformer(nn.Module):
    """F_t = W_o mean over the tokens of two pre-norm encoder layers on the chunk tokens of x_s^n and x_v together."""

    def __init__(self, width: int, num_tokens: int, token_width: int, num_heads: int) -> None:
        super().__init__()
        self.text_tokens = ChunkTokens(width, num_tokens, token_width)
        self.image_tokens = ChunkTokens(width, num_tokens, token_width)
        self.layers = nn.ModuleList(EncoderLayer(token_width, num_heads) for _ in range(2))
        self.norm = nn.LayerNorm(token_width)
        self.out = nn.Linear(token_width, width)

    def condition(self, x_v: Tensor) -> Tensor:
        """Visual tokens [B, num_tokens, token_width]."""
        return self.image_tokens(x_v)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """F_t [B,D]."""
        tokens = torch.cat([self.text_tokens(x_n), context], dim=1)
        for i, layer in enumerate(self.layers):
            tokens = layer(tokens, rng and rng.at("layer", i), p)
        return self.out(self.norm(tokens).mean(1))


class PFIN(nn.Module):
    """Progressive feature interaction network: an interaction of x_s^n and x_v, then a decoder (SeDA sec. 4.1).

    F_t is the interaction's output, plus x_s^n if `residual` (convex mixtures of visual values alone cannot become a text
    feature); the decoder maps h_0 = [F_t; e_n] (eq. 4) through one hidden layer of width 2D. "concat" has
    h_0 = [x_s^n; x_v; e_n] and no residual. Both vectors have width D.
    """

    def __init__(
        self,
        width: int,
        interaction: Interaction = "cross_attention",
        num_tokens: int = 8,
        token_width: int = 128,
        num_heads: int = 4,
        residual: bool = True,
        time_width: int = 128,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.embed = TimeEmbedding(time_width)
        if interaction == "concat":
            self.interaction = None
        elif interaction == "self_attention":
            self.interaction = TokenSelfAttention(width, time_width)
        elif interaction == "multimodal_transformer":
            self.interaction = MultimodalTransformer(width, num_tokens, token_width, num_heads)
        else:
            self.interaction = CrossAttention(width, num_tokens, token_width, num_heads)
        visual = [width] if interaction == "concat" else []
        self.first = ConcatLinear([width, time_width, *visual], 2 * width)
        self.out = nn.Linear(2 * width, width)

    def condition(self, x_v: Tensor) -> Tensor:
        """See the interaction's `condition`; for "concat" x_v's share of the first layer, [B,2D]."""
        return self.first(2, x_v) if self.interaction is None else self.interaction.condition(x_v)

    def time(self, n: Tensor) -> Tensor:
        """e_n (SeDA eq. 3): [...] to [..., time_width]."""
        return self.embed(n)

    def forward(self, x_n: Tensor, e: Tensor, context: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """See `Denoiser`."""
        if self.interaction is None:
            h = self.first(0, x_n) + context
        else:
            f_t = self.interaction(x_n, e, context, rng, p)
            h = self.first(0, x_n + f_t if self.residual else f_t)
        h = F.gelu(h + self.first(1, e))
        return self.out(dropout(h, p, rng and rng.at("decoder"), self.training))
