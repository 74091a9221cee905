"""Which device computes, and in which number format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

ComputeDtype = Literal["auto", "float32", "bfloat16"]


def default_device() -> torch.device:
    """The first CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(choice: ComputeDtype, device: torch.device) -> Literal["float32", "bfloat16"]:
    """The format behind "auto": bfloat16 where the processor multiplies it natively, else float32."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return "bfloat16" if native else "float32"


@contextmanager
def computing(dtype: Literal["float32", "bfloat16"], device: torch.device) -> Iterator[None]:
    """Run matrix products and convolutions in exactly this format; parameters stay float32, and cuDNN repeats its results."""
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with exact, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Compute in float32 and on one thread, because the bits of a sum depend on how many threads share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with computing("float32", device):
            yield
    finally:
        torch.set_num_threads(threads)
