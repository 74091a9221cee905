"""Small networks that methods share: dropout by named streams, tables, MLP, scaling, time embedding, tokens, adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.runtime.rng import KeyedRNG

STD_FLOOR = 1e-3


def register_hyperparameters(module: nn.Module, **values: float) -> None:
    """Registers hyperparameters as 0-d float32 buffers: stacked models may differ in them; checkpoints leave them out."""
    for name, value in values.items():
        module.register_buffer(name, torch.tensor(float(value), dtype=torch.float32), persistent=False)


class LookupTable(nn.Module):
    """Numbers float32 [L] that are only ever looked up by an index below L: stacked models may differ in L.

    The shorter tables of a stack are filled up with NaN. Checkpoints leave tables out.
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)


def dropout(x: Tensor, p: Tensor, rng: KeyedRNG | None, training: bool) -> Tensor:
    """x [B, ...] with each entry zeroed with probability p [] in [0, 1) and the others divided by 1-p.

    x itself outside training, and where there is no stream to draw from.
    """
    if rng is None or not training:
        return x
    return x * (rng.uniform(*x.shape[1:]) >= p) / (1.0 - p)


class MLP(nn.Module):
    """Linear layers of the given widths with GELU and dropout after each but the last."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """[B, widths[0]] to [B, widths[-1]]; rng None predicts, without dropout."""
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = dropout(F.gelu(x), p, rng and rng.at(i), self.training)
            x = layer(x)
        return x


class ConcatLinear(nn.Module):
    """One linear layer on a concatenation [x_0; x_1; ...], applied part by part: the sum of all parts is the layer's output.

    Every part has a parameter of its own: the gradients of slices of one matrix would be put together anew in each step.
    """

    def __init__(self, in_widths: Sequence[int], out_width: int) -> None:
        super().__init__()
        whole = nn.Linear(sum(in_widths), out_width)
        self.weights = nn.ParameterList(part.clone() for part in whole.weight.detach().split(list(in_widths), dim=1))
        self.bias = whole.bias

    def forward(self, part: int, x: Tensor) -> Tensor:
        """W_part x, [..., in_widths[part]] to [..., out_width]; part 0 brings the bias."""
        return F.linear(x, self.weights[part], self.bias if part == 0 else None)


def moments(batches: Iterable[Tensor], full: bool = False) -> tuple[Tensor, Tensor]:
    """Mean [D] and variances [D] (full: covariance [D,D]) of the finite rows of batches [B,D], float64, in one ordered pass.

    Batches are merged by Chan, Golub and LeVeque's update, so large means cost no precision; `ValueError` without a finite row.
    """

    def scatter(centred: Tensor) -> Tensor:
        return centred.T @ centred if full else centred.square().sum(0)

    count, mean, total = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = batch[batch.isfinite().all(dim=1)].to(torch.float64)
        rows = len(x)
        if rows == 0:
            continue
        batch_mean = x.mean(0)
        spread = scatter(x - batch_mean)
        if count == 0:
            count, mean, total = rows, batch_mean, spread
            continue
        delta = batch_mean - mean
        total = total + spread + scatter(delta.unsqueeze(0)) * (count * rows / (count + rows))
        mean = mean + delta * (rows / (count + rows))
        count += rows
    if count == 0:
        raise ValueError("the training split has no finite feature row to take statistics of; extract its features again")
    return mean, total / count


class Standardise(nn.Module):
    """Brings features to unit scale with statistics of the training split, because a noise schedule assumes it.

    "per_dim": every dimension to mean 0 and deviation 1; "global": mean 0 and one common deviation, which keeps the geometry;
    "l2sqrtd": every row to length sqrt(D), without statistics.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mode: Literal["per_dim", "global", "l2sqrtd"], width: int) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Takes mean and deviation (floor 1e-3) from batches [B,D]; rows with a non-finite value are left out."""
        if self.mode == "l2sqrtd":
            return
        mean, variance = moments(batches)
        if self.mode == "global":
            variance = variance.mean().expand_as(variance)
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp(min=STD_FLOOR))

    def forward(self, x: Tensor) -> Tensor:
        """[B,D] to [B,D]."""
        if self.mode == "l2sqrtd":
            return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])
        return (x - self.mean) / self.std


def sinusoid(n: Tensor, width: int) -> Tensor:
    """[sin | cos] of n at width/2 frequencies from 1 to 1e-4, [..., width]; n [...] holds raw step numbers."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=n.device, dtype=torch.float32) * (-math.log(1e4) / (half - 1)))
    angle = n.unsqueeze(-1).to(torch.float32) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """phi(MLP(sinusoid(n))) (SeDA eq. 3), phi = GELU."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"time embedding width is {width}; choose an even number of at least 4")
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU())

    def forward(self, n: Tensor) -> Tensor:
        """Step numbers [...] to [..., width]."""
        return self.layers(sinusoid(n, self.width))


class ChunkTokens(nn.Module):
    """Cuts a vector into tokens and gives each its own affine map; the map's bias is the token's learned position."""

    def __init__(self, width: int, num_tokens: int, token_width: int) -> None:
        super().__init__()
        if num_tokens < 1 or width % num_tokens:
            choices = ", ".join(str(k) for k in range(1, width + 1) if width % k == 0)
            raise ValueError(f"width {width} cannot be cut into {num_tokens} tokens; choose num_tokens from: {choices}")
        chunk = width // num_tokens
        self.weight = nn.Parameter(torch.empty(num_tokens, chunk, token_width).uniform_(-(chunk**-0.5), chunk**-0.5))
        self.bias = nn.Parameter(torch.empty(num_tokens, token_width).uniform_(-(chunk**-0.5), chunk**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[B,D] to [B, num_tokens, token_width]."""
        return torch.einsum("btd,tdm->btm", x.unflatten(-1, (len(self.weight), -1)), self.weight) + self.bias


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V in each head (SeDA eq. 2) among one sample's tokens, [B,Tq,D] and [B,Tk,D] to [B,Tq,D]."""
    q, k, v = (tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tokens in (query, key, value))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention in which the tokens of a sample are query, key and value, and an output map."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"token width {width} is not divisible by num_heads {num_heads}; choose a divisor of {width}")
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B,T,D] to [B,T,D]."""
        query, key, value = self.query_key_value(tokens).chunk(3, dim=-1)
        return self.out(attention(query, key, value, self.num_heads))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads)
        self.mlp = MLP([width, 4 * width, width])

    def forward(self, tokens: Tensor, rng: KeyedRNG | None, p: Tensor) -> Tensor:
        """[B,T,D] to [B,T,D]; rng None predicts, without dropout."""
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.mlp(self.norm_mlp(tokens), rng, p)


class Adapter(nn.Module):
    """A map to a common width, learned in a phase of its own and then frozen, never together with a regression onto it.

    It learns from a classifier on its batch-normalised output, or from principal components without labels. Afterwards
    `Standardise` on `feature` takes the place of batch normalisation, with exact statistics.
    """

    def __init__(self, in_width: int, out_width: int, num_classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(in_width, out_width)
        self.classifier = nn.Linear(out_width, num_classes)

    def feature(self, x: Tensor) -> Tensor:
        """[B, in_width] to [B, out_width]."""
        return self.project(x)

    def logits(self, x: Tensor) -> Tensor:
        """[B, in_width] to [B,C] for the adapter's own phase; normalises by the batch, so B >= 2."""
        return self.classifier(F.batch_norm(self.project(x), None, None, training=True))

    @torch.no_grad()
    def fit_pca(self, batches: Iterable[Tensor]) -> None:
        """Sets the map to the leading principal components of batches [B, in_width]; `ValueError` if it widens."""
        out_width, in_width = self.project.weight.shape
        if out_width > in_width:
            raise ValueError(f"principal components cannot widen {in_width} features to {out_width}; use a learned adapter")
        mean, covariance = moments(batches, full=True)
        components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :out_width].T
        # an eigenvector's sign is arbitrary: its largest entry is made positive, so that every machine finds the same map
        peak = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * torch.sign(peak)
        self.project.weight.copy_(components)
        self.project.bias.copy_(-components @ mean)
