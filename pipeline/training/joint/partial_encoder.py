"""Train only the last blocks of an image encoder: the blocks before them run once, not in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.runtime.errors import UserError

NOT_SEPARABLE = "the last blocks of this encoder cannot be trained on their own; choose --unfreeze image"


class _FirstBlockReached(Exception):
    """Ends a forward pass at the first trained block."""


class PartialEncoder:
    """An encoder from its first trained block on: it computes features from the stored inputs of that block.

    To also compute what the blocks need besides (masks, positions), the whole encoder runs on one item. The stored states of a
    batch replace the input of the first trained block in that run.
    """

    def __init__(self, encoder: nn.Module, blocks: Sequence[nn.Module], num_trained: int, item: Tensor) -> None:
        """Split the encoder before its last `num_trained` blocks.

        Args:
            encoder: The whole encoder.
            blocks: All blocks of the encoder, in execution order.
            num_trained: The number of trained blocks.
            item: One prepared item [1, ...].

        Raises:
            UserError: too many blocks, or the last blocks depend on more than the states before them.
        """
        if not 0 < num_trained < len(blocks):
            raise UserError(f"last:{num_trained} of {len(blocks)} blocks; choose last:1 to last:{len(blocks) - 1}, or image")
        self._encoder, self._item = encoder, item
        self.trained_blocks = list(blocks[-num_trained:])
        if not self._is_exact():
            raise UserError(NOT_SEPARABLE)

    @torch.no_grad()
    def capture(self, prepared: Tensor) -> Tensor:
        """Return the input of the first trained block [B, ...] for prepared items [B, ...]; later blocks do not run.

        Raises:
            UserError: the input is not one tensor with a row for each item.
        """
        captured: list[tuple[Any, ...]] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            captured.append(args)
            raise _FirstBlockReached

        handle = self.trained_blocks[0].register_forward_pre_hook(stop)
        try:
            self._encoder(prepared)
        except _FirstBlockReached:
            pass
        finally:
            handle.remove()
        (args,) = captured
        if not args or not isinstance(args[0], Tensor) or len(args[0]) != len(prepared):
            raise UserError(NOT_SEPARABLE)
        return args[0]

    def __call__(self, states: Tensor) -> Tensor:
        """Return the features [B, *shape] of captured states [B, ...]; gradients reach the trained blocks."""
        unused = [states]  # a block that runs twice finds the list empty and raises IndexError
        handle = self.trained_blocks[0].register_forward_pre_hook(lambda _, args: (unused.pop(), *args[1:]))
        try:
            return self._encoder(self._item)
        finally:
            handle.remove()

    @torch.no_grad()
    def _is_exact(self) -> bool:
        """Return whether other items get the features of the whole encoder, within the rounding of bfloat16."""
        other = self._item + (1 if self._item.is_floating_point() else 128)  # uint8 wraps around, so every value differs
        prepared = torch.cat([other, self._item])
        expected, states = self._encoder(prepared), self.capture(prepared)
        try:
            found = self(states)
        except (RuntimeError, IndexError):  # shapes do not fit, or a block runs twice
            return False
        if found.shape != expected.shape:
            return False
        error, size = ((found - expected).flatten(1).norm(dim=1), expected.flatten(1).norm(dim=1))
        return bool((error <= torch.finfo(torch.bfloat16).eps * size).all())
