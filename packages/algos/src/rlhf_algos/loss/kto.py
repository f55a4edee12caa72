"""Kahneman-Tversky optimization: judgments of single completions instead of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import log_ratios, row_means
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Metric, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["KTOLoss"]


@dataclass(frozen=True)
class KTOLoss(Loss):
    """The human value of a completion, relative to a reference point (Ethayarajh et al. 2024, eq. 8).

    Per completion, with h = log(pi / ref) and the weight w and reference point z of --advantage kto:
    w (1 - sigmoid(beta (h - z))) if it is desirable, w (1 - sigmoid(beta (z - h))) if not
    """

    beta: float = 0.1
    """strength of the pull to the reference, and aversion to risk; larger values stay nearer"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs_NT", "advantages_NT", "returns_NT"})
    rows_per_unit: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_ranges(self, beta="(0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        h_N = log_ratios(outputs, batch)
        weights_N, z_N = row_means(batch["advantages_NT"], batch.mask_NT), row_means(batch["returns_NT"], batch.mask_NT)
        values_N = weights_N.abs() * torch.sigmoid(-weights_N.sign() * self.beta * (h_N - z_N))
        metrics = {
            "desirable_reward": Metric.over(self.beta * h_N, weights_N > 0),
            "undesirable_reward": Metric.over(self.beta * h_N, weights_N < 0),
        }
        return LossTerms(values_N, Reduction("sample"), metrics)
