"""Held-out reward: the policy's answers to prompts it was not trained on, scored by the run's own reward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.contract.providers import Evaluator
from rlhf_core.data.sources import means_by_source
from rlhf_core.errors import UsageError
from rlhf_core.evaluator.heldout_samples import by_datasource
from rlhf_core.lazy import torch
from rlhf_core.observer.files import sample_record
from rlhf_core.util.jsonl import append_line

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.results import RewardOutput
    from rlhf_core.contract.run_view import RunView

__all__ = ["Heldout"]


@dataclass(frozen=True)
class Heldout(Evaluator):
    """Mean reward on held-out prompts, without the KL penalty, with the standard error over prompts.

    The reward's own metrics are averaged the same way. Completions from which the reward abstains count in no mean; if it
    abstains from all, there is none.
    """

    prompts: int = 64
    """maximum number of held-out prompts, taken from the first"""
    n: int = 1
    """completions per prompt"""
    shown: int = 3
    """number of completions written to evaluations.jsonl, for the same prompts each time"""

    writes: ClassVar[tuple[str, ...]] = ("evaluations.jsonl", "evaluations.jsonl.damaged")

    def __call__(self, run: RunView) -> dict[str, float]:
        """Return `heldout/reward`, the reward's metrics as `heldout/<name>`, each with its error `…_se`, length and share cut.

        Seeds depend on the run's seed and the prompt alone, so evaluations at two steps differ by the policy only.
        """
        if not run.plan.online:
            raise UsageError(
                "evaluator heldout samples the policy, but this algorithm has no rollout; "
                "use the evaluator heldout_loss, which measures its loss"
            )
        source = next(name for name in run.plan.sources if name in run.plan.roles)
        rows = run.heldout(self.prompts)
        rank, size = run.world.rank, run.world.size
        mine = list(range(rank, len(rows), size))
        prompts = run.encoder.prompts([rows[i] for i in mine], mine)
        sampling = replace(run.config.sampling, n=self.n, seed=run.config.seed)
        rollouts = run.rollouts(source, prompts, sampling)
        rewards = run.reward_of(rollouts)
        rewards_N, answered_N = rewards.total_N, rewards.answered_N
        if run.leader:
            rollouts.extras |= {"rewards_N": rewards_N, "abstained_N": ~answered_N}
            for i in range(0, min(self.shown * self.n, len(rollouts)), self.n):
                asked = {"step": run.step, **_question(rollouts.meta[i].get("prompt"))}
                append_line(run.output / "evaluations.jsonl", {**asked, **sample_record(rollouts, i)})
        completions = run.world.total(len(rollouts))
        abstained = run.world.total(float((~answered_N).sum())) / completions
        meta = [each for each, answered in zip(rollouts.meta, answered_N.tolist(), strict=True) if answered]
        return {
            **self._mean("reward", rewards_N, answered_N, run.world),
            **self._means_of_metrics(rewards, run.world),
            **({"heldout/abstained": abstained} if abstained else {}),
            "heldout/length": run.world.total(float(rollouts.lengths_N.sum())) / completions,
            "heldout/truncated": run.world.total(float(sum(f != "stop" for f in rollouts.finish))) / completions,
            **means_by_source("heldout/reward", rewards_N[answered_N], meta, run.world),
        }

    def _means_of_metrics(self, rewards: RewardOutput, world: World) -> dict[str, float]:
        """Return the means of the reward's further metrics, where it has a value."""
        measured: dict[str, float] = {}
        names = dict.fromkeys(name for names in world.gather(list(rewards.metrics)) for name in names)
        for name in names:  # a rank without completions has none
            values_N = rewards.metrics.get(name, torch.zeros(0))
            known_N = rewards.known.get(name, torch.ones(len(values_N), dtype=torch.bool)) & rewards.answered_N
            measured |= self._mean(name, values_N, known_N, world)
        return measured

    def _mean(self, name: str, values_N: Tensor, known_N: Tensor, world: World) -> dict[str, float]:
        """Return the mean over the prompts of all ranks and its standard error; every prompt counts once."""
        count_P = known_N.view(-1, self.n).sum(1)
        sum_P = values_N.double().masked_fill(~known_N, 0.0).view(-1, self.n).sum(1)
        means_P = torch.cat(world.gather(sum_P[count_P > 0] / count_P[count_P > 0]))
        return by_datasource(f"heldout/{name}", means_P.tolist(), [{}] * len(means_P))


def _question(prompt: object) -> dict[str, Any]:
    """Return the text that was asked: a prompt of text, or the last message of a chat."""
    last = prompt if isinstance(prompt, str) else prompt[-1].get("content") if isinstance(prompt, tuple) else None
    return {"question": last} if isinstance(last, str) else {}
