"""Repeatable numbers on a GPU: operations that add in any order are replaced by slower ones, or refused by name.

On a CPU nothing is needed. docs/reliability.md lists the differences that remain with any option.
"""

from __future__ import annotations

import os

from rlhf_core.lazy import torch

__all__ = ["REFUSED", "be_deterministic"]

REFUSED = "does not have a deterministic implementation"
"""Message of torch for an operation without such a form."""

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS repeats itself only with a workspace of fixed size
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # transformers hands it on to flash-attn's backward pass
}


def be_deterministic() -> None:
    """Let this process compute the same numbers each time, before it has used a device."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
