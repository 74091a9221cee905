"""Rival: multi-granularity contrastive consistency (MGCC: Wu et al., AAAI 2024, eq. 1-15)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.common_space import CommonSpace, LearnedScale, LinearProjector, scaled_phase
from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import ScaleMode, register_hyperparameters
from pipeline.nn.losses import MASKED_LOGIT, LabelLoss, classification_loss, contrastive_losses
from pipeline.nn.method import Method
from pipeline.nn.recompute import recomputed
from pipeline.nn.tokens import (
    fit_token_layers,
    make_token_layer,
    pooled,
    pooled_batches,
    pooled_shapes,
    pooled_text,
    token_source,
    word_mask,
)
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Shapes

# Similarities of patches and words of one model: up to so many are computed at once (16 MiB, and as much for each step) ...
MAX_TOKEN_PAIRS = 2**22
PART_TOKEN_PAIRS = 2**20  # ... and of more, so many at a time


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of MGCC. The original has words and patches, and no cross-entropy; the weight between both losses is ours."""

    width: Annotated[int, Range(1, 65_536), "d, width of the common space and of the tokens"] = 768
    w_mgcc: Annotated[float, Range(0), "lam, weight of the contrastive loss; 2 is the sum of both directions, eq. 15"] = 1.0
    tau: Annotated[float, Range(0.01), "initial temperature of the similarity; it is learned, and stays at least 0.01"] = 0.07
    tau_tokens: Annotated[float, Range(1e-3), "t, temperature of the weights of tokens"] = 0.01
    num_tokens: Annotated[int, Range(1, 1_024), "chunks that a vector is cut into, its tokens; it divides width"] = 8
    matrices: Annotated[bool, "learned matrices in the similarities, identities at first, as the published code has"] = True
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"


def weighted_sum(
    similarity: Tensor, tau: Tensor | float, dim: int, is_token: Tensor | None = None, matrix: Tensor | None = None
) -> Tensor:
    """Return the sum of the similarities of T tokens, each times its weight: the softmax over the tokens, times a matrix.

    Args:
        similarity: [..., T, ...], of which the tokens are the dimension `dim`, which the sum has not.
        tau: temperature of the softmax.
        dim: see above.
        is_token: which tokens count [...,T]; None: all.
        matrix: [T,T]; None: the identity.
    """
    by_token = similarity.movedim(dim, -1)
    logits = by_token / tau
    if is_token is not None:
        by_token, logits = by_token.masked_fill(~is_token, 0.0), logits.masked_fill(~is_token, MASKED_LOGIT)
    weight = torch.softmax(logits, dim=-1)
    return ((weight if matrix is None else weight @ matrix) * by_token).sum(-1)


class TokenWeights(nn.Module):
    """The learned matrix of a `weighted_sum` of T tokens, an identity at first, or none."""

    def __init__(self, num_tokens: int, has_matrix: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(num_tokens)) if has_matrix else None

    def forward(self, similarity: Tensor, tau: Tensor | float, dim: int, is_token: Tensor | None = None) -> Tensor:
        """Map [..., T, ...] to [..., ...], see `weighted_sum`."""
        return weighted_sum(similarity, tau, dim, is_token, self.matrix)


def patch_word_similarity(patches: Tensor, words: Tensor, tau: Tensor, *matrices: Tensor, is_word: Tensor | None) -> Tensor:
    """Return S_PW [I,J]: patches are weighed and then words, and words and then patches, and the mean is taken of both.

    Args:
        patches: tokens of images [I,Tv,d].
        words: tokens of texts [J,Ts,d].
        tau: temperature of the weights.
        matrices: of the patches and then the words [Tv,Tv] and [Ts,Ts], and of the words and then the patches; or none.
        is_word: which tokens of the texts count, bool [J,Ts]; None: all.
    """
    patches_first, words_last, words_first, patches_last = matrices or (None,) * 4
    tokens = torch.einsum("ipd,jwd->ijpw", patches, words)
    by_pair = None if is_word is None else is_word.unsqueeze(1)  # behind the dimension of patches
    by_word = weighted_sum(weighted_sum(tokens, tau, 2, None, patches_first), tau, 2, is_word, words_last)
    by_patch = weighted_sum(weighted_sum(tokens, tau, 3, by_pair, words_first), tau, 2, None, patches_last)
    return (by_word + by_patch) / 2.0


