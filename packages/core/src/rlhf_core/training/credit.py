"""Needs and credit: from sampled or read batches to what the losses train on.

Each credit, a (source, advantage), is computed once a step on whole groups, before anything is cut into micro-batches.
Its needs are computed by the roles that provide them, once per source, and only if it is not already at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rlhf_core.contract.batch import Batch, Example
from rlhf_core.contract.distributed import World
from rlhf_core.contract.plan import CREDIT, DATA, CreditSpec, Plan
from rlhf_core.contract.providers import Advantage
from rlhf_core.contract.results import Credit, Metric, RewardOutput
from rlhf_core.contract.roles import Role
from rlhf_core.contract.staleness import largest_age
from rlhf_core.contract.terms import PAIRS_ADVICE, Term
from rlhf_core.errors import ContractError, UsageError, run_option
from rlhf_core.lazy import torch
from rlhf_core.training.kl import kl_values
from rlhf_core.training.loss_checks import check_metric
from rlhf_core.training.old_logprobs import (
    FULL_OLD,
    OLDS,
    VERSIONS,
    full_old_logprobs,
    is_live,
    late_tokens,
    replace_late,
)

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")

STALE = "stale_NT"
"""1 at tokens that are too old to be trained on, where they are masked (`Staleness.policy`)."""

__all__ = ["STALE", "assign_credit", "check_rows", "compute_needs", "prepare_rows"]


class Together(Protocol):
    """Makes independent calls to roles, by role, and returns their results: `Placement.together`."""

    def __call__(self, calls: Mapping[str, Callable[[], T]], /) -> dict[str, T]: ...


def in_turn(calls: Mapping[str, Callable[[], T]], /) -> dict[str, T]:
    """Make calls one after the other."""
    return {name: call() for name, call in calls.items()}


def check_rows(plan: Plan, rows: Iterable[Example]) -> None:
    """Check that the first row of data has the completions that losses on data compare; of a stream, none is read yet.

    Raises:
        UsageError: it has not. So the error comes before models are loaded; later rows are checked in their step.
    """
    terms = [term for term in plan.terms if term.source == DATA]
    if not terms or not isinstance(rows, Sequence) or not rows:
        return
    completions = len(rows[0].completions)
    _check_alike(terms, pairs=completions > 1)
    if completions == 1 and any(term.unit > 1 and not _selects_pairs(term) for term in terms):
        raise UsageError(
            f"this loss compares pairs, but the data has prompts without a rejected completion: {PAIRS_ADVICE}"
        )


def _selects_pairs(term: Term) -> bool:
    """Return True if the term's advantage makes the pairs that its loss reads."""
    selects = term.advantage.selects if term.advantage is not None else ""
    return selects == "pairs"


def _check_alike(terms: Sequence[Term], pairs: bool) -> None:
    """Check that rejected completions are not taken for good ones."""
    alike = [term for term in terms if term.unit == 1 and term.advantage is None and "logprobs_NT" in term.outputs]
    if pairs and alike and len(alike) == len(terms):
        raise UsageError(
            f"the data has pairs, but the loss {type(alike[0].loss).__qualname__} does not compare them and would "
            f"learn the rejected completions too; pass {run_option('data.completion_key', 'chosen')} (or the "
            "column's name), or an algorithm for pairs"
        )


def prepare_rows(plan: Plan, batch: Batch) -> Batch:
    """Rows of data with those that credits add to them.

    Raises:
        UsageError: they are pairs, and what is trained would take rejected completions for good ones.
    """
    _check_alike([term for term in plan.terms if term.source == DATA], len(batch.group_N.unique()) < len(batch))
    for spec in plan.credits.values():
        if spec.source == DATA and spec.advantage is not None:
            batch = spec.advantage.prepare(batch)
    return batch


def compute_needs(
    plan: Plan,
    roles: Mapping[str, Role],
    source: str,
    batch: Batch,
    after: str = "",
    trains: bool = True,
    together: Together = in_turn,
) -> Batch:
    """`batch` with every extra that the credits on `source` need and that it does not have yet.

    One forward pass per role gives all outputs asked of it; `together` makes the passes. For old log-probabilities see
    `training.old_logprobs`.

    `trains` is false for an evaluation: no forward pass is kept for training.

    Needs that an update changes before their credit is assigned (`Term.after`) wait for it: they are computed when `after` is
    the role that it waits for. All others are computed before any update, when `after` is empty.
    """
    wanted: dict[tuple[str, str], list[str]] = {}
    credits = [credit for credit in plan.credits.values() if credit.source == source]
    lacking = {need.name for credit in credits for need in credit.needs if need.role} & set(OLDS) - batch.extras.keys()
    sampled = VERSIONS in batch and not after
    live = any(is_live(plan, credit, name, late=0.0) for credit in credits for name in lacking)
    asks = sampled and live and not plan.proximal  # where nothing depends on the sum, ranks do not form it
    late = late_tokens(batch, roles[source].version, batch.world or World()) if asks else 0.0
    for credit, need in ((spec, spec_need) for spec in credits for spec_need in spec.needs):
        waits = need.name not in OLDS and need.role in plan.updated_by(credit.after)
        if (credit.after if waits else "") != after:
            continue
        if need.role and (after or need.name not in batch) and not is_live(plan, credit, need.name, late):
            wanted.setdefault((need.role, need.output), []).append(need.name)
        elif not need.role and need.name not in batch and not _is_earned(need.name):
            raise UsageError(
                f"{need.name!r} is needed, but the data has no numeric column {need.name.removesuffix('_N')!r}"
            )
    calls: dict[str, Callable[[], dict[str, Tensor]]] = {}
    for role in dict.fromkeys(role for role, _ in wanted):
        trained = any((term.role, term.source) == (role, source) for term in plan.terms)
        learns = trains and trained and role not in plan.updated_by(after)  # still to come in this step
        asked = frozenset(output for owner, output in wanted if owner == role)
        calls[role] = partial(roles[role].infer, batch.read_by(role, source), asked, source if learns else "")
    outputs = together(calls)
    extras: dict[str, Tensor] = {}
    for role in calls:
        for (owner, output), names in wanted.items():
            if owner == role:
                extras |= dict.fromkeys(names, outputs[role][output])
    for name in extras.keys() & set(OLDS) if sampled and not plan.proximal else ():
        extras[name] = replace_late(batch, extras[name], roles[source].version, full=name == FULL_OLD)
    if plan.config.stale.policy == "mask" and VERSIONS in batch and not after:
        stale_NT = batch.mask_NT & (roles[source].version - batch[VERSIONS] > largest_age(plan.config))
        extras[STALE] = stale_NT.float()
    return batch.with_extras(**extras)


