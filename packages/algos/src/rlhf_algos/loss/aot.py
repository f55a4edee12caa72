"""Alignment via optimal transport: distributions of rewards are compared, not pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import log_ratios, pair_metrics, row_means, sequence_logprobs, split_pairs
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Reduction
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["AOTLoss"]


@dataclass(frozen=True)
class AOTLoss(Loss):
    """Logistic cost between sorted samples: one distribution should dominate the other (Melnyk et al. 2024, AOT).

    paired:    a = log pi(w) - log pi(l) of each pair, b the same of the reference
    otherwise: a = log(pi / ref)(w) of the chosen, b = log(pi / ref)(l) of the rejected completions
    Of the k-th smallest a and b of the whole batch:  -(1 - s) log sigmoid(beta (a - b)) - s log sigmoid(-beta (a - b))
    """

    beta: float = 0.1
    """strength of the pull to the reference; larger values stay nearer"""
    label_smoothing: float = 0.0
    """probability s that a label is flipped, 0 to 0.5"""
    paired: bool = True
    """compare the policy's preferences with the reference's (TRL's `aot`); False compares chosen with rejected
    completions of any prompts (`aot_unpaired`)"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs_NT", "returns_NT"})
    rows_per_unit: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_ranges(self, beta="(0, inf)", label_smoothing="[0, 0.5]")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        chosen, rejected = split_pairs(log_ratios(outputs, batch), batch)
        above, below = split_pairs(row_means(batch["returns_NT"], batch.mask_NT), batch)
        if self.paired:
            policy_w, policy_l = split_pairs(sequence_logprobs(outputs["logprobs_NT"], batch.mask_NT), batch)
            values = self.cost(policy_w - policy_l - above)
        else:
            # each side meets its partner as a constant: all terms occur here twice, and each has half of their gradient
            twice = self.cost(chosen - above) + self.cost(below - rejected)
            values = twice - twice.detach() / 2
        return LossTerms(values, Reduction("sample"), pair_metrics(self.beta * chosen, self.beta * rejected))

    def cost(self, difference: Tensor) -> Tensor:
        """The logistic cost of a - b, elementwise."""
        log_sigmoid, s = torch.nn.functional.logsigmoid, self.label_smoothing
        return -(1 - s) * log_sigmoid(self.beta * difference) - s * log_sigmoid(-self.beta * difference)
