"""Differences that are rounding, which no estimator, filter or count may take for a preference.

Equal completions get equal rewards only up to rounding, where a reward model reads them in batches of different shapes. Divided
by their own deviation such differences become advantages of +-1. So rewards of one prompt that are equal within their precision
(`RewardOutput.precision`) are made exactly equal before anything compares them, and estimators that divide by a deviation ask
here what counts as none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contract.results import PRECISION
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["equal_groups", "level_groups", "prefer_chosen"]

TIE = 1e-5
"""Relative size below which a margin of a pair is a tie: log-probabilities of 1,000 tokens, summed in float32 in another order,
differ by about this. No margin of a trained model is so small."""


def equal_groups(values_N: Tensor, group_N: Tensor, precision: float = PRECISION) -> Tensor:
    """Return where the values of a completion's group are all equal within their precision; bool (N,).

    They are if the largest and the smallest differ by at most `precision * max(1, |largest|)`. A group of one is equal.
    """
    groups, index_N = torch.unique(group_N, return_inverse=True)
    values_N = values_N.double()
    low_P, high_P, size_P = (
        torch.zeros(len(groups), dtype=torch.float64, device=values_N.device).scatter_reduce(
            0, index_N, of_N, how, include_self=False
        )
        for of_N, how in ((values_N, "amin"), (values_N, "amax"), (values_N.abs(), "amax"))
    )
    equal_P: Tensor = high_P - low_P <= precision * size_P.clamp(min=1.0)
    return equal_P[index_N]


def level_groups(values_N: Tensor, group_N: Tensor, precision: float = PRECISION) -> Tensor:
    """Return the values, with those of each group that are equal within their precision replaced by their mean."""
    groups, index_N = torch.unique(group_N, return_inverse=True)
    mean_P = torch.zeros(len(groups), dtype=torch.float64).scatter_reduce(
        0, index_N, values_N.double(), "mean", include_self=False
    )
    return torch.where(equal_groups(values_N, group_N, precision), mean_P[index_N].to(values_N.dtype), values_N)


def prefer_chosen(chosen_P: Tensor, rejected_P: Tensor, precision: float = TIE) -> Tensor:
    """Return 1 where the chosen side is higher, 0 where the rejected side is, 0.5 for ties within rounding; (P,) or any shape.

    A tie is a margin of at most `precision * max(1, |larger side|)`.
    """
    margin_P = (chosen_P - rejected_P).detach()
    tie_P = margin_P.abs() <= precision * torch.maximum(chosen_P.abs(), rejected_P.abs()).detach().clamp(min=1.0)
    return torch.where(tie_P, 0.5, (margin_P > 0).float())
