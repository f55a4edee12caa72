"""What online presets have in common: roles, and terms made of the chosen credit and objective.

Everything is decided by what providers declare (`min_samples`, `needs`, a `length` to be filled in), nothing by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_algos.loss.entropy import Entropy
from rlhf_core.errors import UsageError
from rlhf_core.kl import kl_terms
from rlhf_core.options import ModelOptions, Optim, TrainedOptions
from rlhf_core.types import Term

if TYPE_CHECKING:
    from rlhf_core.options import KL
    from rlhf_core.types import Advantage, Chosen, Loss

__all__ = ["OFFLINE", "ONLINE", "POLICY_ROLES", "chosen_loss", "policy_terms"]

OFFLINE: Mapping[str, str] = {"data": "json"}
"""Where completions come from data."""

ONLINE: Mapping[str, str] = {"data": "prompts", "rollout": "hf", "reward": "length"}
"""Where completions are sampled and scored."""

POLICY_ROLES: Mapping[str, ModelOptions] = {"actor": TrainedOptions(optim=Optim(lr=1e-6)), "reference": ModelOptions()}
"""A policy, and the frozen model that a KL penalty is measured against."""


def policy_terms(chosen: Chosen, kl: KL | None = None, entropy: float = 0.0) -> tuple[Term, ...]:
    """The policy sampled, credited and trained; the KL penalty if it is a loss; the entropy bonus if there is one.

    Raises:
        UsageError: the credit compares completions of a prompt, and there is one per prompt.
    """
    advantage = _chosen_advantage(chosen)
    terms = (
        Term("actor", "actor", chosen_loss(chosen), advantage),
        *kl_terms(kl, "actor", "actor", advantage),
    )
    return (*terms, Term("actor", "actor", Entropy(), advantage, weight=entropy)) if entropy else terms


def chosen_loss(chosen: Chosen) -> Loss:
    """The objective, with a constant length of 0 replaced by the longest completion that can be sampled."""
    loss: Any = chosen.loss
    if chosen.sampling is not None and getattr(loss, "length", None) == 0:
        loss = replace(loss, length=chosen.sampling.max_new_tokens)
    return loss  # type: ignore[no-any-return]


def _chosen_advantage(chosen: Chosen) -> Advantage:
    """The credit, checked against the number of completions per prompt."""
    advantage: Any = chosen.advantage
    least, n = getattr(advantage, "min_samples", 1), chosen.sampling.n if chosen.sampling is not None else 1
    if n < least:
        raise UsageError(
            f"{type(advantage).__name__} compares the completions of one prompt; "
            f"set --sampling.n to {least} or more (it is {n})"
        )
    return advantage  # type: ignore[no-any-return]
