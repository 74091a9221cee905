"""Features that are tokens, one vector of each patch or each word, for methods whose `Method.reads_tokens` is true.

All images of a cache have equally many patches. Texts have different numbers of words: behind the last word of a text there are
zeros, its padding. No word is zeros alone, so `word_mask` tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from pipeline.nn.feature_space import paired_text
from pipeline.nn.layers import ChunkTokens, ScaleMode, Standardise
from pipeline.types import Batch, Shapes


def word_mask(text: Tensor) -> Tensor | None:
    """Return which tokens of text features [B,T,D] are words and no padding, bool [B,T]; None for vectors [B,D]."""
    return None if text.ndim == 2 else (text != 0).any(-1)


def token_mean(x: Tensor, is_token: Tensor | None = None) -> Tensor:
    """Return the mean over the tokens of x [B,T,...], or over those that `is_token` [B,T] marks, [B,...]; 0 of none."""
    if is_token is None:
        return x.mean(1)
    share = is_token.to(x.dtype) / is_token.sum(1, keepdim=True).clamp(min=1)
    return (share.reshape(*share.shape, *(1 for _ in x.shape[2:])) * x).sum(1)


def pooled(image: Tensor) -> Tensor:
    """Return one vector of each image [B,D]: vectors [B,D] as they are, of tokens [B,T,D] the mean."""
    return image if image.ndim == 2 else image.mean(1)


def pooled_text(text: Tensor) -> Tensor:
    """Return one vector of each text [B,D]: vectors [B,D] as they are, of tokens [B,T,D] the mean of the words."""
    return text if text.ndim == 2 else token_mean(text, word_mask(text))


def pooled_shapes(shapes: Shapes) -> Shapes:
    """Return the shapes of a batch whose features are pooled."""
    return {**shapes, "image": shapes["image"][-1:], "text": shapes["text"][-1:]}


def pooled_batches(train: Callable[[], Iterator[Batch]]) -> Callable[[], Iterator[Batch]]:
    """Return what starts the same passes over a split with pooled features."""
    return lambda: ({**batch, "image": pooled(batch["image"]), "text": pooled_text(batch["text"])} for batch in train())


def paired_words(batch: Batch) -> Tensor:
    """Return all words of the samples that have a text [M,D], or their texts if these are vectors; see `paired_text`."""
    text = paired_text(batch)
    is_word = word_mask(text)
    return text if is_word is None else text[is_word]


class TokenLayer(nn.Module):
    """Maps tokens to another width: standardised over all patches, or all words, of the training split, then a linear layer."""

    def __init__(self, width: int, token_width: int, scale: ScaleMode) -> None:
        super().__init__()
        self.scale, self.layer = Standardise(scale, width), nn.Linear(width, token_width)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Compute the statistics of tokens, batches [...,D]."""
        self.scale.fit(batch.flatten(0, -2) for batch in batches)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B,T,D] to [B,T,token_width]."""
        return self.layer(self.scale(x))


def make_token_layer(
    shape: tuple[int, ...], width: int, num_tokens: int, token_width: int, scale: ScaleMode
) -> TokenLayer | ChunkTokens:
    """Return the layer that gives the tokens of an image or text: from its features if these are tokens, else from its vector.

    Args:
        shape: of the features, (T,D) or (D,).
        width: of the vector.
        num_tokens: chunks of the vector.
        token_width: of a token.
        scale: see `layers.Standardise`.
    """
    return TokenLayer(shape[1], token_width, scale) if len(shape) > 1 else ChunkTokens(width, num_tokens, token_width)


def token_source(feature: Tensor, vector: Tensor) -> Tensor:
    """Return what the layer of `make_token_layer` reads: features that are tokens [B,T,D], or else their vector [B,d]."""
    return feature if feature.ndim > 2 else vector


def fit_token_layers(image: nn.Module, text: nn.Module, train: Callable[[], Iterator[Batch]]) -> None:
    """Compute the statistics of those of two layers that are `TokenLayer`s; `train` starts a pass over the training split."""
    if isinstance(image, TokenLayer):
        image.fit(batch["image"] for batch in train())
    if isinstance(text, TokenLayer):
        text.fit(paired_words(batch) for batch in train())
