"""Completions with what a reward reads of roles: a reward model or a judge is a role of the run, placed as any other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_core.contract.results import PRECISION
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.plan import Plan
    from rlhf_core.contract.providers import Reward
    from rlhf_core.contract.roles import Role
    from rlhf_core.run.data import RunData

__all__ = ["reward_precision", "with_reward_needs"]


def reward_precision(plan: Plan) -> float:
    """Return the relative precision of what the run's reward reads of roles: that of the narrowest dtype among them."""
    dtypes = [plan.roles[need.role].options.compute_dtype for need in plan.reward_needs]
    return max([PRECISION, *(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)])


def with_reward_needs(plan: Plan, reward: Reward, rollouts: Batch, roles: Mapping[str, Role], data: RunData) -> Batch:
    """Return `rollouts` with the outputs that `reward` needs; one forward pass per role. Collective over ranks.

    Raises:
        ContractError: the reward's own rows are not one per completion.
    """
    extras: dict[str, Tensor] = {}
    for name in dict.fromkeys(need.role for need in plan.reward_needs):
        rows = reward.role_rows(name, rollouts, data.encoder_of(name)) if reward.reads_texts else rollouts
        if len(rows) != len(rollouts):
            who = type(reward).__qualname__
            raise ContractError(f"{who}.role_rows({name!r}) gave {len(rows)} rows for {len(rollouts)} completions")
        own = [need for need in plan.reward_needs if need.role == name]
        outputs = roles[name].infer(replace(rows, kept_sets=[]), frozenset(need.output for need in own))
        extras |= {need.name: outputs[need.output] for need in own}
    return rollouts.with_extras(**extras) if extras else rollouts
