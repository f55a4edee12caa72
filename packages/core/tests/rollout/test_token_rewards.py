"""Rewards of tokens inside a turn: from environments and agents to the returns that a policy is trained with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_driving import Driven, driven, ids_of
from test_episodes import AFTER_12, ENCODER, EOS, LIMITS, Recorded, Script, ask, played

from rlhf_core.contract.batch import Example, Rollouts
from rlhf_core.contract.driving import Outcome, Policy
from rlhf_core.contract.episode import Feedback
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.endpoint.agents import outcome_of
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.reward.environment import EnvironmentReward
from rlhf_core.rollout.driving import drive
from rlhf_core.rollout.episodes import play

SCRIPT = {"ab": [*b"c", EOS], AFTER_12: [*b"d", EOS], "x": [*b"yz", EOS]}
ENVIRONMENT = Recorded(
    {
        "c": Feedback("12", reward=0.25, token_rewards=(0.5, -1.0)),
        "d": Feedback(reward=1.0, token_rewards=(2.0, 0.125), done=True),
        "yz": Feedback(token_rewards=(1.0, 0.0, -3.0), done=True),
    }
)
CELLS = [[0.5, -0.75, 0, 0, 2.0, 1.125], [1.0, 0, -3.0, 0, 0, 0]]
"""What both episodes earn, token by token: written by hand."""


async def agent(policy: Policy, example: Example) -> Outcome:
    """Do what `ENVIRONMENT` does."""
    first = await policy.ask(ids_of(example))
    if example.prompt == "x":
        return Outcome(token_rewards=[(1.0, 0.0, -3.0)])
    await policy.ask([*ids_of(example), *first.token_ids, *b"12"])
    return Outcome(1.0, turn_rewards=[0.25], token_rewards=[(0.5, -1.0), (2.0, 0.125)])


@pytest.fixture(params=["answered", "driven"])
def rollouts(request: pytest.FixtureRequest) -> Rollouts:
    if request.param == "driven":
        return driven(Script(SCRIPT), agent, "ab", "x")
    return played(Script(SCRIPT), replace(ENVIRONMENT, heard=[], closed=[]), "ab", "x")


def test_rewards_stand_at_their_tokens(rollouts: Rollouts) -> None:
    assert rollouts["environment_rewards_NT"].tolist() == CELLS


@pytest.mark.parametrize(
    ("per", "final", "others"),
    [
        ("episode", [2.875, -2.0], None),
        ("turn", [3.125, -2.0], [[0, -0.25, 0, 0, 0, 0], [0] * 6]),
        ("token", [1.125, -3.0], [[0.5, -0.75, 0, 0, 2.0, 0], [1.0, 0, 0, 0, 0, 0]]),
    ],
)
def test_what_is_added_up(rollouts: Rollouts, per: Any, final: list[float], others: Any) -> None:
    found = EnvironmentReward(per=per)(rollouts)
    assert found.rewards_N.tolist() == final
    assert (found.rewards_NT if found.rewards_NT is None else found.rewards_NT.tolist()) == others
    assert found.total_N.tolist() == [2.875, -2.0]


@pytest.mark.parametrize("per", ["turn", "token"])
def test_returns_are_those_of_a_loop_in_float64(per: Any) -> None:
    """Many random episodes: a return is this token's reward and the discounted return of the next sampled token."""
    pytest.importorskip("rlhf_algos")
    from rlhf_algos.advantage.gae import GAEAdvantage
    from rlhf_algos.advantage.reinforce_pp import ReinforcePPAdvantage

    rollouts = random_episodes(24)
    rewards = EnvironmentReward(per=per)(rollouts)
    values_NT = torch.rand(rollouts.tokens_NT.shape, generator=torch.Generator().manual_seed(1))
    credit = ReinforcePPAdvantage(gamma=0.9, whiten="none")(rewards, rollouts, {})
    advantages = GAEAdvantage(gamma=0.9, lam=0.8, whiten="none")(rewards, rollouts, {"values_NT": values_NT})
    for i in range(len(rollouts)):
        places = [t for t in range(int(rollouts.lengths_N[i])) if rollouts.mask_NT[i, t]]
        earned = [float(rollouts["environment_rewards_NT"][i, t]) for t in places]
        turns = [int(rollouts["turns_NT"][i, t]) for t in places]
        if per == "turn":
            ends = [k for k in range(len(places)) if k + 1 == len(places) or turns[k + 1] != turns[k]]
            earned = [
                sum(e for e, turn in zip(earned, turns, strict=True) if turn == turns[k]) if k in ends else 0.0
                for k in range(len(places))
            ]
        values = [float(values_NT[i, t]) for t in places]
        after, gathered = 0.0, 0.0
        for k in reversed(range(len(places))):
            after = earned[k] + 0.9 * after
            delta = earned[k] + 0.9 * (values[k + 1] if k + 1 < len(values) else 0.0) - values[k]
            gathered = delta + 0.9 * 0.8 * gathered
            assert float(credit.advantages_NT[i, places[k]]) == pytest.approx(after, abs=1e-5)
            assert float(advantages.advantages_NT[i, places[k]]) == pytest.approx(gathered, abs=1e-5)
    assert len({float(each) for each in rollouts["turns_N"]}) > 1


