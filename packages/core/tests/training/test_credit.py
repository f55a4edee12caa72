"""Needs and credit: computed once, only when not at hand, checked against the contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from thread_ranks import together
from torch import Tensor

from rlhf_core.contract.batch import Batch, Rollouts
from rlhf_core.contract.distributed import World
from rlhf_core.contract.options import KL, ModelOptions, RunConfig, TrainedOptions
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Advantage, Algorithm, Loss
from rlhf_core.contract.results import Credit, LossTerms, Metric, Outputs, Reduction, RewardOutput
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.testing.batches import make_batch
from rlhf_core.training.credit import assign_credit, compute_needs
from rlhf_core.training.planner import make_plan
from rlhf_core.training.step_metrics import Meter

ZERO = torch.zeros(2, 2)
"""Credit of a batch of two rows."""


@dataclass(frozen=True)
class Ratio(Loss):
    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs_NT"})
    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    rows_per_unit: ClassVar[int] = 1

    def __call__(self, outputs: Outputs, batch: Batch) -> LossTerms:
        return LossTerms(outputs["logprobs_NT"], Reduction("token"))


@dataclass(frozen=True)
class PerToken(Advantage):
    """Each token earns its own reward, the final one the completion's as well."""

    result: Any = None
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Credit | Tensor:
        if self.result is not None:
            return self.result(rollouts)  # type: ignore[no-any-return]
        assert rewards.rewards_NT is not None
        last = (torch.arange(rollouts.mask_NT.shape[1]) == rollouts.lengths_N[:, None] - 1).float()
        return (rewards.rewards_NT + rewards.rewards_N[:, None] * last) * rollouts.mask_NT


@dataclass(frozen=True)
class Given(Algorithm):
    terms: tuple[Term, ...]
    kl: KL

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return self.terms


class Spy:
    """A role that answers with a constant and counts its forward passes."""

    version = 0

    def __init__(self, value: float) -> None:
        self.value, self.asked = value, []

    def infer(self, batch: Batch, names: frozenset[str], source: str = "") -> dict[str, Tensor]:
        self.asked.append(sorted(names))
        return {name: torch.full(batch.mask_NT.shape, self.value) * batch.mask_NT for name in names}


def plan_of(advantage: PerToken, kl: KL = KL(coef=0.0), loss: Loss = Ratio(), **options: Any) -> Plan:
    roles = {"actor": TrainedOptions(), "reference": ModelOptions(), "critic": TrainedOptions()}
    terms = (Term("actor", "actor", loss, advantage),)
    return make_plan(RunConfig(Given(terms, kl), {}, {}, roles, model="tiny", **options))


def test_strictly_on_policy_nothing_is_scored_that_training_yields_itself() -> None:
    actor = Spy(-1.0)
    compute_needs(plan_of(PerToken()), {"actor": actor}, "actor", make_batch([2, 1]))  # type: ignore[dict-item]
    assert actor.asked == []


def test_with_several_optimiser_steps_the_old_log_probabilities_are_scored_once() -> None:
    actor = Spy(-1.0)
    batch = compute_needs(plan_of(PerToken(), update_epochs=2), {"actor": actor}, "actor", make_batch([2, 1]))  # type: ignore[dict-item]
    assert actor.asked == [["logprobs_NT"]]
    assert batch["old_logprobs_NT"].tolist() == [[-1.0, -1.0], [-1.0, 0.0]]


def test_what_the_batch_already_has_is_not_computed_again() -> None:
    actor = Spy(-1.0)
    given = make_batch([2, 1]).with_extras(old_logprobs_NT=torch.full((2, 2), -5.0))
    batch = compute_needs(plan_of(PerToken(), update_epochs=2), {"actor": actor}, "actor", given)  # type: ignore[dict-item]
    assert actor.asked == [] and float(batch["old_logprobs_NT"][0, 0]) == -5.0


def test_the_penalty_is_subtracted_from_each_tokens_reward() -> None:
    """r_t = -beta (log pi - log ref), plus the final reward at the end; k1 with pi -1 and ref -3 is 2 a token."""
    plan = plan_of(PerToken(), KL(coef=0.1, estimator="k1", where="reward"))
    roles = {"actor": Spy(-1.0), "reference": Spy(-3.0)}
    batch = compute_needs(plan, roles, "actor", make_batch([2, 1]))  # type: ignore[arg-type]
    rewards = RewardOutput(torch.tensor([1.0, 5.0]))
    credited, _ = assign_credit(plan, plan.credits["actor"], batch, rewards, kl_coef=0.1)
    torch.testing.assert_close(credited["advantages_NT"], torch.tensor([[-0.2, 0.8], [4.8, 0.0]]))


def test_an_advantage_can_tell_the_penalty_from_a_reward_of_tokens() -> None:
    @dataclass(frozen=True)
    class Own(PerToken):
        def __call__(self, rewards: RewardOutput, rollouts: Rollouts, extras: Mapping[str, Tensor]) -> Tensor:
            assert rewards.rewards_NT is not None
            return (rewards.rewards_NT + extras["penalty_NT"]) * rollouts.mask_NT

    plan = plan_of(Own(), KL(coef=0.1, estimator="k1", where="reward"))
    batch = compute_needs(plan, {"actor": Spy(-1.0), "reference": Spy(-3.0)}, "actor", make_batch([2, 1]))  # type: ignore[dict-item]
    given_NT = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    credited, _ = assign_credit(plan, plan.credits["actor"], batch, RewardOutput(torch.zeros(2), given_NT), kl_coef=0.1)
    torch.testing.assert_close(credited["advantages_NT"], given_NT)
    assert "penalty_NT" not in credited


