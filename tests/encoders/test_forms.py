"""VanillaNet and RepMLPNet: both forms give the same features, the layers follow their formulas, and public names are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from torch import Tensor, nn

from pipeline.encoders._factory import build_encoder
from pipeline.encoders.repmlpnet import REPMLPNETS, RepMLPBlock, RepMLPNet
from pipeline.encoders.vanillanet import SeriesActivation, VanillaLayer, VanillaNet
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError

NAMES = ("repmlpnet", "vanillanet")
ORIGINS = {"repmlpnet": "DingXiaoH/RepMLP", "vanillanet": "huawei-noah/VanillaNet"}
# Millions of parameters, with a classifier of 1,000 classes, as the repositories publish them; VanillaNet's in deploy form.
PUBLISHED_VANILLANETS = {5: 15.5, 6: 32.5, 7: 32.8, 8: 37.1, 9: 41.4, 10: 45.7, 11: 50.0, 12: 54.3, 13: 58.6}
PUBLISHED_REPMLPNETS = {"T224": 38.3, "B224": 68.2, "T256": 58.7, "B256": 96.5, "D256": 86.9, "L256": 117.7}


def build(name: str, **settings: Any) -> Any:
    return build_encoder(name, {**plugins.get("encoders", name).small(), "compute_dtype": "float32", **settings})


def disturb(network: nn.Module) -> None:
    """Give every batch normalisation other statistics, factors and terms."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, mean, deviation in ((module.running_mean, 0, 0.5), (module.weight, 1, 0.3), (module.bias, 0, 0.5)):
                assert tensor is not None
                nn.init.normal_(tensor, mean, deviation, generator)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2, generator)


def features_of(encoder: Any) -> Tensor:
    shape = (3, 3, encoder.config.side, encoder.config.side)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return encoder(pixels)


@pytest.fixture(params=NAMES)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """The name of an encoder, the encoder in its training form, and the file of its weights with a classifier."""
    encoder = build(request.param)
    disturb(encoder.network)
    classifier = {"head.weight": torch.zeros(9, 2), "cls1.2.weight": torch.zeros(9, 2)}
    torch.save({**encoder.network.state_dict(), **classifier}, tmp_path / "trained.pth")
    return request.param, build(request.param, weights=tmp_path / "trained.pth"), tmp_path / "trained.pth"


