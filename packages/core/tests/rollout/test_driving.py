"""Episodes that agents drive: against transcripts written by hand, episodes that core drives, and the trainer's numbers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from test_episodes import AFTER_12, ENCODER, EOS, LIMITS, Script, ask

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.driving import EpisodeOver, Outcome, Policy
from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.contract.providers import Environment
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.reward.environment import EnvironmentReward
from rlhf_core.rollout.driving import drive
from rlhf_core.rollout.episodes import play
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.testing.tiny_environment import TinyEnvironment
from rlhf_core.training.local_role import LocalRole

Agent = Callable[[Policy, Example], Awaitable[Any]]


@dataclass(frozen=True)
class Driven(Environment):
    """Lets a function drive."""

    agent: Agent
    closed: list[str] = field(default_factory=list)

    drives = True
    metrics = ("calls",)

    def __call__(self, example: Example, seed: int) -> Session:
        return Driving(self, example)


@dataclass
class Driving(Session):
    environment: Driven
    example: Example

    def drive(self, policy: Policy) -> Awaitable[Outcome]:
        return self.environment.agent(policy, self.example)

    def close(self) -> None:
        self.environment.closed.append(str(self.example.prompt))


def driven(
    sample: Any, agent: Agent, *texts: str, limits: EpisodeLimits = LIMITS, tokens: int = 60, n: int = 1
) -> Rollouts:
    return drive(sample, Driven(agent), ask(*texts), Sampling(n=n, max_new_tokens=tokens, seed=5), limits, ENCODER)


def ids_of(example: Example) -> list[int]:
    return list(str(example.prompt).encode())


async def two_turns(policy: Policy, example: Example) -> Outcome:
    first = await policy.ask(ids_of(example))
    await policy.ask([*ids_of(example), *first.token_ids, *b"12"])
    return Outcome(1.0, turn_rewards=(0.25,), score=0.5, metrics={"calls": 1.0})


SCRIPT = {"ab": [*b"c", EOS], AFTER_12: [*b"d", EOS]}


def test_an_episode_is_the_transcript_written_by_hand() -> None:
    rollouts = driven(Script(SCRIPT), two_turns, "ab")
    assert rollouts.prompt_NL.tolist() == [[*b"ab"]]
    assert rollouts.tokens_NT.tolist() == [[*b"c", EOS, *b"12", *b"d", EOS]]
    assert rollouts.mask_NT.tolist() == [[True, True, False, False, True, True]]
    assert rollouts["turns_NT"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert rollouts["segments_NT"].tolist() == [[0] * 6]
    assert rollouts["environment_rewards_NT"].tolist() == [[0, 0.25, 0, 0, 0, 1.0]]
    expected = torch.tensor([[-0.99, -EOS / 100, 0, 0, -1.0, -EOS / 100]])
    torch.testing.assert_close(rollouts["sampler_logprobs_NT"], expected)
    assert rollouts["versions_NT"].tolist() == [[3, 3, 0, 0, 3, 3]]
    assert (rollouts.texts, rollouts.finish) == (["cd"], ["stop"])
    assert rollouts["turns_N"].tolist() == [2]
    assert rollouts["environment/calls_N"].tolist() == [1.0]
    assert rollouts["environment_scores_N"].tolist() == [0.5]
    assert rollouts.meta[0]["transcript"] == [
        {"from": "policy", "turn": 0, "text": "c"},
        {"from": "environment", "turn": 0, "text": "12"},
        {"from": "policy", "turn": 1, "text": "d"},
    ]


def test_a_prompt_that_is_rewritten_begins_a_segment() -> None:
    """The second ask begins otherwise than the first; the third continues the second."""

    async def forgetful(policy: Policy, example: Example) -> Outcome:
        await policy.ask([*b"ab"])
        second = await policy.ask([*b"zz"])
        await policy.ask([*b"zz", *second.token_ids, *b"!"])
        return Outcome(2.0)

    script = Script({"ab": [*b"c", EOS], "zz": [*b"d"], "zzd!": [*b"e", EOS]})
    rollouts = driven(script, forgetful, "ab")
    assert rollouts.tokens_NT.tolist() == [[*b"c", EOS, *b"zz", *b"d", *b"!", *b"e", EOS]]
    assert rollouts.mask_NT.tolist() == [[True, True, False, False, True, False, True, True]]
    assert rollouts["segments_NT"].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    assert rollouts["turns_NT"].tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]]
    assert rollouts["segments_N"].tolist() == [2]
    assert rollouts["environment_rewards_NT"].tolist() == [[0, 0, 0, 0, 0, 0, 0, 2.0]]


@pytest.mark.parametrize(
    ("limits", "tokens", "finish", "length"),
    [
        (EpisodeLimits(turns=1), 40, "turns", 2),
        (EpisodeLimits(), 4, "length", 2),
        (EpisodeLimits(), 5, "stop", 5),
        (EpisodeLimits(turn_tokens=1), 40, "stop", 5),  # c 12 d, a token each
    ],
)
def test_limits_end_an_episode(limits: EpisodeLimits, tokens: int, finish: str, length: int) -> None:
    script = Script({**SCRIPT, "abc12": [*b"d", EOS]})
    rollouts = driven(script, two_turns, "ab", limits=limits, tokens=tokens)
    length = 4 if limits.turn_tokens else length
    assert (rollouts.finish, int(rollouts.lengths_N)) == ([finish], length)
    assert rollouts["environment_failed_N"].tolist() == [False]
    assert rollouts["environment_rewards_NT"].sum().item() == (1.25 if finish == "stop" else 0.0)


def test_an_agent_may_end_with_a_reward_when_its_limit_is_reached() -> None:
    async def careful(policy: Policy, example: Example) -> Outcome:
        first = await policy.ask(ids_of(example))
        with pytest.raises(EpisodeOver, match="has used all 1 turns"):
            await policy.ask([*ids_of(example), *first.token_ids, *b"12"])
        return Outcome(0.75)

    rollouts = driven(Script(SCRIPT), careful, "ab", limits=EpisodeLimits(turns=1))
    assert (rollouts.finish, rollouts["environment_rewards_NT"].sum().item()) == (["turns"], 0.75)


def test_the_time_of_a_batch_ends_its_episodes() -> None:
    async def slow(policy: Policy, example: Example) -> Outcome:
        await policy.ask(ids_of(example))
        await asyncio.sleep(60 if example.prompt == "ab" else 0)
        return Outcome(1.0)

    script = Script({"ab": [*b"c", EOS], "x": [*b"y", EOS]})
    rollouts = driven(script, slow, "ab", "x", limits=EpisodeLimits(seconds=1.0))
    assert rollouts.finish == ["seconds", "stop"]
    assert rollouts["environment_rewards_NT"].sum(1).tolist() == [0.0, 1.0]


async def breaking(policy: Policy, example: Example) -> Outcome:
    """Fail on `x` after a turn, and on `y` before one."""
    if example.prompt == "y":
        raise KeyError("pear")
    await policy.ask(ids_of(example))
    if example.prompt == "x":
        raise KeyError("apple")
    return Outcome(1.0)


BREAKING = {"ab": [*b"c", EOS], "x": [*b"d", EOS]}


def test_an_exception_ends_its_own_episode_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rollouts = driven(Script(BREAKING), breaking, "ab", "x", "y", limits=EpisodeLimits(failures=0.7))
    assert rollouts.finish == ["stop", "error", "error"]
    assert rollouts.lengths_N.tolist() == [2, 2, 1]
    assert rollouts.mask_NT.sum(1).tolist() == [2, 2, 0]
    assert rollouts.meta[2]["transcript"][-1] == {"from": "environment", "error": "KeyError: 'pear'"}
    assert "'pear'" in caplog.text or "'apple'" in caplog.text
    scored = EnvironmentReward()(rollouts)
    assert scored.answered_N.tolist() == [True, False, False]


def test_more_failures_than_allowed_stop_the_run() -> None:
    with pytest.raises(KeyError) as caught:
        driven(Script(BREAKING), breaking, "ab", "x", "y", limits=EpisodeLimits(failures=0.5))
    notes = " ".join(caught.value.__notes__)
    assert "2 of 3 episodes failed, more than" in notes
    assert "environment Driven" in notes


def test_without_an_allowance_the_first_failure_stops_the_run() -> None:
    with pytest.raises(KeyError, match="apple"):
        driven(Script(BREAKING), breaking, "ab", "x")


def test_an_agent_that_asks_nothing_has_failed() -> None:
    async def idle(policy: Policy, example: Example) -> Outcome:
        return Outcome(1.0)

    with pytest.raises(UsageError, match="ended without asking the policy"):
        driven(Script(BREAKING), idle, "ab")


def test_what_is_no_outcome_breaks_the_contract() -> None:
    async def wrong(policy: Policy, example: Example) -> Any:
        await policy.ask(ids_of(example))
        return 1.0

    with pytest.raises(ContractError, match=r"environment Driven.*returned 1.0, which is not an Outcome"):
        driven(Script(BREAKING), wrong, "ab", limits=EpisodeLimits(failures=1.0))


def test_an_error_of_the_engine_ends_all_agents() -> None:
    def broken(prompts: Prompts, sampling: Sampling) -> Rollouts:
        raise MemoryError("no device")

    environment = Driven(two_turns)
    with pytest.raises(MemoryError, match="no device"):
        drive(broken, environment, ask("ab", "x"), Sampling(n=2), EpisodeLimits(), ENCODER)
    assert sorted(environment.closed) == ["ab", "ab", "x", "x"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rlhf-agents")]


def test_an_ask_that_is_cancelled_leaves_no_trace() -> None:
    """The agent gives up while the engine samples, and asks again: the turn has the same seed and is recorded once."""
    asked: list[int] = []
    sampling = threading.Event()

    def engine(prompts: Prompts, how: Sampling) -> Rollouts:
        asked.extend(prompts.uids)
        if len(asked) == 1:
            assert sampling.wait(60)
        return Script(SCRIPT)(prompts, how)

    async def impatient(policy: Policy, example: Example) -> Outcome:
        task = asyncio.ensure_future(policy.ask(ids_of(example)))
        while not asked:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        sampling.set()
        await policy.ask(ids_of(example))
        return Outcome(1.0)

    rollouts = driven(engine, impatient, "ab")
    assert rollouts.tokens_NT.tolist() == [[*b"c", EOS]]
    assert asked == [10, 10]


def test_no_more_episodes_run_at_once_than_the_limit() -> None:
    running = [0, 0]

    async def counting(policy: Policy, example: Example) -> Outcome:
        running[0] += 1
        running[1] = max(running)
        await policy.ask(ids_of(example))
        await asyncio.sleep(0.01)
        running[0] -= 1
        return Outcome(1.0)

    driven(Script(BREAKING), counting, "ab", "x", limits=EpisodeLimits(at_once=2), n=4)
    assert running == [0, 2]


# ----------------------------------------------------------------------------------------------------------------------
# real sampling
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def role() -> Any:
    return LocalRole(tiny_run("unused").plan, "actor")


async def as_tiny_environment(policy: Policy, example: Example) -> Outcome:
    """Do what `TinyEnvironment` does."""
    ids, rewards = ids_of(example), []
    try:
        while True:
            reply = await policy.ask(ids)
            session: Any = TinyEnvironment()(example, 0)
            feedback: Feedback = session.respond(Action(reply.text, reply.token_ids, reply.finish, reply.turn))
            rewards.append(feedback.reward)
            if feedback.done:
                break
            ids = [*ids, *reply.token_ids, *feedback.text.encode()]
    except EpisodeOver:
        pass
    return Outcome(turn_rewards=rewards)


def test_driven_episodes_equal_those_that_core_drives_bit_for_bit(role: Any) -> None:
    prompts, limits = ask(*(f"Question {i}" + "?" * i for i in range(12))), EpisodeLimits(turns=4, turn_tokens=3)
    sampling = Sampling(n=1, max_new_tokens=30, seed=3)
    with HuggingFaceRollout().session(role) as sample:
        direct = play(sample, TinyEnvironment(), prompts, sampling, limits, ENCODER)
        found = drive(sample, Driven(as_tiny_environment), prompts, sampling, limits, ENCODER)
    assert len(set(direct["turns_N"].tolist())) > 2
    for name in ("tokens_NT", "mask_NT", "lengths_N", "prompt_NL", "group_N"):
        assert torch.equal(getattr(found, name), getattr(direct, name)), name
    for name in ("sampler_logprobs_NT", "versions_NT", "environment_rewards_NT", "turns_NT", "turns_N", "uids_N"):
        assert torch.equal(found[name], direct[name]), name
    assert (found.texts, found.finish) == (direct.texts, direct.finish)


def test_the_trainer_computes_the_same_log_probabilities_over_segments(role: Any) -> None:
    async def compacting(policy: Policy, example: Example) -> Outcome:
        ids = ids_of(example)
        for turn in range(4):
            reply = await policy.ask(ids)
            ids = [*b"summary", *reply.token_ids] if turn % 2 else [*ids, *reply.token_ids, *b" more"]
        return Outcome(1.0)

    sampling = Sampling(n=3, max_new_tokens=80, seed=3)
    with HuggingFaceRollout().session(role) as sample:
        rollouts = drive(
            sample, Driven(compacting), ask("One?", "Two and more?"), sampling, EpisodeLimits(turn_tokens=5), ENCODER
        )
    assert rollouts["segments_N"].tolist() == [2] * 6
    assert rollouts.group_N.tolist() == [0, 0, 0, 1, 1, 1]
    logprobs_NT = role.infer(rollouts, frozenset({"logprobs_NT"}))["logprobs_NT"]
    mask_NT = rollouts.mask_NT
    torch.testing.assert_close(rollouts["sampler_logprobs_NT"][mask_NT], logprobs_NT[mask_NT], atol=1e-5, rtol=0)
    again = replace(rollouts, extras={**rollouts.extras})
    del again.extras["segments_NT"]
    other_NT = role.infer(again, frozenset({"logprobs_NT"}))["logprobs_NT"]
    assert float((other_NT - logprobs_NT)[mask_NT].abs().max()) > 1e-3  # in one context they would be others
