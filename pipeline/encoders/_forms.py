"""Networks with two forms that compute the same: one to train, and one for deployment, whose layers are merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pipeline.encoders._weights import load_matching_state, read_state_dict, state_sha256
from pipeline.runtime.errors import UserError

Form = Literal["training", "deploy"]


@dataclass(frozen=True, kw_only=True)
class CheckpointLayout:
    """What the public checkpoints of a network look like."""

    origin: str  # the repository that publishes them
    merged_tensor: str  # the name of a tensor that there is in the deploy form alone
    whole: tuple[str, ...]  # prefixes of the names of tensors that are no classifier's
    settings: str  # which settings must be those of the file


def load_in_form(network: Any, weights: str, form: Form, layout: CheckpointLayout) -> str:
    """Load weights into a network in its training form, merge its layers if the form is "deploy", and return a digest.

    The digest is that of the weights as they were loaded, so it does not depend on the rounding of the merge.

    Args:
        network: a module with random weights and a function `merge`, which gives it the deploy form.
        weights: a file or folder with weights in either form, or "random".
        form: the form of the result.
        layout: what the files look like.

    Raises:
        UserError: no weights are given, they do not fit, or those of the deploy form are to be trained.
    """
    if not weights:
        raise UserError(f"weights are needed: give --set weights=FILE, a checkpoint of {layout.origin}, or weights=random")
    is_merged = False
    if weights != "random":
        path = Path(weights)
        state = read_state_dict(path)
        if is_merged := layout.merged_tensor in state:
            if form != "deploy":
                raise UserError(f"weights {path.name!r} are of the deploy form: set form=deploy, or give those of training")
            network.merge()
        load_matching_state(network, state, path.name, layout.whole, f"set {layout.settings} to those of the file")
    digest = state_sha256(network)
    if form == "deploy" and not is_merged:
        network.merge()
    return digest


def fold_normalization(weight: Tensor, bias: Tensor | None, bn: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weight [C, ...] and bias [C] of a convolution that does the batch normalisation after it, too."""
    return fuse_conv_bn_weights(weight, bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
