"""pass@k: how likely one of k answers to a held-out prompt is right, by data source."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

from rlhf_core.contract.providers import Evaluator
from rlhf_core.errors import UsageError
from rlhf_core.evaluator.heldout_samples import by_datasource, sample_heldout

if TYPE_CHECKING:
    from rlhf_core.contract.run_view import RunView

__all__ = ["PassAtK", "pass_at_k"]


@dataclass(frozen=True)
class PassAtK(Evaluator):
    """pass@1 and pass@k on held-out prompts from the reward's scores (Chen et al. 2021, unbiased), by data source.

    Completions from which the reward abstains are no samples; a prompt with fewer than k others is left out of pass@k.
    """

    k: int = 4
    """number of answers of which one must be right"""
    n: int = 8
    """number of completions sampled per prompt, at least k"""
    prompts: int = 64
    """maximum number of held-out prompts, taken from the first"""
    threshold: float = 1.0
    """least score of a right completion (the reward, if the provider gives no score)"""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n:
            raise UsageError(f"k must be from 1 to n ({self.n}), not {self.k}")

    def __call__(self, run: RunView) -> dict[str, float]:
        """`pass@1`, `pass@<k>`, their standard errors over prompts as `…_se`, and `…/<datasource>`."""
        rollouts = sample_heldout(run, "pass_at_k", self.prompts, self.n)
        output = run.reward_of(rollouts)
        scores_N = output.total_N if output.scores_N is None else output.scores_N
        answered_Pn = output.answered_N.view(-1, self.n)
        right_P = ((scores_N.view(-1, self.n) >= self.threshold) & answered_Pn).sum(1).tolist()
        gathered = run.world.gather(
            list(zip(answered_Pn.sum(1).tolist(), right_P, rollouts.meta[:: self.n], strict=True))
        )
        prompts = [prompt for part in gathered for prompt in part]
        metrics: dict[str, float] = {}
        for k in sorted({1, self.k}):
            enough = [(n, right, meta) for n, right, meta in prompts if n >= k]
            values = [pass_at_k(n, right, k) for n, right, _ in enough]
            metrics |= by_datasource(f"pass@{k}", values, [meta for *_, meta in enough])
        return metrics


def pass_at_k(n: int, right: int, k: int) -> float:
    """The share of the k-subsets of n samples that hold a right one: 1 - C(n - right, k) / C(n, k)."""
    return 1.0 - comb(n - right, k) / comb(n, k)
