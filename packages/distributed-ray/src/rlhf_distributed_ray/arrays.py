"""Weights on their way through Ray's object store: arrays, in buckets of about 64 MiB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BUCKET_BYTES", "buckets", "from_array", "to_array"]

BUCKET_BYTES = 64 * 2**20


def buckets(weights: Iterator[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Any]]]:
    """`weights` in runs of about `BUCKET_BYTES`, as arrays (bfloat16 as its bits)."""
    bucket: list[tuple[str, Any]] = []
    size = 0
    for name, tensor in weights:
        bucket.append((name, to_array(tensor)))
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def to_array(tensor: Tensor) -> Any:
    """A tensor as (dtype name, array); NumPy has no bfloat16, so its bits travel as int16."""
    tensor = tensor.detach().cpu().contiguous()
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return str(tensor.dtype).removeprefix("torch."), bits.numpy()


def from_array(packed: Any) -> Tensor:
    """Unpack what `to_array` packed."""
    dtype, array = packed
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
