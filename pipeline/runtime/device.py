"""The device that computes, its memory, and the number format of its computations."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.runtime.environment import set_environment

CGROUP_LIMIT_FILES = tuple(
    Path("/sys/fs/cgroup", name) for name in ("memory/memory.limit_in_bytes", "memory.max", "memory.high")
)
ComputeDtype = Literal["auto", "float32", "mixed", "bfloat16"]
Precision = Literal["float32", "mixed", "bfloat16"]  # mixed: float32 parameters, bfloat16 products; bfloat16: everything


def default_device() -> torch.device:
    """Return the first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def num_visible_gpus() -> int:
    """Return the number of CUDA devices that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_bytes(device: torch.device) -> int:
    """Return the bytes of the device's memory that are free for new tensors."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, but not in use
        return torch.cuda.mem_get_info(device)[0] + cached
    return min(psutil.virtual_memory().available, memory_limit_bytes())


def total_bytes(device: torch.device) -> int:
    """Return the bytes of the device's memory; for the CPU, those that this process may use."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_limit_bytes()


@cache
def memory_limit_bytes() -> int:
    """Return the bytes of main memory that this process may use.

    That is the memory of the machine, or less if the control group or the resource limits of the process say so.
    """
    found = [psutil.virtual_memory().total, resource.getrlimit(resource.RLIMIT_RSS)[0]]
    for path in CGROUP_LIMIT_FILES:
        with suppress(OSError):  # a file that is not there, or that this user may not read, says nothing
            text = path.read_text().strip()
            found += [int(text)] if text.isdecimal() else []
    return min(limit for limit in found if limit > 0)


def resolve_dtype(choice: ComputeDtype, device: torch.device, lower: Precision = "bfloat16") -> Precision:
    """Return the format to compute in.

    Args:
        choice: the user's choice; anything but "auto" is returned as it is.
        device: the device that computes.
        lower: the format that "auto" stands for where the processor multiplies bfloat16 natively; elsewhere it is float32.
    """
    if choice != "auto":
        return choice
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return lower if native else "float32"


@contextmanager
def use_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Inside the block, compute matrix products and convolutions in exactly this format, with repeatable results on a GPU."""
    set_environment()
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    # cache_enabled=False: a cached bfloat16 copy of a weight would outlive the optimiser's step
    with exact, torch.autocast(device.type, torch.bfloat16, enabled=precision == "mixed", cache_enabled=False):
        yield


@contextmanager
def reproducible(device: torch.device, precision: Precision = "float32") -> Iterator[None]:
    """Inside the block, compute in exactly this format, on one CPU thread, and without fused attention on a GPU.

    The last bits of a sum depend on how many threads share it, and fused attention does not promise the same gradients again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with use_precision(precision, device), sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
