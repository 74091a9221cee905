"""The blocks of every encoder family are found, and the last blocks train from stored states as they do from images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import encoder_cases
from PIL import Image
from torch import Tensor, nn

from pipeline.encoders._factory import build_encoder
from pipeline.training.joint.encoder_blocks import (
    enable_checkpointing,
    find_blocks,
    modules_in_execution_order,
    parameter_depths,
)
from pipeline.training.joint.inputs import TensorChunks, open_mapped
from pipeline.training.joint.partial_encoder import PartialEncoder

KINDS = ("vit", "siglip")
OWN = ("efficientnet_lite", "repmlpnet", "vanillanet")
IMAGES = [*OWN, "openclip image", "timm vit", "timm resnet", *(f"transformers_image {kind}" for kind in KINDS)]
BLOCKS = {  # the class of a family's blocks and how many it has
    "efficientnet_lite": ("InvertedResidual", 15),
    "frames": ("Block", 6),
    "repmlpnet": ("RepMLPUnit", 12),
    "vanillanet": ("VanillaLayer", 3),
    "wiser": ("BasicBlock", 3),
    "openclip image": ("ResidualAttentionBlock", 2),
    "openclip text": ("ResidualAttentionBlock", 2),
    "timm vit": ("Block", 6),
    "timm resnet": ("BasicBlock", 3),
    "timm levit": ("LevitStage", 3),
    "transformers_image vit": ("ViTLayer", 2),
    "transformers_image siglip": ("SiglipEncoderLayer", 2),
    "transformers_text bert": ("BertLayer", 2),
    "transformers_text siglip": ("SiglipEncoderLayer", 2),
    "transformers_text gpt2": ("GPT2Block", 2),
    "transformers_video videomae": ("VideoMAELayer", 2),
    "transformers_video timesformer": ("TimesformerLayer", 2),
    "transformers_video xclip": ("XCLIPVisionEncoderLayer", 2),
}


def built(case: str, folder: Path) -> tuple[nn.Module, Tensor]:
    """A small float32 encoder of a family, and a prepared batch of three different items."""
    name, settings = encoder_cases.family_settings(case, folder / "model")
    settings |= {"side": "64"} if name == "efficientnet_lite" else {}
    settings |= {} if name == "frames" else {"compute_dtype": "float32"}
    encoder = build_encoder(name, {"weights": "random", **settings})
    items = []
    for number in range(3):
        if encoder.modality == "text":
            items.append(encoder.prepare(("a cat", "the lazy dog", "a quick brown fox")[number]))
            continue
        path = folder / f"{number}.{'webp' if encoder.modality == 'video' else 'png'}"
        if encoder.modality == "video":
            encoder_cases.write_animation(path, [10, 200 - 60 * number, 90])
        else:
            noise = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        items.append(encoder.prepare(path))
    assert isinstance(encoder, nn.Module)
    return encoder, torch.stack(items)


@pytest.mark.parametrize("case", encoder_cases.FAMILIES)
def test_the_blocks_of_every_family_are_found(case: str, tmp_path: Path) -> None:
    encoder, items = built(case, tmp_path)
    executed = modules_in_execution_order(encoder, items[:1])
    blocks = find_blocks(executed)
    assert (type(blocks[0]).__name__, len(blocks)) == BLOCKS[case]
    depth = parameter_depths(encoder, executed, blocks)
    for name, module in encoder.named_modules():
        if module in blocks:
            own = [depth[f"{name}.{parameter}"] for parameter, _ in module.named_parameters()]
            assert set(own) == {blocks.index(module) + 1}
    before = gradients(encoder, encoder(items))
    enable_checkpointing(blocks)
    after = gradients(encoder, encoder(items))
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-5)


def gradients(encoder: nn.Module, features: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    (features * direction).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in encoder.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_stored_states_train_the_last_blocks_as_images_do(case: str, checkpointing: bool, tmp_path: Path) -> None:
    encoder, items = built(case, tmp_path)
    blocks = find_blocks(modules_in_execution_order(encoder, items[:1]))
    partial_encoder = PartialEncoder(encoder, blocks, 1, items[:1])
    states = partial_encoder.capture(items)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    for parameter in blocks[-1].parameters():
        parameter.requires_grad_(True)
    direct = encoder(items)
    expected = gradients(encoder, direct)
    if checkpointing:
        enable_checkpointing(partial_encoder.trained_blocks)
    replayed = partial_encoder(states)
    torch.testing.assert_close(replayed, direct, rtol=1e-5, atol=1e-5)
    found = gradients(encoder, replayed)
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(items), direct)  # the encoder itself has not changed


@pytest.mark.parametrize("case", ["frames", "transformers_video xclip", "wiser"])
def test_encoders_that_combine_several_images_or_branches_are_refused(case: str, tmp_path: Path) -> None:
    encoder, items = built(case, tmp_path)
    with pytest.raises(ValueError, match="choose --unfreeze image"):
        PartialEncoder(encoder, find_blocks(modules_in_execution_order(encoder, items[:1])), 1, items[:1])


class ToyEncoder(nn.Module):
    """Two blocks over tokens; `kind` says what the last block needs besides the states of the first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.blocks = kind, nn.ModuleList([ToyBlock(), ToyBlock()])

    def forward(self, items: Tensor) -> Tensor:
        """Features [B, 4] of items [B, 3, 4]."""
        first, last = self.blocks
        x = items if items.is_floating_point() else items / 256
        states = first(x)
        if self.kind == "tuple":
            states, _ = last((states, x))
        elif self.kind == "keyword":
            states = last(x=states)
        elif self.kind == "sequence first":
            states = last(states.transpose(0, 1)).transpose(0, 1)
        elif self.kind == "twice":
            states = last(last(states))
        elif self.kind == "gate":
            states = last(states, x.mean(dim=(1, 2), keepdim=True))
        elif self.kind == "skip":
            states = last(states) + x
        else:
            states = last(states)
        return states.mean(dim=1)


