"""What all encoders share: read weights from a file, a folder, the hub or a seed, hash them, and prepare images.

Weights are read without ever running code.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
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

from pipeline.encoders._encoder import Encoder
from pipeline.runtime.errors import UserError

CONFIGURATION_FILES = ("*.json", "*.txt", "*.model")  # vocabularies, too
WEIGHT_FILES = "*.safetensors"
_NO_CODE = " weights; other formats can carry code and are not loaded"
_ENCODER_PREFIX = re.compile(r"^(?:(?:image|text|video)\.)*network\.")  # of tensor names in states of our own encoders
_STATE_KEYS = ("state_dict", "model_ema", "model")  # where training programs store the state; they report the averaged one
_PARALLEL_PREFIX = "module."  # of all tensor names, if a model was saved as it trained on several GPUs


def read_state_dict(path: Path, modality: Literal["image", "text"] = "image") -> dict[str, Tensor]:
    """Return the tensors of a weight file (.safetensors, .pth, .pt or .bin) by name, on the CPU.

    The file may also be a checkpoint of a training program, with the state under "state_dict", "model_ema" or "model"; or the
    state of an encoder of this package, or of two encoders under the names `image` (or `video`) and `text`. Then the tensors of
    the network inside are returned, under the network's own names.

    Args:
        path: the file, or a folder, whose .safetensors files are all read.
        modality: of two encoders, the one whose tensors are returned.

    Raises:
        UserError: there is no such file, it holds other things than tensors, or it cannot be read without running code.
    """
    files = sorted(path.glob(WEIGHT_FILES)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .safetensors{_NO_CODE}")
    state: dict[str, Any] = {}
    for file in files:
        state |= _read_file(file)
    state = next((state[key] for key in _STATE_KEYS if isinstance(state.get(key), Mapping)), state)
    if all(name.startswith(_PARALLEL_PREFIX) for name in state):
        state = {name.removeprefix(_PARALLEL_PREFIX): tensor for name, tensor in state.items()}
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path.name} holds other things than tensors; save the network's state_dict alone")
    others = ("image.", "video.") if modality == "text" else ("text.",)
    kept = {name: tensor for name, tensor in state.items() if not (name.startswith(others) and _ENCODER_PREFIX.match(name))}
    return {_ENCODER_PREFIX.sub("", name, count=1): tensor for name, tensor in kept.items()}


def _read_file(file: Path) -> dict[str, Any]:
    """Return the contents of one weight file."""
    if not file.is_file():
        raise UserError(f"weights {str(file)!r} are no file; give a .pth or .safetensors file, or what else `weights` takes")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a training program, which are only values
            return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError, TypeError) as error:
        raise UserError(
            f"{file.name} does not hold weights that can be loaded without running code; where you trust it, save its "
            "state_dict alone"
        ) from error


def load_matching_state(
    network: nn.Module, state: Mapping[str, Tensor], source: str, whole: tuple[str, ...] = (), remedy: str = ""
) -> None:
    """Load a state into a network; tensors that the network does not have (a classifier) are left out.

    Args:
        network: the network; all its tensors must be in the state.
        state: tensors by name.
        source: where the state comes from, for messages.
        whole: prefixes of the names of tensors of which none may be left out.
        remedy: the end of the messages.

    Raises:
        UserError: a tensor is missing, has another shape, or must not be left out; the message names the first one.
    """
    wanted, remedy = network.state_dict(), f"; {remedy}" if remedy else ""
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise UserError(f"{source} does not fit: {name} {tuple(tensor.shape)} {found}{remedy}")
    for name in state:
        if name.startswith(whole) and name not in wanted:
            raise UserError(f"{source} does not fit: the network has no {name}{remedy}")
    network.load_state_dict({name: state[name] for name in wanted})


@contextlib.contextmanager
def fixed_seed() -> Iterator[None]:
    """Inside the block, draw new weights from one fixed seed; the caller's random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def state_sha256(network: nn.Module) -> str:
    """Return the SHA-256 of names, formats, shapes and bytes of a network's state.

    It is the same whether the weights come from a file, a folder or the hub.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hub_folder(model: str, needed: str = WEIGHT_FILES, setting: str = "model") -> Path:
    """Return the folder of a model with its configuration and its weight files.

    A local folder is used as it is. Otherwise the local store of the hub is searched first, and the model is downloaded only if
    it is not stored. So a stored model does not change while there are caches of it.

    Args:
        model: a local folder or an id of the Hugging Face hub.
        needed: pattern of the files that must be there.
        setting: which setting takes a local folder, for messages.

    Raises:
        UserError: the files are not available; at once if there is no network, or with HF_HUB_OFFLINE=1.
    """
    if Path(model).is_dir():
        folder = Path(model)
    else:
        try:
            folder = _stored_or_downloaded(model, needed)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model {model!r} is neither a local folder nor available from the hub ({type(error).__name__}); download it "
                f"where there is a network (hf download {model} --local-dir FOLDER) and give --set {setting}=FOLDER"
            ) from error
    if not list(folder.glob(needed)):
        raise UserError(f"{folder} holds no {needed.removeprefix('*')}{_NO_CODE if needed.endswith(WEIGHT_FILES[1:]) else ''}")
    return folder


def _stored_or_downloaded(model: str, needed: str) -> Path:
    patterns = [*CONFIGURATION_FILES, needed]
    with contextlib.suppress(FileNotFoundError):  # the model is not stored
        folder = Path(snapshot_download(model, allow_patterns=patterns, local_files_only=True))
        if list(folder.glob(needed)):
            return folder
    return Path(snapshot_download(model, allow_patterns=patterns))


def probe_feature_shape(encoder: Encoder, blank: Tensor) -> tuple[int, ...]:
    """Return the shape of an encoder's features of one prepared item, by running the encoder once.

    Args:
        encoder: the encoder.
        blank: any prepared item.

    Raises:
        UserError: the model does not have the layer that the config names.
    """
    probe = copy.deepcopy(encoder)  # a run can leave hooks or cached values in the network
    try:
        with torch.inference_mode():
            return tuple(probe(blank[None]).shape[1:])
    except (
        AssertionError,
        AttributeError,
        IndexError,
    ) as error:  # OpenCLIP or timm; no layers; transformers
        raise UserError(f"model {encoder.config.model!r} does not give layer {encoder.config.layer}: {error}") from error


def split_transform(transform: object) -> tuple[Compose, Normalize]:
    """Split a library's preprocessing into two steps: PIL image -> PIL image, and the normalisation of channels in [0,1].

    The conversion of 8-bit channels to [0,1] between them is left out. So items travel between processes as bytes, and are
    scaled where they are encoded.
    """
    assert isinstance(transform, Compose), transform
    *shape, to_tensor, normalize = transform.transforms
    assert "ToTensor" in type(to_tensor).__name__, transform
    assert isinstance(normalize, Normalize), transform
    return Compose(shape), normalize


def image_to_uint8(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image, uint8 [3,H,W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
