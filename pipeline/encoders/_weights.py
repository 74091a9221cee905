"""Where the numbers of a pretrained network come from (a file, a folder, the hub, a seed), read without ever running code."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize

from pipeline.runtime.files import fingerprint

CONFIGURATION_FILES = ("*.json", "*.txt", "*.model")  # vocabularies too
WEIGHT_FILES = "*.safetensors"
NO_CODE = " weights; other formats can carry code and are not loaded"
NOT_MEANT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")  # says nothing of features
OWN_NAME = re.compile(r"^(?:(?:image|text|video)\.)*network\.")  # begins names in states of this package's encoders


def read_state(path: Path, modality: Literal["image", "text"] = "image") -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .bin file, or of all .safetensors files of a folder, by name, on the CPU.

    Of the state of one of this package's encoders, or of two of them under the names `image` (or `video`) and `text`, these are
    the tensors of the network inside, that of the modality. `ValueError` when there is no such file, or it cannot be read
    without running code.
    """
    files = sorted(path.glob(WEIGHT_FILES)) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no .safetensors{NO_CODE}")
    state: dict[str, Any] = {}
    for file in files:
        state |= _read(file)
    state = state.get("state_dict", state)  # how training programs wrap it
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path.name} holds other things than tensors; save the network's state_dict alone")
    others = ("image.", "video.") if modality == "text" else ("text.",)
    kept = {name: tensor for name, tensor in state.items() if not (name.startswith(others) and OWN_NAME.match(name))}
    return {OWN_NAME.sub("", name, count=1): tensor for name, tensor in kept.items()}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"weights {str(file)!r} are no file; give a .pth or .safetensors file, or what else `weights` takes")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError, TypeError) as error:
        raise ValueError(f"{file.name} does not hold weights that can be loaded without running code") from error


def fit(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state into a network; tensors that the network lacks (a classifier) are left out.

    `ValueError` names the first tensor that is missing or has another shape.
    """
    wanted = network.state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise ValueError(f"{source} does not fit: {name} {tuple(tensor.shape)} {found}")
    network.load_state_dict({name: state[name] for name in wanted})


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Draw new weights from one seed, whoever asks, and leave the caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def digest(network: nn.Module) -> str:
    """SHA-256 of names, formats, shapes and bytes of a network's state: the same for a file, a folder and the hub."""
    total = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def hub_folder(model: str, needed: str = WEIGHT_FILES) -> Path:
    """The folder of a model with the files that match `needed` and its configuration: local, else stored, else downloaded.

    The hub's local store is asked first, so a stored model does not change under its caches. `ValueError` when the files cannot
    be had; without a network, or with HF_HUB_OFFLINE=1, at once.
    """
    if Path(model).is_dir():
        folder = Path(model)
    else:
        try:
            folder = _stored_or_downloaded(model, needed)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {model!r} is neither a local folder nor available from the hub ({type(error).__name__}); download it "
                f"where there is a network (hf download {model} --local-dir FOLDER) and give --set model=FOLDER"
            ) from error
    if not list(folder.glob(needed)):
        raise ValueError(f"{folder} holds no {needed.removeprefix('*')}{NO_CODE if needed.endswith(WEIGHT_FILES[1:]) else ''}")
    return folder


def _stored_or_downloaded(model: str, needed: str) -> Path:
    patterns = [*CONFIGURATION_FILES, needed]
    with contextlib.suppress(FileNotFoundError):  # nothing is stored yet
        folder = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if list(folder.glob(needed)):
            return folder
    return Path(snapshot_download(model, allow_patterns=patterns))


def transformers_folder(model: str, weights: str) -> Path:
    """The folder of a transformers model; without its weights when others, or random ones, are wanted."""
    return hub_folder(model, WEIGHT_FILES if weights == "pretrained" else "config.json")


