"""Convolutions that a library computes wrongly are replaced by ones that give the same."""

from __future__ import annotations

import pickle

import pytest
import timm
import torch
from torch import nn

from pipeline.training.joint.encoder_blocks import MIN_CHANNELS_WITH_STRIDE, avoid_strided_convolutions


def has_stride(module: nn.Module) -> bool:
    """Whether it is a 1x1 convolution of few channels with a stride, whose gradient can damage memory."""
    if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1):
        return False
    return module.stride != (1, 1) and module.in_channels < MIN_CHANNELS_WITH_STRIDE


@pytest.mark.parametrize(("stride", "side"), [((2, 2), 8), ((3, 2), 7)])
def test_without_its_stride_a_convolution_and_its_gradients_are_the_same(stride: tuple[int, int], side: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 1, stride, dtype=torch.float64)
    images = torch.randn(2, 3, side, side, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.einsum("oc,bchw->bohw", convolution.weight[:, :, 0, 0], images)[:, :, :: stride[0], :: stride[1]]
    expected = expected + convolution.bias[:, None, None] if convolution.bias is not None else expected
    weights = [images, *convolution.parameters()]
    gradients = torch.autograd.grad(expected.square().sum(), weights)
    network = nn.Sequential(convolution)
    avoid_strided_convolutions(network)
    assert not any(map(has_stride, network.modules()))
    found = pickle.loads(pickle.dumps(network))(images)
    torch.testing.assert_close(found, expected)
    for gradient, wanted in zip(torch.autograd.grad(network(images).square().sum(), weights), gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_repvgg_keeps_no_such_stride() -> None:
    with torch.device("meta"):
        network = timm.create_model("repvgg_a2")
        assert any(map(has_stride, network.modules()))
        avoid_strided_convolutions(network)
        assert not any(map(has_stride, network.modules()))
        assert network(torch.empty(1, 3, 64, 64)).shape == (1, 1000)
