"""Checks of the kinds that are functions of their input: data, rewards, advantages, losses.

They are called with small batches that have ragged lengths, tokens outside the mask, and equal rewards (see `tiny`).
Core checks shapes and types at its own doors too. The rest is what it trusts providers with: the same answer twice,
finite numbers, inputs left alone, and a loss whose values do not depend on the company in which they are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rlhf_core.contract.batch import Example
from rlhf_core.contract.engines import Stateful, open_provider
from rlhf_core.contract.requirements import resolve, trim
from rlhf_core.contract.results import Credit, LossTerms, Metric, Reduction
from rlhf_core.lazy import torch
from rlhf_core.testing.opening import check_opening, check_state
from rlhf_core.testing.providers import check_provider
from rlhf_core.testing.tiny import tiny_extras, tiny_outputs, tiny_rewards, tiny_rollouts

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.contract.batch import Batch, Rollouts
    from rlhf_core.contract.providers import Advantage, Data, Loss, Reward
    from rlhf_core.contract.results import RewardOutput

__all__ = ["check_advantage", "check_data", "check_loss", "check_reward"]


# ----------------------------------------------------------------------------------------------------------------------
# data
# ----------------------------------------------------------------------------------------------------------------------


def check_data(data: Data, split: str = "train") -> None:
    """Rows are `Example`s with a prompt and at most two completions, there is at least one, and they come again.

    Raises:
        AssertionError: it is not so.
    """
    check_provider(data)
    check_opening(data)
    with open_provider(data) as engine, open_provider(data) as other:
        rows = engine(split)
        first, second = _rows(rows), _rows((other if isinstance(engine, Stateful) else engine)(split))
        _check_rows(data, rows, first, second, split)
    check_state(data, lambda engine: _rows(engine(split), 3), lambda one, other: one == other)


def _check_rows(data: Data, rows: Any, first: list[Example], second: list[Example], split: str) -> None:
    """Check that two engines read the same rows, each of them once."""
    assert first, f"{_name(data)} gave no row of the split {split!r}"
    assert first == second, f"{_name(data)} must give the same rows in the same order each time it is opened"
    if isinstance(rows, Sequence):
        assert len(rows) >= len(first), f"{_name(data)}: len() must be the number of rows"
        assert rows[0] == first[0], f"{_name(data)}: rows[0] must be the first row"
    for i, row in enumerate(first):
        assert isinstance(row, Example), f"{_name(data)}: row {i} is {type(row).__name__}, not an Example"
        assert row.prompt or row.completions, f"{_name(data)}: row {i} has neither a prompt nor a completion"
        assert isinstance(row.completions, tuple), f"{_name(data)}: row {i}: completions is a tuple"
        assert len(row.completions) <= 2, f"{_name(data)}: row {i} has {len(row.completions)} completions, at most 2"
        assert all(isinstance(x, (int, float)) for x in row.fields.values()), (
            f"{_name(data)}: row {i}: fields are numbers"
        )


def _rows(rows: Iterable[Example], most: int = 50) -> list[Example]:
    return [row for row, _ in zip(rows, range(most), strict=False)]


# ----------------------------------------------------------------------------------------------------------------------
# reward
# ----------------------------------------------------------------------------------------------------------------------


def check_reward(reward: Reward, rollouts: Rollouts | None = None) -> RewardOutput:
    """N finite rewards, the same each time and whatever other prompts are in the batch; per-token ones inside the mask.

    Args:
        reward: the provider.
        rollouts: what to score, if it cannot score `tiny_rollouts()` (for example because it needs labels of a certain
            form).

    Raises:
        AssertionError, ContractError: it is not so.
    """
    from rlhf_core.reward.output import to_reward_output

    check_provider(reward)
    check_opening(reward)
    rollouts = tiny_rollouts() if rollouts is None else rollouts

    def score(engine: Any, batch: Rollouts = rollouts) -> RewardOutput:
        return to_reward_output(engine(batch), batch, reward)

    with open_provider(reward) as engine:
        before = _freeze(rollouts)
        output = score(engine)
        assert _freeze(rollouts) == before, f"{_name(reward)} must leave the rollouts as they are"
        _finite(reward, "rewards_N", output.rewards_N)
        if not isinstance(engine, Stateful):
            again = score(engine)
            assert torch.equal(output.rewards_N, again.rewards_N), (
                f"{_name(reward)} must give the same rewards each time"
            )
            _check_company(reward, partial(score, engine), rollouts, output)
    check_state(reward, score, lambda one, other: torch.equal(one.rewards_N, other.rewards_N))
    if output.rewards_NT is not None:
        _finite(reward, "rewards_NT", output.rewards_NT)
        outside = output.rewards_NT[~rollouts.mask_NT]
        assert not outside.any(), f"{_name(reward)}: rewards_NT must be zero outside the mask"
    if output.scores_N is not None:
        inside = (output.scores_N >= 0) & (output.scores_N <= 1)
        assert inside.all(), f"{_name(reward)}: scores_N must be from 0 to 1; put other numbers into metrics"
    return output


def _check_company(
    reward: Reward, score: Callable[[Rollouts], RewardOutput], rollouts: Rollouts, output: RewardOutput
) -> None:
    """The first group alone has the rewards that it has in the batch."""
    first = rollouts.rows([i for i, group in enumerate(rollouts.group_N.tolist()) if group == rollouts.group_N[0]])
    part = score(first).rewards_N
    same = torch.allclose(part, output.rewards_N[: len(part)], atol=1e-4)  # a model's scores differ a little by padding
    assert same, f"{_name(reward)}: the reward of a completion must not depend on other prompts in the batch"


# ----------------------------------------------------------------------------------------------------------------------
# advantage
# ----------------------------------------------------------------------------------------------------------------------


def check_advantage(
    advantage: Advantage, rollouts: Rollouts | None = None, metrics: Mapping[str, Tensor] | None = None
) -> Credit:
    """Finite float32 advantages of the mask's shape, zero outside it, without gradient; for equal rewards too.

    Its `needs` must resolve; it gets plausible values of them. `metrics` are the reward's (N,), for one that reads them.

    Raises:
        AssertionError, ContractError, UsageError: it is not so.
    """
    check_provider(advantage)
    check_opening(advantage)
    given = tiny_rollouts() if rollouts is None else rollouts
    batch = given.with_extras(**tiny_extras(_needs(advantage), given))

    def assign(engine: Any, equal: bool = False) -> Credit:
        rewards = replace(tiny_rewards(batch, equal=equal), metrics=metrics or {})
        return _credit(advantage, engine, rewards, batch)

    def same(one: Credit, other: Credit) -> bool:
        return torch.equal(one.advantages_NT, other.advantages_NT)

    with open_provider(advantage) as engine:
        credit = assign(engine)
        if not isinstance(engine, Stateful):
            assert same(credit, assign(engine)), f"{_name(advantage)} must give the same advantages each time"
        assign(engine, equal=True)
    check_state(advantage, assign, same)
    return credit


def _credit(advantage: Advantage, engine: Any, rewards: RewardOutput, rollouts: Rollouts) -> Credit:
    before, rewarded = _freeze(rollouts), rewards.rewards_N.clone()
    result = engine(rewards, rollouts, rollouts.extras)
    assert _freeze(rollouts) == before, f"{_name(advantage)} must leave the rollouts as they are"
    assert torch.equal(rewards.rewards_N, rewarded), f"{_name(advantage)} must leave the rewards as they are"
    credit = result if isinstance(result, Credit) else Credit(result)
    for name, values_NT in (("advantages_NT", credit.advantages_NT), ("returns_NT", credit.returns_NT)):
        if values_NT is None:
            continue
        assert isinstance(values_NT, torch.Tensor), f"{_name(advantage)}: {name} must be a tensor"
        shape = tuple(rollouts.mask_NT.shape)
        assert values_NT.shape == shape, f"{_name(advantage)}: {name} has shape {tuple(values_NT.shape)}, not {shape}"
        assert values_NT.dtype == torch.float32, f"{_name(advantage)}: {name} must be float32, not {values_NT.dtype}"
        assert not values_NT.requires_grad, f"{_name(advantage)}: {name} must not carry a gradient"
        _finite(advantage, name, values_NT)
        assert not values_NT[~rollouts.mask_NT].any(), f"{_name(advantage)}: {name} must be zero outside the mask"
    if credit.rows is not None:
        known = set(range(len(rollouts)))
        assert known.issuperset(credit.rows.tolist()), f"{_name(advantage)}: rows must be row numbers of the batch"
    return credit


# ----------------------------------------------------------------------------------------------------------------------
# loss
# ----------------------------------------------------------------------------------------------------------------------


def check_loss(loss: Loss, rollouts: Batch | None = None) -> LossTerms:
    """Values of the shape that the reduction asks for, finite inside the mask, with a gradient to the outputs; and the
    same values for a part of the batch, since core cuts batches as memory allows.

    Its `needs` must resolve; it gets plausible values of them, and outputs that collect gradients.

    Raises:
        AssertionError, UsageError: it is not so.
    """
    check_provider(loss)
    batch = tiny_rollouts() if rollouts is None else rollouts
    batch = batch.with_extras(**tiny_extras(_needs(loss), batch))
    names = loss.outputs
    outputs, before = tiny_outputs(names, batch), _freeze(batch)
    terms = loss(outputs, batch)
    assert _freeze(batch) == before, f"{_name(loss)} must leave the batch as it is"
    inside = _check_terms(loss, terms, batch)
    _finite(loss, "the loss inside the mask", inside)
    grads = torch.autograd.grad(inside.sum(), list(outputs.values()), allow_unused=True)
    assert any(grad is not None for grad in grads), (
        f"{_name(loss)} must be differentiable in its outputs {sorted(names)}"
    )
    for name, grad in zip(outputs, grads, strict=True):
        if grad is not None:
            _finite(loss, f"the gradient with respect to {name}", grad)
    _check_parts(loss, terms, outputs, batch)
    return terms


def _check_terms(loss: Loss, terms: LossTerms, batch: Batch) -> Tensor:
    """The values that count: those inside the mask, or all if they are per sample."""
    assert isinstance(terms, LossTerms), f"{_name(loss)} must return LossTerms(values, Reduction(...))"
    assert isinstance(terms.reduction, Reduction), f"{_name(loss)}: the reduction must be a Reduction"
    if terms.reduction.per == "constant":
        assert terms.reduction.length > 0, f"{_name(loss)}: the reduction `constant` needs a length"
    per_sample = terms.reduction.per == "sample"
    expected = (len(batch) // loss.rows_per_unit,) if per_sample else tuple(batch.mask_NT.shape)
    shape = tuple(terms.values.shape)
    assert shape == expected, f"{_name(loss)}: values have shape {shape}, but {terms.reduction.per!r} needs {expected}"
    assert terms.values.requires_grad, f"{_name(loss)}: values must be computed from `outputs`, with their gradient"
    for name, metric in terms.metrics.items():
        assert isinstance(metric, Metric), (
            f"{_name(loss)}: metric {name!r} must be a Metric, such as Metric.over(values, mask)"
        )
        assert metric.total.numel() == metric.count.numel() == 1, (
            f"{_name(loss)}: metric {name!r} must hold two scalars"
        )
    return terms.values if per_sample else terms.values[batch.mask_NT]


def _check_parts(loss: Loss, whole: LossTerms, outputs: dict[str, Tensor], batch: Batch) -> None:
    """The first units of the batch alone have the values that they have in the whole."""
    unit = loss.rows_per_unit
    rows = list(range(unit * max(1, len(batch) // unit // 2)))
    part = batch.rows(rows)
    T = part.tokens_NT.shape[1]
    cut = {name: trim(name, value[rows], T) for name, value in outputs.items()}
    alone = loss(cut, part).values
    if whole.reduction.per == "sample":
        same = torch.allclose(alone, whole.values[: len(rows) // unit], atol=1e-6)
    else:
        same = torch.allclose(alone[part.mask_NT], whole.values[rows, :T][part.mask_NT], atol=1e-6)
    assert same, (
        f"{_name(loss)}: values change when the batch is cut into micro-batches; return one value per token or sample "
        "and let the reduction divide. Coupling of a group's samples belongs into an advantage"
    )


# ----------------------------------------------------------------------------------------------------------------------


def _needs(asker: Any) -> frozenset[str]:
    """Return the needs of the provider. Raises UsageError if one cannot be provided."""
    needs: frozenset[str] = asker.needs
    for name in needs:
        resolve(name, "actor", asker)
    return needs


def _finite(provider: Any, what: str, values: Tensor) -> None:
    assert torch.isfinite(values).all(), f"{_name(provider)}: {what} must be finite; it has nan or inf"


def _freeze(batch: Batch) -> list[Any]:
    """Return a comparable copy of what must not change."""
    tensors = [batch.tokens_NT, batch.mask_NT, batch.lengths_N, *(batch.extras[name] for name in sorted(batch.extras))]
    return [batch.texts.copy(), sorted(batch.extras), *(tensor.tolist() for tensor in tensors)]


def _name(provider: Any) -> str:
    return type(provider).__qualname__
