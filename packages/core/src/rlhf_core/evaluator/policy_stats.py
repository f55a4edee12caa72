"""Measure the policy's KL from its reference and the length of its answers on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rlhf_core.contract.providers import Evaluator
from rlhf_core.evaluator.heldout_samples import mean_and_error, policy, sample_heldout
from rlhf_core.lazy import torch
from rlhf_core.training.kl import kl_values

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["PolicyStats"]


@dataclass(frozen=True)
class PolicyStats(Evaluator):
    """KL to the reference, response lengths and the share cut at the limit, on held-out prompts."""

    prompts: int = 64
    """maximum number of held-out prompts, taken from the first"""
    n: int = 1
    """completions per prompt"""

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs_NT"})
    """a reference is placed because of it, even where no term has one"""

    def __call__(self, run: RunView) -> dict[str, float]:
        """`policy/kl` per completion (k1: the sum of log pi - log ref) with its error, `kl_token` (k3), lengths.

        The KL is of the distributions at the sampling temperature, before any truncation.
        """
        rollouts = sample_heldout(run, "policy_stats", self.prompts, self.n)
        names = frozenset({"logprobs_NT"})
        now_NT = run.roles[policy(run, "policy_stats")].infer(rollouts, names)["logprobs_NT"]
        ref_NT = run.roles["reference"].infer(rollouts, names)["logprobs_NT"]
        k1_NT, k3_NT = (kl_values(now_NT, ref_NT, rollouts.mask_NT, estimator) for estimator in ("k1", "k3"))
        mine = (k1_NT.sum(1).tolist(), rollouts.lengths_N.tolist(), [float(f != "stop") for f in rollouts.finish])
        kl, lengths, truncated = ([x for part in parts for x in part] for parts in zip(*run.world.gather(mine)))
        mean, error = mean_and_error(kl)
        lengths_N = torch.tensor(lengths, dtype=torch.float64)
        return {
            "policy/kl": mean,
            "policy/kl_se": error,
            "policy/kl_token": run.world.total(float(k3_NT.sum()))
            / max(1.0, run.world.total(float(rollouts.mask_NT.sum()))),
            "policy/length": float(lengths_N.mean()),
            "policy/length_median": float(lengths_N.quantile(0.5)),
            "policy/length_max": float(lengths_N.max()),
            "policy/truncated": sum(truncated) / len(truncated),
        }
