"""Which device computes, and in which number format."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import nn

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS does not repeat its results
CGROUP_LIMITS = tuple(Path("/sys/fs/cgroup", name) for name in ("memory/memory.limit_in_bytes", "memory.max", "memory.high"))
ComputeDtype = Literal["auto", "float32", "mixed", "bfloat16"]
Precision = Literal["float32", "mixed", "bfloat16"]  # mixed: float32 parameters, bfloat16 products; bfloat16: all of it


def default_device() -> torch.device:
    """The first CUDA device when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nobody needs."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # of torch's own
        return torch.cuda.mem_get_info(device)[0] + idle
    return min(psutil.virtual_memory().available, memory_limit())


@cache
def memory_limit() -> int:
    """Bytes of memory that this process may use: the machine's, or less where its control group or its limits say so."""
    found = [psutil.virtual_memory().total, resource.getrlimit(resource.RLIMIT_RSS)[0]]
    for path in CGROUP_LIMITS:
        text = path.read_text().strip() if path.is_file() else ""
        found += [int(text)] if text.isdecimal() else []
    return min(limit for limit in found if limit > 0)


def total_bytes(device: torch.device) -> int:
    """Memory of the device, or of the part of this machine that this process may use."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_limit()


def resolve_dtype(choice: ComputeDtype, device: torch.device, lower: Precision = "bfloat16") -> Precision:
    """The format behind "auto": `lower` where the processor multiplies bfloat16 natively, else float32."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return lower if native else "float32"


def place_network(network: nn.Module, precision: Precision, device: torch.device) -> torch.dtype:
    """Move a network for inference where, and into the format in which, it computes; returns the format of its inputs."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    network.to(device=device, dtype=dtype).eval()
    return dtype


@contextmanager
def computing(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run matrix products and convolutions in exactly this format, and let cuDNN repeat its results."""
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    # a cached bfloat16 copy of a weight would outlive the optimiser's step
    with exact, torch.autocast(device.type, torch.bfloat16, enabled=precision == "mixed", cache_enabled=False):
        yield


@contextmanager
def reproducible(device: torch.device, precision: Precision = "float32") -> Iterator[None]:
    """Compute in exactly this format and on one thread: the bits of a sum depend on how many threads share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with computing(precision, device):
            yield
    finally:
        torch.set_num_threads(threads)


def visible_gpus() -> int:
    """CUDA devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
