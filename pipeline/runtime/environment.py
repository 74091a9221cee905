"""Environment variables that libraries read when they start to work."""

from __future__ import annotations

import os


def set_environment() -> None:
    """Set what is not set yet; call it before tokenizers are used and before the first matrix product on a GPU.

    TOKENIZERS_PARALLELISM: tokenizers must not start threads before processes are forked. CUBLAS_WORKSPACE_CONFIG: with a fixed
    workspace, cuBLAS gives the same bits each time.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