class ToyBlock(nn.Module):
    """A residual block with an optional gate; it takes a tensor or a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor | tuple[Tensor, Tensor], gate: float | Tensor = 1.0) -> Any:
        """Return tokens [B, T, 4]."""
        if isinstance(x, tuple):
            return self(x[0]), x[1]
        return x + gate * torch.tanh(self.linear(x))


@pytest.mark.parametrize("item", [torch.zeros(1, 3, 4, dtype=torch.uint8), torch.zeros(1, 3, 4), torch.randn(1, 3, 4)])
@pytest.mark.parametrize("kind", ["gate", "skip", "tuple", "keyword", "sequence first", "twice", "nothing"])
def test_last_blocks_that_need_more_than_their_states_are_refused(kind: str, item: Tensor) -> None:
    torch.manual_seed(0)
    encoder = ToyEncoder(kind)
    if kind == "nothing":
        PartialEncoder(encoder, [*encoder.blocks], 1, item)
        return
    with pytest.raises(ValueError, match="cannot be trained on their own; choose --unfreeze image"):
        PartialEncoder(encoder, [*encoder.blocks], 1, item)


def test_a_real_encoder_with_tuples_between_its_blocks_is_refused() -> None:
    encoder = build_encoder("timm", {"model": "pit_ti_224", "weights": "random", "compute_dtype": "float32"})
    item = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    assert isinstance(encoder, nn.Module)
    with pytest.raises(ValueError, match="choose --unfreeze image"):
        PartialEncoder(encoder, find_blocks(modules_in_execution_order(encoder, item)), 1, item)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_mapped_rows_are_made_once_and_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = (torch.arange(60).reshape(10, 2, 3) * 3).to(dtype)
    path, calls = tmp_path / "rows.npy", 0

    def chunks(fail: bool = False) -> TensorChunks:
        nonlocal calls
        calls += 1
        yield rows[:4]
        if fail:
            raise KeyboardInterrupt
        yield rows[4:]

    with pytest.raises(KeyboardInterrupt):
        open_mapped(path, lambda: chunks(fail=True), 10)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".rows.npy.tmp").write_bytes(b"left by a process that was killed")
    for _ in range(2):
        found = open_mapped(path, chunks, 10)
        assert found.dtype == dtype
        assert torch.equal(found, rows)
    assert calls == 2
    assert list(tmp_path.iterdir()) == [path]
