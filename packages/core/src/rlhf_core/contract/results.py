"""Results of providers: rewards, credit, and values of losses with the reduction they ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts

__all__ = ["PRECISION", "Credit", "LossTerms", "Metric", "Outputs", "Reduction", "RewardOutput", "ScoredRollouts"]

PRECISION = 1e-6
"""Relative size below which a difference of float32 rewards is rounding: eight units in the last place."""

UNCERTAINTY = "uncertainty"
"""Name of the metric that holds the standard deviation of each completion's reward, which pair selectors read."""


@dataclass(frozen=True)
class RewardOutput:
    """Scores of N completions."""

    rewards_N: Tensor
    """float32, rewards to maximize"""
    rewards_NT: Tensor | None = None
    """float32, per-token rewards that are added to the final one"""
    scores_N: Tensor | None = None
    """float32 in 0..1, for filtering and pass rates; the rewards where absent"""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """further numbers per completion (N), logged as `reward/<name>` means"""
    known: Mapping[str, Tensor] = field(default_factory=dict)
    """bool (N), where the metric of that name has a value, over which its mean is taken; everywhere without an entry"""
    abstained_N: Tensor | None = None
    """bool, completions without an answer of the reward: they leave their group, and their numbers are not read; the
    default is none"""
    precision: float = PRECISION
    """relative size below which a difference of two rewards is rounding, above 0: about 0.008 for a bfloat16 model. Rewards of
    one prompt that are equal within it, relative to the larger of 1 and the largest of them, count as equal"""

    @property
    def total_N(self) -> Tensor:
        """Rewards of whole completions (N,), float64: `rewards_N` and what `rewards_NT` gives token by token."""
        whole_N = self.rewards_N.double()
        return whole_N if self.rewards_NT is None else whole_N + self.rewards_NT.double().sum(1)

    @property
    def outcome_N(self) -> Tensor:
        """Return the outcomes that filters and samplers compare (N,), float64: `scores_N`, or rewards of whole completions."""
        return self.total_N if self.scores_N is None else self.scores_N.double()

    @property
    def answered_N(self) -> Tensor:
        """Mark the samples that have a reward; bool (N,)."""
        none_N = torch.zeros(len(self.rewards_N), dtype=torch.bool)
        return ~(none_N if self.abstained_N is None else self.abstained_N)

    def rows(self, index: Tensor | Sequence[int]) -> RewardOutput:
        """Return the rewards of the completions at `index`, in that order."""
        index = torch.as_tensor(index, dtype=torch.long)
        return self._each(lambda values: values[index])

    @classmethod
    def cat(cls, outputs: Sequence[RewardOutput]) -> RewardOutput:
        """Return the rewards of all completions, per-token ones padded with zeros to the longest."""
        first = outputs[0]

        def stack(name: str) -> Tensor | None:
            parts = [getattr(each, name) for each in outputs]
            return None if parts[0] is None else _stack(parts)

        def known(output: RewardOutput, name: str) -> Tensor:
            return output.known.get(name, torch.ones(len(output.rewards_N), dtype=torch.bool))

        names = {name for each in outputs for name in each.known}
        abstains = any(each.abstained_N is not None for each in outputs)
        return cls(
            rewards_N=_stack([each.rewards_N for each in outputs]),
            rewards_NT=stack("rewards_NT"),
            scores_N=stack("scores_N"),
            metrics={name: _stack([each.metrics[name] for each in outputs]) for name in first.metrics},
            known={name: _stack([known(each, name) for each in outputs]) for name in names},
            abstained_N=_stack([~each.answered_N for each in outputs]) if abstains else None,
            precision=max(each.precision for each in outputs),
        )

    def with_tokens(self, count: int) -> RewardOutput:
        """Return the same rewards with `rewards_NT` cut to `count` tokens, where there are any."""
        return self if self.rewards_NT is None else replace(self, rewards_NT=self.rewards_NT[:, :count])

    def _each(self, change: Callable[[Tensor], Tensor]) -> RewardOutput:
        """Return a copy with every tensor changed."""
        optional: dict[str, Any] = {
            name: change(values)
            for name in ("rewards_NT", "scores_N", "abstained_N")
            if (values := getattr(self, name)) is not None
        }
        metrics, known = (
            {name: change(values_N) for name, values_N in of.items()} for of in (self.metrics, self.known)
        )
        return replace(self, rewards_N=change(self.rewards_N), metrics=metrics, known=known, **optional)


