"""Ragged rows as one tensor: every per-token tensor of a batch is padded on the right.

Rows are copied as arrays: a batch has millions of tokens, and a Python object for each would cost more than all the rest of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pad_rows"]


def pad_rows(
    rows: Sequence[Sequence[float] | Tensor | array[Any]],
    filler: float = 0,
    dtype: torch.dtype | None = None,
    width: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return N rows padded on the right (N, longest), and their N lengths (int64).

    Args:
        rows: N sequences of numbers: lists, arrays, or tensors on the CPU.
        filler: value of the padding.
        dtype: of the padded rows; int64 if absent.
        width: columns that the result has at least.

    Raises:
        TypeError: something in a row is no number.
    """
    import numpy as np

    dtype = dtype or torch.int64
    lengths_N = np.fromiter(map(len, rows), np.int64, len(rows))
    padded_NT = torch.full((len(rows), max(width, int(lengths_N.max(initial=0)))), filler, dtype=dtype)
    for place_T, row in zip(padded_NT.numpy(), rows, strict=True):
        place_T[: len(row)] = _numbers(row, dtype)
    return padded_NT, torch.from_numpy(lengths_N)


def _numbers(row: Any, dtype: torch.dtype) -> Any:
    """Return a row as numpy reads it without a look at each number; of a list, an array of its numbers."""
    if isinstance(row, torch.Tensor):
        return row.numpy()
    if isinstance(row, array):
        return row
    try:
        return array("d" if dtype.is_floating_point else "q", row)
    except TypeError:  # a float where integers are asked for: torch cuts it, and raises for what is no number
        return torch.tensor(row, dtype=dtype).numpy()
