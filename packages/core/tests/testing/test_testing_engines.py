"""The kit's checks of engines pass core's own and find what is wrong with broken ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from rlhf_core import AdamW, Prompts, Rollouts, Run, Sampling
from rlhf_core.contract.plan import Plan
from rlhf_core.contract.providers import Evaluator
from rlhf_core.contract.roles import Placement, Role
from rlhf_core.evaluator.heldout import Heldout
from rlhf_core.launcher.local import Local
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing import check_evaluator, check_launcher, check_rollout


def test_cores_own_engines_keep_the_contract() -> None:
    check_rollout(HuggingFaceRollout())
    check_launcher(Local())
    check_evaluator(Heldout(prompts=4))


# ----------------------------------------------------------------------------------------------------------------------
# rollout
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deaf(HuggingFaceRollout):
    """Does not listen to the seed."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        return super().__call__(role, prompts, replace(sampling, seed=0))


@dataclass(frozen=True)
class Crowded(HuggingFaceRollout):
    """Seeds a completion by its place in the batch."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        return super().__call__(role, replace(prompts, uids=list(range(len(prompts)))), sampling)


@dataclass(frozen=True)
class Hot(HuggingFaceRollout):
    """Samples at another temperature than asked."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        return super().__call__(role, prompts, replace(sampling, temperature=3.0))


@dataclass(frozen=True)
class Stingy(HuggingFaceRollout):
    """Gives one completion per prompt."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        return super().__call__(role, prompts, replace(sampling, n=1))


@dataclass(frozen=True)
class Chatty(HuggingFaceRollout):
    """Does not stop in time."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        return super().__call__(role, prompts, replace(sampling, max_new_tokens=20))


@dataclass(frozen=True)
class Everywhere(HuggingFaceRollout):
    """Marks padding as sampled."""

    def __call__(self, role: Role, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rollouts = super().__call__(role, prompts, sampling)
        wider = [torch.nn.functional.pad(t, (0, 1)) for t in (rollouts.tokens_NT, rollouts["sampler_logprobs_NT"])]
        everywhere_NT = torch.ones(wider[0].shape, dtype=torch.bool)
        rollouts = replace(rollouts, tokens_NT=wider[0], mask_NT=everywhere_NT)
        return rollouts.with_extras(sampler_logprobs_NT=wider[1])


@pytest.mark.parametrize(
    ("rollout", "clause"),
    [
        (Deaf(), "other tokens for another seed"),
        (Crowded(), "whatever else is in the batch"),
        (Hot(), "sampler_logprobs_NT differ from the role's"),
        (Stingy(), "gave 3 completions for 3 prompts and n=3"),
        (Chatty(), "more than max_new_tokens"),
        (Everywhere(), "false after the end|more than max_new_tokens"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_rollout_that_breaks_a_rule_is_told_which(rollout: HuggingFaceRollout, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_rollout(rollout)


# ----------------------------------------------------------------------------------------------------------------------
# launcher, evaluator
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Absent(Local):
    """Places nobody."""

    def __call__(self, plan: Plan) -> Placement:
        return replace(super().__call__(plan), roles={})


@dataclass(frozen=True)
class Otherwise(Local):
    """Trains with another learning rate than asked."""

    def __call__(self, plan: Plan) -> Placement:
        actor = plan.roles["actor"]
        faster = replace(actor, options=replace(actor.options, optim=AdamW(lr=0.1)))
        return super().__call__(replace(plan, roles={"actor": faster}))


@pytest.mark.parametrize(
    ("launcher", "clause"),
    [(Absent(), "exactly the roles"), (Otherwise(), "after training actor")],
    ids=["no", "other"],
)
def test_a_launcher_that_breaks_a_rule_is_told_which(launcher: Local, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_launcher(launcher)


@dataclass(frozen=True)
class Measured(Evaluator):
    """Measures what it is told to."""

    value: float | str = 1.0
    """the measurement"""
    spoil: bool = False
    """change the policy meanwhile"""

    def __call__(self, run: Run) -> Mapping[str, Any]:
        if self.spoil:
            with torch.no_grad():
                next(run.roles["actor"].module.parameters()).add_(1.0)
        return {"value": self.value}


@pytest.mark.parametrize(
    ("evaluator", "clause"),
    [
        (Measured(float("inf")), "is inf"),
        (Measured("good"), "must be a float"),
        (Measured(spoil=True), "leave the policy as it is"),
    ],
    ids=["inf", "text", "spoil"],
)
def test_an_evaluator_that_breaks_a_rule_is_told_which(evaluator: Measured, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_evaluator(evaluator)
