"""Image features that are tokens, one vector of each patch, for methods whose `Method.reads_tokens` is true."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn

from pipeline.nn.layers import ChunkTokens, ScaleMode, Standardise
from pipeline.runtime.errors import UserError
from pipeline.types import Batch, Shapes


def pooled(x: Tensor) -> Tensor:
    """Return one vector of each sample [B,D]: vectors [B,D] as they are, of tokens [B,T,D] the mean."""
    return x if x.ndim == 2 else x.mean(1)


def pooled_shapes(shapes: Shapes) -> Shapes:
    """Return the shapes of a batch whose image features are pooled.

    Raises:
        UserError: the texts are tokens; features do not say which of them are padding.
    """
    if len(shapes["text"]) > 1:
        size = "×".join(map(str, shapes["text"]))
        raise UserError(f"the text features are tokens, {size} of each text; this method reads one vector of each text")
    return {**shapes, "image": shapes["image"][-1:]}


def pooled_batches(train: Callable[[], Iterator[Batch]]) -> Callable[[], Iterator[Batch]]:
    """Return what starts the same passes over a split with pooled image features."""
    return lambda: ({**batch, "image": pooled(batch["image"])} for batch in train())


class PatchTokens(nn.Module):
    """Maps tokens of image features to another width: standardised over all tokens of all images, then a linear layer."""

    def __init__(self, width: int, token_width: int, scale: ScaleMode) -> None:
        super().__init__()
        self.scale, self.layer = Standardise(scale, width), nn.Linear(width, token_width)

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Compute the statistics of image features, batches [B,T,D]."""
        self.scale.fit(batch.flatten(0, 1) for batch in batches)

    def forward(self, image: Tensor) -> Tensor:
        """Map image features [B,T,D] to [B,T,token_width]."""
        return self.layer(self.scale(image))


def make_image_tokens(
    shape: tuple[int, ...], width: int, num_tokens: int, token_width: int, scale: ScaleMode
) -> PatchTokens | ChunkTokens:
    """Return the layer that gives an image's tokens: from its features if these are tokens, else from its vector.

    Args:
        shape: of the image features, (T,D) or (D,).
        width: of the image's vector.
        num_tokens: chunks of the vector.
        token_width: of a token.
        scale: see `layers.Standardise`.
    """
    return PatchTokens(shape[1], token_width, scale) if len(shape) > 1 else ChunkTokens(width, num_tokens, token_width)
