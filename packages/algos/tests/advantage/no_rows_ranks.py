"""Credit of every advantage of rlhf-algos, on ranks of which only the first has rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rlhf_core.contract.results import Credit, Metric
from rlhf_core.launcher.local import join_world
from rlhf_core.plugins.registry import default_registry
from rlhf_core.testing import tiny_extras, tiny_rewards, tiny_rollouts


def names() -> list[str]:
    """Return the names of the advantages that need no options."""
    table = default_registry().table("advantage")
    return sorted(name for name, entry in table.items() if entry.plugin.distribution == "rlhf-algos")


def credit_all(output: str) -> None:
    """Write the credits and metrics of each advantage, per rank."""
    world = join_world()
    found: dict[str, Any] = {}
    for name in names():
        advantage = default_registry().resolve("advantage", name)()
        rollouts = tiny_rollouts(2, 4)
        rollouts = replace(rollouts, world=world, labels=[i % 2 == 0 for i in range(len(rollouts))])
        rollouts = rollouts.with_extras(**tiny_extras(advantage.needs, rollouts))
        rewards = tiny_rewards(rollouts)
        rewards = replace(rewards, metrics={"uncertainty": rewards.rewards_N})  # which is all of the reward, for gdpo
        if world.rank:
            rollouts, rewards = rollouts.rows([]), rewards.rows([]).with_tokens(0)
        result = advantage(rewards, rollouts, dict(rollouts.extras))
        credit = result if isinstance(result, Credit) else Credit(result)
        metrics = {key: _numbers(value) for key, value in credit.metrics.items()}
        rows = None if credit.rows is None else len(credit.rows)
        found[name] = (credit.advantages_NT, metrics, rows)
    torch.save(found, f"{output}-{world.rank}.pt")


def _numbers(value: float | Metric) -> tuple[float, float] | float:
    """Return the total and the count of a metric, or the number."""
    return (float(value.total), float(value.count)) if isinstance(value, Metric) else float(value)
