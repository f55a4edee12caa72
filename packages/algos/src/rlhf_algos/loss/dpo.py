"""Direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_algos.pairs import log_ratios, pair_metrics, split
from rlhf_core.lazy import torch
from rlhf_core.types import LossTerms, Reduction

if TYPE_CHECKING:
    from rlhf_core.types import Batch, Outputs

__all__ = ["DPO"]


@dataclass(frozen=True)
class DPO:
    """Logistic loss on the difference of log-ratios to the reference (Rafailov et al. 2023, eq. 7).

    Per pair, with h = log(pi / ref)(chosen) - log(pi / ref)(rejected), sums over tokens:  -log sigmoid(beta h)
    """

    beta: float = 0.1
    """strength of the pull to the reference; larger stays nearer"""

    wants: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs_NT"})
    rows_per_unit: ClassVar[int] = 2

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        rewards_N = self.beta * log_ratios(outputs, batch)
        chosen, rejected = split(rewards_N)
        values = -torch.nn.functional.logsigmoid(chosen - rejected)
        return LossTerms(values, Reduction("sample"), pair_metrics(rewards_N))
