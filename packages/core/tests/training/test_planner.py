"""Plans: roles, credits and needs follow from terms, never from names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from rlhf_core.contract.options import KL, ModelOptions, RunConfig, Sampling, TrainedOptions
from rlhf_core.contract.providers import Advantage, Algorithm, Loss
from rlhf_core.contract.terms import ProviderChoices, Term
from rlhf_core.errors import UsageError
from rlhf_core.training.planner import make_plan


@dataclass(frozen=True)
class Policy(Loss):
    clip: float = 0.2
    outputs: ClassVar[frozenset[str]] = frozenset({"logprobs_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs_NT", "advantages_NT"})
    rows_per_unit: ClassVar[int] = 1


@dataclass(frozen=True)
class Value(Policy):
    outputs: ClassVar[frozenset[str]] = frozenset({"values_NT"})
    needs: ClassVar[frozenset[str]] = frozenset({"returns_NT"})


@dataclass(frozen=True)
class Gae(Advantage):
    lam: float = 0.95
    needs: ClassVar[frozenset[str]] = frozenset({"values_NT"})


@dataclass(frozen=True)
class Baseline(Advantage):
    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class Two(Algorithm):
    """An algorithm whose terms are given from outside."""

    terms: tuple[Term, ...]
    kl: KL = KL(coef=0.0)

    def __call__(self, choices: ProviderChoices) -> tuple[Term, ...]:
        return self.terms


TRAINED = {"actor": TrainedOptions(), "critic": TrainedOptions(model="other"), "proposal": TrainedOptions()}
ROLES = {**TRAINED, "reference": ModelOptions(), "teacher": ModelOptions()}


def plan_of(*terms: Term, kl: KL = KL(coef=0.0), **options: object):
    config = RunConfig(Two(terms, kl), {}, {"algorithm": "two"}, ROLES, model="tiny", **options)  # type: ignore[arg-type]
    return make_plan(config)


def test_actor_and_critic_share_one_credit_and_the_critic_exists_because_values_are_needed() -> None:
    plan = plan_of(Term("actor", "actor", Policy(), Gae()), Term("critic", "actor", Value(), Gae()))
    assert list(plan.credits) == ["actor"]
    assert plan.trained_roles == ("actor", "critic")
    assert plan.roles["critic"].outputs == {"values_NT"}
    assert plan.roles["critic"].options.model == "other" and plan.roles["actor"].options.model == "tiny"
    assert plan.roles["actor"].sampled and not plan.roles["critic"].sampled
    assert "reference" not in plan.roles


def test_credits_with_other_options_or_another_source_are_apart() -> None:
    plan = plan_of(
        Term("actor", "actor", Policy(), Gae(0.9)),
        Term("actor", "actor", Policy(), Gae(0.8)),
        Term("actor", "proposal", Policy(), Baseline()),
    )
    assert list(plan.credits) == ["actor", "actor#1", "proposal"]
    assert plan.sources == ("actor", "proposal")
    assert not plan.roles["proposal"].trained and plan.roles["proposal"].sampled


def test_old_log_probabilities_are_those_of_the_role_that_sampled() -> None:
    plan = plan_of(Term("actor", "proposal", Policy(), Baseline()))
    (need,) = (n for n in plan.credits["proposal"].needs if n.name == "old_logprobs_NT")
    assert (need.role, need.output) == ("proposal", "logprobs_NT")


@pytest.mark.parametrize(("where", "reference"), [("reward", True), ("loss", False)])
def test_a_penalty_in_the_reward_needs_the_reference(where: str, reference: bool) -> None:
    plan = plan_of(Term("actor", "actor", Policy(), Baseline()), kl=KL(coef=0.1, where=where))  # type: ignore[arg-type]
    assert ("reference" in plan.roles) is reference


def test_no_penalty_means_no_reference_model() -> None:
    plan = plan_of(Term("actor", "actor", Policy(), Baseline()), kl=KL(coef=0.0))
    assert plan.kl is None and "reference" not in plan.roles


def test_any_output_of_any_role_can_be_needed() -> None:
    @dataclass(frozen=True)
    class Imitate(Policy):
        needs: ClassVar[frozenset[str]] = frozenset({"teacher.logprobs_NT"})

    plan = plan_of(Term("actor", "data", Imitate()))
    assert plan.roles["teacher"].outputs == {"logprobs_NT"} and not plan.online


def test_a_need_that_nothing_provides_is_named_with_its_asker() -> None:
    @dataclass(frozen=True)
    class Odd(Policy):
        needs: ClassVar[frozenset[str]] = frozenset({"colour"})

    with pytest.raises(UsageError, match=r"^Odd needs 'colour', which nothing provides; the known names are "):
        plan_of(Term("actor", "actor", Odd(), Baseline()))


def test_a_role_without_options_is_named() -> None:
    with pytest.raises(UsageError, match=r"the algorithm Two needs a role 'judge', but Two has only actor, critic"):
        plan_of(Term("judge", "actor", Value(), Baseline()))


@pytest.mark.parametrize(
    ("change", "steps", "single_update"), [({}, 100, True), ({"update_epochs": 2, "minibatches": 3}, 600, False)]
)
def test_optimiser_steps_are_counted_over_epochs_and_minibatches(
    change: dict[str, int], steps: int, single_update: bool
) -> None:
    plan = plan_of(Term("actor", "actor", Policy(), Baseline()), **change)
    assert (plan.optimiser_steps("actor"), plan.single_update) == (steps, single_update)


def test_the_seed_of_a_completion_depends_on_run_prompt_and_number_only() -> None:
    sampling = Sampling(seed=3)
    seeds = {sampling.seed_for(uid, k) for uid in range(50) for k in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
    assert replace(sampling, n=9).seed_for(1, 2) == sampling.seed_for(1, 2) != replace(sampling, seed=4).seed_for(1, 2)


@pytest.mark.parametrize(
    ("terms", "kl", "message"),
    [
        ([Term("actor", "data", Policy())], None, r"the algorithm Two returned \[.*; return a tuple of Terms"),
        (None, None, "the algorithm Two returned None; return a tuple of Terms"),
        ((), 0.1, "the algorithm Two has kl = 0.1, but core reads kl as a KL; give it that type, or rename it"),
    ],
)
def test_an_algorithm_that_core_would_misread_is_told_so(terms: object, kl: object, message: str) -> None:
    config = RunConfig(Two(terms, kl), {}, {"algorithm": "two"}, ROLES, model="tiny")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        make_plan(config)


def test_a_model_must_be_given_for_every_role_that_is_needed() -> None:
    terms = (Term("actor", "actor", Policy(), Baseline()),)
    config = RunConfig(Two(terms), {}, {"algorithm": "two"}, ROLES)
    with pytest.raises(UsageError, match="^no model is given: pass model = NAME .*, or model = .tiny. to try$"):
        make_plan(config)
    named = {**ROLES, "actor": replace(ROLES["actor"], model="tiny")}
    assert make_plan(replace(config, roles=named)).roles["actor"].options.model == "tiny"


def test_a_role_that_credit_waits_for_is_updated_alone() -> None:
    """Check that later computations see the earlier roles with new weights, and no others."""
    own = Term("actor", "actor", Policy(), Baseline())
    value, other = Term("critic", "actor", Value(), Gae()), Term("proposal", "actor", Policy(), Baseline())
    assert plan_of(own, value, other).update_waves == (("actor", "critic", "proposal"),)
    assert plan_of(own, replace(value, after="actor"), other).update_waves == (("actor",), ("critic", "proposal"))
    assert plan_of(own, value, replace(other, after="critic")).update_waves == (("actor",), ("critic",), ("proposal",))
