"""WISeR: its slice branch follows its formula, its sizes are the paper's, and its weights come whole or for one branch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from pipeline.encoders._factory import build_encoder
from pipeline.encoders.wiser import NUM_SLICES, WideSliceNet, Wiser
from pipeline.runtime.errors import UserError


def build(**settings: Any) -> Any:
    return build_encoder("wiser", {**Wiser.small(), "compute_dtype": "float32", **settings})


def test_a_slice_is_five_whole_rows_and_its_maximum_is_over_five_positions() -> None:
    network = WideSliceNet("test_resnet", num_maps=2, width=3).eval()
    conv, bn, *_ = network.slice
    assert isinstance(conv, torch.nn.Conv2d)
    with torch.no_grad():
        bn.running_mean.normal_()  # type: ignore[union-attr]
        bn.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        images = torch.randn(1, 3, 224, 224)
        found = network.slice(images)[0].reshape(2, NUM_SLICES)
        kernels, biases = conv.weight.numpy(), conv.bias.numpy()  # type: ignore[union-attr]
        mean, deviation = bn.running_mean.numpy(), np.sqrt(bn.running_var.numpy() + 1e-5)  # type: ignore[union-attr]
    pixels = images[0].numpy().astype(np.float64)
    for number in range(2):
        sums = np.array([(kernels[number] * pixels[:, row : row + 5]).sum() + biases[number] for row in range(220)])
        positive = np.maximum((sums - mean[number]) / deviation[number], 0)
        expected = [positive[start : start + 5].max() for start in range(0, 216, 3)]
        np.testing.assert_allclose(found[number], expected, rtol=1e-4, atol=1e-5)


def test_the_sizes_are_those_of_the_paper() -> None:
    """320 maps with 72 positions beside the 2,048 features of the residual branch, and two layers of 2,048."""
    with torch.device("meta"):
        network = WideSliceNet("wide_resnet50_2", 320, 2048)
        residual = timm.create_model("wide_resnet50_2", num_classes=1000)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (network, residual)]
    branches = counts[1] - (2048 * 1000 + 1000) + 320 * (3 * 5 * 224 + 1) + 2 * 320
    assert counts[0] == branches + (2048 + 320 * 72 + 1) * 2048 + (2048 + 1) * 2048


def test_the_input_has_224_pixels_on_each_side(tmp_path: Path) -> None:
    Image.new("RGB", (300, 90)).save(tmp_path / "wide.png")
    encoder = build()
    assert encoder.prepare(tmp_path / "wide.png").shape == (3, 224, 224)
    assert encoder.drawing_side == 256


def test_weights_of_the_residual_branch_alone_are_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = timm.create_model("test_resnet")
    torch.save(network.state_dict(), tmp_path / "branch.pth")
    with caplog.at_level(logging.WARNING):
        encoder = build(weights=tmp_path / "branch.pth")
    assert "branch.pth holds the residual branch of WISeR alone; the rest is random" in caplog.text
    random, state = build().network.state_dict(), encoder.network.state_dict()
    for name, tensor in state.items():
        wanted = network.state_dict()[name.removeprefix("residual.")] if name.startswith("residual.") else random[name]
        assert torch.equal(tensor, wanted), name
    torch.save(encoder.network.state_dict(), tmp_path / "whole.pth")
    caplog.clear()
    assert build(weights=tmp_path / "whole.pth").identity() == encoder.identity()
    assert not caplog.records
    with pytest.raises(UserError, match=r"whole\.pth does not fit: .*; set residual, num_maps and width to those of the file"):
        build(weights=tmp_path / "whole.pth", width=8)


def test_a_residual_branch_that_is_not_available_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"hf download timm/test_resnet\.r160_in1k .* --set weights=FOLDER"):
        build(weights="pretrained")
    with pytest.raises(UserError, match="residual 'wide_resnet' is no model of timm; wide_resnet50_2 is the paper's"):
        build(residual="wide_resnet")
