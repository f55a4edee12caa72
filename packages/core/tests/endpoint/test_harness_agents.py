"""Agents of the harness: functions of files, commands, and what they return."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from endpoint_agents import PLAIN, Echo, encoder, rows, run_agent

from rlhf_core.contract.driving import Outcome
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.endpoint.agents import outcome_of
from rlhf_core.endpoint.harness import Harness, HarnessEngine
from rlhf_core.errors import UsageError
from rlhf_core.rollout.driving import drive

COMMAND = """
import json, os, sys, urllib.request
row = json.loads(sys.stdin.read())
body = json.dumps({"messages": row["prompt"]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
answer = json.loads(urllib.request.urlopen(request).read())
print("thinking")
print(json.dumps({"reward": len(answer["choices"][0]["message"]["content"])}))
"""


def test_a_command_is_an_agent_too(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(COMMAND)
    command = f"{sys.executable} {tmp_path / 'agent.py'}"
    engine = HarnessEngine(Harness(command=command))
    rollouts = drive(
        Echo(["abc"]), engine, rows("Hi"), Sampling(n=1, max_new_tokens=99), EpisodeLimits(), encoder(PLAIN, tmp_path)
    )
    assert rollouts["environment_rewards_NT"].sum().item() == 3.0


def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("raise SystemExit('no luck')")
    engine = HarnessEngine(Harness(command=f"{sys.executable} {tmp_path / 'agent.py'}"))
    with pytest.raises(UsageError, match="ended with code 1: no luck"):
        drive(Echo([]), engine, rows("Hi"), Sampling(n=1), EpisodeLimits(), encoder(PLAIN, tmp_path))


def test_a_command_that_fails_without_a_word_is_told(tmp_path: Path) -> None:
    engine = HarnessEngine(Harness(command="false"))
    with pytest.raises(UsageError, match="ended with code 1: it wrote nothing to its standard error"):
        drive(Echo([]), engine, rows("Hi"), Sampling(n=1), EpisodeLimits(), encoder(PLAIN, tmp_path))


def test_a_harness_without_an_agent_is_one_line() -> None:
    with pytest.raises(UsageError, match="needs one agent"):
        Harness().check()
    for agent, fault in (
        ("nowhere.py:play", "there is no such file"),
        (f"{__file__}:nobody", "there is no function 'nobody'"),
    ):
        with pytest.raises(UsageError, match=rf"^agent \S*: {fault}"):
            Harness(agent=agent).check()
    with pytest.raises(UsageError, match="there is no such program"):
        Harness(command="no-such-program-here --x").check()
    Harness(agent=f"{Path(__file__).parent / 'endpoint_agents.py'}:chat").check()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("good", "'good' as reward"),
        (float("nan"), "is not a finite number"),
        ({"prize": 1}, "'prize'"),
        ({"metrics": {"a": 1}}, "'a'"),
    ],
)
def test_what_an_agent_returns_is_checked(raw: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        outcome_of(raw, ("b",))


def test_numbers_and_nothing_are_outcomes() -> None:
    assert outcome_of(True, ()) == Outcome(1.0)
    assert outcome_of(None, ()) == Outcome()


def test_the_game_of_the_examples_is_played(tmp_path: Path) -> None:
    """The number is what Python's generator draws from the seed of the prompt, as the example says."""
    number = random.Random(Sampling(seed=5).seed_for(10, -1)).randrange(10)
    wrong = (number + 1) % 10
    policy = Echo(["?", str(wrong), str(number)])
    agent = f"{Path(__file__).parents[4] / 'examples' / 'agents' / 'guess.py'}:play"
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path), log=("tries",))
    assert rollouts["environment_rewards_NT"].sum().item() == pytest.approx(0.9)
    assert rollouts["environment/tries_N"].tolist() == [3.0]
    read = [bytes(each for each in ids if each < 256).decode() for ids in policy.read]
    hint = "higher" if wrong < number else "lower"
    assert read == ["Guess a digit: ", "Guess a digit: ?\nno digit: ", f"Guess a digit: ?\nno digit: {wrong}\n{hint}: "]


def test_the_sums_of_the_examples_are_verified_and_tried_again(tmp_path: Path) -> None:
    """The sum is what Python's generator draws from the seed of the prompt; the second try earns half of the reward."""
    draw = random.Random(Sampling(seed=5).seed_for(10, -1))
    first, second = draw.randrange(3), draw.randrange(3)
    agent = f"{Path(__file__).parents[4] / 'examples' / 'agents' / 'sums.py'}:play"
    policy = Echo(["?", str(first + second)])
    rollouts = run_agent(policy, agent, encoder(PLAIN, tmp_path), log=("first", "right"))
    assert rollouts["environment_rewards_NT"].sum().item() == pytest.approx(0.5 - 0.1)
    assert [rollouts[f"environment/{name}_N"].tolist() for name in ("first", "right")] == [[0.0], [1.0]]
    read = [bytes(each for each in ids if each < 256).decode() for ids in policy.read]
    question = f"{first}+{second}="
    assert read == [question, f"{question}?\nno\n{question}"]
    wrong = run_agent(Echo(["x"] * 3), agent, encoder(PLAIN, tmp_path), log=("first", "right"))
    assert wrong["environment_scores_N"].tolist() == [0.0]
    assert wrong["environment_rewards_NT"].sum().item() == pytest.approx(-0.3)
