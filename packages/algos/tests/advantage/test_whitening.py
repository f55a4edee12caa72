"""Whitening: what counts as rounding grows with the mean, as the spacing of floats does."""

from __future__ import annotations

import pytest
import torch

from rlhf_algos.whitening import whiten


@pytest.mark.parametrize(("mean", "expected"), [(0.0, 1.0), (1.0, 1.0), (2000.0, 0.0), (-2000.0, 0.0)])
def test_a_deviation_is_rounding_relative_to_the_mean(mean: float, expected: float) -> None:
    """+-1e-3 is a thousand times the precision around 0 and 1, and half of it around 2000."""
    values_NT = mean + torch.tensor([[1e-3, -1e-3]], dtype=torch.float64)
    white_NT = whiten(values_NT, torch.ones(1, 2, dtype=torch.bool), "std", None, precision=1e-6)
    assert white_NT[0].tolist() == pytest.approx([expected, -expected], rel=1e-6)
