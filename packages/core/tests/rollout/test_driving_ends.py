"""Ends of driven episodes: turns in progress when an agent ends, simultaneous turns, and limits that an agent survives."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from test_driving import Driven, driven, ids_of
from test_episodes import ENCODER, EOS, LIMITS, Recorded, Recording, Script, ask, played

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.driving import EpisodeOver, Outcome, Policy
from rlhf_core.contract.episode import Feedback
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.contract.providers import Environment
from rlhf_core.errors import ContractError, UsageError
from rlhf_core.rollout import failures
from rlhf_core.rollout.driving import drive
from rlhf_core.util import event_loop

SCRIPT = {"ab": [*b"c", EOS], "zz": [*b"e", EOS], "x": [*b"y", EOS]}


class Held(Script):
    """An engine whose second call takes until `until` is true."""

    until: Callable[[], bool]
    sampling = False

    def __call__(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        rollouts = super().__call__(prompts, sampling)
        if len(self.asked) == 2:
            self.sampling, deadline = True, time.monotonic() + 60
            while not self.until():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        return rollouts


async def leave(policy: Policy, engine: Held) -> asyncio.Task[Any]:
    """Take a turn, and ask for another one that is still sampled on return."""
    await policy.ask([*b"ab"])
    asking = asyncio.ensure_future(policy.ask([*b"zz"]))
    while not engine.sampling:
        await asyncio.sleep(0.01)
    return asking


def test_the_last_agent_may_end_while_its_turn_is_sampled() -> None:
    engine = Held(SCRIPT)

    async def agent(policy: Policy, example: Example) -> Outcome:
        episode = asyncio.current_task()
        assert episode is not None
        engine.until = episode.done
        await leave(policy, engine)
        return Outcome(1.0)

    rollouts = driven(engine, agent, "ab")
    assert (rollouts.tokens_NT.tolist(), rollouts.finish) == ([[*b"c", EOS]], ["stop"])


def test_a_turn_that_ends_after_its_agent_is_not_recorded() -> None:
    """The reward is of what the agent had seen, while another episode goes on."""
    engine, tasks = Held(SCRIPT), []
    over = threading.Event()
    engine.until = over.is_set

    async def agent(policy: Policy, example: Example) -> Outcome:
        if example.prompt == "ab":
            tasks.append(await leave(policy, engine))
            asyncio.get_running_loop().call_later(0.05, over.set)
            return Outcome(1.0)
        while not (tasks and over.is_set()):
            await asyncio.sleep(0.01)
        with pytest.raises(EpisodeOver, match="the agent has ended"):
            await tasks[0]
        await policy.ask(ids_of(example))
        return Outcome(0.5)

    rollouts = driven(engine, agent, "ab", "x", limits=EpisodeLimits(gather=0.01))
    assert rollouts.texts == ["c", "y"]
    assert rollouts["turns_N"].tolist() == [1, 1]


def test_simultaneous_turns_stay_within_the_tokens_of_an_episode() -> None:
    """Each may have all 12 when it is asked for: the first takes 6, the second reads 2 and is cut to 4."""

    async def agent(policy: Policy, example: Example) -> Outcome:
        replies = await asyncio.gather(policy.ask([*b"ab"]), policy.ask([*b"zz"]))
        assert sorted((len(each.token_ids), each.finish) for each in replies) == [(4, "length"), (6, "stop")]
        return Outcome(1.0)

    rollouts = driven(Script({"ab": [*b"ccccc", EOS], "zz": [*b"eeeee", EOS]}), agent, "ab", tokens=12)
    assert rollouts.lengths_N.tolist() == [12]


async def compact(policy: Policy, example: Example) -> Outcome:
    """Read too much, and continue in a shorter context."""
    first = await policy.ask([*b"ab"])
    with pytest.raises(EpisodeOver, match="no token is left"):
        await policy.ask([*b"ab", *first.token_ids, *b"0" * 60])
    await policy.ask([*b"zz"])
    return Outcome(1.0)


def test_an_agent_that_continues_in_a_shorter_context_was_not_ended_by_the_limit() -> None:
    assert driven(Script(SCRIPT), compact, "ab").finish == ["stop"]


def test_a_metric_that_is_not_declared_breaks_the_contract() -> None:
    """It would be logged nowhere."""

    async def agent(policy: Policy, example: Example) -> Outcome:
        await policy.ask(ids_of(example))
        return Outcome(metrics={"called": 1.0})

    with pytest.raises(ContractError, match=r"returned a metric 'called' that is not in its `metrics`: \('calls',\)"):
        driven(Script(SCRIPT), agent, "ab")


def test_an_exception_long_after_a_limit_is_a_failure() -> None:
    async def agent(policy: Policy, example: Example) -> Outcome:
        await compact(policy, example)
        raise KeyError("apple")

    with pytest.raises(KeyError, match="apple"):
        driven(Script(SCRIPT), agent, "ab")


@dataclass(frozen=True)
class Silent(Environment):
    """An environment whose server never answers for `x`."""

    drives: bool = False

    def __call__(self, example: Example, seed: int) -> Any:
        return asyncio.sleep(600) if example.prompt == "x" else Recording(Recorded({"c": Feedback(done=True)}), example)


def test_a_session_that_is_never_made_ends_with_the_time_of_its_batch() -> None:
    limits = EpisodeLimits(seconds=0.5, failures=0.5)
    begun = time.monotonic()
    assert played(Script(SCRIPT), Silent(), "ab", "x", limits=limits).finish == ["stop", "error"]
    with pytest.raises(
        UsageError, match=r"did not begin the episode within the 0\.5 s of a batch; raise episode.seconds"
    ):
        played(Script(SCRIPT), Silent(), "x", limits=EpisodeLimits(seconds=0.5))
    with pytest.raises(UsageError, match="did not begin the episode within"):
        drive(Script(SCRIPT), Silent(drives=True), ask("x"), Sampling(n=1), EpisodeLimits(seconds=0.5), ENCODER)
    assert time.monotonic() - begun < 500


def test_a_machine_without_another_event_loop_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("too many open files")

    async def agent(policy: Policy, example: Example) -> Outcome:
        raise AssertionError("no event loop runs it")

    found: list[BaseException] = []

    def run() -> None:
        try:
            drive(Script(SCRIPT), Driven(agent), ask("ab"), Sampling(n=1), LIMITS, ENCODER)
        except OSError as error:
            found.append(error)

    monkeypatch.setattr(event_loop._thread, "loop", None)
    monkeypatch.setattr(asyncio, "new_event_loop", broken)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert [str(each) for each in found] == ["too many open files"]


@dataclass(frozen=True)
class Stuck(Environment):
    """Sessions that end well, and whose close never returns."""

    drives: bool = False

    def __call__(self, example: Example, seed: int) -> Any:
        return Unclosed(Recorded({"c": Feedback(1.0, done=True)}), example)


class Unclosed(Recording):
    def close(self) -> Any:
        return asyncio.sleep(600)

    async def drive(self, policy: Policy) -> Outcome:
        await policy.ask([*b"ab"])
        return Outcome(1.0)


@pytest.mark.parametrize("drives", [False, True])
def test_a_session_that_never_closes_is_left(drives: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(failures, "CLOSING_SECONDS", 0.1)
    begun = time.monotonic()
    if drives:
        rollouts = drive(Script(SCRIPT), Stuck(drives=True), ask("ab"), Sampling(n=1), LIMITS, ENCODER)
    else:
        rollouts = played(Script(SCRIPT), Stuck(), "ab")
    assert rollouts.finish == ["stop"]
    assert time.monotonic() - begun < 500
    assert "environment Stuck: sessions not closed within 0.1 s: 1;" in caplog.text
