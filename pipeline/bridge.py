"""Train the last blocks of an image encoder from what reaches them: the blocks before them run once, not in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Ends a forward pass at the first trained block."""


class Bridge:
    """The encoder from its first trained block on.

    What comes before it runs on one item, for the sake of what is computed besides (masks, positions); then the stored states
    of a batch take the place of that item's.
    """

    def __init__(self, encoder: nn.Module, parts: Sequence[nn.Module], num_trained: int, item: Tensor) -> None:
        """`parts` are all blocks of the encoder, `item` [1, ...] is prepared.

        `ValueError` for too many blocks, and for encoders whose last blocks depend on more than these states.
        """
        if not 0 < num_trained < len(parts):
            raise ValueError(f"last:{num_trained} of {len(parts)} blocks; choose last:1 to last:{len(parts) - 1}, or image")
        self._encoder, self._item = encoder, item
        self.trained = list(parts[-num_trained:])
        if not self._is_exact(torch.cat([item, item])):
            raise ValueError("the last blocks of this encoder cannot be trained on their own; choose --train image")

    @torch.no_grad()
    def capture(self, prepared: Tensor) -> Tensor:
        """What reaches the first trained block [B, ...] for prepared items; what comes after does not run."""
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _Reached

        handle = self.trained[0].register_forward_pre_hook(stop)
        try:
            self._encoder(prepared)
        except _Reached:
            pass
        finally:
            handle.remove()
        (states,) = found
        return states

    def __call__(self, states: Tensor) -> Tensor:
        """Features [B, *shape] of states [B, ...]; gradients reach the trained blocks."""
        handle = self.trained[0].register_forward_pre_hook(lambda _, args: (states, *args[1:]))
        try:
            return self._encoder(self._item)
        finally:
            handle.remove()

    @torch.no_grad()
    def _is_exact(self, prepared: Tensor) -> bool:
        """Whether a batch gives the features that the whole encoder gives, within the rounding of bfloat16."""
        expected = self._encoder(prepared)
        try:
            found = self(self.capture(prepared))
        except RuntimeError:  # of shapes that do not fit
            return False
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
