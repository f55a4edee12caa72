"""Dynamic sampling: prompts that teach nothing are replaced by fresh ones before anything is trained.

A round samples and scores a batch of prompts and keeps those whose completions are worth comparing; rounds go on until as many
are kept as the step wants. All that are kept are trained on in the step that sampled them: nothing accepted is thrown away or
grows stale, and a checkpoint needs no more than the data's position. So a step has at least --batch-size prompts, and fewer
only where the rounds ran out. Ranks decide together, and share what was kept evenly.

An algorithm that has a field `dynamic` gets it. The loop knows nothing of it: `Run.sample` asks here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rlhf_core.contract.batch import Rollouts
from rlhf_core.contract.results import RewardOutput
from rlhf_core.data.stream import DrawnRows
from rlhf_core.errors import UsageError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.run.run import Run

__all__ = ["DynamicSampling", "keep_sampling"]

METRIC = "metric/"
"""Before the names of a reward's metrics while they travel with their rows."""


@dataclass(frozen=True)
class DynamicSampling:
    """Which prompts are worth training on; fresh ones replace the others."""

    keep: Literal["all", "varied", "inside"] = "all"
    """prompts to train on: all, those whose completions do not all score the same (Yu et al. 2025, eq. 11, for any reward), or
    those whose mean score lies strictly between `low` and `high`"""
    low: float = 0.0
    """mean score at or below which a prompt is too hard for `inside`"""
    high: float = 1.0
    """mean score at or above which a prompt is too easy for `inside`"""
    oversample: int = 1
    """batches of prompts that a round samples at a time: more of them need fewer rounds, and may keep more prompts"""
    rounds: int = 10
    """rounds after which a step trains on what it has"""

    def __post_init__(self) -> None:
        for name in ("oversample", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.low < self.high:
            raise UsageError(f"low must be below high, not {self.low} and {self.high}")

    def accepted_N(self, scores_N: Tensor, group_N: Tensor) -> Tensor:
        """Whether each completion's prompt is kept (N,)."""
        groups, index_N = torch.unique(group_N, return_inverse=True)
        scores_N = scores_N.double()
        if self.keep == "varied":
            ends = [
                torch.zeros(len(groups)).double().scatter_reduce(0, index_N, scores_N, how, include_self=False)
                for how in ("amin", "amax")
            ]
            return (ends[0] < ends[1])[index_N]
        means = torch.zeros(len(groups)).double().scatter_reduce(0, index_N, scores_N, "mean", include_self=False)
        return ((means > self.low) & (means < self.high))[index_N] | (self.keep == "all")


def keep_sampling(run: Run, source: str, drawn: DrawnRows, dynamic: DynamicSampling) -> tuple[Rollouts, RewardOutput]:
    """Completions of enough prompts that `dynamic` accepts, and their rewards; `drawn` are the first prompts.

    Raises:
        UsageError: the run's first step finds not a single one. A later step trains on its last round then, as it is.
    """
    begun, rounds = [drawn], list[Rollouts]()
    prompts = kept = 0.0
    while len(rounds) < dynamic.rounds and kept < run.config.batch_size:
        sampled = run.sample_once(source, _draw_batches(run, begun, dynamic.oversample))
        begun = []
        with run.phase("reward"):
            rewards = run.judge(sampled)
        run.log_batch("dynamic/reward", rewards.total_N)
        scored = _with_rewards(sampled, rewards)
        scores_N = rewards.total_N if rewards.scores_N is None else rewards.scores_N
        rounds.append(scored.rows(dynamic.accepted_N(scores_N, sampled.group_N).nonzero().flatten()))
        prompts += run.world_sum(_groups(sampled))
        kept += run.world_sum(_groups(rounds[-1]))
    run.log({"dynamic/rounds": len(rounds), "dynamic/prompts": prompts, "dynamic/kept": kept / prompts})
    if kept < run.world.size:
        if run.step == 0:
            raise UsageError(
                f"of {prompts:.0f} prompts none gave completions that --algorithm.dynamic.keep {dynamic.keep} keeps: "
                "choose other prompts, another reward, a larger --sampling.n, or --algorithm.dynamic.keep all"
            )
        rounds = [scored]
    return _without_rewards(_share_evenly(run, rounds))


def _draw_batches(run: Run, begun: list[DrawnRows], batches: int) -> DrawnRows:
    """So many batches of data as one, `begun` among them."""
    parts = [*begun, *(run.next_rows() for _ in range(batches - len(begun)))]
    ready = [part.rows for part in parts if part.rows is not None]
    return DrawnRows(
        examples=[example for part in parts for example in part.examples],
        uids=[uid for part in parts for uid in part.uids],
        rows=[row for rows in ready for row in rows] if ready else None,
    )


def _groups(rollouts: Rollouts) -> int:
    return len(rollouts.group_N.unique())


def _share_evenly(run: Run, rounds: list[Rollouts]) -> Rollouts:
    """This rank's even share of the prompts that all ranks kept."""
    everyone = run.world.gather([replace(part, world=None) for part in rounds])
    parts = [ranks[k] for k in range(len(rounds)) for ranks in everyone if len(ranks[k])]
    whole = Rollouts.cat(parts)
    mine = whole.group_N.unique().tensor_split(run.world.size)[run.world.rank]
    share = whole.rows(torch.isin(whole.group_N, mine).nonzero().flatten())
    return replace(share, world=rounds[0].world)


# ----------------------------------------------------------------------------------------------------------------------
# rewards travel with their rows, as extras
# ----------------------------------------------------------------------------------------------------------------------


def _with_rewards(rollouts: Rollouts, rewards: RewardOutput) -> Rollouts:
    extras: dict[str, Any] = {"rewards_N": rewards.rewards_N}
    extras |= {f"{METRIC}{name}_N": values_N for name, values_N in rewards.metrics.items()}
    for name in ("rewards_NT", "scores_N"):
        if (values := getattr(rewards, name)) is not None:
            extras[name] = values
    return rollouts.with_extras(**extras)


def _without_rewards(rollouts: Rollouts) -> tuple[Rollouts, RewardOutput]:
    extras = dict(rollouts.extras)
    names = [name for name in extras if name.startswith(METRIC)]
    metrics = {name.removeprefix(METRIC).removesuffix("_N"): extras.pop(name) for name in names}
    output = RewardOutput(
        extras.pop("rewards_N"), extras.pop("rewards_NT", None), extras.pop("scores_N", None), metrics
    )
    return replace(rollouts, extras=extras), output
