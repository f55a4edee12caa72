"""Groups that ranks kept are shared evenly: whole, in as few moves as can be, from one rank to another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import ThreadWorld, exchange, together

from rlhf_core.contract.results import ScoredRollouts
from rlhf_core.testing import run_ranks
from rlhf_core.testing.tiny import tiny_rewards, tiny_rollouts
from rlhf_core.training.dynamic_sampling import plan_moves, share_evenly


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_moves_leave_even_shares_and_move_as_little_as_can_be(counts: list[int]) -> None:
    """Shares differ by one at most, the first ones are the larger, and nobody both sends and receives."""
    after = list(counts)
    for source, target, count in plan_moves(counts):
        assert count > 0
        after[source] -= count
        after[target] += count
    assert after == [len(part) for part in torch.arange(sum(counts)).tensor_split(len(counts))]
    moved = sum(count for *_, count in plan_moves(counts))
    assert moved == sum(max(0, have - share) for have, share in zip(counts, after, strict=True))


@pytest.mark.parametrize("kept", [(5, 0, 1), (0, 0, 3), (2, 2, 2), (4, 3, 3)])
def test_groups_move_whole_and_only_to_ranks_that_lack_some(kept: tuple[int, ...]) -> None:
    def rank(world: ThreadWorld) -> tuple[list[list[str]], int]:
        rollouts = tiny_rollouts(max(kept[world.rank], 1), 2)
        rollouts.texts = [f"{world.rank}:{int(group)}" for group in rollouts.group_N]
        scored = ScoredRollouts(rollouts, tiny_rewards(rollouts))
        share = share_evenly([scored.rows(range(2 * kept[world.rank]))], world)
        assert share.rollouts.world is world or world.calls == 1
        texts, groups = share.rollouts.texts, share.rollouts.group_N
        return [
            sorted({texts[i] for i in (groups == g).nonzero()[:, 0].tolist()}) for g in groups.unique()
        ], world.calls

    shares = together(rank, 3)
    assert [len(groups) for groups, _ in shares] == [len(part) for part in torch.arange(sum(kept)).tensor_split(3)]
    assert all(len(group) == 1 for groups, _ in shares for group in groups), "groups stay whole and apart"
    found = sorted(group[0] for groups, _ in shares for group in groups)
    assert found == sorted(f"{rank}:{group}" for rank, count in enumerate(kept) for group in range(count))
    for number, (groups, calls) in enumerate(shares):
        own = sum(group[0].startswith(f"{number}:") for group in groups)
        assert own == min(kept[number], len(groups))
        assert calls == (1 if max(kept) - min(kept) < 2 else 2)


def test_processes_exchange_bytes() -> None:
    done = run_ranks(3, exchange)
    assert [rank.code for rank in done] == [0, 0, 0], done[0].stderr[-2000:]