@dataclass(frozen=True)
class ScoredRollouts:
    """Completions together with what they earned: rows of both are picked and joined at once."""

    rollouts: Rollouts
    """N completions"""
    rewards: RewardOutput
    """their rewards"""
    failed: bool = False
    """True if a reward of these or of other completions of the step is not finite on this rank, and is replaced by 0"""

    def __len__(self) -> int:
        return len(self.rollouts)

    def rows(self, index: Tensor | Sequence[int]) -> ScoredRollouts:
        """Return the rows at `index`, in that order, trimmed to their longest prompt and completion."""
        rollouts = self.rollouts.rows(index)
        return replace(self, rollouts=rollouts, rewards=self.rewards.rows(index).with_tokens(rollouts.mask_NT.shape[1]))

    def keep_answered(self) -> ScoredRollouts:
        """Return the rows that the reward did not abstain from."""
        return self.rows(self.rewards.answered_N.nonzero().flatten())

    @classmethod
    def cat(cls, parts: Sequence[ScoredRollouts]) -> ScoredRollouts:
        """Return all rows, padded to the longest. Group numbers are shifted so that groups stay apart."""
        rollouts = type(parts[0].rollouts).cat([part.rollouts for part in parts])
        rewards = RewardOutput.cat([part.rewards for part in parts])
        return cls(rollouts, rewards, any(part.failed for part in parts))


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors of shape (N,), or (N, T) padded with zeros to the widest."""
    if tensors[0].dim() == 1:
        return torch.cat(list(tensors))
    width = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])


@dataclass(frozen=True)
class Credit:
    """Advantage of each completion token. It is zero outside the mask and has no gradient."""

    advantages_NT: Tensor
    """float32"""
    returns_NT: Tensor | None = None
    """float32, what a critic should have predicted"""
    rows: Tensor | None = None
    """int64, which rows to train on and in which order (best of n, chosen/rejected pairs); all where absent"""
    metrics: Mapping[str, float | Metric] = field(default_factory=dict)
    """metrics of this rank's rows; over ranks, totals and counts of a `Metric` are summed, and plain numbers are averaged"""


@dataclass(frozen=True)
class Metric:
    """A mean that keeps its own denominator, so that micro-batches and ranks can be added up."""

    total: Tensor
    """sum of the values, a scalar"""
    count: Tensor
    """number of values, a scalar"""

    @classmethod
    def over(cls, values: Tensor, mask: Tensor | None = None) -> Metric:
        """The mean of `values`, where `mask` is true if given (same shape)."""
        values = values.detach().float()
        if mask is None:
            return cls(values.sum(), torch.tensor(float(values.numel())))
        return cls((values * mask).sum(), mask.sum().float())


@dataclass(frozen=True)
class Reduction:
    """Rule that reduces a loss's values to one number over the optimizer step, all micro-batches and ranks.

    * `token`: sum over masked tokens / number of masked tokens.
    * `sequence`: mean over completions of the mean over their masked tokens (empty completions do not count).
    * `sample`: mean of per-sample (or per-pair) values.
    * `prompt`: sum over masked tokens / number of groups. For weights that already sum to one over a group.
    * `constant`: sum over masked tokens / (number of completions x `length`), Dr. GRPO's.
    * `sum`: no denominator.
    """

    per: Literal["token", "sequence", "sample", "prompt", "constant", "sum"]
    length: int = 0
    """the constant of `constant`, in tokens"""


@dataclass(frozen=True)
class LossTerms:
    """Values of a loss, not their mean. Core masks, weights and divides them."""

    values: Tensor
    """(N, T) per token, (N,) per sample, or (N / rows_per_unit,) per pair"""
    reduction: Reduction
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    """logged as `<role>/<name>`"""


Outputs = Mapping[str, "Tensor"]
"""Differentiable outputs of the trained role's forward pass: `logprobs_NT`, `entropy_NT`, `values_NT`, `scores_N`."""
