"""Groups of completions dealt to ranks by their tokens, so that no rank waits for one whose rows are long.

Ranks draw equal numbers of prompts before anybody knows how long completions get. Once they are there, whole groups move from
the rank with the most tokens to the one with the fewest, one at a time or against a shorter one, as few as it takes. Core
reduces over all ranks, so who trains on a group changes no number. Groups stay where they are if little is gained.

Under `--launcher ray` batches are split by tokens anyway, since the controller has all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rlhf_core.contract.results import RewardOutput, ScoredRollouts
from rlhf_core.lazy import torch
from rlhf_core.training.moved_groups import from_bytes, to_bytes

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.distributed import World

__all__ = ["balance_rows", "balance_tokens", "group_tokens", "plan_groups"]

CLOSE = 0.02
"""Difference between the most and the fewest tokens of a rank, as a share of the mean, that is left alone."""
WORTH = 0.05
"""Share of the most tokens of a rank that must be saved for groups to move: it is about the time of a step."""


class PlacedGroup(NamedTuple):
    """A group of rows."""

    tokens: int
    """number of its tokens, of prompts and completions"""
    rank: int
    """number of the rank that holds it"""
    place: int
    """number of the group among those of its rank"""


def group_tokens(rows: Batch) -> list[int]:
    """Return the number of tokens of each group of a rank's rows, in the order of their numbers."""
    groups, group_N = rows.group_N.unique(return_inverse=True)
    lengths_N = rows.prompt_lengths_N + rows.lengths_N
    return torch.zeros(len(groups), dtype=torch.int64).scatter_add_(0, group_N, lengths_N).tolist()


def balance_tokens(
    scored: ScoredRollouts, world: World, tokens: Sequence[Sequence[int]] | None = None
) -> ScoredRollouts:
    """Return this rank's groups, so that all ranks have about equally many tokens.

    `tokens` are the `group_tokens` of every rank, where they are at hand. Collective over `world` if they are not, or if groups
    move.
    """
    if world.size == 1:
        return scored
    plan = plan_groups(world.gather(group_tokens(scored.rollouts)) if tokens is None else tokens)
    group_N = scored.rollouts.group_N.unique(return_inverse=True)[1]
    if all(group.rank == rank for rank, share in enumerate(plan) for group in share):
        return scored
    parts = [b""] * world.size
    for rank, share in enumerate(plan):
        places = [group.place for group in share if group.rank == world.rank]
        if rank == world.rank:
            kept = _rows_of_groups(scored, group_N, places)
        elif places:
            parts[rank] = to_bytes(_rows_of_groups(scored, group_N, places))
    received = [from_bytes(part, like=scored.rollouts) for part in world.exchange(parts) if part]
    share_here = ScoredRollouts.cat([part for part in (kept, *received) if len(part)] or [kept])
    return replace(share_here, rollouts=replace(share_here.rollouts, world=world))


def balance_rows(batch: Batch, world: World) -> Batch:
    """Return this rank's rows of data, dealt as `balance_tokens` deals completions. Collective over `world`."""
    rows: Any = batch  # moved as completions are
    return balance_tokens(ScoredRollouts(rows, RewardOutput(torch.zeros(len(batch)))), world).rollouts


def plan_groups(tokens: Sequence[Sequence[int]]) -> list[list[PlacedGroup]]:
    """Return the groups that each rank should have.

    Args:
        tokens: tokens of each group, by rank; every rank that has a group keeps at least one.
    """
    first = [[PlacedGroup(count, rank, i) for i, count in enumerate(row)] for rank, row in enumerate(tokens)]
    shares = [list(share) for share in first]
    loads = np.array([sum(row) for row in tokens], dtype=np.int64)
    most = loads.max()
    for _ in range(4 * sum(map(len, tokens))):
        source, target = int(loads.argmax()), int(loads.argmin())
        gap = int(loads[source] - loads[target])
        move = _best_move(shares[source], shares[target], gap) if gap > CLOSE * loads.mean() else None
        if move is None:
            break
        given, taken = move
        for out, into, group in ((source, target, given), (target, source, taken)):
            if group is not None:
                shares[out].remove(group)
                shares[into].append(group)
                loads[out] -= group.tokens
                loads[into] += group.tokens
    if loads.max() > (1 - WORTH) * most:
        return first
    return [sorted(share, key=lambda group: (group.rank, group.place)) for share in shares]


def _best_move(
    source: Sequence[PlacedGroup], target: Sequence[PlacedGroup], gap: int
) -> tuple[PlacedGroup, PlacedGroup | None] | None:
    """Return the group to give, and the one to take for it if any, that leave both ranks closest; None if nothing helps."""
    takes: list[PlacedGroup | None] = [*([None] if len(source) > 1 else []), *sorted(target)]
    if not takes:
        return None
    taken_K = np.array([0 if group is None else group.tokens for group in takes])
    given_G = np.array([group.tokens for group in source])
    right_G = np.searchsorted(taken_K, given_G - gap / 2)
    best: tuple[float, int, int] | None = None
    for near_G in (np.maximum(right_G - 1, 0), np.minimum(right_G, len(takes) - 1)):
        moved_G = given_G - taken_K[near_G]
        off_G = np.where((moved_G > 0) & (moved_G < gap), np.abs(moved_G - gap / 2), np.inf)
        g = int(off_G.argmin())
        if np.isfinite(off_G[g]) and (best is None or off_G[g] < best[0]):
            best = (float(off_G[g]), g, int(near_G[g]))
    return None if best is None else (source[best[1]], takes[best[2]])


def _rows_of_groups(scored: ScoredRollouts, group_N: Tensor, places: list[int]) -> ScoredRollouts:
    """Return the rows of the groups at `places`."""
    return scored.rows(torch.isin(group_N, torch.tensor(places, dtype=torch.int64)).nonzero().flatten())
