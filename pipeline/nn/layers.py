"""Layers that methods share: dropout, MLP, standardisation, time embedding, attention and adapters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.losses import MASKED_LOGIT
from pipeline.runtime.errors import UserError

ScaleMode = Literal["per_dim", "global", "l2sqrtd"]  # see `Standardise`
MIN_STD = 1e-3
BATCH_NORM_EPSILON = 1e-5


def register_hyperparameters(module: nn.Module, **values: float) -> None:
    """Register hyperparameters as float32 buffers [], so that the models of an ensemble may differ in them.

    Checkpoints do not contain them.
    """
    for name, value in values.items():
        module.register_buffer(name, torch.tensor(float(value), dtype=torch.float32), persistent=False)


class LookupTable(nn.Module):
    """A float32 table [L] that code only indexes, with indices below L. The models of an ensemble may differ in L.

    An ensemble pads the shorter tables with NaN. Checkpoints do not contain tables.
    """

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)


class Dropout(nn.Module):
    """Dropout whose probability p is a tensor, so that the models of an ensemble may differ in it; p = 0 draws nothing.

    In training, each entry becomes 0 with probability p, and the others are divided by 1 - p.
    """

    p: Tensor
    factor: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.is_on = p > 0
        register_hyperparameters(self, p=p, factor=1.0 / (1.0 - p))

    def forward(self, x: Tensor) -> Tensor:
        """Map [...] to [...]."""
        if not (self.is_on and self.training):
            return x
        return x * (torch.rand_like(x, dtype=torch.float32) >= self.p) * self.factor


class MLP(nn.Module):
    """Linear layers with the given widths; GELU and dropout follow each layer except the last."""

    def __init__(self, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, widths[0]] to [B, widths[-1]]."""
        first, *others = self.layers
        x = first(x)
        for layer in others:
            x = layer(self.dropout(F.gelu(x)))
        return x


class ConcatLinear(nn.Module):
    """A linear layer on a concatenation [x_0; x_1; ...] that is applied to each part separately.

    The sum over all parts is the output of the layer. Each part has its own weight parameter. With slices of one weight matrix,
    autograd would have to assemble the gradient of the matrix from its slices in every step.
    """

    def __init__(self, in_widths: Sequence[int], out_width: int) -> None:
        super().__init__()
        linear = nn.Linear(sum(in_widths), out_width)
        self.weights = nn.ParameterList(part.clone() for part in linear.weight.detach().split(list(in_widths), dim=1))
        self.bias = linear.bias

    def forward(self, part: int, x: Tensor, others: Tensor | None = None) -> Tensor:
        """Map one part [..., in_widths[part]] to its contribution to the output [..., out_width]; part 0 adds the bias.

        If contributions of other parts [B,out_width] are given, return the sum with them.
        """
        bias = self.bias if part == 0 else None
        if others is not None and bias is None and x.ndim == 2:
            return torch.addmm(others, x, self.weights[part].T)
        own = F.linear(x, self.weights[part], bias)
        return own if others is None else others + own


def moments(batches: Iterable[Tensor], full_covariance: bool = False) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of all finite rows of batches [B,D], in float64 and in one pass.

    Batches are merged with the update formula of Chan, Golub and LeVeque, which stays precise for large means.

    Args:
        batches: feature batches [B,D]; their order changes the rounding.
        full_covariance: compute the covariance matrix instead of the variances.

    Returns:
        The mean [D], and the variances [D] or the covariance [D,D].

    Raises:
        UserError: no row is finite.
    """

    def scatter(centred: Tensor) -> Tensor:
        return centred.T @ centred if full_covariance else centred.square().sum(0)

    count, mean, total = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = batch[batch.isfinite().all(dim=1)].to(torch.float64)
        num_rows = len(x)
        if num_rows == 0:
            continue
        batch_mean = x.mean(0)
        batch_scatter = scatter(x - batch_mean)
        if count == 0:
            count, mean, total = num_rows, batch_mean, batch_scatter
            continue
        delta = batch_mean - mean
        total = total + batch_scatter + scatter(delta.unsqueeze(0)) * (count * num_rows / (count + num_rows))
        mean = mean + delta * (num_rows / (count + num_rows))
        count += num_rows
    if count == 0:
        raise UserError("the training split has no finite feature row to take statistics of; extract its features again")
    return mean, total / count


class Standardise(nn.Module):
    """Scales features to unit variance with statistics of the training split, because a noise schedule assumes unit variance.

    "per_dim" gives each dimension mean 0 and standard deviation 1. "global" subtracts the mean and divides all dimensions by
    one common standard deviation, which keeps the geometry. "l2sqrtd" scales each row to length sqrt(D), without statistics.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mode: ScaleMode, width: int) -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Store mean and standard deviation (at least 1e-3) of batches [B,D]; rows with a non-finite value are ignored."""
        if self.mode == "l2sqrtd":
            return
        mean, variance = moments(batches)
        if self.mode == "global":
            variance = variance.mean().expand_as(variance)
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp(min=MIN_STD))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,D] to [B,D]."""
        if self.mode == "l2sqrtd":
            return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])
        return (x - self.mean) / self.std