def test_credit_can_choose_and_order_the_rows_to_train_on() -> None:
    def pick(rollouts: Rollouts) -> Credit:
        return Credit(torch.zeros(rollouts.mask_NT.shape), rows=torch.tensor([2, 0]), metrics={"picked": 2.0})

    plan = plan_of(PerToken(pick))
    credited, metrics = assign_credit(
        plan, plan.credits["actor"], make_batch([1, 2, 3]), RewardOutput(torch.zeros(3)), kl_coef=0.0
    )
    assert credited.texts == ["t2", "t0"] and credited.lengths_N.tolist() == [3, 1]
    assert float(metrics["picked"].total) == 2.0 * float(metrics["picked"].count)


def test_metrics_of_credit_are_those_of_all_ranks() -> None:
    """Rewards 1 and 2 here and 6 there have mean 3, not 1.5 and not that of two means; numbers are averaged."""

    def measured(rollouts: Rollouts) -> Credit:
        metrics = {"kept": Metric.over(torch.tensor([1.0, 2.0])), "z": 0.25}
        return Credit(torch.zeros(rollouts.mask_NT.shape), metrics=metrics)

    plan = plan_of(PerToken(measured))

    def rank(world: World) -> dict[str, float]:
        meter = Meter(world)
        rows = make_batch([2, 1])
        _, metrics = assign_credit(plan, plan.credits["actor"], rows, RewardOutput(torch.zeros(2)), kl_coef=0.0)
        here = {"kept": metrics["kept"], "z": metrics["z"]}
        one = torch.tensor(1.0)
        there = {"kept": Metric.over(6 * one), "z": Metric(0.75 * one, one), "theirs": Metric(2 * one, 4 * one)}
        meter.log(there if world.rank else here)
        return meter.take()

    for metrics in together(rank, 2):
        assert metrics == {"kept": 3.0, "z": 0.5, "theirs": 0.5}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda r: torch.zeros(3), r"advantages_NT must be a tensor of shape \(2, 2\)"),
        (lambda r: [0.0, 1.0], r"advantages_NT must be a tensor of shape"),
        (lambda r: torch.zeros(2, 2, requires_grad=True), r"advantages_NT must not carry a gradient"),
        (lambda r: torch.ones(2, 2), r"advantages_NT must be zero outside the mask"),
        (lambda r: Credit(torch.zeros(2, 2), returns_NT=torch.ones(2, 2)), r"returns_NT must be zero outside the mask"),
        (lambda r: Credit(ZERO, metrics={"z": torch.ones(3)}), r"the metric 'z' must be a number, or a Metric of two"),
        (lambda r: Credit(ZERO, metrics={"z": "x"}), r"the metric 'z' must be a number, or a Metric .*, not 'x'$"),
        (lambda r: Credit(ZERO, metrics={"z": Metric(torch.ones(2), torch.ones(1))}), r"the metric 'z' must be"),
        (lambda r: Credit(ZERO, rows=torch.tensor([0, 2])), r"rows has \[0, 2\], but the batch has the rows 0 to 1$"),
        (lambda r: Credit(ZERO, rows=torch.tensor([-1])), r"rows has \[-1\], but the batch has the rows 0 to 1$"),
        (lambda r: Credit(ZERO, rows=torch.tensor([True, False])), r"rows must be an int64 tensor of row numbers"),
    ],
)
def test_an_advantage_that_breaks_the_contract_is_named(result: object, message: str) -> None:
    plan = plan_of(PerToken(result))
    with pytest.raises(ContractError, match=rf"^advantage PerToken of .*: {message}"):
        assign_credit(plan, plan.credits["actor"], make_batch([2, 1]), RewardOutput(torch.zeros(2)), kl_coef=0.0)


def test_a_number_the_data_does_not_have_is_named() -> None:
    @dataclass(frozen=True)
    class Margin(Ratio):
        needs: ClassVar[frozenset[str]] = frozenset({"margin_N"})

    plan = plan_of(PerToken(), loss=Margin())
    with pytest.raises(UsageError, match=r"'margin_N' is needed, but the data has no numeric column 'margin'"):
        compute_needs(plan, {}, "actor", make_batch([2, 1]))


def test_batches_join_and_split_without_mixing_rows() -> None:
    first = make_batch([3, 1], groups=[0, 0]).with_extras(x_NT=torch.ones(2, 3), y_N=torch.tensor([1.0, 2.0]))
    second = replace(make_batch([2]), texts=["other"]).with_extras(x_NT=torch.ones(1, 2), y_N=torch.tensor([3.0]))
    both = Batch.cat([first, second])
    assert both.texts == ["t0", "t1", "other"] and both.group_N.tolist() == [0, 0, 1] and both.finish == ["stop"] * 3
    back = both.rows([2])
    assert torch.equal(back.tokens_NT, second.tokens_NT) and torch.equal(back["x_NT"], second["x_NT"])
    assert back["y_N"].tolist() == [3.0] and back.prompt_NL.tolist() == second.prompt_NL.tolist()
