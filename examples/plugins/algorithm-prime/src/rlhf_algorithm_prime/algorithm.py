"""PRIME, process reinforcement through implicit rewards (Cui et al. 2025).

Three roles: the policy (`actor`), a language model whose log-ratio to the reference is a reward of every token (`prm`), and the
reference. In each step the `prm` learns the outcomes of the samples, and the policy's credit reads it with its new weights.

Left out on purpose: choosing prompts by accuracy (the paper's online filter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core import (
    AdamW,
    Advantage,
    Algorithm,
    Loss,
    LossTerms,
    Metric,
    ModelOptions,
    OptionError,
    ProviderChoices,
    Reduction,
    Sampling,
    Term,
    TrainedOptions,
    UsageError,
)
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core import Batch, Outputs, RewardOutput, Rollouts

__all__ = ["ImplicitPRMLoss", "Prime", "PrimeAdvantage"]


@dataclass(frozen=True)
class Prime(Algorithm):
    """Process reinforcement through implicit rewards (Cui et al. 2025): prm <- actor, then actor <- actor after it."""

    beta: float = 0.05
    """scale of the implicit rewards, beta log(prm / reference) of each token"""
    gamma: float = 1.0
    """discount per token of the implicit rewards"""

    policy: ClassVar[str] = "actor"
    exports: ClassVar[tuple[str, ...]] = ("prm",)
    defaults: ClassVar[Mapping[str, str]] = {"data": "prompts", "rollout": "hf", "reward": "exact", "loss": "clip"}
    roles: ClassVar[Mapping[str, ModelOptions]] = {
        "actor": TrainedOptions(optim=AdamW(lr=5e-7)),
        "prm": TrainedOptions(optim=AdamW(lr=1e-6)),
        "reference": ModelOptions(),
    }
    config_defaults: ClassVar[Mapping[str, Any]] = {"sampling": Sampling(n=4)}

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise OptionError("beta", f"must be above 0, not {self.beta}")
        if not 0 <= self.gamma <= 1:
            raise OptionError("gamma", f"must be from 0 to 1, not {self.gamma}")

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        if choices.sampling is not None and choices.sampling.n < PrimeAdvantage.min_samples:
            raise UsageError(
                f"prime compares the completions of one prompt; sampling.n must be 2 or more, not {choices.sampling.n}"
            )
        assert choices.loss is not None, "it has a default"
        return (
            Term("prm", "actor", ImplicitPRMLoss(self.beta)),
            Term("actor", "actor", choices.loss, PrimeAdvantage(self.beta, self.gamma), after="prm"),
        )


@dataclass(frozen=True)
class ImplicitPRMLoss(Loss):
    """Cross-entropy of the outcome, with the implicit reward of the whole completion as its logit (Cui et al. 2025, eq. 4).

    Per completion, with r = beta sum_t log(prm / ref):  -o log sigmoid(r) - (1 - o) log(1 - sigmoid(r))
    """

    beta: float = 0.05
    """scale of the implicit rewards"""

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs_NT", "rewards_N"})

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        outcome_N = batch["rewards_N"]
        if bool(((outcome_N < 0) | (outcome_N > 1)).any()):
            raise UsageError(
                "prime learns outcomes from 0 (wrong) to 1 (right), and the reward gave others; choose exact or math"
            )
        ratio_NT = torch.where(batch.mask_NT, outputs["logprobs_NT"] - batch["ref_logprobs_NT"], 0.0)
        logit_N = self.beta * ratio_NT.sum(1)
        values_N = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, outcome_N, reduction="none")
        right_N = ((logit_N > 0) == (outcome_N > 0.5)).float()
        return LossTerms(values_N, Reduction("sample"), {"accuracy": Metric.over(right_N)})


@dataclass(frozen=True)
class PrimeAdvantage(Advantage):
    """Returns of implicit process rewards, and outcomes, each less its mean over the prompt's other completions (eq. 5).

    With r_t = beta log(prm / ref) of token t, its mean over a completion m, and the outcome o; LOO is the mean of the others:
    A_t = sum over s >= t of gamma^(s - t) (r_s - LOO(m)) + o - LOO(o)
    """

    beta: float = 0.05
    """scale of the implicit rewards"""
    gamma: float = 1.0
    """discount per token"""

    needs: ClassVar[frozenset[str]] = frozenset({"prm.logprobs_NT", "ref_logprobs_NT"})
    min_samples: ClassVar[int] = 2

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
        mask_NT = rollouts.mask_NT
        ratio_NT = extras["prm.logprobs_NT"] - extras["ref_logprobs_NT"]
        process_NT = torch.where(mask_NT, self.beta * ratio_NT, 0.0)
        mean_N = process_NT.sum(1) / mask_NT.sum(1).clamp(min=1)
        centered_NT = process_NT - leave_one_out(mean_N, rollouts.group_N)[:, None]
        returns_NT = discounted_returns(torch.where(mask_NT, centered_NT, 0.0), self.gamma)
        total_N = rewards.total_N.float()
        outcome_N = total_N - leave_one_out(total_N, rollouts.group_N)
        return torch.where(mask_NT, returns_NT + outcome_N[:, None], 0.0)


def leave_one_out(values_N: Tensor, group_N: Tensor) -> Tensor:
    """Return for each completion the mean of `values_N` over the others of its prompt (N,)."""
    groups = int(group_N.max()) + 1
    totals_P = values_N.new_zeros(groups).index_add(0, group_N, values_N)
    sizes_P = values_N.new_zeros(groups).index_add(0, group_N, torch.ones_like(values_N))
    return (totals_P[group_N] - values_N) / (sizes_P[group_N] - 1).clamp(min=1)


def discounted_returns(rewards_NT: Tensor, gamma: float) -> Tensor:
    """Return the sum of each token's reward and those after it, discounted (N, T)."""
    returns_NT = rewards_NT.clone()
    for t in reversed(range(rewards_NT.shape[1] - 1)):
        returns_NT[:, t] += gamma * returns_NT[:, t + 1]
    return returns_NT
