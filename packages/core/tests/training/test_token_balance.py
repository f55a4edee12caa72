"""Groups dealt to ranks by their tokens: whole, none lost, no rank with many more than another, and no number changed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from balance_ranks import CASES, run_all, write_data
from hypothesis import given
from hypothesis import strategies as st
from thread_ranks import ThreadWorld, together

from rlhf_core.contract.results import ScoredRollouts
from rlhf_core.testing import run_ranks, tiny_rewards, tiny_rollouts
from rlhf_core.training.token_balance import balance_tokens, plan_groups

TOKENS = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=8), min_size=1, max_size=5)


@given(TOKENS)
def test_a_plan_places_every_group_once_and_never_raises_the_most_tokens(tokens: list[list[int]]) -> None:
    plan = plan_groups(tokens)
    placed = sorted((group.rank, group.place, group.tokens) for share in plan for group in share)
    assert placed == [(rank, i, count) for rank, row in enumerate(tokens) for i, count in enumerate(row)]
    assert all(plan), "every rank has a group"
    before, after = max(map(sum, tokens)), max(sum(group.tokens for group in share) for share in plan)
    assert after <= before


def test_skewed_lengths_are_dealt_evenly() -> None:
    """One completion in eight is long, and a rank has them all: 3.1 times the mean before, within 5 % after."""
    dice = random.Random(0)
    tokens = [[dice.randint(2000, 4000) for _ in range(32)]] + [
        [dice.randint(100, 400) for _ in range(32)] for _ in range(3)
    ]
    sums = [[sum(row) for row in tokens], [sum(each.tokens for each in share) for share in plan_groups(tokens)]]
    before, after = (max(row) / (sum(row) / len(row)) for row in sums)
    assert before > 3 and after < 1.05


def test_few_groups_move_and_none_where_little_is_gained() -> None:
    even = [[100, 101, 99], [100, 98, 102]]
    assert [[each.rank for each in share] for share in plan_groups(even)] == [[0, 0, 0], [1, 1, 1]]
    moved = plan_groups([[100, 100, 100, 100], [100, 100]])
    assert sum(each.rank != rank for rank, share in enumerate(moved) for each in share) == 1


def test_rows_move_whole_with_their_rewards_and_texts() -> None:
    kept = {0: 6, 1: 1, 2: 1}

    def rank(world: ThreadWorld) -> list[tuple[list[str], list[float], int]]:
        rollouts = tiny_rollouts(kept[world.rank], 2)
        rollouts.texts = [f"{world.rank}:{int(group)}" for group in rollouts.group_N]
        rewards = tiny_rewards(rollouts)
        reward = [100.0 * world.rank + float(group) for group in rollouts.group_N]
        scored = ScoredRollouts(rollouts, type(rewards)(torch.tensor(reward)))
        share = balance_tokens(scored, world)
        assert share.rollouts.world is world
        found = []
        for group in share.rollouts.group_N.unique():
            rows = share.rows((share.rollouts.group_N == group).nonzero().flatten())
            tokens = int((rows.rollouts.prompt_lengths_N + rows.rollouts.lengths_N).sum())
            found.append((rows.rollouts.texts, rows.rewards.rewards_N.tolist(), tokens))
        return found

    shares = together(rank, 3)
    groups = [group for share in shares for group in share]
    assert sorted(texts[0] for texts, *_ in groups) == sorted(
        f"{r}:{g}" for r, count in kept.items() for g in range(count)
    )
    for texts, rewards, _ in groups:
        owner, number = map(int, texts[0].split(":"))
        assert texts == [texts[0]] * 2 and rewards == [100.0 * owner + number] * 2
    loads = [sum(tokens for *_, tokens in share) for share in shares]
    assert max(loads) < 1.5 * sum(loads) / 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one process and of ranks, for batches that are larger and smaller than the ranks."""
    pytest.importorskip("rlhf_algos", reason="trains sft and kto")
    folder = tmp_path_factory.mktemp("balance")
    data = write_data(folder)
    run_all(data, str(folder / "one"))
    done = run_ranks(3, run_all, data, str(folder / "three"))
    assert [rank.code for rank in done] == [0, 0, 0], "".join(rank.stderr[-2000:] for rank in done)
    return folder


def test_ranks_of_a_run_have_even_tokens(runs: Path) -> None:
    one, three = (torch.load(runs / f"{name}-sft.pt", weights_only=False)["seen"] for name in ("one", "three"))
    for ranks, ((whole, longest),) in zip(three, one, strict=True):
        loads = [load for load, _ in ranks]
        assert sum(loads) == whole
        assert max(loads) <= (whole / 3 + longest) / 0.95, "no row could move for the better, by 5 % or more"


def test_a_rank_may_have_no_row(runs: Path) -> None:
    seen = torch.load(runs / "three-few.pt", weights_only=False)["seen"]
    assert all((0, 0) in ranks for ranks in seen), "two rows, three ranks"


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_the_numbers_of_one_process(case: str, runs: Path) -> None:
    one, three = (torch.load(runs / f"{name}-{case}.pt", weights_only=False) for name in ("one", "three"))
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(three["weights"][name], tensor, rtol=0.0, atol=1e-6)
    ours, theirs = (
        [json.loads(line) for line in (runs / f"{name}-{case}" / "metrics.jsonl").read_text("utf-8").splitlines()]
        for name in ("three", "one")
    )
    assert len(ours) == len(theirs) > 0
    for found, expected in zip(ours, theirs, strict=True):
        assert found["loss/actor"] == pytest.approx(expected["loss/actor"], abs=1e-6)
        assert found["grad_norm/actor"] == pytest.approx(expected["grad_norm/actor"], rel=1e-5)
