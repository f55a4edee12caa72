"""Memory of this process's GPU, as the allocator and the driver count it. Nothing here starts CUDA."""

from __future__ import annotations

from rlhf_core.lazy import torch

__all__ = ["allocated_bytes", "free_bytes"]


def allocated_bytes() -> int | None:
    """Return the bytes of this process's tensors on its GPU; None if it uses none."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else None


def free_bytes() -> int:
    """Return the bytes of this process's GPU that no process has taken; 0 if it uses none."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_initialized() else 0
