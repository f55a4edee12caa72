"""Episodes of an endpoint equal those that the environment drives itself, and train a policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_agents import PLAIN, chat, encoder, post, rows

from rlhf_core.contract.batch import Example
from rlhf_core.contract.episode import Action, Feedback, Session
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.contract.providers import Environment
from rlhf_core.endpoint.harness import Harness, HarnessEngine
from rlhf_core.rollout.driving import drive
from rlhf_core.rollout.episodes import play
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.training.local_role import LocalRole

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def role() -> Any:
    return LocalRole(tiny_run("unused").plan, "actor")


@dataclass(frozen=True)
class Asking(Environment):
    """Answers each turn with a message that counts its letters; the conversation is over after an even number of bytes."""

    messages = True

    def __call__(self, example: Example, seed: int) -> Session:
        return Counting()


class Counting(Session):
    def respond(self, action: Action) -> Feedback:
        done = action.token_ids[0] % 2 == 0
        return Feedback(messages=() if done else (reply_to(action.text),), reward=1.0, done=done)


def reply_to(text: str) -> dict[str, str]:
    return {"role": "user", "content": f"{len(text)} letters"}


def test_trajectories_of_the_endpoint_equal_direct_ones_bit_for_bit(role: Any, tmp_path: Path) -> None:
    """An agent behind HTTP that does what an environment does: ids, masks and log-probabilities are the same."""

    def agent(base_url: str, api_key: str, example: Example) -> dict[str, Any]:
        messages, rewards = [*example.prompt], []
        while True:
            body = {"messages": messages, "return_token_ids": True}
            status, answer = post(base_url, api_key, "chat/completions", body)
            if status != 200:
                return {"turn_rewards": rewards}
            rewards.append(1.0)
            (choice,) = answer["choices"]
            if choice["token_ids"][0] % 2 == 0:
                return {"turn_rewards": rewards}
            messages += [choice["message"], reply_to(choice["message"]["content"])]

    encode = encoder(PLAIN, tmp_path)
    prompts = encode.prompts(rows(*(f"Question {i}" for i in range(16))).examples, range(16))
    sampling, limits = Sampling(n=1, max_new_tokens=90, seed=3), EpisodeLimits(turns=5, turn_tokens=6, gather=60.0)
    with HuggingFaceRollout().session(role) as sample:
        direct = play(sample, Asking(), prompts, sampling, limits, encode)
        found = drive(sample, HarnessEngine(Harness(agent=agent)), prompts, sampling, limits, encode)
    assert len(set(direct["turns_N"].tolist())) > 2
    assert found["segments_N"].tolist() == [1] * 16
    for name in ("prompt_NL", "tokens_NT", "mask_NT", "lengths_N"):
        assert torch.equal(getattr(found, name), getattr(direct, name)), name
    for name in ("sampler_logprobs_NT", "versions_NT", "environment_rewards_NT", "turns_NT", "turns_N"):
        assert torch.equal(found[name], direct[name]), name


def test_the_trainer_agrees_on_contexts_that_a_template_rewrites(role: Any, tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str, example: Example) -> float:
        messages = [*example.prompt]
        for _ in range(3):
            messages += [chat(base_url, api_key, messages, max_tokens=12), USER]
        return 1.0

    rewriting = PLAIN.replace("{{ m.content }}", "{% if loop.index < 3 %}{{ m.content }}{% else %}…{% endif %}")
    prompts = rows("One?", "Two?", "Three?")
    with HuggingFaceRollout().session(role) as sample:
        sampling = Sampling(n=2, max_new_tokens=200, seed=3)
        engine = HarnessEngine(Harness(agent=agent))
        rollouts = drive(sample, engine, prompts, sampling, EpisodeLimits(), encoder(rewriting, tmp_path))
    assert int(rollouts["segments_N"].min()) > 1
    logprobs_NT = role.infer(rollouts, frozenset({"logprobs_NT"}))["logprobs_NT"]
    mask_NT = rollouts.mask_NT
    torch.testing.assert_close(rollouts["sampler_logprobs_NT"][mask_NT], logprobs_NT[mask_NT], atol=1e-5, rtol=0)


def test_a_run_trains_an_agent(tmp_path: Path) -> None:
    """A whole run: the agent is rewarded for turns that begin with an even byte, and these become more frequent."""

    def agent(base_url: str, api_key: str, prompt: str) -> float:
        body = {"prompt": prompt, "max_tokens": 2, "return_token_ids": True}
        _, answer = post(base_url, api_key, "completions", body)
        return float(answer["choices"][0]["token_ids"][0] % 2 == 0)

    run = tiny_run(
        tmp_path / "run",
        model="tiny:hidden=16,layers=1",
        environment=Harness(agent=agent),
        sampling={"n": 8, "max_new_tokens": 8},
        actor={"optim": {"lr": 0.05}},
        steps=10,
        batch_size=4,
    )
    run.train()
    means = [json.loads(line)["reward/mean"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.15
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "harness" in config.lower() or "Harness" in config
