"""Dynamic sampling: prompts that a filter rejects are replaced by fresh ones before anything is trained.

A round samples and scores a batch of prompts and keeps those that the filter accepts; rounds continue until as many are
kept as the step wants. All that are kept are trained on in the step that sampled them: nothing accepted is thrown away or
grows stale, and a checkpoint needs no more than the data's position. So a step has at least --batch-size prompts, and fewer
only where the rounds ran out. Ranks decide together, and share what was kept evenly.

An algorithm that has a field `dynamic` has options of it. The loop knows nothing of it: `Iteration.sample` asks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal, Protocol

from rlhf_core.contract.results import ScoredRollouts
from rlhf_core.data.stream import DrawnRows
from rlhf_core.errors import OptionError, UsageError, options_under, run_option
from rlhf_core.lazy import torch
from rlhf_core.training.filters import InsideFilter, VariedFilter, accepted_groups
from rlhf_core.training.moved_groups import from_bytes, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.options import RunConfig
    from rlhf_core.contract.selection import Filter
    from rlhf_core.training.step_metrics import Meter

__all__ = ["DynamicSampling", "choose_filter", "keep_sampling", "plan_moves", "share_evenly"]


@dataclass(frozen=True)
class DynamicSampling:
    """Options for replacing prompts that a filter rejects."""

    keep: Literal["all", "varied", "inside"] = "all"
    """filter if none is chosen by name: `all` keeps every prompt, `varied` keeps prompts whose completions do not all
    score the same (Yu et al. 2025, eq. 11), `inside` keeps those whose mean score is strictly between `low` and
    `high`"""
    low: float = 0.0
    """mean score at or below which a prompt is too hard for `inside`"""
    high: float = 1.0
    """mean score at or above which a prompt is too easy for `inside`"""
    oversample: int = 1
    """number of batches of prompts that a round samples; larger values need fewer rounds and may keep more prompts"""
    rounds: int = 10
    """maximum number of rounds, after which a step trains on the prompts it has"""

    def __post_init__(self) -> None:
        for name in ("oversample", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.low < self.high:
            raise UsageError(f"low must be below high, not {self.low} and {self.high}")

    @property
    def filter(self) -> Filter | None:
        """The filter that `keep` is short for."""
        filters: dict[str, Filter] = {"varied": VariedFilter(), "inside": InsideFilter(self.low, self.high)}
        return filters.get(self.keep)


def choose_filter(config: RunConfig) -> Filter | None:
    """Return the filter of a run: the one chosen by name, else what the algorithm's `dynamic.keep` is short for.

    Raises:
        UsageError: the user chose one by name, and another one by `keep`.
    """
    dynamic: DynamicSampling | None = config.algorithm.dynamic
    chosen: Filter | None = config.providers.get("filter")
    if dynamic is None or chosen is None:
        return chosen if dynamic is None else chosen or dynamic.filter
    usual = {each.name: each.default for each in fields(config.algorithm)}.get("dynamic")
    if dynamic.filter is not None and (not isinstance(usual, DynamicSampling) or dynamic.filter != usual.filter):
        raise OptionError(
            "/algorithm.dynamic.keep",
            f"{dynamic.keep} and {run_option('filter')} both select prompts; leave out one of them",
        )
    return chosen


class PromptSampler(Protocol):
    """Parts of an iteration that the rounds need."""

    config: RunConfig
    """the resolved options"""
    world: World
    """the ranks that decide together"""
    step: int
    """the step that is sampled for, from 1"""

    @property
    def meter(self) -> Meter:
        """Return the meter that collects metrics."""
        ...

    def draw(self) -> DrawnRows:
        """Return the next rows of data."""
        ...

    def sample_once(self, source: str, rows: DrawnRows) -> Rollouts:
        """Return completions on the prompts of `rows`."""
        ...

    def judge(self, source: str, rollouts: Rollouts) -> ScoredRollouts:
        """Return completions of `source` with their rewards."""
        ...


def keep_sampling(
    iteration: PromptSampler, source: str, drawn: DrawnRows, group_filter: Filter, dynamic: DynamicSampling
) -> ScoredRollouts:
    """Return scored completions of enough prompts that `group_filter` accepts; `drawn` are the first prompts.

    Raises:
        UsageError: the run's first step finds not a single one. A later step trains on its last round then, as it is.
    """
    meter = iteration.meter
    begun, rounds = [drawn], list[ScoredRollouts]()
    prompts = kept = 0.0
    failed = False
    while len(rounds) < dynamic.rounds and kept < iteration.config.batch_size:
        rows = _draw_batches(iteration, begun, dynamic.oversample)
        scored = iteration.judge(source, iteration.sample_once(source, rows))
        begun, failed = [], failed or scored.failed
        answered = scored if scored.rewards.abstained_N is None else scored.keep_answered()
        meter.log_batch("dynamic/reward", answered.rewards.total_N)
        with options_under("/filter"):
            accepted_P = accepted_groups(group_filter, answered.rollouts, answered.rewards)
        accepted_N = accepted_P[torch.unique(answered.rollouts.group_N, return_inverse=True)[1]]
        rounds.append(answered.rows(accepted_N.nonzero().flatten()))
        counts = torch.tensor([_groups(scored), _groups(rounds[-1])], dtype=torch.float64)
        sampled, accepted = iteration.world.sum(counts).tolist()
        prompts, kept = prompts + sampled, kept + accepted
    meter.log({"dynamic/rounds": len(rounds), "dynamic/prompts": prompts, "dynamic/kept": kept / prompts})
    if not kept:
        if iteration.step == 1:
            raise UsageError(
                f"the filter {group_filter} accepts the completions of none of {prompts:.0f} prompts: choose other "
                f"prompts, another reward, a larger {run_option('sampling.n')}, or another {run_option('filter')}"
            )
        rounds = [scored]
    return replace(share_evenly(rounds, iteration.world), failed=failed)


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


def share_evenly(rounds: list[ScoredRollouts], world: World) -> ScoredRollouts:
    """Return this rank's even share of the prompts that all ranks kept; at least one for each rank if there are so many.

    A rank keeps its own prompts as far as they are its share. Only what is more than that moves, and only to the rank that
    lacks it.
    """
    own = ScoredRollouts.cat([part for part in rounds if len(part)] or rounds[:1])
    if world.size == 1:
        return own
    moves = plan_moves(world.gather(_groups(own)))
    if not moves:
        return own
    groups, stop = own.rollouts.group_N.unique(), _groups(own)
    parts = [b""] * world.size
    for source, target, count in moves:
        if source == world.rank:
            parts[target] = to_bytes(_of_groups(own, groups[stop - count : stop]))
            stop -= count
    kept = _of_groups(own, groups[:stop])
    received = [from_bytes(part, like=own.rollouts) for part in world.exchange(parts) if part]
    share = ScoredRollouts.cat([part for part in (kept, *received) if len(part)] or [kept])
    return replace(share, rollouts=replace(share.rollouts, world=world))


def plan_moves(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return the moves that leave every rank an even share of groups, as few groups as can be: (from, to, how many).

    Args:
        counts: groups of each rank. The first ranks get one more where the groups do not divide.
    """
    each, more = divmod(sum(counts), len(counts))
    surplus = [have - each - (rank < more) for rank, have in enumerate(counts)]
    moves = []
    lacking = [rank for rank, over in enumerate(surplus) if over < 0]
    for source, over in enumerate(surplus):
        while over > 0:
            count = min(over, -surplus[lacking[0]])
            moves.append((source, lacking[0], count))
            over -= count
            surplus[lacking[0]] += count
            if not surplus[lacking[0]]:
                lacking.pop(0)
    return moves


def _of_groups(scored: ScoredRollouts, groups: Tensor) -> ScoredRollouts:
    return scored.rows(torch.isin(scored.rollouts.group_N, groups).nonzero().flatten())
