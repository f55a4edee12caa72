"""Exact checksums of weights that do not depend on how an engine lays them out.

A checksum is a sum over the elements of tensors, of a hash of the bits of each. So it stays as it is where an engine joins
matrices, transposes them, packs them or pads them with zeros, and any element that differs changes it. Tensors are taken
together by the number of their layer, which all names have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OUTSIDE", "add_checksums", "checksum", "describe_groups", "differing", "layer_number"]

OUTSIDE = -1
"""Number of what belongs to no layer: embedding, last norm, head."""

FACTORS = (
    0x9E3779B97F4A7C15 - (1 << 64),
    0x94D049BB133111EB - (1 << 64),
)  # those of splitmix64; odd, so that no bits are lost

PART = 1 << 24
"""Elements that are hashed at a time, each of which takes 8 bytes more."""


def checksum(tensor: Tensor) -> int:
    """Return the checksum of a floating-point tensor; 0 for zeros."""
    total = 0
    for part in tensor.detach().reshape(-1).split(PART):
        plain = part + 0.0  # minus zero becomes zero, as it does in a product
        bits = plain.view(torch.int32 if plain.element_size() == 4 else torch.int16).to(torch.int64)
        bits = bits * FACTORS[0]
        bits = (bits ^ (bits >> 29)) * FACTORS[1]
        total += int((bits ^ (bits >> 32)).sum())
    return _wrap(total)


def layer_number(name: str) -> int:
    """Return the first number in the name of a tensor; `OUTSIDE` if it has none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), OUTSIDE)


def add_checksums(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> dict[int, int]:
    """Return the checksum of each layer.

    Args:
        weights: names and tensors; those that are not floating-point numbers are left out.
        dtype: that tensors are converted to before; None leaves them as they are.
    """
    totals: dict[int, int] = {}
    for name, tensor in weights:
        if tensor.is_floating_point():
            number = layer_number(name)
            found = checksum(tensor if dtype is None else tensor.detach().to(dtype))
            totals[number] = _wrap(totals.get(number, 0) + found)
    return totals


def describe_groups(numbers: Iterable[int]) -> str:
    """Return layers as words for a message."""
    found = sorted(numbers)
    layers = [str(number) for number in found if number != OUTSIDE]
    words = [f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(layers)}"] if layers else []
    return " and ".join([*words, *(["embedding, last norm or head"] if OUTSIDE in found else [])])


def differing(ours: Mapping[int, int], theirs: Mapping[int, int]) -> set[int]:
    """Return the layers whose checksums differ."""
    return {number for number in ours.keys() | theirs.keys() if ours.get(number, 0) != theirs.get(number, 0)}


def _wrap(total: int) -> int:
    """Return a sum modulo 2^64, as a number with a sign."""
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)
