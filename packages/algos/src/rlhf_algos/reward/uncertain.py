"""`--reward uncertain`: a reward model whose head was trained in one pass, with the uncertainty that its curvature gives.

    rlhf-run reward --model MODEL --data.path pairs.jsonl --reward.freeze body --reward.optim.use omd --output rm
    rlhf-run online_dpo --model POLICY --reward uncertain --reward.model rm/model --advantage optimistic

The metric `uncertainty` is the standard deviation of each completion's reward under N(theta, H^-1): what pair selectors read.
The reward itself may be the mean, an optimistic one, which explores, or a pessimistic one, which does not reach for what
was never compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlhf_algos.ranges import check_ranges
from rlhf_core.contract.results import UNCERTAINTY
from rlhf_core.errors import UsageError, options_under
from rlhf_core.lazy import torch
from rlhf_core.reward.model import RewardModel, RewardModelEngine

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.engines import OpenContext
    from rlhf_core.contract.results import RewardOutput

__all__ = ["UncertainReward"]


@dataclass(frozen=True)
class UncertainReward(RewardModel):
    """A reward model with the uncertainty of its head: a folder that `rlhf-run reward --reward.optim.use omd` wrote."""

    state: str = ""
    """folder of the run that trained the head, or a checkpoint of it; empty takes the folder of the model"""
    mode: Literal["mean", "bonus", "pessimistic"] = "mean"
    """the score; score + bonus std, an exploration bonus; or -beta log E[exp(-score / beta)], arXiv 2606.09073"""
    bonus: float = 1.0
    """weight of the standard deviation in mode `bonus`, 0 or more"""
    beta: float = 1.0
    """temperature of mode `pessimistic`, above 0, in units of the reward; infinity gives the mean, smaller values are
    more pessimistic"""
    scale: float = 1.0
    """factor on all standard deviations, above 0"""
    against: Literal["prompt", "zero"] = "prompt"
    """uncertainty of a completion's reward minus the mean of its prompt's, which is all that preferences determine; or of the
    reward itself. With one completion per prompt, zero"""

    def __post_init__(self) -> None:
        check_ranges(self, bonus="[0, inf)", beta="(0, inf]", scale="(0, inf)")

    def open(self, context: OpenContext) -> UncertainEngine:
        """Load the model and the state of its head.

        Raises:
            UsageError: there is no such model or state, or they do not belong together.
        """
        return UncertainEngine(self)


class UncertainEngine(RewardModelEngine):
    """A reward model in memory, and the curvature of its head.

    Args:
        reward: its options.
    """

    reward: UncertainReward

    def __init__(self, reward: UncertainReward) -> None:
        from rlhf_algos.one_pass.store import load_estimator

        with options_under("state"):
            estimator = load_estimator(reward.state or Path(reward.model).parent)
        super().__init__(reward)
        self.curvature = estimator.curvature  # once: that of `mle` is made anew of all pairs
        width = self.module.model.config.hidden_size
        if width != estimator.d:
            raise UsageError(
                f"the state has {estimator.d} features, but the model {reward.model} has {width}; name the run that "
                "trained this model"
            )

    def __call__(self, rollouts: Rollouts) -> RewardOutput:
        output, outputs = self.score_rollouts(rollouts, frozenset({"features_NH"}))
        std_N = self._std(outputs["features_NH"].double(), rollouts.group_N).float() / self.reward.std
        rewards_N = self._reward(output.rewards_N, std_N)
        return replace(output, rewards_N=rewards_N, metrics={**output.metrics, UNCERTAINTY: std_N})

    def _std(self, features_NH: Tensor, group_N: Tensor) -> Tensor:
        """The standard deviation of each completion's score (N,), float64, according to `against`."""
        if self.reward.against == "prompt":
            _, prompt_N, sizes_P = torch.unique(group_N, return_inverse=True, return_counts=True)
            sums_PH = features_NH.new_zeros(len(sizes_P), features_NH.shape[1]).index_add(0, prompt_N, features_NH)
            means_PH = sums_PH / sizes_P[:, None] * (sizes_P > 1)[:, None]
            features_NH = features_NH - means_PH[prompt_N]
        return self.reward.scale * self.curvature.norm_inverse(features_NH)

    def _reward(self, mean_N: Tensor, std_N: Tensor) -> Tensor:
        from rlhf_algos.selection.pessimism import exploration_bonus, pessimistic_normal

        if self.reward.mode == "bonus":
            return exploration_bonus(mean_N, std_N, self.reward.bonus)
        return pessimistic_normal(mean_N, std_N, self.reward.beta) if self.reward.mode == "pessimistic" else mean_N
