"""SPIN, self-play fine-tuning (Chen et al. 2024).

The opponent is a copy of the policy that follows it every so many steps. In each step it answers the prompts of the data, and
the policy learns to tell the data's completions from these answers. Nothing is scored, so there is no reward.

Left out on purpose: answers of older opponents (the paper's iterations 1 and later mix in those of the one before).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core import (
    AdamW,
    Advantage,
    Algorithm,
    Credit,
    Loss,
    LossTerms,
    Metric,
    ModelOptions,
    OptionError,
    ProviderChoices,
    Reduction,
    Sampling,
    Term,
    Tracking,
    TrackingOptions,
    TrainedOptions,
)
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core import Batch, Outputs, RewardOutput, Rollouts

__all__ = ["SPIN", "SPINLoss", "SPINPairs"]


@dataclass(frozen=True)
class SPIN(Algorithm):
    """Self-play fine-tuning (Chen et al. 2024): actor <- data, beside the samples of an opponent, its own past."""

    lam: float = 0.1
    """lambda, the strength of the pull to the opponent; larger stays nearer"""

    policy: ClassVar[str] = "actor"
    defaults: ClassVar[Mapping[str, str]] = {"data": "json", "rollout": "hf"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=5e-7)),
        "opponent": TrackingOptions(track=Tracking(of="actor", every=500)),
    }
    config_defaults: ClassVar[Mapping[str, Any]] = {"sampling": Sampling(n=1)}

    def __post_init__(self) -> None:
        if not self.lam > 0:
            raise OptionError("lam", f"must be above 0, not {self.lam}")

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return (Term("actor", "data", SPINLoss(self.lam), SPINPairs()),)


@dataclass(frozen=True)
class SPINPairs(Advantage):
    """Pairs of a demonstration and each sample of the opponent on its prompt; where a row of data has pairs, the chosen one."""

    joins: ClassVar[str] = "opponent"
    selects: ClassVar[str] = "pairs"

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit:
        demonstrations: dict[int, int] = {}
        pairs: list[int] = []
        for row, (group, sampled) in enumerate(
            zip(rollouts.group_N.tolist(), extras["joined_N"].tolist(), strict=True)
        ):
            demonstration = demonstrations.setdefault(group, row)  # the rows of data come first
            pairs += [demonstration, row] if sampled else []
        return Credit(torch.zeros(rollouts.mask_NT.shape), rows=torch.tensor(pairs, dtype=torch.long))


@dataclass(frozen=True)
class SPINLoss(Loss):
    """Logistic loss of the difference of log-ratios to the opponent (Chen et al. 2024, eq. 4.7).

    Per pair of a demonstration y and a sample y', with r = log(pi / opponent), sums over tokens:
    log(1 + exp(-lam (r(y) - r(y'))))
    """

    lam: float = 0.1
    """lambda"""

    needs: ClassVar[frozenset[str]] = frozenset({"opponent.logprobs_NT"})
    rows_per_unit: ClassVar[int] = 2

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        ratio_NT = torch.where(batch.mask_NT, outputs["logprobs_NT"] - batch["opponent.logprobs_NT"], 0.0)
        ratio_N = ratio_NT.sum(1)
        margin = self.lam * (ratio_N[0::2] - ratio_N[1::2])  # (N / 2,)
        metrics = {"margin": Metric.over(margin), "accuracy": Metric.over(margin > 0)}
        return LossTerms(torch.nn.functional.softplus(-margin), Reduction("sample"), metrics)
