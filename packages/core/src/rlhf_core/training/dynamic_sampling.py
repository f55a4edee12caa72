"""Dynamic sampling: prompts that teach nothing are replaced by fresh ones before anything is trained.

A round samples and scores a batch of prompts and keeps those whose completions are worth comparing; rounds go on until as many
are kept as the step wants. All that are kept are trained on in the step that sampled them: nothing accepted is thrown away or
grows stale, and a checkpoint needs no more than the data's position. So a step has at least --batch-size prompts, and fewer
only where the rounds ran out. Ranks decide together, and share what was kept evenly.

An algorithm that has a field `dynamic` gets it. The loop knows nothing of it: `Iteration.sample` asks here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from rlhf_core.contract.results import ScoredRollouts
from rlhf_core.data.stream import DrawnRows
from rlhf_core.errors import UsageError, run_option
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.training.step_metrics import Meter

__all__ = ["DynamicSampling", "keep_sampling"]


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


class PromptSampler(Protocol):
    """What the rounds ask of an iteration."""

    config: RunConfig
    """the resolved options"""
    world: World
    """the ranks that decide together"""
    step: int
    """the step that is sampled for, from 1"""

    @property
    def meter(self) -> Meter:
        """Where metrics go."""
        ...

    def draw(self) -> DrawnRows:
        """Return the next rows of data."""
        ...

    def sample_once(self, source: str, rows: DrawnRows) -> Rollouts:
        """Return completions on the prompts of `rows`."""
        ...

    def judge(self, rollouts: Rollouts) -> ScoredRollouts:
        """Return completions with their rewards."""
        ...


def keep_sampling(iteration: PromptSampler, source: str, drawn: DrawnRows, dynamic: DynamicSampling) -> ScoredRollouts:
    """Return scored completions of enough prompts that `dynamic` accepts; `drawn` are the first prompts.

    Raises:
        UsageError: the run's first step finds not a single one. A later step trains on its last round then, as it is.
    """
    meter, total = iteration.meter, iteration.world.total
    begun, rounds = [drawn], list[ScoredRollouts]()
    prompts = kept = 0.0
    failed = False
    while len(rounds) < dynamic.rounds and kept < iteration.config.batch_size:
        scored = iteration.judge(iteration.sample_once(source, _draw_batches(iteration, begun, dynamic.oversample)))
        begun, failed = [], failed or scored.failed
        rewards, group_N = scored.rewards, scored.rollouts.group_N
        meter.log_batch("dynamic/reward", rewards.total_N)
        scores_N = rewards.total_N if rewards.scores_N is None else rewards.scores_N
        rounds.append(scored.rows(dynamic.accepted_N(scores_N, group_N).nonzero().flatten()))
        prompts += total(_groups(scored))
        kept += total(_groups(rounds[-1]))
    meter.log({"dynamic/rounds": len(rounds), "dynamic/prompts": prompts, "dynamic/kept": kept / prompts})
    if kept < iteration.world.size:
        if iteration.step == 1:
            raise UsageError(
                f"of {prompts:.0f} prompts none gave completions that {run_option('algorithm.dynamic.keep')} "
                f"{dynamic.keep} keeps: "
                f"choose other prompts, another reward, a larger {run_option('sampling.n')}, or "
                f"{run_option('algorithm.dynamic.keep', 'all')}"
            )
        rounds = [scored]
    return replace(_share_evenly(rounds, iteration.world), failed=failed)


def _draw_batches(iteration: PromptSampler, begun: list[DrawnRows], batches: int) -> DrawnRows:
    """Return so many batches of data as one, `begun` among them."""
    parts = [*begun, *(iteration.draw() for _ in range(batches - len(begun)))]
    ready = [part.rows for part in parts if part.rows is not None]
    return DrawnRows(
        examples=[example for part in parts for example in part.examples],
        uids=[uid for part in parts for uid in part.uids],
        rows=[row for rows in ready for row in rows] if ready else None,
    )


def _groups(scored: ScoredRollouts) -> int:
    return len(scored.rollouts.group_N.unique())


def _share_evenly(rounds: list[ScoredRollouts], world: World) -> ScoredRollouts:
    """Return this rank's even share of the prompts that all ranks kept."""
    everyone = world.gather([replace(part, rollouts=replace(part.rollouts, world=None)) for part in rounds])
    parts = [ranks[k] for k in range(len(rounds)) for ranks in everyone if len(ranks[k])]
    whole = ScoredRollouts.cat(parts)
    groups = whole.rollouts.group_N
    mine = groups.unique().tensor_split(world.size)[world.rank]
    share = whole.rows(torch.isin(groups, mine).nonzero().flatten())
    return replace(share, rollouts=replace(share.rollouts, world=world))
