"""Tensors that a model reads for images in addition to tokens, and stacking those of several rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PER_TOKEN", "Images", "stack_images"]

Images = Mapping[str, "Tensor"]
"""Tensors by name that a model reads for the images of one prompt, or of several rows."""

PER_TOKEN = "token_type_ids"
"""Ending of the names whose tensors have one number per token."""


def stack_images(images: Sequence[Images], width: int, left: bool = False) -> dict[str, Tensor]:
    """Stack the image inputs of rows into one tensor per name; empty if no row has an image.

    Args:
        images: of each row.
        width: tokens of the longest row.
        left: whether rows are padded on the left.
    """
    names = dict.fromkeys(name for each in images for name in each)
    found: dict[str, Tensor] = {}
    for name in names:
        parts = [each[name] for each in images if name in each]
        if name.endswith(PER_TOKEN):
            empty = parts[0].new_zeros(0)
            rows = [each.get(name, empty) for each in images]
            found[name] = torch.stack([_pad(row, [width], left) for row in rows])
        else:
            sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].dim())]
            found[name] = torch.cat([_pad(part, [len(part), *sizes]) for part in parts])
    return found


def _pad(tensor: Tensor, sizes: Sequence[int], left: bool = False) -> Tensor:
    """`tensor` filled with zeros to these sizes."""
    short = [size - own for size, own in zip(sizes, tensor.shape, strict=True)]
    sides = [side for each in reversed(short) for side in ((each, 0) if left else (0, each))]
    return torch.nn.functional.pad(tensor, sides) if any(short) else tensor