def transformers_network(folder: Path, weights: str, tower: Literal["vision_model", "text_model", ""], pooler: bool) -> Any:
    """The float32 network that a transformers folder configures, with weights that are pretrained, random, or a file's.

    Of a model that has this tower it is the tower, whose weights are enough. `pooler` says that the pooler's weights are
    needed, too; many checkpoints lack them. `ValueError` names what is missing.
    """
    from transformers import AutoConfig, AutoModel  # seconds, which other encoders need not wait
    from transformers.utils import logging

    logging.disable_progress_bar()  # standard error belongs to extraction
    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with seeded():
        if weights == "random":
            network = AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
            return getattr(network, tower, network)
        options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if weights == "pretrained":
            network, info = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
        else:
            with torch.device("meta"):
                empty = AutoModel.from_config(config, trust_remote_code=False)
            state = _of_tower(read_state(Path(weights), "text" if tower == "text_model" else "image"), tower, empty)
            network, info = type(empty).from_pretrained(None, config=config, state_dict=state, **options)
    read = getattr(network, tower, network)
    fault = f"weights {weights!r} do not fit {type(read).__name__}"
    _check_complete(info, "" if read is network else f"{tower}.", pooler, fault)
    return read


def _of_tower(state: Mapping[str, Tensor], tower: str, network: nn.Module) -> dict[str, Tensor]:
    """A state under the network's names, also when it is that of the tower alone."""
    names = network.state_dict().keys()
    return {within if (within := f"{tower}.{name}") in names else name: tensor for name, tensor in state.items()}


def _check_complete(info: Mapping[str, Any], prefix: str, pooler: bool, fault: str) -> None:
    """`ValueError` that begins with `fault` when transformers did not find a tensor whose name has this prefix."""
    lacking = [f"{name} is missing" for name in info["missing_keys"] if pooler or "pooler" not in name]
    lacking += [f"{name} has another shape" for name, *_ in info["mismatched_keys"]]
    for each in sorted(each for each in lacking if each.startswith(prefix)):
        raise ValueError(f"{fault}: {each}")


def states_of(output: Any, layer: int) -> Tensor:
    """Hidden states float32 [B,T,D] of a transformers output: layer 0 the embeddings, 1, 2, … the blocks, -1 the final ones.

    The final ones are those after the closing norm, if the network has one. A map [B,D,H,W] becomes H*W tokens.
    """
    states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    return (states.flatten(2).transpose(1, 2) if states.ndim == 4 else states).float()


def pooled(states_BTD: Tensor, pooling: str, tokens: bool) -> Tensor:
    """All tokens [B,T,D], or of each item the first one (cls), or their mean [B,D]."""
    if tokens:
        return states_BTD
    return states_BTD[:, 0] if pooling == "cls" else states_BTD.mean(dim=1)


def feature_shape(encoder: Any, blank: Tensor) -> tuple[int, ...]:
    """The shape of what an encoder makes of one prepared item; `ValueError` when its model does not have its layer."""
    probe = copy.deepcopy(encoder)  # some networks of timm keep what they compute of their weights, those of transformers hooks
    try:
        with torch.inference_mode():
            return tuple(probe(blank[None]).shape[1:])
    except (AssertionError, AttributeError, IndexError) as error:  # OpenCLIP or timm, a network without layers, transformers
        raise ValueError(f"model {encoder.config.model!r} does not give layer {encoder.config.layer}: {error}") from error


def check_class_token(network: nn.Module) -> None:
    """`ValueError` when the first token of a transformer is not one that was learned to stand for all."""
    if not any(name.endswith(("cls_token", "class_embedding")) for name in network.state_dict()):
        raise ValueError(f"{type(network).__name__} has no class token; set pooling=mean or pooling=pooler")


def architecture(network: Any) -> dict[str, Any]:
    """The identity of a transformers network: its configuration, without what does not change features, and its weights."""
    settings = {key: value for key, value in plain(network.config).items() if key not in NOT_MEANT}
    return {"configuration": fingerprint(settings), "weights_sha256": digest(network)}


def plain(settings: Any) -> dict[str, Any]:
    """The settings of a transformers configuration or image processor, as JSON values."""
    return json.loads(json.dumps(settings.to_dict(), default=str))


def split_transform(transform: object) -> tuple[Compose, Normalize]:
    """A library's preprocessing as two steps: PIL image -> PIL image, and the normalisation of [0, 1] channels.

    Between them lies the scaling of 8-bit channels by 1/255, so items travel as bytes and are scaled where they are encoded.
    """
    assert isinstance(transform, Compose), transform
    *shape, to_tensor, normalize = transform.transforms
    assert "ToTensor" in type(to_tensor).__name__, transform
    assert isinstance(normalize, Normalize), transform
    return Compose(shape), normalize


def pixels(image: Image.Image) -> Tensor:
    """uint8 [3,H,W] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
