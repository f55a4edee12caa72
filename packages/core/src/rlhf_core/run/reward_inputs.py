"""Completions with what a reward reads of roles: a reward model or a judge is a role of the run, placed as any other."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from rlhf_core.contract.results import PRECISION
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from rlhf_core.contract.batch import Batch
    from rlhf_core.contract.plan import Plan
    from rlhf_core.run.run import Run

__all__ = ["reward_precision", "with_reward_needs"]


def reward_precision(plan: Plan) -> float:
    """Return the relative precision of what the run's reward reads of roles: that of the narrowest dtype among them."""
    dtypes = [plan.roles[need.role].options.compute_dtype for need in plan.reward_needs]
    return max([PRECISION, *(torch.finfo(getattr(torch, dtype)).eps for dtype in dtypes)])


def with_reward_needs(run: Run, rollouts: Batch) -> Batch:
    """Return `rollouts` with the outputs that the reward needs; one forward pass per role, and roles with devices of their
    own at once. Collective over ranks.

    Raises:
        ContractError: the reward's own rows are not one per completion.
    """
    plan, reward = run.plan, run.config.providers["reward"]
    reads = reward.reads_texts and len(rollouts) > 0  # a rank without completions reads what core makes up for it
    calls: dict[str, Callable[[], dict[str, Tensor]]] = {}
    for name in dict.fromkeys(need.role for need in plan.reward_needs):
        rows = reward.role_rows(name, rollouts, run.data.encoder_of(name)) if reads else rollouts
        if len(rows) != len(rollouts):
            who = type(reward).__qualname__
            raise ContractError(f"{who}.role_rows({name!r}) gave {len(rows)} rows for {len(rollouts)} completions")
        outputs = frozenset(need.output for need in plan.reward_needs if need.role == name)
        calls[name] = partial(run.roles[name].infer, replace(rows, kept_sets=[]), outputs)
    found = run.together(calls)
    extras = {need.name: found[need.role][need.output] for need in plan.reward_needs}
    return rollouts.with_extras(**extras) if extras else rollouts
