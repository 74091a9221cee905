"""The blocks of every encoder family are found, and its last ones learn from stored states as they do from pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import encoder_cases
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.blocks import blocks, depths, executed, recomputed
from pipeline.bridge import Bridge
from pipeline.encoding import build_encoder
from pipeline.live import mapped

KINDS = ("vit", "siglip")
IMAGES = ["efficientnet_lite", "openclip image", "timm vit", "timm resnet", *(f"transformers_image {kind}" for kind in KINDS)]
BLOCKS = {  # the class of a family's blocks and how many it has
    "efficientnet_lite": ("InvertedResidual", 15),
    "frames": ("Block", 6),
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
    """A small float32 encoder of a family, and a batch of three different items."""
    name, settings = encoder_cases.family(case, folder / "model")
    settings |= {"side": "64"} if name == "efficientnet_lite" else {}
    settings |= {} if name == "frames" else {"compute_dtype": "float32"}
    encoder = build_encoder(name, {"weights": "random", **settings})[1]
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
    ran = executed(encoder, items[:1])
    parts = blocks(ran)
    assert (type(parts[0]).__name__, len(parts)) == BLOCKS[case]
    depth = depths(encoder, ran, parts)
    for name, module in encoder.named_modules():
        if module in parts:
            own = [depth[f"{name}.{parameter}"] for parameter, _ in module.named_parameters()]
            assert set(own) == {parts.index(module) + 1}
    before = gradients(encoder, encoder(items))
    recomputed(parts)
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
def test_stored_states_train_the_last_blocks_as_pictures_do(case: str, checkpointing: bool, tmp_path: Path) -> None:
    encoder, items = built(case, tmp_path)
    parts = blocks(executed(encoder, items[:1]))
    bridge = Bridge(encoder, parts, 1, items[:1])
    states = bridge.capture(items)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    for parameter in parts[-1].parameters():
        parameter.requires_grad_(True)
    live = encoder(items)
    expected = gradients(encoder, live)
    if checkpointing:
        recomputed(bridge.trained)
    replayed = bridge(states)
    torch.testing.assert_close(replayed, live, rtol=1e-5, atol=1e-5)
    found = gradients(encoder, replayed)
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(items), live)  # the encoder itself is as it was


@pytest.mark.parametrize("case", ["frames", "transformers_video xclip"])
def test_encoders_that_meet_several_pictures_are_refused(case: str, tmp_path: Path) -> None:
    encoder, items = built(case, tmp_path)
    with pytest.raises(ValueError, match="choose --train image"):
        Bridge(encoder, blocks(executed(encoder, items[:1])), 1, items[:1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.bfloat16])
def test_mapped_rows_are_made_once_and_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = (torch.arange(60).reshape(10, 2, 3) * 3).to(dtype)
    path, calls = tmp_path / "rows.npy", 0

    def chunks(fail: bool = False) -> Iterator[Tensor]:
        nonlocal calls
        calls += 1
        yield rows[:4]
        if fail:
            raise KeyboardInterrupt
        yield rows[4:]

    with pytest.raises(KeyboardInterrupt):
        mapped(path, lambda: chunks(fail=True), 10)
    assert not path.exists()
    for _ in range(2):
        found = mapped(path, chunks, 10)
        assert found.dtype == dtype
        assert torch.equal(found, rows)
    assert calls == 2
