"""Shared parts of online presets: roles, and terms made of the chosen credit and objective.

Everything is decided by what providers declare (`min_samples`, `needs`, a `length` to be filled in), nothing by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlhf_algos.loss.entropy import EntropyLoss
from rlhf_core.contract.optimizers import AdamW
from rlhf_core.contract.options import ModelOptions, TrackingOptions, TrainedOptions
from rlhf_core.contract.providers import Advantage, Algorithm, Loss
from rlhf_core.contract.requirements import LANGUAGE
from rlhf_core.contract.results import Reduction
from rlhf_core.contract.terms import Term
from rlhf_core.errors import UsageError, run_option
from rlhf_core.training.dynamic_sampling import DynamicSampling
from rlhf_core.training.kl import kl_terms
from rlhf_core.training.reward_shaping import RewardShaping

if TYPE_CHECKING:
    from rlhf_core.contract.options import KL
    from rlhf_core.contract.terms import ProviderChoices

__all__ = ["OFFLINE", "ONLINE", "POLICY_ROLES", "OnlineOptions", "chosen_loss", "policy_terms"]

OFFLINE: Mapping[str, str] = {"data": "json"}
"""Providers of algorithms whose completions come from data."""

ONLINE: Mapping[str, str] = {"data": "prompts", "rollout": "hf", "reward": "length"}
"""Providers of algorithms that sample and score completions."""

POLICY_ROLES: Mapping[str, ModelOptions] = {
    "actor": TrainedOptions(optim=AdamW(lr=1e-6)),
    "reference": TrackingOptions(),
}
"""A policy, and the frozen model that a KL penalty is measured against."""


@dataclass(frozen=True)
class OnlineOptions(Algorithm):
    """Options of every online preset that apply before credit is assigned. This is not a preset itself."""

    shaping: RewardShaping = RewardShaping()
    """scale and penalties of rewards"""
    dynamic: DynamicSampling = DynamicSampling()
    """filter of prompts; fresh prompts replace those that are left out"""


def policy_terms(choices: ProviderChoices, kl: KL | None = None, entropy: float = 0.0) -> tuple[Term, ...]:
    """The policy sampled, credited and trained; the KL penalty if it is a loss; the entropy bonus if there is one. Both average
    over tokens as the objective does: in GRPO's, eq. 3, the penalty is inside the mean over a completion.

    Raises:
        UsageError: the credit compares completions of a prompt, and there is one per prompt; or the loss is none of a policy,
            or compares pairs, and the credit selects none.
    """
    advantage, loss = _chosen_advantage(choices), chosen_loss(choices)
    _check_fit(Term("actor", "actor", loss, advantage))
    per: Any = loss.aggregate or "token"
    length = loss.length or 0
    terms = (
        Term("actor", "actor", loss, advantage),
        *kl_terms(kl, "actor", "actor", advantage, Reduction(per, length)),
    )
    return (*terms, Term("actor", "actor", EntropyLoss(per, length), advantage, weight=entropy)) if entropy else terms


def chosen_loss(choices: ProviderChoices) -> Loss:
    """The objective, with a constant length of 0 replaced by the longest completion that can be sampled."""
    loss: Any = choices.loss
    if choices.sampling is not None and loss is not None and loss.length == 0:
        loss = replace(loss, length=choices.sampling.max_new_tokens)
    return loss  # type: ignore[no-any-return]


def _chosen_advantage(choices: ProviderChoices) -> Advantage | None:
    """The credit, checked against the number of completions per prompt; None where a loss needs none."""
    advantage = choices.advantage
    least = advantage.min_samples if advantage is not None else 1
    n = choices.sampling.n if choices.sampling is not None else 1
    if n < least:
        raise UsageError(
            f"the advantage ({type(advantage).__name__}) compares the completions of each prompt; set "
            f"{run_option('sampling.n')} to at least {least}, not {n}"
        )
    return advantage


def _check_fit(term: Term) -> None:
    """Check that a policy can be trained with the term's loss on what its advantage leaves."""
    loss = type(term.loss).__qualname__
    strange = sorted(name for name in term.outputs - LANGUAGE if "." not in name)
    if strange:
        raise UsageError(
            f"the loss {loss} needs {strange[0]}, which a policy does not produce; choose a loss on "
            "log-probabilities (rlhf-run plugins --kind loss)"
        )
    selects = term.advantage.selects if term.advantage is not None else ""
    if term.unit > 1 and selects != "pairs":
        raise UsageError(
            f"the loss {loss} compares a chosen with a rejected completion, but the advantage "
            f"{type(term.advantage).__qualname__} selects no pairs; choose {run_option('advantage', 'pairs')}, or a "
            "loss on single completions"
        )
    if term.advantage is not None and "advantages_NT" not in term.needs and not selects:
        raise UsageError(
            f"the loss {loss} does not read advantages, so it would learn good and bad samples alike; choose a "
            f"policy loss, or {run_option('advantage', 'best_of_n')}"
        )
