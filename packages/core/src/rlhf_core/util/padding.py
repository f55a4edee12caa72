"""Ragged rows as one tensor: every per-token tensor of a batch is padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pad_rows"]


def pad_rows(
    rows: Sequence[Sequence[float]], filler: float = 0, dtype: torch.dtype | None = None, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Return N rows padded on the right (N, longest), and their N lengths (int64).

    Args:
        rows: N sequences of numbers.
        filler: value of the padding.
        dtype: of the padded rows; int64 if absent.
        width: columns that the result has at least.
    """
    lengths = [len(row) for row in rows]
    columns = max([width, *lengths])
    padded = [[*row, *[filler] * (columns - length)] for row, length in zip(rows, lengths, strict=True)]
    shape = (len(rows), columns)
    return torch.tensor(padded, dtype=dtype or torch.int64).reshape(shape), torch.tensor(lengths, dtype=torch.int64)