def _is_earned(name: str) -> bool:
    """Return True if credit itself produces `name`."""
    return name in ("advantages_NT", "returns_NT", "rewards_NT", "scores_N")


def assign_credit(
    plan: Plan,
    spec: CreditSpec,
    batch: Batch,
    rewards: RewardOutput | None,
    kl_coef: float,
    engine: Advantage | None = None,
) -> tuple[Batch, dict[str, Metric]]:
    """Return the batch that the terms of `spec` train on, and this rank's part of the metrics of its credit.

    `engine` is the opened advantage. The KL penalty in the reward is added here, per token and before the advantage:
    r_t = -beta * KL_t (+ the reward's own per-token part). The subtracted penalty is the extra `penalty_NT`.
    """
    batch = replace(batch, step=replace(batch.step, kl_coef=kl_coef))
    if spec.advantage is None:
        return batch, {}
    if rewards is None:  # rows of data, which have no rewards: KTO's credit reads their labels
        rewards = RewardOutput(torch.zeros(len(batch)))
    completions: Any = batch  # rollouts, or rows of data
    rewards_NT = torch.zeros(batch.mask_NT.shape) if rewards.rewards_NT is None else rewards.rewards_NT
    extras = dict(batch.extras)
    penalized = plan.kl is not None and plan.kl.where == "reward" and not spec.advantage.raw_rewards
    if penalized and plan.kl is not None and "ref_logprobs_NT" in batch:
        policy_NT = full_old_logprobs(batch)
        assert policy_NT is not None, "the planner asks for them"
        kl_NT = kl_values(policy_NT, batch["ref_logprobs_NT"], batch.mask_NT, plan.kl.estimator)
        extras["penalty_NT"] = kl_coef * kl_NT
        rewards_NT = rewards_NT - extras["penalty_NT"]
    shaped = replace(rewards, rewards_NT=rewards_NT)
    credit = _check_credit(spec.advantage, (engine or spec.advantage)(shaped, completions, extras), batch)
    earned = {"advantages_NT": credit.advantages_NT}
    if credit.returns_NT is not None:
        earned["returns_NT"] = credit.returns_NT
    batch = batch.with_extras(**earned)
    if STALE in batch:
        batch = _without_stale(batch)
    metrics = {name: each if isinstance(each, Metric) else _as_metric(each) for name, each in credit.metrics.items()}
    if credit.rows is not None:  # a prompt may have none on any rank then
        batch = replace(batch.rows(credit.rows), step=replace(batch.step, uids=()))
    return batch, metrics


def _without_stale(batch: Batch) -> Batch:
    """Return a credited batch whose stale tokens are not sampled ones: no loss counts them, and they earn nothing."""
    fresh_NT = batch[STALE] == 0
    earned = {name: batch[name] * fresh_NT for name in CREDIT if name in batch}
    return replace(batch, mask_NT=batch.mask_NT & fresh_NT).with_extras(**earned)


def _as_metric(number: float) -> Metric:
    """Return a number of this rank, whose mean over ranks is logged."""
    return Metric(torch.tensor(float(number), dtype=torch.float64), torch.tensor(1.0))


def _check_credit(advantage: Advantage, result: Credit | Tensor, batch: Batch) -> Credit:
    """`result` as a `Credit`, if it keeps the contract of an advantage."""
    who = f"advantage {type(advantage).__qualname__} of {type(advantage).__module__}"
    credit = result if isinstance(result, Credit) else Credit(result)
    for name, values in (("advantages_NT", credit.advantages_NT), ("returns_NT", credit.returns_NT)):
        if values is None and name == "returns_NT":
            continue
        if not isinstance(values, torch.Tensor) or values.shape != batch.mask_NT.shape:
            raise ContractError(f"{who}: {name} must be a tensor of shape {tuple(batch.mask_NT.shape)}")
        if values.requires_grad:
            raise ContractError(f"{who}: {name} must not carry a gradient")
        if bool((values[~batch.mask_NT] != 0).any()):
            raise ContractError(f"{who}: {name} must be zero outside the mask")
    for name, metric in credit.metrics.items():
        check_metric(who, name, metric, plain=True)
    if credit.rows is not None:
        _check_rows(who, credit.rows, len(batch))
    return credit


def _check_rows(who: str, rows: object, count: int) -> None:
    """Require the numbers of some of `count` rows."""
    if not isinstance(rows, torch.Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
        raise ContractError(f"{who}: rows must be an int64 tensor of row numbers, of shape (rows,)")
    if bool(((rows < 0) | (rows >= count)).any()):
        raise ContractError(f"{who}: rows has {rows.tolist()[:9]}, but the batch has the rows 0 to {count - 1}")
