"""Ragged rows become one tensor, and come back by their lengths."""

from __future__ import annotations

from array import array

import pytest
import torch

from rlhf_core import pad_rows


def test_rows_come_back_by_their_lengths_and_the_rest_is_filler() -> None:
    rows = [[3, 1], [], [7, 8, 9]]
    padded, lengths = pad_rows(rows, filler=-1)
    assert padded.tolist() == [[3, 1, -1], [-1, -1, -1], [7, 8, 9]]
    assert lengths.tolist() == [2, 0, 3]
    assert padded.dtype == lengths.dtype == torch.int64


@pytest.mark.parametrize(("dtype", "row"), [(torch.float32, [0.5, 1.5]), (torch.bool, [True, False])])
def test_numbers_keep_their_values_in_the_asked_dtype(dtype: torch.dtype, row: list[float]) -> None:
    padded, _ = pad_rows([row, []], dtype=dtype)
    assert padded.dtype == dtype
    assert padded.tolist() == [row, [0, 0]]


def test_it_agrees_with_torchs_own_padding() -> None:
    rows = [list(range(n)) for n in (4, 1, 6)]
    expected = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=9)
    assert torch.equal(pad_rows(rows, 9)[0], expected)


def test_no_rows_and_empty_rows_have_the_width_that_is_asked_for() -> None:
    assert pad_rows([])[0].shape == (0, 0)
    assert pad_rows([[], []], width=1)[0].tolist() == [[0], [0]]
    assert pad_rows([[1, 2]], width=1)[0].tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_lists_arrays_and_tensors_give_the_same(dtype: torch.dtype) -> None:
    """Rows of one length and of several; numbers are rounded as torch rounds them."""
    for lengths in ((2, 0, 5), (3, 3)):
        lists = [[(i * 7 + j) % 5 for j in range(length)] for i, length in enumerate(lengths)]
        if dtype.is_floating_point:
            lists = [[number / 3 for number in row] for row in lists]  # type: ignore[misc]
        expected = torch.zeros(len(lists), max(lengths), dtype=dtype)
        for i, row in enumerate(lists):
            expected[i, : len(row)] = torch.tensor(row, dtype=dtype)
        code = "d" if dtype.is_floating_point else "q"
        for rows in (lists, [array(code, row) for row in lists], [torch.tensor(row).to(dtype) for row in lists]):
            assert torch.equal(pad_rows(rows, dtype=dtype)[0], expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_what_is_no_number_is_an_error(dtype: torch.dtype) -> None:
    for nothing in (None, "1"):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            pad_rows([[1, 2], [nothing]], dtype=dtype)  # type: ignore[list-item]