def random_episodes(count: int) -> Rollouts:
    """Return driven episodes of one to three turns with random rewards of episodes, turns and tokens."""

    class Writer(Script):
        def __call__(self, prompts: Any, sampling: Any) -> Rollouts:
            from rlhf_core.rollout.assemble import assemble

            rows = [[97 + uid % 26, *[98] * (uid % 5), EOS] for uid in prompts.uids]
            numbers = {"sampler_logprobs_NT": [[-1.0] * len(row) for row in rows]}
            return assemble(prompts, rows, ["stop"] * len(rows), ENCODER.tokenizer, per_token=numbers)

    async def earning(policy: Policy, example: Example) -> Outcome:
        draw = random.Random(str(example.prompt))
        ids, token_rewards = ids_of(example), []
        for _ in range(draw.randint(1, 3)):
            reply = await policy.ask(ids)
            ids = [*ids, *reply.token_ids, *b"12"]
            token_rewards.append([draw.uniform(-1, 1) for _ in reply.token_ids] if draw.random() < 0.7 else [])
        turn_rewards = [draw.uniform(-1, 1) for _ in token_rewards[1:]]
        return Outcome(draw.uniform(-1, 1), turn_rewards, token_rewards=token_rewards)

    prompts = ask(*(f"row {i}" for i in range(count)))
    return drive(Writer({}), Driven(earning), prompts, Sampling(n=1, max_new_tokens=200, seed=5), LIMITS, ENCODER)


@pytest.mark.parametrize("rewards", [(1.0,), (1.0, 2.0, 3.0)])
def test_too_few_or_too_many_are_refused(rewards: Sequence[float]) -> None:
    answers = {"c": Feedback(token_rewards=rewards, done=True)}
    with pytest.raises(ContractError, match=rf"{len(rewards)} token_rewards for 2 tokens; give one for each"):
        play(Script(SCRIPT), Recorded(answers), ask("ab"), Sampling(n=1, max_new_tokens=40), LIMITS, ENCODER)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [([[1.0]], "1 token_rewards for turn 0, which has 2 tokens"), ([[], [1.0]], "for turn 1, which has 0 tokens")],
)
def test_an_agent_that_miscounts_fails_alone(rewards: Any, message: str) -> None:
    async def miscounting(policy: Policy, example: Example) -> Outcome:
        await policy.ask(ids_of(example))
        return Outcome(token_rewards=rewards if example.prompt == "ab" else [[0.5] * 3])

    rollouts = driven(Script(SCRIPT), miscounting, "ab", "x", limits=EpisodeLimits(failures=0.5))
    assert rollouts.finish == ["error", "stop"]
    assert message in rollouts.meta[0]["transcript"][-1]["error"]
    assert rollouts["environment_rewards_NT"].tolist() == [[0] * 3, [0.5] * 3]


def test_agents_return_them_in_a_mapping() -> None:
    outcome = outcome_of({"reward": 1, "token_rewards": [[0.5, 1], None, []]}, ())
    assert outcome == Outcome(1.0, [], token_rewards=[[0.5, 1.0], [], []])
    for wrong in ({"token_rewards": 3}, {"token_rewards": "12"}, {"turn_rewards": 1.0}, {"token_rewards": [1.0]}):
        with pytest.raises(UsageError, match="which is not a list"):
            outcome_of(wrong, ())
    with pytest.raises(UsageError, match="which is not a finite number"):
        outcome_of({"token_rewards": [[float("nan")]]}, ())