class TrainingRows(nn.Module):
    """Features and labels of the training split in buffers. Their number N is not known before they are stored or loaded.

    A checkpoint contains them, so it grows with the training split.
    """

    feature: Tensor
    label: Tensor

    def __init__(self, feature: Tensor, label: Tensor) -> None:
        """Start with N = 0: the tensors [0, ...] give the shape and the type of what will be stored."""
        super().__init__()
        self.register_buffer("feature", feature)
        self.register_buffer("label", label)
        self.register_load_state_dict_pre_hook(_make_room)

    def store(self, feature: Tensor, label: Tensor) -> None:
        """Replace the rows by features [N, ...] and labels [N, ...]."""
        self.feature, self.label = feature.to(self.feature), label.to(self.label)


def _make_room(rows: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Give the buffers of a module the number of rows that a checkpoint has."""
    for name, buffer in list(rows.named_buffers()):
        if prefix + name in state_dict:
            setattr(rows, name, buffer.new_empty((*state_dict[prefix + name].shape[:1], *buffer.shape[1:])))


def sinusoidal_embedding(n: Tensor, width: int) -> Tensor:
    """Return [sin | cos] of raw step numbers n [...] at width/2 frequencies from 1 to 1e-4, [..., width]."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=n.device, dtype=torch.float32) * (-math.log(1e4) / (half - 1)))
    angle = n.unsqueeze(-1).to(torch.float32) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """The time embedding e_n = phi(MLP(sinusoid(n))) of the steps 0..T-1, with phi = GELU (SeDA eq. 3).

    Raises:
        UserError: the width is odd or smaller than 4.
    """

    def __init__(self, num_steps: int, width: int = 128) -> None:
        super().__init__()
        if width < 4 or width % 2:
            raise UserError(f"time embedding width is {width}; choose an even number of at least 4")
        self.sinusoids = LookupTable(sinusoidal_embedding(torch.arange(num_steps), width))
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU())

    def forward(self, n: Tensor) -> Tensor:
        """Map step numbers [...] to [..., width]."""
        return self.layers(self.sinusoids.values[n])


