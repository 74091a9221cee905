"""Settings of the device are made when they are needed, not when a module is imported."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.runtime.device import use_precision

CPU = torch.device("cpu")


def test_the_workspace_of_cublas_is_fixed_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with use_precision("float32", CPU):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_the_user_s_workspace_of_cublas_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with use_precision("float32", CPU):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.gpu
def test_products_on_a_gpu_repeat_their_bits() -> None:
    device = torch.device("cuda")
    a, b = (torch.randn(512, 768, device=device) for _ in range(2))
    with use_precision("mixed", device):
        first, second = ((a @ b.T).sum(dim=0) for _ in range(2))
    assert torch.equal(first, second)