class GranularSimilarities(nn.Module):
    """The similarity of each image and each text at four granularities: by their vectors, their tokens, or one of each."""

    def __init__(self, width: int, num_patches: int, num_words: int, has_matrices: bool) -> None:
        super().__init__()
        self.image_words, self.words_first, self.words_last = (TokenWeights(num_words, has_matrices) for _ in range(3))
        self.patches_text, self.patches_first, self.patches_last = (TokenWeights(num_patches, has_matrices) for _ in range(3))
        self.of_vectors, self.of_tokens = (nn.Parameter(torch.eye(width)) if has_matrices else None for _ in range(2))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        patches: Tensor,
        words: Tensor,
        tau: Tensor | float,
        is_word: Tensor | None = None,
    ) -> Tensor:
        """Return S_IT, S_IW, S_PT and S_PW of B images and texts [4,B,B]: images are rows (eq. 3-13).

        S_PW weighs patches and then words, and words and then patches, and is the mean of both.

        Args:
            image: vectors of length 1 [B,d].
            text: the same [B,d].
            patches: tokens of the images, of length 1 [B,Tv,d].
            words: tokens of the texts, of length 1 [B,Ts,d].
            tau: temperature of the weights.
            is_word: which tokens of the texts count, bool [B,Ts]; None: all.
        """
        pairs = (image if self.of_vectors is None else image @ self.of_vectors) @ text.T
        image_words = self.image_words(torch.einsum("id,jwd->ijw", image, words), tau, 2, is_word)
        patches_text = self.patches_text(torch.einsum("ipd,jd->ijp", patches, text), tau, 2)
        mapped = patches if self.of_tokens is None else patches @ self.of_tokens
        return torch.stack([pairs, image_words, patches_text, self._patches_words(mapped, words, tau, is_word)])

    def _patches_words(self, patches: Tensor, words: Tensor, tau: Tensor | float, is_word: Tensor | None) -> Tensor:
        """Return S_PW [B,B]: of a few images at a time, also for the gradient, if there are many pairs of tokens."""
        layers = (self.patches_first, self.words_last, self.words_first, self.patches_last)
        matrices = [layer.matrix for layer in layers if layer.matrix is not None]
        similarity = partial(patch_word_similarity, is_word=is_word)
        inputs = (words, torch.as_tensor(tau, device=words.device), *matrices)
        pairs_per_image = patches.shape[1] * words.shape[0] * words.shape[1]
        if len(patches) * pairs_per_image <= MAX_TOKEN_PAIRS:
            return similarity(patches, *inputs)
        parts = patches.split(max(1, PART_TOKEN_PAIRS // pairs_per_image))
        return torch.cat([recomputed(similarity, part, *inputs) for part in parts])


class MGCC(Method):
    """A classifier on the image's vector, and CLIP's loss with the mean of four similarities, of vectors and of tokens.

    Tokens are chunks of both vectors. With one token each the four similarities are equal and, up to the matrices, this is
    `clip`. Features that are tokens, patches or words of a cache with tokens=true, are the tokens, and their mean is the
    vector. The original keeps those that its encoders attend to most, 3 of 10 patches and 4 of 10 words: extract them with
    --set keep=0.3 and keep=0.4.

    --preset paper has the sum of both directions (eq. 15) and the published training of what is no encoder: 60 epochs, batches
    of 128, and a rate of 1e-4 that falls to a tenth after 20 and 40. The cross-entropy stays, which the original does not have.
    """

    Config = Config
    needs = ("image", "text", "paired", "label")
    symbols: ClassVar[Mapping[str, str]] = {"lam": "w_mgcc", "t": "tau_tokens", "tau": "tau", "d": "width"}
    without_text: ClassVar[Mapping[str, Any]] = {"w_mgcc": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_mgcc": (0.1, 0.3, 1.0, 3.0), "tau_tokens": (0.01, 0.1)}
    paper: ClassVar[Mapping[str, Any]] = {"w_mgcc": 2.0}
    paper_training: ClassVar[Mapping[str, Any]] = {"lr_step": 20, "lr_gamma": 0.1, "epochs": 60, "batch_size": 128}
    phases = (scaled_phase("similarity_scale"),)
    reads_tokens = True

    w_mgcc: Tensor
    tau_tokens: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.label_loss: LabelLoss = config.label_loss
        width, num_tokens = config.width, config.num_tokens
        projector = partial(LinearProjector, out_width=width)
        self.common = CommonSpace(pooled_shapes(shapes), projector, config.scale, config.dropout)
        self.classifier = nn.Linear(width, num_classes_in(shapes))
        self.image_tokens, self.text_tokens = (
            make_token_layer(shapes[key], width, num_tokens, width, config.scale) for key in ("image", "text")
        )
        num_patches, num_words = (shapes[key][0] if len(shapes[key]) > 1 else num_tokens for key in ("image", "text"))
        self.similarities = GranularSimilarities(width, num_patches, num_words, config.matrices)
        self.similarity_scale = LearnedScale(config.tau)
        register_hyperparameters(self, w_mgcc=config.w_mgcc, tau_tokens=config.tau_tokens)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16, "num_tokens": 4}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.common.fit(pooled_batches(train))
        fit_token_layers(self.image_tokens, self.text_tokens, train)

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return CE + lam (L_i2t + L_t2i) / 2, and both parts."""
        image, text, paired = batch["image"], batch["text"], batch["paired"]
        h_v, h_s = self.common.image(pooled(image)), self.common.text(pooled_text(text), paired)
        similarity = self.similarity(h_v, h_s, token_source(image, h_v), token_source(text, h_s))
        v2s, s2v = contrastive_losses(self.similarity_scale() * similarity, paired)
        ce, mgcc = classification_loss(self.classifier(h_v), batch["label"], self.label_loss), (v2s + s2v) / 2.0
        return {"loss": ce + self.w_mgcc * mgcc, "ce": ce, "mgcc": mgcc}

    def similarity(self, h_v: Tensor, h_s: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """Return the mean of the four similarities [B,B] of vectors h_v and h_s [B,d].

        The tokens are made from the image and the text: h_v and h_s or, if they are tokens, the features [B,T,D].
        """
        is_word = word_mask(text)
        with torch.autocast(h_v.device.type, enabled=False):  # a small t makes one weight of rounded ones
            parts = (h_v.float(), h_s.float(), self.image_tokens(image.float()), self.text_tokens(text.float()))
            return self.similarities(*(F.normalize(part, dim=-1) for part in parts), self.tau_tokens, is_word).mean(0)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return h_v [B,d], before it is normalised, from image features [B,Dv] or [B,T,Dv]."""
        return self.common.image(pooled(image))

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv] or [B,T,Dv]; tokens are compared in training alone."""
        return self.classifier(self.feature(image, rng))
