"""Base class of losses on the difference of log-ratios to a reference. This is not an objective itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import log_ratios, pair_metrics, split_pairs
from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.providers import Loss
from rlhf_core.contract.results import LossTerms, Reduction

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.results import Outputs

__all__ = ["PreferenceLoss"]


@dataclass(frozen=True)
class PreferenceLoss(Loss):
    """A function of log(pi / ref) of both completions, summed over tokens; in most losses of their difference h."""

    beta: float = 0.1
    """strength of the pull to the reference; larger values stay nearer"""

    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs_NT"})
    rows_per_unit: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_ranges(self, beta="(0, inf)")

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        chosen, rejected = split_pairs(self.beta * self.ratios(outputs, batch), batch)
        return LossTerms(self.reward_loss(chosen, rejected), Reduction("sample"), pair_metrics(chosen, rejected))

    def ratios(self, outputs: Outputs, batch: Batch) -> Tensor:
        """log(pi / ref) of each completion (N,)."""
        return log_ratios(outputs, batch)

    def reward_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair (N / 2,), from its implicit rewards beta log(pi / ref); by default, of their margin."""
        return self.pair_loss(chosen - rejected)

    def pair_loss(self, margin: Tensor) -> Tensor:
        """The loss of each pair, from its margin beta h."""
        raise NotImplementedError
