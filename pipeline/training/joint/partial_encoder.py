"""Train the last blocks of an image encoder from what reaches them: the blocks before them run once, not in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

REFUSAL = "the last blocks of this encoder cannot be trained on their own; choose --train image"


class _Reached(Exception):
    """Ends a forward pass at the first trained block."""


class PartialEncoder:
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
        if not self._is_exact():
            raise ValueError(REFUSAL)

    @torch.no_grad()
    def capture(self, prepared: Tensor) -> Tensor:
        """What reaches the first trained block [B, ...] for prepared items; what comes after does not run.

        `ValueError` when that is not one tensor with a row per item.
        """
        found: list[tuple[Any, ...]] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args)
            raise _Reached

        handle = self.trained[0].register_forward_pre_hook(stop)
        try:
            self._encoder(prepared)
        except _Reached:
            pass
        finally:
            handle.remove()
        (args,) = found
        if not args or not isinstance(args[0], Tensor) or len(args[0]) != len(prepared):
            raise ValueError(REFUSAL)
        return args[0]

    def __call__(self, states: Tensor) -> Tensor:
        """Features [B, *shape] of states [B, ...]; gradients reach the trained blocks."""
        waiting = [states]  # for the one time that the block runs
        handle = self.trained[0].register_forward_pre_hook(lambda _, args: (waiting.pop(), *args[1:]))
        try:
            return self._encoder(self._item)
        finally:
            handle.remove()

    @torch.no_grad()
    def _is_exact(self) -> bool:
        """Whether items beside the one that is held get the features of the whole encoder, within the rounding of bfloat16."""
        other = self._item + (1 if self._item.is_floating_point() else 128)  # bytes wrap around: no item is its own other
        prepared = torch.cat([other, self._item])
        expected, states = self._encoder(prepared), self.capture(prepared)
        try:
            found = self(states)
        except (RuntimeError, IndexError):  # of shapes that do not fit, or a block that runs twice
            return False
        if found.shape != expected.shape:
            return False
        error, size = ((found - expected).flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1))
        return bool((error <= torch.finfo(torch.bfloat16).eps * size).all())
