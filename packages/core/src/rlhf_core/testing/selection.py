"""The checks of filters (one bool per group, the same each time) and samplers (rows in range, exact resuming)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.engines import Stateful, open_provider
from rlhf_core.lazy import torch
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.tiny import tiny_rewards, tiny_rollouts
from rlhf_core.util.tensor_tree import plain_tree

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Rollouts
    from rlhf_core.contract.results import RewardOutput
    from rlhf_core.contract.selection import Filter, Sampler

__all__ = ["check_filter", "check_sampler"]


def check_filter(group_filter: Filter, rollouts: Rollouts | None = None, rewards: RewardOutput | None = None) -> Tensor:
    """Check that it accepts the same groups each time, bool_P, for equal rewards and a single group too.

    Args:
        group_filter: the provider.
        rollouts: completions that it can judge, if it cannot judge `tiny_rollouts()`.
        rewards: what they earned.

    Returns:
        The accepted groups, for checks of your own.

    Raises:
        AssertionError, ContractError: the filter breaks its contract.
    """
    from rlhf_core.training.filters import accepted_groups

    check_provider(group_filter)
    name = type(group_filter).__qualname__
    rollouts = tiny_rollouts(prompts=3) if rollouts is None else rollouts
    rewards = tiny_rewards(rollouts) if rewards is None else rewards
    before = (rollouts.group_N.clone(), rewards.rewards_N.clone())
    with open_provider(group_filter) as engine:
        accepted_P = accepted_groups(engine, rollouts, rewards)
        assert torch.equal(before[0], rollouts.group_N) and torch.equal(before[1], rewards.rewards_N), (
            f"{name} must leave rollouts and rewards as they are"
        )
        again_P = accepted_groups(engine, rollouts, rewards)
        same = isinstance(engine, Stateful) or torch.equal(accepted_P, again_P)
        assert same, f"{name} must accept the same groups each time; keep what it remembers in a state"
        accepted_groups(engine, rollouts, tiny_rewards(rollouts, equal=True))
        first = (rollouts.group_N == rollouts.group_N.unique()[0]).nonzero().flatten()
        accepted_groups(engine, rollouts.rows(first), rewards.rows(first))
    return accepted_P


BATCH = 4
"""Rows per step."""
STEPS = 10


def check_sampler(sampler: Sampler, rows: int = 11, score: Callable[[int], float] | None = None) -> list[int]:
    """Check that it gives row numbers without end, the same each time, and continues exactly from its state.

    Args:
        sampler: the provider.
        rows: number of rows.
        score: what a row earns; between 0 and 1, rising with its number, if absent.

    Returns:
        The numbers of ten steps of four rows with an update after each, for checks of your own.

    Raises:
        AssertionError, ContractError: the sampler breaks its contract.
    """
    check_provider(sampler)
    name = type(sampler).__qualname__
    earned = score or (lambda number: number / max(1, rows - 1))
    drawn, _ = _draw_steps(sampler, rows, earned, STEPS)
    for number in drawn:
        assert isinstance(number, int) and 0 <= number < rows, (
            f"{name} gave {number!r}, which is not a row from 0 to {rows - 1}"
        )
    again, _ = _draw_steps(sampler, rows, earned, STEPS)
    assert again == drawn, f"{name} must give the same rows after the same scores"
    if sampler.epochs:
        for at in range(0, len(drawn) - rows + 1, rows):
            assert sorted(drawn[at : at + rows]) == list(range(rows)), f"{name}: {rows} draws are not every row once"
    if sampler.reacts:
        first, state = _draw_steps(sampler, rows, earned, STEPS // 2)
        rest, _ = _draw_steps(sampler, rows, earned, STEPS - STEPS // 2, state)
        assert first + rest == drawn, f"{name} must continue from its state as if it had never stopped"
    return drawn


def _draw_steps(
    sampler: Sampler, rows: int, score: Callable[[int], float], steps: int, state: Mapping[str, Any] | None = None
) -> tuple[list[int], Any]:
    """Return the rows of some steps, two completions of each being scored, and the state after them."""
    with open_provider(sampler) as engine:
        name = type(sampler).__qualname__
        assert isinstance(engine, Stateful) == sampler.reacts, (
            f"the engine of {name} needs state_dict and load_state_dict exactly if it reacts to scores"
        )
        if state is not None:
            engine.load_state_dict(state)
        numbers, drawn = engine(rows, 3), list[int]()
        for _ in range(steps):
            batch = list(islice(numbers, BATCH))
            assert len(batch) == BATCH, f"{name} must give rows without end; it gave {len(drawn) + len(batch)}"
            drawn += batch
            if sampler.reacts:
                row_N = torch.tensor([number for number in batch for _ in range(2)])
                engine.update(row_N, torch.tensor([score(number) for number in row_N.tolist()], dtype=torch.float64))
        return drawn, plain_tree(engine.state_dict(), clone=True) if isinstance(engine, Stateful) else None
