"""Reward shaping: a reward's scale, and what is added to or taken from it because of how a completion ended.

An algorithm that has a field `shaping` gets it; the scores that filters and pass rates read stay as the provider gave them.
The state of a running normalization is the run's (`Moments`), so that checkpoints have it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.training.running_moments import Moments

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput

__all__ = ["RewardShaping"]


MIN_STD = 1e-4  # equal rewards have no scale; this keeps 0 / 0 at 0 and lets no first batch be blown up


@dataclass(frozen=True)
class RewardShaping:
    """Scale, penalties and bounds of rewards, applied in the order of the fields."""

    normalize: Literal["none", "running", "fixed"] = "none"
    """normalization of rewards, (reward - mean) / deviation: `running` uses all rewards of the run so far, over all
    ranks; `fixed` uses `mean` and `std`"""
    mean: float = 0.0
    """value that `fixed` subtracts"""
    std: float = 1.0
    """value that `fixed` divides by"""
    overlong_buffer: int = 0
    """number of tokens before --sampling.max-new-tokens over which the penalty grows from 0 (Yu et al. 2025, eq. 13); 0
    disables it"""
    overlong_factor: float = 1.0
    """penalty at --sampling.max-new-tokens"""
    stop_properly: float | None = None
    """reward of a completion that was cut: values from 0 to 1 multiply the reward, values below 0 replace it; the
    default changes nothing"""
    clip: float | None = None
    """bound c of rewards, which are clipped to -c and c; the default does not clip"""

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UsageError(f"std must be above 0, not {self.std}")
        if self.overlong_buffer < 0:
            raise UsageError(f"overlong_buffer must be at least 0 tokens, not {self.overlong_buffer}")
        if self.stop_properly is not None and not self.stop_properly <= 1:
            raise UsageError(f"stop_properly must be at most 1, not {self.stop_properly}")
        if self.clip is not None and not self.clip > 0:
            raise UsageError(f"clip must be above 0, not {self.clip}")

    def __call__(
        self, rewards: RewardOutput, rollouts: Rollouts, max_new_tokens: int, seen: Moments | None = None
    ) -> RewardOutput:
        """`rewards` with `rewards_N` shaped; `seen` are those of the run so far, and take these in.

        Raises:
            UsageError: the options do not fit the run, or rewards that are given token by token.
        """
        if self.overlong_buffer > max_new_tokens:
            raise UsageError(
                f"overlong_buffer {self.overlong_buffer} is more than the {max_new_tokens} of "
                f"{run_option('sampling.max_new_tokens')}"
            )
        if rewards.rewards_NT is not None and (self.normalize != "none" or self.clip is not None):
            name = run_option("algorithm.shaping.normalize" if self.normalize != "none" else "algorithm.shaping.clip")
            raise UsageError(
                f"{name} works only with one reward per completion, but this reward also gives rewards per token; "
                "leave it out"
            )
        shaped_N = self._normalize(rewards.rewards_N, rollouts, seen or Moments())
        if self.overlong_buffer:
            over_N = (_spans(rollouts.mask_NT) - (max_new_tokens - self.overlong_buffer)).clamp(0, self.overlong_buffer)
            shaped_N = shaped_N - self.overlong_factor * over_N / self.overlong_buffer
        if self.stop_properly is not None:
            cut_N = torch.tensor([reason != "stop" for reason in rollouts.finish])
            instead_N = shaped_N * self.stop_properly if self.stop_properly >= 0 else self.stop_properly
            shaped_N = torch.where(cut_N, instead_N, shaped_N)
        if self.clip is not None:
            shaped_N = shaped_N.clamp(-self.clip, self.clip)
        return replace(rewards, rewards_N=shaped_N, scores_N=rewards.outcome_N.float())

    def _normalize(self, rewards_N: Tensor, rollouts: Rollouts, seen: Moments) -> Tensor:
        """On the scale that was chosen; a running one has these rewards in it already."""
        if self.normalize == "none":
            return rewards_N
        if self.normalize == "fixed":
            return (rewards_N - self.mean) / self.std
        seen.update(rewards_N, rollouts.world)
        return (rewards_N - seen.mean) / max(seen.std, MIN_STD)


def _spans(mask_NT: Tensor) -> Tensor:
    """Tokens from the first sampled one to the last, texts of others between them included; (N,) float32."""
    number_T = torch.arange(1, mask_NT.shape[1] + 1)
    last_N = (number_T * mask_NT).amax(1)
    return (last_N - mask_NT.float().argmax(1) * mask_NT.any(1)).float()