class ChunkTokens(nn.Module):
    """Cuts a vector into equal chunks and maps each chunk to a token with its own linear layer.

    The bias of a chunk's layer acts as the learned position of its token.

    Raises:
        UserError: num_tokens does not divide the width; the message lists the divisors.
    """

    def __init__(self, width: int, num_tokens: int, token_width: int) -> None:
        super().__init__()
        if num_tokens < 1 or width % num_tokens:
            choices = ", ".join(str(k) for k in range(1, width + 1) if width % k == 0)
            raise UserError(f"width {width} cannot be cut into {num_tokens} tokens; choose num_tokens from: {choices}")
        chunk = width // num_tokens
        self.weight = nn.Parameter(torch.empty(num_tokens, chunk, token_width).uniform_(-(chunk**-0.5), chunk**-0.5))
        self.bias = nn.Parameter(torch.empty(num_tokens, token_width).uniform_(-(chunk**-0.5), chunk**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B,D] to [B, num_tokens, token_width]."""
        chunks = x.unflatten(-1, (len(self.weight), -1)).transpose(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), chunks, self.weight).transpose(0, 1)


def multi_head_attention(query: Tensor, key_value: Tensor, num_heads: int, is_key: Tensor | None = None) -> Tensor:
    """Return softmax(Q K^T / sqrt(d_k)) V of each head (SeDA eq. 2), among the tokens of one sample.

    Args:
        query: [B,Tq,D].
        key_value: keys and values side by side, [B,Tk,2D].
        num_heads: divides D.
        is_key: which keys count, bool [B,Tk]; None: all. Where none does, all count alike.

    Returns:
        The outputs of the heads side by side, [B,Tq,D].
    """
    q = query.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k, v = key_value.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    bias = None  # added to the logits of all heads and queries
    if is_key is not None:
        bias = torch.zeros_like(is_key, dtype=q.dtype).masked_fill(~is_key, MASKED_LOGIT)[:, None, None]
    # torch turns autocast off inside attention, but not under vmap; there, on a GPU, the softmax has no gradient in bfloat16
    with torch.autocast("cuda", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of a sample, with an output layer.

    Raises:
        UserError: num_heads does not divide the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise UserError(f"token width {width} is not divisible by num_heads {num_heads}; choose a divisor of {width}")
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B,T,D] to [B,T,D]."""
        width = tokens.shape[-1]
        query, key_value = self.query_key_value(tokens).split([width, 2 * width], dim=-1)
        return self.out(multi_head_attention(query, key_value, self.num_heads))


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads)
        self.mlp = MLP([width, 4 * width, width], dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B,T,D] to [B,T,D]."""
        tokens = tokens + self.attention(self.norm_attention(tokens))
        return tokens + self.mlp(self.norm_mlp(tokens))


def batch_normalise(x: Tensor, weight: Tensor) -> Tensor:
    """Return features [B,D] with mean 0 and variance 1 over the rows of weight 1, without learned parameters.

    Args:
        x: [B,D].
        weight: [B], 1 for the rows that enter the statistics and 0 for the others; these are mapped like them.
    """
    share = (weight / weight.sum().clamp(min=1.0)).unsqueeze(-1)
    centred = x - (share * x).sum(0)
    return centred * torch.rsqrt((share * centred.square()).sum(0) + BATCH_NORM_EPSILON)


class Adapter(nn.Module):
    """A linear map to a common width. It is fitted and then frozen; it is never trained together with a regression onto it.

    It is fitted in one of three ways: with a classifier on its batch-normalised output; as principal components, without
    labels; or by a contrast between two adapters, which then have a leaky ReLU, as MARNet's projectors have (eq. 6-8).
    Afterwards `Standardise` on the output of `feature` replaces the batch normalisation, with exact statistics.

    Args:
        in_width: width of the features.
        out_width: the common width.
        num_classes: C, for a classifier; 0: it needs none.
        has_activation: whether a leaky ReLU follows the map.
    """

    def __init__(self, in_width: int, out_width: int, num_classes: int, has_activation: bool = False) -> None:
        super().__init__()
        self.project = nn.Linear(in_width, out_width)
        self.classifier = nn.Linear(out_width, num_classes) if num_classes else nn.Identity()
        self.has_activation = has_activation

    def feature(self, x: Tensor) -> Tensor:
        """Map [B, in_width] to [B, out_width]."""
        projected = self.project(x)
        return F.leaky_relu(projected) if self.has_activation else projected

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return logits [B,C] from [B, in_width], to train the adapter; the weights are those of `batch_normalise`."""
        return self.classifier(batch_normalise(self.project(x), weight))

    @property
    def is_fitted(self) -> bool:
        """Whether principal components have been found: before, the map is zero."""
        return bool(self.project.weight.any())

    @torch.no_grad()
    def fit_pca(self, batches: Iterable[Tensor]) -> None:
        """Set the map to the leading principal components of batches [B, in_width].

        Raises:
            UserError: out_width > in_width.
        """
        out_width, in_width = self.project.weight.shape
        if out_width > in_width:
            raise UserError(f"principal components cannot widen {in_width} features to {out_width}; use a learned adapter")
        mean, covariance = moments(batches, full_covariance=True)
        components = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :out_width].T
        # The sign of an eigenvector is arbitrary. The entry of largest size is made positive, so that all machines agree.
        peak = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * torch.sign(peak)
        self.project.weight.copy_(components)
        self.project.bias.copy_(-components @ mean)
