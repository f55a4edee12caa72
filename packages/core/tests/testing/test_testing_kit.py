"""The authors' test kit lets what keeps the contract pass, and says of everything else which clause is broken."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core import Batch, Credit, Example, LossTerms, Metric, Outputs, Reduction, RewardOutput, Rollouts, Run, Term
from rlhf_core.contract.options import ModelOptions, TrainedOptions
from rlhf_core.contract.providers import Advantage, Algorithm, Data, Loss, Reward
from rlhf_core.contract.terms import ProviderChoices
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.testing import (
    check_advantage,
    check_algorithm,
    check_data,
    check_light,
    check_loss,
    check_provider,
    check_reward,
    tiny_rollouts,
)
from rlhf_core.testing.tiny_algorithm import TinyAdvantage, TinyAlgorithm, TinyLoss


def does(call: Callable[..., Any], **attributes: Any) -> Any:
    """A provider that keeps every general rule and, when called, does `call`."""
    attributes = {"__doc__": "Does what the test says.", "__call__": staticmethod(call), **attributes}
    Does.__call__ = attributes.pop("__call__")  # type: ignore[method-assign]
    for name in ("needs", "outputs", "rows_per_unit", "defaults", "roles"):
        if name in attributes:
            setattr(Does, name, attributes[name])
        elif name in vars(Does):
            delattr(Does, name)
    return Does()


@dataclass(frozen=True)
class Does(Data, Reward, Advantage, Loss, Algorithm):
    """Does what the test says."""

    def __call__(self, *args: Any) -> Any: ...


# ----------------------------------------------------------------------------------------------------------------------
# every provider
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Good:
    """Keeps every rule."""

    limit: int = 3
    """how many"""
    words: tuple[str, ...] = ("a", "b")
    """which"""
    where: str | None = None
    """where"""

    def __call__(self) -> None: ...


@dataclass
class Thawed:
    """Is not frozen."""

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Silent:
    """Has an option that nobody explains."""

    limit: int = 3

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Unwritable:
    """Has an option that no file can hold."""

    how: Any = field(default_factory=object)
    """how"""

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Mistyped:
    """Has an option whose default is not of its type."""

    limit: int = "three"  # type: ignore[assignment]
    """how many"""

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Idle:
    """Cannot be called."""


@dataclass(frozen=True)
class Stateful:
    """Keeps state in a field."""

    state: Any = field(default_factory=lambda: (i for i in ()), metadata={"internal": True})
    """state"""

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class NoDocs:
    def __call__(self) -> None: ...


def test_a_good_provider_passes() -> None:
    check_provider(Good(limit=4, words=(), where="here"))


@pytest.mark.parametrize(
    ("provider", "clause"),
    [
        (object(), "must be a dataclass"),
        (Thawed(), "must be frozen"),
        (NoDocs(), "needs a docstring"),
        (Silent(), "Silent.limit needs a docstring line"),
        (Unwritable(), "cannot be written to config.toml"),
        (Mistyped(), "cannot be written to config.toml and read as int"),
        (Idle(), "must define __call__"),
        (Stateful(), "must pickle"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_provider_that_breaks_a_rule_is_told_which(provider: object, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_provider(provider)


def test_modules_on_the_path_of_help_must_not_import_torch() -> None:
    check_light("rlhf_core", "rlhf_core.testing", "rlhf_core.testing.fixtures")
    with pytest.raises(AssertionError, match="imports torch"):
        check_light("rlhf_core.testing.batches")


# ----------------------------------------------------------------------------------------------------------------------
# data
# ----------------------------------------------------------------------------------------------------------------------

ONCE = iter([Example("a"), Example("b")])
ROWS = [Example("Hello"), Example("Which?", ("this", "that"), fields={"margin": 1.0})]


def test_good_data_passes() -> None:
    check_data(does(lambda split: ROWS))
    check_data(does(lambda split: iter(ROWS)))


@pytest.mark.parametrize(
    ("call", "clause"),
    [
        (lambda split: [], "no row of the split 'train'"),
        (lambda split: ONCE, "same rows in the same order"),
        (lambda split: ["Hello"], "not an Example"),
        (lambda split: [Example("")], "neither a prompt nor a completion"),
        (lambda split: [Example("x", ("1", "2", "3"))], "3 completions, at most 2"),
        (lambda split: [Example("x", fields={"margin": "big"})], "fields are numbers"),
    ],
)
def test_data_that_breaks_a_rule_is_told_which(call: Callable[[str], Iterable[Any]], clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_data(does(call))


# ----------------------------------------------------------------------------------------------------------------------
# reward
# ----------------------------------------------------------------------------------------------------------------------


COUNTER = itertools.count()


def lengths(rollouts: Rollouts) -> list[float]:
    return [float(len(text)) for text in rollouts.texts]


def test_good_rewards_pass_in_every_form() -> None:
    check_reward(does(lengths))
    check_reward(does(lambda rollouts: torch.tensor(lengths(rollouts))))
    output = check_reward(does(lambda rollouts: RewardOutput(torch.tensor(lengths(rollouts)))))
    assert output.rewards_N.tolist() == lengths(tiny_rollouts())


def shuffling(rollouts: Rollouts) -> list[float]:
    rollouts.texts.reverse()
    return lengths(rollouts)


def counting(rollouts: Rollouts) -> list[float]:
    return [float(next(COUNTER)) for _ in rollouts.texts]


@pytest.mark.parametrize(
    ("call", "clause"),
    [
        (lambda r: [1.0], "."),
        (lambda r: [float("nan")] * len(r), "finite|nan"),
        (counting, "same rewards each time"),
        (lambda r: [max(lengths(r)) - len(r)] * len(r), "must not depend on other prompts"),
        (shuffling, "leave the rollouts as they are"),
        (lambda r: RewardOutput(torch.zeros(len(r)), torch.ones(r.mask_NT.shape)), "zero outside the mask"),
        (lambda r: RewardOutput(torch.zeros(len(r)), scores_N=torch.full((len(r),), 2.0)), r"from 0 to 1"),
        (lambda r: RewardOutput(torch.zeros(len(r)), metrics={"x": torch.zeros(1)}), "metric 'x' of shape"),
    ],
)
def test_a_reward_that_breaks_a_rule_is_told_which(call: Callable[[Rollouts], Any], clause: str) -> None:
    with pytest.raises((AssertionError, ContractError), match=clause):
        check_reward(does(call))


# ----------------------------------------------------------------------------------------------------------------------
# advantage
# ----------------------------------------------------------------------------------------------------------------------


def on_mask(values_N: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    return values_N[:, None] * rollouts.mask_NT


def test_a_good_advantage_passes() -> None:
    credit = check_advantage(TinyAdvantage(scale=2.0))
    assert not credit.advantages_NT[~tiny_rollouts().mask_NT].any()


def divided_by_spread(rewards: RewardOutput, rollouts: Rollouts, extras: Any) -> torch.Tensor:
    centered_N = rewards.rewards_N - rewards.rewards_N.mean()
    return on_mask(centered_N / rewards.rewards_N.std(), rollouts)


def spoiling(rewards: RewardOutput, rollouts: Rollouts, extras: Any) -> torch.Tensor:
    return on_mask(rewards.rewards_N.sub_(1.0), rollouts)


@pytest.mark.parametrize(
    ("call", "clause"),
    [
        (lambda r, b, e: r.rewards_N, "has shape"),
        (lambda r, b, e: [1.0], "must be a tensor"),
        (lambda r, b, e: torch.ones(b.mask_NT.shape), "zero outside the mask"),
        (lambda r, b, e: on_mask(r.rewards_N, b).double(), "must be float32"),
        (lambda r, b, e: on_mask(r.rewards_N, b).requires_grad_(), "must not carry a gradient"),
        (lambda r, b, e: on_mask(torch.randn(len(b)), b), "same advantages each time"),
        (divided_by_spread, "advantages_NT must be finite"),
        (spoiling, "leave the rewards as they are"),
        (lambda r, b, e: Credit(on_mask(r.rewards_N, b), torch.ones(b.mask_NT.shape)), "returns_NT must be zero"),
        (lambda r, b, e: Credit(on_mask(r.rewards_N, b), rows=torch.tensor([99])), "row numbers of the batch"),
    ],
)
def test_an_advantage_that_breaks_a_rule_is_told_which(call: Callable[..., Any], clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_advantage(does(call))


def test_an_advantage_gets_what_it_needs_and_nothing_unknown() -> None:
    check_advantage(does(lambda r, b, e: e["values_NT"] * b.mask_NT, needs=frozenset({"values_NT"})))
    with pytest.raises(UsageError, match="nothing provides"):
        check_advantage(does(lambda r, b, e: e["mood_NT"], needs=frozenset({"mood_NT"})))


# ----------------------------------------------------------------------------------------------------------------------
# loss
# ----------------------------------------------------------------------------------------------------------------------


def pairs(outputs: Outputs, batch: Batch) -> LossTerms:
    scores_N = outputs["scores_N"]
    return LossTerms(-torch.nn.functional.logsigmoid(scores_N[::2] - scores_N[1::2]), Reduction("sample"))


def test_good_losses_pass() -> None:
    check_loss(TinyLoss())
    check_loss(does(pairs, outputs=frozenset({"scores_N"}), rows_per_unit=2))


def averaged(outputs: Outputs, batch: Batch) -> LossTerms:
    return LossTerms(outputs["logprobs_NT"] - outputs["logprobs_NT"].mean(), Reduction("token"))


@pytest.mark.parametrize(
    ("call", "clause"),
    [
        (lambda o, b: o["logprobs_NT"].mean(), "must return LossTerms"),
        (lambda o, b: LossTerms(o["logprobs_NT"].mean(), Reduction("token")), "values have shape"),
        (lambda o, b: LossTerms(o["logprobs_NT"], Reduction("sample")), "values have shape"),
        (lambda o, b: LossTerms(o["logprobs_NT"].detach(), Reduction("token")), "with their gradient"),
        (lambda o, b: LossTerms(o["logprobs_NT"].log(), Reduction("token")), "inside the mask must be finite"),
        (lambda o, b: LossTerms((o["logprobs_NT"] * 0).sqrt(), Reduction("token")), "gradient .* must be finite"),
        (lambda o, b: LossTerms(o["logprobs_NT"], Reduction("constant")), "needs a length"),
        (lambda o, b: LossTerms(o["logprobs_NT"], Reduction("token"), {"x": 1.0}), "must be a Metric"),
        (
            lambda o, b: LossTerms(o["logprobs_NT"], Reduction("token"), {"x": Metric(b.mask_NT, b.mask_NT)}),
            "two scalars",
        ),
        (averaged, "cut into micro-batches"),
    ],
)
def test_a_loss_that_breaks_a_rule_is_told_which(call: Callable[..., Any], clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_loss(does(call))


# ----------------------------------------------------------------------------------------------------------------------
# algorithm
# ----------------------------------------------------------------------------------------------------------------------


def test_a_good_algorithm_passes_and_gives_its_plan() -> None:
    plan = check_algorithm(TinyAlgorithm())
    assert plan.online
    assert set(plan.roles) == {"actor"}


class Needy(TinyAdvantage):
    needs: ClassVar[frozenset[str]] = frozenset({"values_NT"})


@pytest.mark.parametrize(
    ("call", "attributes", "clause"),
    [
        (lambda chosen: (), {}, "at least one term|out of range"),
        (
            lambda chosen: (Term("actor", "data", TinyLoss(), TinyAdvantage()),),
            {"defaults": {"teacher": "x"}},
            "which is not a kind",
        ),
        (
            lambda chosen: (Term("actor", "data", TinyLoss(), TinyAdvantage()),),
            {"roles": {"actor": {}}},
            "must be ModelOptions",
        ),
        (
            lambda chosen: (Term("actor", "data", TinyLoss(), TinyAdvantage()),),
            {"roles": {"actor": ModelOptions()}},
            "must be `TrainedOptions`",
        ),
        (lambda chosen: (Term("critic", "data", TinyLoss(), TinyAdvantage()),), {}, "needs a role 'critic'"),
        (lambda chosen: (Term("actor", "actor", TinyLoss(), Needy()),), {}, "needs a role 'critic'"),
    ],
)
def test_an_algorithm_that_breaks_a_rule_is_told_which(
    call: Callable[[ProviderChoices], tuple[Term, ...]], attributes: Mapping[str, Any], clause: str
) -> None:
    attributes = {"defaults": {}, "roles": {"actor": TrainedOptions()}, **attributes}
    with pytest.raises((AssertionError, UsageError), match=clause):
        check_algorithm(does(call, **attributes))


# ----------------------------------------------------------------------------------------------------------------------
# fixtures
# ----------------------------------------------------------------------------------------------------------------------


def test_the_fixtures_are_there_without_an_import(
    empty_registry: Any, registry: Any, tiny_rollouts: Rollouts, tiny_run: Callable[..., Run]
) -> None:
    assert {plugin.distribution for plugin in empty_registry.plugins.values()} == {"rlhf-core"}
    assert registry.plugins.keys() >= empty_registry.plugins.keys()
    assert len(tiny_rollouts) == 8
    assert tiny_run(steps=3).config.steps == 3


def test_tiny_rollouts_have_what_trips_providers(tiny_rollouts: Rollouts) -> None:
    assert "" in tiny_rollouts.texts
    assert "length" in tiny_rollouts.finish
    inside_NT = torch.arange(tiny_rollouts.tokens_NT.shape[1]) < tiny_rollouts.lengths_N[:, None]
    assert (inside_NT & ~tiny_rollouts.mask_NT).any(), "tokens that were not sampled"
    assert len(set(tiny_rollouts.lengths_N.tolist())) > 3, "ragged lengths"
