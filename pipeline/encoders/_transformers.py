"""What encoders with models of transformers share: loading a network, its identity, and its hidden states as features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from pipeline.encoders._encoder import Encoder
from pipeline.encoders._weights import WEIGHT_FILES, fixed_seed, hub_folder, read_state_dict, state_sha256
from pipeline.runtime.device import ComputeDtype, use_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import fingerprint
from pipeline.runtime.settings import Settings

# entries of a configuration that do not change features
_IGNORED_KEYS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")

Tower = Literal["vision_model", "text_model", ""]  # the part of a two-tower model that is used; "": the whole model


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Settings):
    """Which image or video model to use, with which weights, and which of its outputs is the feature."""

    model: Annotated[str, "a local folder or an id of the Hugging Face hub; it decides the preprocessing"]
    weights: Annotated[str, "pretrained (the model's own), random, or a local .pth or .safetensors file or folder"] = (
        "pretrained"
    )
    pooling: Annotated[Literal["cls", "mean", "pooler"], "first token, mean of all tokens, or the model's own pooling"]
    layer: Annotated[int, "hidden state: 0 is the embeddings, 1, 2, … the blocks, -1 the last one after the final norm"] = -1
    tokens: Annotated[bool, "all tokens [T,D] instead of one vector"] = False
    compute_dtype: Annotated[ComputeDtype, "auto: bfloat16 if the processor supports it; mixed keeps float32 parameters"] = (
        "auto"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling == "pooler" and (self.layer != -1 or self.tokens):
            raise UserError("pooling=pooler reads the final layer and gives one vector; leave layer and tokens alone")


class TransformersVision(Encoder):
    """An image or video model of transformers with its own processor; it computes in the compute dtype."""

    config: VisionConfig

    def __init__(self, config: VisionConfig, tower: Tower) -> None:
        super().__init__(config)
        folder = transformers_folder(config.model, config.weights)

        from transformers import AutoImageProcessor  # takes seconds to import, and texts do not need it

        self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        has_pooler = config.pooling == "pooler"
        self.network: Any = load_transformers_network(folder, config.weights, tower, needs_pooler=has_pooler)
        self.check_network()
        self.architecture = transformers_identity(self.network)
        self.move_for_inference(config.compute_dtype)

    def check_network(self) -> None:
        """Raise `UserError` if the network cannot give the features that the config asks for."""
        if self.config.pooling == "cls" and not self.config.tokens:
            check_class_token(self.network)

    def identity(self) -> dict[str, Any]:
        """Return the configuration, weights, processor settings, pooling, layer, tokens and the resolved compute dtype."""
        return {
            **self.architecture,
            "preprocessing": plain_settings(self.processor),
            "pooling": "none" if self.config.tokens else self.config.pooling,
            "layer": self.config.layer,
            "compute_dtype": self.compute_dtype,
        }

    def run_network(self, prepared: Tensor, **options: Any) -> Any:
        """Return the output of the network for prepared pixels, with its hidden states if a layer is asked for."""
        options |= {"output_hidden_states": self.config.layer != -1}
        with use_precision(self.compute_dtype, self.device):
            return self.network(pixel_values=prepared.to(self.device, self.input_dtype), **options)

    def token_features(self, output: Any) -> Tensor:
        """Return the features float32 [B,D] or [B,T,D] from the tokens of the layer that the config names."""
        return pool_tokens(hidden_states(output, self.config.layer), self.config.pooling, self.config.tokens)


def transformers_folder(model: str, weights: str) -> Path:
    """Return the folder of a transformers model; weight files are required only if the model's own weights are used.

    Args:
        model: a local folder or an id of the Hugging Face hub.
        weights: "pretrained" for the model's own weights; anything else needs only the configuration.
    """
    return hub_folder(model, WEIGHT_FILES if weights == "pretrained" else "config.json")


def load_transformers_network(folder: Path, weights: str, tower: Tower, needs_pooler: bool) -> Any:
    """Return the float32 network that the configuration in a folder describes.

    Args:
        folder: the folder of the model.
        weights: "pretrained", "random", or the path of a file or folder.
        tower: if the model has this tower, only the tower is returned, and the tower's weights are enough.
        needs_pooler: whether the weights of the pooler are needed, too; many checkpoints do not have them.

    Raises:
        UserError: a tensor is missing or has another shape; the message names it.
    """
    from transformers import AutoConfig, AutoModel  # takes seconds to import
    from transformers.utils import logging

    logging.disable_progress_bar()  # standard error belongs to the progress of extraction
    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with fixed_seed():
        if weights == "random":
            network = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
            return getattr(network, tower, network)
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if weights == "pretrained":
            network, info = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
        else:
            with torch.device("meta"):
                empty = AutoModel.from_config(config, trust_remote_code=False)
            state = read_state_dict(Path(weights), "text" if tower == "text_model" else "image")
            state = _with_tower_prefix(state, tower, empty)
            network, info = type(empty).from_pretrained(None, config=config, state_dict=state, **options)
    selected = getattr(network, tower, network)
    fault = f"weights {weights!r} do not fit {type(selected).__name__}"
    _check_complete(info, "" if selected is network else f"{tower}.", needs_pooler, fault)
    return selected


def _with_tower_prefix(state: Mapping[str, Tensor], tower: str, network: nn.Module) -> dict[str, Tensor]:
    """Return a state under the names of the whole network, also if it is the state of the tower alone."""
    names = network.state_dict().keys()
    return {prefixed if (prefixed := f"{tower}.{name}") in names else name: tensor for name, tensor in state.items()}


def _check_complete(info: Mapping[str, Any], prefix: str, needs_pooler: bool, fault: str) -> None:
    """Raise `UserError` if transformers did not find a tensor whose name begins with `prefix`.

    Args:
        info: the loading info of transformers.
        prefix: only tensors whose names begin with it are needed.
        needs_pooler: whether the tensors of the pooler are needed.
        fault: the beginning of the message.
    """
    lacking = [f"{name} is missing" for name in info["missing_keys"] if needs_pooler or "pooler" not in name]
    lacking += [f"{name} has another shape" for name, *_ in info["mismatched_keys"]]
    for each in sorted(each for each in lacking if each.startswith(prefix)):
        raise UserError(f"{fault}: {each}")


def hidden_states(output: Any, layer: int) -> Tensor:
    """Return hidden states float32 [B,T,D] from the output of a transformers model.

    Args:
        output: the output; a map [B,D,H,W] in it becomes H*W tokens.
        layer: 0 is the embeddings, 1, 2, … the blocks, -1 the last one (after the final norm, if the network has one).
    """
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return (states.flatten(2).transpose(1, 2) if states.ndim == 4 else states).float()


def pool_tokens(states_BTD: Tensor, pooling: str, tokens: bool) -> Tensor:
    """Return all tokens [B,T,D] if `tokens`, else of each item the first token ("cls") or the mean of all tokens, [B,D]."""
    if tokens:
        return states_BTD
    return states_BTD[:, 0] if pooling == "cls" else states_BTD.mean(dim=1)


def check_keep(keep: float, tokens: bool, layer: int) -> None:
    """Raise `UserError` if a share of tokens is to be kept where there are no tokens, or no attention that made them."""
    if keep < 1 and not (tokens and layer):
        raise UserError(
            f"keep={keep:g} chooses among tokens by the attention that made them; set tokens=true, and a layer but 0"
        )


def num_kept(keep: float, count: Tensor) -> Tensor:
    """Return how many of `count` tokens [B] are kept, a share of them but at least one, int64 [B]."""
    return (keep * count.double()).round().long().clamp(min=1)


def given_attention(output: Any, layer: int, row_B: Tensor) -> Tensor:
    """Return the attention that one token of each item gives to all, in the block that made a layer: a mean over heads [B,T].

    Args:
        output: of a transformers model, with its attentions.
        layer: see `hidden_states`, but not 0.
        row_B: the token of each item.
    """
    attention_BTT = output.attentions[layer if layer == -1 else layer - 1].float().mean(dim=1)
    return attention_BTT[torch.arange(len(row_B), device=row_B.device), row_B]


def keep_most_attended(tokens_BTD: Tensor, attention_BT: Tensor, count_B: Tensor, most: int) -> Tensor:
    """Return the tokens of each item that get most attention, so many of each, in their order [B,most,D]; then come zeros."""
    rank_BT = attention_BT.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    is_kept_BT = rank_BT < count_B.unsqueeze(1)
    order_BT = (~is_kept_BT).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    kept_BTD = tokens_BTD.masked_fill(~is_kept_BT.unsqueeze(-1), 0.0)
    return kept_BTD.gather(1, order_BT.unsqueeze(-1).expand(-1, -1, tokens_BTD.shape[-1]))


def check_class_token(network: nn.Module) -> None:
    """Raise `UserError` if the first token of a transformer is not a class token, learned to represent the whole input."""
    if not any(name.endswith(("cls_token", "class_embedding")) for name in network.state_dict()):
        raise UserError(f"{type(network).__name__} has no class token; set pooling=mean or pooling=pooler")


def transformers_identity(network: Any) -> dict[str, Any]:
    """Return the identity of a transformers network: its weights, and its configuration as far as it changes features."""
    settings = {key: value for key, value in plain_settings(network.config).items() if key not in _IGNORED_KEYS}
    return {"configuration": fingerprint(settings), "weights_sha256": state_sha256(network)}


def plain_settings(settings: Any) -> dict[str, Any]:
    """Return the settings of a transformers configuration or image processor as JSON values."""
    return json.loads(json.dumps(settings.to_dict(), default=str))