def test_the_deploy_form_equals_the_training_form(trained: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, encoder, file = trained
    expected, merged = features_of(encoder), build(name, weights=file, form="deploy")
    assert expected.std() > 0.1
    torch.testing.assert_close(features_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert merged.identity() == {
        **encoder.identity(),
        "form": "deploy",
    }  # the digest is that of the weights as they were loaded
    torch.save(merged.state_dict(), tmp_path / "merged.pth")
    assert torch.equal(features_of(build(name, weights=tmp_path / "merged.pth", form="deploy")), features_of(merged))
    with pytest.raises(UserError, match=r"weights 'merged\.pth' are of the deploy form: set form=deploy"):
        build(name, weights=tmp_path / "merged.pth")


def test_checkpoints_of_training_programs_are_read(trained: tuple[str, Any, Path], tmp_path: Path) -> None:
    """With their options, their average of the weights, and the prefix of models that were trained on several GPUs."""
    name, encoder, file = trained
    state = torch.load(file, weights_only=True)
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    other = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    checkpoints = {"average": {"model": other, "model_ema": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}}
    checkpoints |= {"last": {"model": parallel}, "bare": parallel}
    for title, checkpoint in checkpoints.items():
        torch.save(checkpoint, tmp_path / f"{title}.pth")
        assert build(name, weights=tmp_path / f"{title}.pth").identity() == encoder.identity(), title
    torch.save({"model": state, "config": Path("x")}, tmp_path / "objects.pth")
    with pytest.raises(UserError, match=r"objects\.pth does not hold weights .* without running code; .* save its state_dict"):
        build(name, weights=tmp_path / "objects.pth")


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_foreign_weights_are_named_with_the_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--set weights=FILE, a checkpoint of {ORIGINS[name]}, or weights=random"):
        build(name, weights="")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not fit: .* is missing; set \w+ and \w+ to those of the file"):
        build(name, weights=tmp_path / "other.pth")


def test_a_deeper_network_is_not_cut(tmp_path: Path) -> None:
    torch.save(build("vanillanet", depth=6).network.state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(UserError, match=r"deeper\.pth does not fit: the network has no stages\.3\..*; set depth and width"):
        build("vanillanet", depth=5, weights=tmp_path / "deeper.pth")


@pytest.mark.parametrize(
    ("name", "settings", "fault"),
    [
        ("repmlpnet", {"side": 100}, "side must be a multiple of 32, not 100"),
        ("repmlpnet", {"width": 0.3}, "width 0.3 gives 38 channels, no multiple of 4 sets; set width=1"),
        ("vanillanet", {"form": "deploy", "slope": 0.5}, "set slope=1 or form=training"),
        ("vanillanet", {"depth": 14}, r"depth must be in 5\.\.13"),
    ],
)
def test_impossible_settings_are_named(name: str, settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        build(name, **settings)


@pytest.mark.parametrize("depth", PUBLISHED_VANILLANETS)
def test_vanillanet_has_the_published_number_of_parameters(depth: int) -> None:
    with torch.device("meta"):
        network = VanillaNet(depth, 1.0, 1.0)
        network.merge()
        classifier = nn.Linear(4096, 1000)
    assert millions(network, classifier) == pytest.approx(PUBLISHED_VANILLANETS[depth], abs=0.051)


def test_the_wide_vanillanet_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = VanillaNet(13, 1.5, 1.0)
        network.merge()
        assert millions(network, nn.Linear(6144, 1000)) == pytest.approx(127.8, abs=0.051)


@pytest.mark.parametrize("variant", PUBLISHED_REPMLPNETS)
def test_repmlpnet_has_the_published_number_of_parameters(variant: str) -> None:
    with torch.device("meta"):
        network = RepMLPNet(REPMLPNETS[variant[0]], int(variant[1:]))
        classifier = nn.Linear(network.head_norm.num_features, 1000)
    assert millions(network, classifier) == pytest.approx(PUBLISHED_REPMLPNETS[variant], abs=0.1)


def millions(*modules: nn.Module) -> float:
    return sum(parameter.numel() for module in modules for parameter in module.parameters()) / 1e6


def batch_norm(*prefixes: str) -> set[str]:
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{prefix}.{tensor}" for prefix in prefixes for tensor in tensors}


def test_the_names_of_vanillanet_are_those_of_its_checkpoints() -> None:
    network = VanillaNet(5, 1 / 64, 1.0)
    convolutions = {"stem1.0", "stem2.0", *(f"stages.{number}.conv{half}.0" for number in range(3) for half in (1, 2))}
    activations = {"stem2.2", *(f"stages.{number}.act" for number in range(3))}
    expected = {f"{name}.{tensor}" for name in convolutions for tensor in ("weight", "bias")}
    expected |= {f"{name}.weight" for name in activations} | batch_norm(*(f"{name}.bn" for name in activations))
    assert set(network.state_dict()) == expected | batch_norm(*(f"{name[:-1]}1" for name in convolutions))
    network.merge()
    merged = {"stem.0", "stem.1", *(f"stages.{number}.{part}" for number in range(3) for part in ("conv", "act"))}
    assert set(network.state_dict()) == {f"{name}.{tensor}" for name in merged for tensor in ("weight", "bias")}


def test_the_names_of_repmlpnet_are_those_of_its_checkpoints() -> None:
    network = RepMLPNet(REPMLPNETS["T"].times(1 / 4), 32)
    units = [f"stages.{stage}.{number}" for stage, length in enumerate((2, 2, 6, 2)) for number in range(length)]
    blocks = [f"{unit}.repmlp_block" for unit in units]
    gates = {f"{block}.gp.{layer}.{tensor}" for block in blocks for layer in ("fc1", "fc2") for tensor in ("weight", "bias")}
    outer = {"conv_embedding", *(f"embeds.{number}" for number in range(3))}
    outer |= {f"{unit}.ffn_block.{layer}" for unit in units for layer in ("ffn_fc1", "ffn_fc2")}
    inner = {f"{block}.repconv{kernel}" for block in blocks for kernel in (1, 3)}
    common = gates | {f"{block}.fc3.weight" for block in blocks} | {f"{name}.conv.weight" for name in outer}
    common |= batch_norm("head_norm", *(f"{name}.bn" for name in outer))
    common |= batch_norm(*(f"{unit}.prebn{half}" for unit in units for half in (1, 2)))
    trained = {f"{name}.conv.weight" for name in inner} | batch_norm(*(f"{name}.bn" for name in inner))
    assert set(network.state_dict()) == common | trained | batch_norm(*(f"{block}.fc3_bn" for block in blocks))
    network.merge()
    assert set(network.state_dict()) == common | {f"{block}.fc3.bias" for block in blocks}


def normalized(bn: Any, maps: np.ndarray, channel: int) -> np.ndarray:
    """Batch normalisation of one map, by its formula."""
    tensors = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    mean, variance, factor, term = (each[channel].item() for each in tensors)
    return (maps - mean) / np.sqrt(variance + bn.eps) * factor + term


def test_the_series_activation_is_a_weighted_sum_over_neighbours() -> None:
    activation = SeriesActivation(2).eval()
    disturb(activation)
    x = torch.randn(1, 2, 9, 8)
    weights = activation.weight.detach().numpy()
    with torch.no_grad():
        found = activation(x)[0].numpy()
    for channel in range(2):
        total = np.zeros((9, 8))
        positive = np.pad(np.maximum(x[0, channel].numpy(), 0), 3)
        for i in range(7):
            for j in range(7):
                total += weights[channel, 0, i, j] * positive[i : i + 9, j : j + 8]
        np.testing.assert_allclose(found[channel], normalized(activation.bn, total, channel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 0.4, 1.0])
def test_a_vanilla_layer_is_two_linear_maps_with_a_fading_activation_between_them(slope: float) -> None:
    layer: Any = VanillaLayer(2, 3, 2, slope).eval()
    disturb(layer)
    x = torch.randn(1, 2, 4, 6)
    values = x[0].numpy()
    for conv, bn in (layer.conv1, layer.conv2):
        weights, biases = conv.weight[:, :, 0, 0].detach().numpy(), conv.bias.detach().numpy()
        mixed = np.einsum("oi,ihw->ohw", weights, values) + biases[:, None, None]
        values = np.stack([normalized(bn, each, channel) for channel, each in enumerate(mixed)])
        values = values if conv is layer.conv2[0] else np.where(values > 0, values, slope * values)
    pooled = values.reshape(3, 2, 2, 3, 2).max(axis=(2, 4))
    with torch.no_grad():
        expected = layer.act(torch.from_numpy(pooled[None]).float())
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_a_repmlp_block_treats_each_channel_with_the_weights_of_its_set() -> None:
    width, side, num_sets = 6, 4, 3
    block: Any = RepMLPBlock(width, side, num_sets).eval()
    disturb(block)
    x = torch.randn(2, width, side, side)
    maps = block.fc3.weight.detach().numpy().reshape(num_sets, side * side, side * side)
    with torch.no_grad():
        found, gates = block(x).numpy(), block.gp(x)[:, :, 0, 0].numpy()
        gp = block.gp
        means = x.mean(dim=(2, 3)).numpy() @ gp.fc1.weight[:, :, 0, 0].numpy().T + gp.fc1.bias.numpy()
        logits = np.maximum(means, 0) @ gp.fc2.weight[:, :, 0, 0].numpy().T + gp.fc2.bias.numpy()
    np.testing.assert_allclose(gates, 1 / (1 + np.exp(-logits)), rtol=1e-4)
    for item in range(2):
        for channel in range(width):
            own, values = channel % num_sets, x[item, channel].numpy()
            total = normalized(block.fc3_bn, (maps[own] @ values.ravel()).reshape(side, side), own)
            for branch in (block.repconv1, block.repconv3):
                kernel = branch.conv.weight[own, 0].detach().numpy()
                total = total + normalized(branch.bn, correlate(values, kernel, mode="constant"), own)
            np.testing.assert_allclose(found[item, channel], total * gates[item, channel], rtol=1e-3, atol=1e-5)
