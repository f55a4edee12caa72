"""Ragged rows as one tensor: every per-token tensor of a batch is padded on the right.

Rows are joined and put into place as arrays: a batch has millions of tokens, and a Python object for each would cost more
than all the rest of a batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from numpy import ndarray
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
        rows: N sequences of numbers: lists, arrays, or tensors on the CPU; all of a kind.
        filler: value of the padding.
        dtype: of the padded rows; int64 if absent.
        width: columns that the result has at least.

    Raises:
        TypeError: something in a row is no number.
    """
    import numpy as np

    dtype = dtype or torch.int64
    lengths_N = np.fromiter(map(len, rows), np.int64, len(rows))
    columns = max(width, int(lengths_N.max(initial=0)))
    padded_NT = torch.full((len(rows), columns), filler, dtype=dtype)
    flat = _join(rows, dtype)
    if len(flat) == padded_NT.numel():
        return torch.from_numpy(flat).to(dtype).reshape(padded_NT.shape), torch.from_numpy(lengths_N)
    inside_NT = np.arange(columns) < lengths_N[:, None]
    padded_NT.numpy()[inside_NT] = flat  # row by row, as the numbers are joined
    return padded_NT, torch.from_numpy(lengths_N)


def _join(rows: Sequence[Any], dtype: torch.dtype) -> ndarray[Any, Any]:
    """Return the numbers of all rows, one after the other."""
    import numpy as np

    if rows and isinstance(rows[0], torch.Tensor):
        joined: ndarray[Any, Any] = torch.cat(list(rows)).numpy()
        return joined
    if rows and isinstance(rows[0], array):
        return np.concatenate([np.asarray(row) for row in rows])
    flat: array[Any] = array("d" if dtype.is_floating_point else "q")
    try:
        for row in rows:
            flat.extend(row)
    except TypeError:  # a float where integers are asked for: torch cuts it, and says what else may be wrong
        return torch.tensor([number for row in rows for number in row], dtype=dtype).numpy()
    return np.asarray(flat)
