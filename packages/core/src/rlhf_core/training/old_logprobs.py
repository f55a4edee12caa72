"""Old log-probabilities: log pi_old of the sampled tokens, the denominator of every importance ratio. One rule, stated here.

pi_old is the policy that sampled. Each token takes its log-probability from the first of these that applies:

1. The engine's own, if the engine computes exactly what the trainer computes (`Rollout.exact`). They cost nothing and hold
   however old the sample is.
2. Those of the training pass itself, detached: the ratio is exactly 1. It applies if the present weights sampled the token
   and all before it (their version is the role's), the batch gets one optimizer step, and nothing reads the values before that.
3. Those that the role computes before its update, if the present weights sampled the token and all before it.
4. The engine's, if older weights sampled the token or one before it: the current weights cannot compute what those computed.

Where a run samples ahead and its losses correct for that (`Plan.proximal`), pi_old is the policy that begins to train, for
every token: rules 2 and 3 apply to late tokens too, rules 1 and 4 to none. The losses' importance weights, old over sampler
probabilities, then stand for the distance between the two.

A batch counts as on-policy by its versions (`versions_NT`), never from options. Rows of data have no version: no
policy sampled them, and the present weights count as their sampler.

    iteration   keep_exact     rule 1, when completions arrive
    credit      is_live        rules 2 and 3, before needs are computed
    credit      replace_late   rule 4, after they are
    optimizer   with_live      rule 2, inside the training pass
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_core.contract.batch import Batch, Rollouts
from rlhf_core.contract.plan import CreditSpec, Plan
from rlhf_core.errors import ContractError
from rlhf_core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.distributed import World
    from rlhf_core.contract.providers import Rollout

__all__ = [
    "FULL_OLD",
    "OLD",
    "OLDS",
    "VERSIONS",
    "ages_of",
    "current_mask",
    "full_old_logprobs",
    "is_live",
    "keep_exact",
    "late_tokens",
    "oldest_age",
    "replace_late",
    "sample_ages",
    "with_live",
]

OLD = "old_logprobs_NT"
FULL_OLD = "old_full_logprobs_NT"
OLDS = (OLD, FULL_OLD)
SAMPLER = "sampler_logprobs_NT"
LOG_MASS = "sampler_log_mass_NT"
VERSIONS = "versions_NT"


def current_mask(batch: Batch, version: int) -> Tensor:
    """Return where the weights of `version` sampled a token and all before it: bool (N, T), true everywhere for rows of data.

    Tokens after an update in the middle of a call are not current: they were sampled over keys and values of older weights.
    """
    if VERSIONS not in batch:
        return torch.ones_like(batch.mask_NT)
    late_NT = (batch[VERSIONS] != version) & batch.mask_NT
    return (late_NT.cumsum(1) == 0) | ~batch.mask_NT


def late_tokens(batch: Batch, version: int, world: World) -> float:
    """Return the number of tokens, on all ranks, that other weights than those of `version` sampled, or one before them."""
    return world.total(float((~current_mask(batch, version)).sum()))


def keep_exact(rollouts: Rollouts, engine: Rollout, temperature: float, dtype: str) -> Rollouts:
    """Return `rollouts` with the engine's log-probabilities as the old ones, if they are what the trainer computes.

    A narrow dtype rounds token by token otherwise than in one pass, at temperature 0 the engine reports another distribution
    than it sampled, and truncated sampling reports probabilities over the kept tokens only, which the trainer takes too if it
    replays the kept sets.
    """
    if not (engine.exact and temperature > 0 and dtype == "float32"):
        return rollouts
    if LOG_MASS in rollouts:
        full = rollouts.with_extras(**{FULL_OLD: rollouts[SAMPLER] + rollouts[LOG_MASS]})
        return full.with_extras(**{OLD: rollouts[SAMPLER]}) if rollouts.kept_sets else full
    return rollouts if "kept_mass" in rollouts.scalars else rollouts.with_extras(**{OLD: rollouts[SAMPLER]})


def full_old_logprobs(batch: Batch) -> Tensor | None:
    """Return the policy's log-probabilities over the whole vocabulary, of the weights that sampled (N, T); None where the
    trainer has not computed them."""
    if FULL_OLD in batch:
        return batch[FULL_OLD]
    return None if batch.kept_sets else batch.extras.get(OLD)


def is_live(plan: Plan, credit: CreditSpec, name: str, late: float) -> bool:
    """Return True if the training pass itself gives the need `name` of `credit`, and nothing reads it before.

    Args:
        plan: the run.
        credit: what asks for it.
        name: of the need.
        late: tokens of the batch, on all ranks, that other weights sampled (`late_tokens`).
    """
    in_reward = plan.kl is not None and plan.kl.where == "reward"
    read_before = credit.advantage is not None and name in credit.advantage.needs
    current = plan.proximal or not late
    return name in OLDS and plan.single_update and current and not in_reward and not read_before


def replace_late(batch: Batch, computed_NT: Tensor, version: int, full: bool = False) -> Tensor:
    """Return old log-probabilities (N, T): `computed_NT` of the present weights, and the engine's where others sampled.

    Those over the `full` vocabulary stay the present weights' if the engine does not report the kept probability.

    Raises:
        ContractError: other weights sampled, and the engine gave no log-probabilities.
    """
    current_NT = current_mask(batch, version)
    if bool(current_NT.all()):
        return computed_NT
    if SAMPLER not in batch:
        raise ContractError(f"late completions need {SAMPLER}, which the rollout engine did not return")
    if not full:
        return torch.where(current_NT, computed_NT, batch[SAMPLER])
    return torch.where(current_NT, computed_NT, batch[SAMPLER] + batch[LOG_MASS]) if LOG_MASS in batch else computed_NT


def with_live(micro: Batch, logprobs_NT: Tensor, version: int, proximal: bool = False) -> Batch:
    """Return a micro-batch whose old log-probabilities are those of the training pass where its weights sampled.

    Args:
        micro: rows in training, with old log-probabilities if any of them is late.
        logprobs_NT: of the training pass; the result has no gradient.
        version: of the weights in training.
        proximal: take them for all tokens (`Plan.proximal`).
    """
    live_NT = logprobs_NT.detach()
    if proximal:
        return micro.with_extras(**{OLD: live_NT})
    current_NT = current_mask(micro, version)
    return micro.with_extras(
        **{OLD: live_NT if bool(current_NT.all()) else torch.where(current_NT, live_NT, micro[OLD])}
    )


def ages_of(batch: Batch, version: int) -> tuple[float, float, float]:
    """Return the number of a rank's sampled tokens, and the sum and maximum of their ages, in optimizer steps.

    It is the age when the batch is trained on: `version` is that of the weights that the next update changes.
    """
    ages = version - batch[VERSIONS][batch.mask_NT]
    return float(len(ages)), float(ages.sum()), float(ages.max()) if len(ages) else 0.0


def oldest_age(batch: Batch, version: int) -> float:
    """Return the age of the oldest sampled token of this rank, in optimizer updates; 0 for rows of data."""
    return ages_of(batch, version)[2] if VERSIONS in batch else 0.0


def sample_ages(batch: Batch, version: int) -> tuple[Tensor, Tensor]:
    """Return the age of the oldest and of the newest sampled token of each completion (N,) that has one, in updates."""
    some_N = batch.mask_NT.any(1)
    ages_NT, mask_NT = (version - batch[VERSIONS])[some_N].double(), batch.mask_NT[some_N]
    return (
        ages_NT.masked_fill(~mask_NT, -torch.inf).amax(1),
        ages_NT.masked_fill(~mask_NT, torch.inf).amin(1),
    )
