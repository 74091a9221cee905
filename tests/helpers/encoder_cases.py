"""Small encoders of every family that need no network, and clips for the video encoders."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, VideoMAEImageProcessor, ViTImageProcessor

from pipeline.runtime import plugins

BODY_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VISION_SIZES = {**BODY_SIZES, "image_size": 32, "patch_size": 8}
TEXT_SIZES = {
    **BODY_SIZES,
    "vocab_size": 99,
    "max_position_embeddings": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CROSS_FRAME_SIZES = {f"mit_{key}": value for key, value in BODY_SIZES.items()}  # where X-CLIP combines frames
MODEL_SIZES: dict[str, dict[str, Any]] = {  # transformers' name of a model -> a small configuration
    "vit": VISION_SIZES,
    "siglip": {"vision_config": VISION_SIZES, "text_config": TEXT_SIZES},
    "bert": TEXT_SIZES,
    "roberta": {**TEXT_SIZES, "pad_token_id": 1, "max_position_embeddings": 10},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 16},
    "videomae": {**VISION_SIZES, "num_frames": 4},
    "timesformer": {**VISION_SIZES, "num_frames": 4},
    "xclip": {
        "vision_config": {**VISION_SIZES, **CROSS_FRAME_SIZES, "num_frames": 4},
        "text_config": TEXT_SIZES,
        **CROSS_FRAME_SIZES,
        "projection_dim": 32,
        "prompt_layers": 1,
        "prompt_num_attention_heads": 2,
    },
}
FAMILIES = {  # every family, with every kind of network in it -> settings other than its model
    "efficientnet_lite": {},
    "frames": {"encoder": "timm", "settings": "model=test_vit", "num_frames": "3"},
    "repmlpnet": {"side": "32"},
    "vanillanet": {"depth": "5", "width": "0.03125", "side": "32"},
    "wiser": {"residual": "test_resnet", "num_maps": "4", "width": "16"},
    "openclip image": {"modality": "image"},
    "openclip text": {"modality": "text"},
    "timm vit": {"model": "test_vit"},
    "timm resnet": {"model": "test_resnet"},
    "timm levit": {"model": "levit_128s"},  # it caches values that it computes from its weights
    "transformers_image vit": {},
    "transformers_image siglip": {"pooling": "pooler"},
    "transformers_text bert": {"max_tokens": "8"},
    "transformers_text siglip": {"max_tokens": "8"},
    "transformers_text gpt2": {"max_tokens": "8"},
    "transformers_video videomae": {},
    "transformers_video timesformer": {"pooling": "cls"},
    "transformers_video xclip": {"pooling": "pooler"},
}
TEXTS = ("a cat", "the quick brown fox jumps over the lazy dog")
TINY_DATASET_WORDS = "red green blue grey square number 0 1 2 3 4 5 6 7 8 9"  # the words of the tiny dataset


def family_settings(case: str, folder: Path) -> tuple[str, dict[str, str]]:
    """Return the name of a small encoder of `FAMILIES`, and its settings without the weights.

    Args:
        case: a key of `FAMILIES`.
        folder: where the files of its model are written.
    """
    name, _, kind = case.partition(" ")
    folder.mkdir(exist_ok=True)
    write = {"openclip": lambda: openclip_folder(folder), "transformers_image": lambda: image_folder(folder, kind)}
    write |= {"transformers_text": lambda: text_folder(folder, kind), "transformers_video": lambda: video_folder(folder, kind)}
    model = {"model": str(write[name]())} if name in write else {}
    return name, {**model, **FAMILIES[case]}


def small_settings(name: str, folder: Path) -> dict[str, Any]:
    """Return settings of a small encoder, its own if it needs no files; these are written to `folder`."""
    folder.mkdir(exist_ok=True)
    if name == "openclip":
        return {"model": str(openclip_folder(folder)), "weights": "random"}
    if name == "transformers_image":
        return {"model": str(image_folder(folder, "vit"))}
    if name == "transformers_video":
        return {"model": str(video_folder(folder, "videomae"))}
    if name == "frames":
        return {"encoder": "timm", "settings": "model=test_vit,weights=random,compute_dtype=float32", "num_frames": "3"}
    return plugins.get("encoders", name).small()


def openclip_folder(folder: Path) -> Path:
    """Write the configuration of a small model, without weights, as OpenCLIP saves it."""
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    preprocessing = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocessing}))
    return folder


def image_folder(folder: Path, model: str) -> Path:
    """Write a small random image model and its processor, as transformers saves them."""
    AutoModel.from_config(AutoConfig.for_model(model, **MODEL_SIZES[model])).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def video_folder(folder: Path, model: str) -> Path:
    """Write a small random video model and its processor, as transformers saves them."""
    AutoModel.from_config(AutoConfig.for_model(model, **MODEL_SIZES[model])).save_pretrained(folder)
    VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def text_folder(folder: Path, model: str, **tokenizer: Any) -> Path:
    """Write a small random text model and a tokenizer that knows the words of `TEXTS` and the tiny dataset."""
    AutoModel.from_config(AutoConfig.for_model(model, **MODEL_SIZES[model])).save_pretrained(folder)
    words = [
        "[PAD]",
        "[BOS]",
        "[EOS]",
        "[UNK]",
        *sorted({word for text in (*TEXTS, TINY_DATASET_WORDS) for word in text.split()}),
    ]
    splitter = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    splitter.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=splitter, **tokenizer).save_pretrained(folder)
    return folder


def write_video(path: Path, codec: str, greys: list[int], size: tuple[int, int] = (48, 32), pixels: str = "yuv420p") -> Path:
    """Write a video of ten frames a second; each frame is of a single grey."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for grey in greys:
            picture = np.full((size[1], size[0], 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_animation(path: Path, greys: list[int], **options: Any) -> Path:
    """Write a lossless animated GIF, WebP or PNG; each frame is of a single grey."""
    frames = [Image.new("RGB", (48, 32), (grey,) * 3) for grey in greys]
    settings: dict[str, Any] = {"lossless": True, **options}
    frames[0].save(path, save_all=True, append_images=frames[1:], **settings)
    return path
