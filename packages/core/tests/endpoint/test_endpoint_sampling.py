"""Sampling options of requests: log-probabilities of training are those of the distribution that answered the agent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from endpoint_agents import EOS, PLAIN, Echo, chat, encoder, post, rows, run_agent

from rlhf_core.contract.batch import Prompts, Rollouts
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.endpoint.harness import Harness, HarnessEngine
from rlhf_core.rollout.driving import drive
from rlhf_core.rollout.hf import HuggingFaceRollout
from rlhf_core.testing.tiny import tiny_run
from rlhf_core.training.local_role import LocalRole

USER = {"role": "user", "content": "Hi"}
ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [USER]},
    "completions": {"prompt": "Hi"},
    "messages": {"messages": [USER], "max_tokens": 100},
}
OTHERS = [
    ("chat/completions", "temperature", 0.7),
    ("chat/completions", "temperature", 0),
    ("completions", "top_p", 0.9),
    ("messages", "top_k", 5),
    ("messages", "temperature", 0.5),
    ("chat/completions", "presence_penalty", 0.5),
    ("chat/completions", "logit_bias", {"5": 1}),
    ("chat/completions", "response_format", {"type": "json_object"}),
    ("chat/completions", "tool_choice", "required"),
    ("messages", "tool_choice", {"type": "any"}),
    ("completions", "ignore_eos", True),
]


@pytest.mark.parametrize(("route", "name", "value"), OTHERS)
def test_a_request_for_another_distribution_is_refused(route: str, name: str, value: Any, tmp_path: Path) -> None:
    """It is told in one line what differs and what to do, and no turn is sampled."""

    def agent(base_url: str, api_key: str) -> float:
        status, answer = post(base_url, api_key, route, {**ROUTES[route], name: value})
        message = answer["error"]["message"]
        assert (status, message.count("\n")) == (400, 0)
        assert message.startswith(f"the request's {name} is {value!r}")
        assert "environment.request_sampling" in message
        chat(base_url, api_key, [USER])
        return 1.0

    policy = Echo(["ab"])
    assert run_agent(policy, agent, encoder(PLAIN, tmp_path))["turns_N"].tolist() == [1]
    assert len(policy.read) == 1


def test_vllms_route_reads_its_own_options(tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        root, ids = base_url.removesuffix("/v1"), {"token_ids": [*b"Go"]}
        for option in ({"min_p": 0.1}, {"repetition_penalty": 1.1}, {"min_tokens": 3}):
            body = {**ids, "sampling_params": option}
            assert post(root, api_key, "inference/v1/generate", body)[0] == 400, option
        same = {"temperature": 1.0, "top_p": 1, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 3, "n": 1}
        assert post(root, api_key, "inference/v1/generate", {**ids, "sampling_params": same})[0] == 200
        return 1.0

    assert run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path)).tokens_NT.tolist() == [[*b"ab", EOS]]


@pytest.mark.parametrize(("route", "name", "value"), OTHERS)
def test_an_agent_that_cannot_be_changed_is_sampled_as_the_run_says(
    route: str, name: str, value: Any, tmp_path: Path
) -> None:
    asked: list[Sampling] = []

    class Noting(Echo):
        def __call__(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
            asked.append(sampling)
            return super().__call__(prompts, sampling)

    def agent(base_url: str, api_key: str) -> float:
        assert post(base_url, api_key, route, {**ROUTES[route], name: value})[0] == 200
        return 1.0

    run_agent(Noting(["ab"]), agent, encoder(PLAIN, tmp_path), request_sampling="ignore")
    assert [(each.temperature, each.top_p, each.top_k) for each in asked] == [(1.0, 1.0, 0)]


@pytest.mark.parametrize(
    ("route", "options"),
    [
        ("chat/completions", {"max_tokens": 2}),
        ("chat/completions", {"max_completion_tokens": 2, "max_tokens": 3}),
        ("completions", {"max_tokens": 2}),
        ("messages", {"max_tokens": 2}),
    ],
)
def test_a_turn_is_cut_where_the_request_says(route: str, options: dict[str, int], tmp_path: Path) -> None:
    def agent(base_url: str, api_key: str) -> float:
        post(base_url, api_key, route, ROUTES[route] | options)
        return 1.0

    assert run_agent(Echo(["abcd"]), agent, encoder(PLAIN, tmp_path)).tokens_NT.tolist() == [[*b"ab"]]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"n": 2}, "n must be 1"),
    ],
)
def test_what_cannot_be_honored_is_refused_even_if_options_are_ignored(
    option: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def agent(base_url: str, api_key: str) -> float:
        status, answer = post(base_url, api_key, "chat/completions", {"messages": [USER], **option})
        assert (status, message in answer["error"]["message"]) == (400, True), answer
        chat(base_url, api_key, [USER])
        return 1.0

    run_agent(Echo(["ab"]), agent, encoder(PLAIN, tmp_path), request_sampling="ignore")


# ----------------------------------------------------------------------------------------------------------------------
# real sampling
# ----------------------------------------------------------------------------------------------------------------------


def sampled(role: Any, folder: Path, sampling: Sampling, **options: Any) -> Rollouts:
    """Return episodes of two turns for two prompts, whose requests have these options."""

    def agent(base_url: str, api_key: str) -> float:
        for _ in range(2):
            chat(base_url, api_key, [USER], max_tokens=8, **options)
        return 1.0

    engine, limits = HarnessEngine(Harness(agent=agent)), EpisodeLimits()
    with HuggingFaceRollout().session(role) as sample:
        return drive(sample, engine, rows("One?", "Two?"), sampling, limits, encoder(PLAIN, folder))


@pytest.fixture(scope="module")
def role() -> Any:
    return LocalRole(tiny_run("unused").plan, "actor")


def test_the_trainer_agrees_with_turns_whose_options_are_the_runs(tmp_path: Path) -> None:
    """Temperature and top-p are in the log-probabilities of both: a role at temperature 1 disagrees."""
    own: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}
    cool = LocalRole(tiny_run("unused", sampling=own).plan, "actor")
    rollouts = sampled(cool, tmp_path, Sampling(n=2, max_new_tokens=99, seed=3, **own), **own, seed=5)
    mask_NT = rollouts.mask_NT

    def difference(judge: Any) -> float:
        logprobs_NT = judge.infer(rollouts, frozenset({"logprobs_NT"}))["logprobs_NT"]
        return float((rollouts["sampler_logprobs_NT"] - logprobs_NT)[mask_NT].abs().max())

    assert difference(cool) < 1e-5
    warm = LocalRole(tiny_run("unused", sampling={"temperature": 1.0, "top_p": 0.9}).plan, "actor")
    assert difference(warm) > 1e-2


def test_a_seed_varies_a_draw_and_repeats_none(role: Any, tmp_path: Path) -> None:
    """Completions of a prompt, and turns that ask the same, stay independent; the run itself is repeatable."""
    sampling = Sampling(n=2, max_new_tokens=99, seed=3)
    first, again, other, none = (
        sampled(role, tmp_path, sampling, **({} if seed is None else {"seed": seed})) for seed in (5, 5, 6, None)
    )
    assert torch.equal(first.tokens_NT, again.tokens_NT)
    assert not torch.equal(first.tokens_NT, other.tokens_NT)
    assert not torch.equal(first.tokens_NT, none.tokens_NT)
    for rollouts in (first, none):
        turns = [
            text
            for row in rollouts.meta
            for text in (each["text"] for each in row["transcript"] if each["from"] == "policy")
        ]
        assert len(turns) == len(set(turns)) == 8
