"""Many agents at once, some of which fail, are too slow or go away: no session is lost, and none is mixed up."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from endpoint_agents import EOS, PLAIN, assembled, chat, encoder, leave_early, rows

from rlhf_core.contract.batch import Example, Prompts, Rollouts
from rlhf_core.contract.options import EpisodeLimits, Sampling
from rlhf_core.endpoint.harness import Harness, HarnessEngine
from rlhf_core.rollout.driving import drive

FATES = ("end", "end", "fail", "late", "leave")


class Named:
    """Writes the number that stands in the first message, and some letters; it takes its time."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, prompts: Prompts, sampling: Sampling) -> Rollouts:
        self.calls.append(len(prompts))
        time.sleep(0.002)
        tokens = []
        for ids, uid in zip(prompts.token_ids, prompts.uids, strict=True):
            number = bytes(each for each in ids if each < 256).split(b"#")[1]
            tokens.append([*b"#", *number, *b"#", *b"x" * (uid % 7), EOS])
        return assembled(prompts, tokens)


@pytest.mark.parametrize(
    ("sessions", "seconds", "known"),
    [
        (48, 300.0, ("end", "end", "fail", "leave")),
        pytest.param(256, 45.0, FATES, marks=pytest.mark.slow),  # those that are too late take all their seconds
    ],
)
def test_sessions_at_once_none_lost_none_mixed_up(
    sessions: int, seconds: float, known: tuple[str, ...], tmp_path: Path
) -> None:
    fates: dict[int, tuple[str, int]] = {}
    over = threading.Event()

    def agent(base_url: str, api_key: str, example: Example) -> float:
        (message,) = example.prompt
        number = int(message["content"].split("#")[1])  # type: ignore[index]  # a chat
        draw = random.Random(number)
        fate, turns = draw.choice(known), draw.randint(1, 5)
        fates[number] = (fate, turns)
        messages: list[Any] = [message]
        for _ in range(turns):
            if fate == "leave":
                leave_early(base_url, api_key, message["content"])  # type: ignore[index]  # a chat
            answer = chat(base_url, api_key, messages)
            assert f"#{number}#" in answer["content"], "another session's turn"
            messages += [answer, {"role": "user", "content": "on"}]
        if fate == "fail":
            raise ValueError(f"agent {number}")
        if fate == "late":
            over.wait(120)
        return float(number)

    engine, policy = HarnessEngine(Harness(agent=agent, seconds=seconds)), Named()
    prompts = rows(*(f"I am #{number}#" for number in range(sessions)))
    limits = EpisodeLimits(turns=10, failures=1.0)
    rollouts = drive(policy, engine, prompts, Sampling(n=1, max_new_tokens=4000), limits, encoder(PLAIN, tmp_path))
    over.set()
    assert sorted(fates) == list(range(sessions))
    assert len(rollouts) == sessions
    assert {fate for fate, _ in fates.values()} == set(known)
    finish = {"end": "stop", "leave": "stop", "fail": "error", "late": "seconds"}
    for number in range(sessions):
        fate, turns = fates[number]
        length = int(rollouts.lengths_N[number])
        written = bytes(t for t in rollouts.tokens_NT[number, :length].tolist() if t < 256)
        count = rollouts.texts[number].count(f"#{number}#")  # an answer may be quicker than a client that leaves
        assert turns <= count <= (2 * turns if fate == "leave" else turns), "a turn is missing or doubled"
        assert set(written.replace(b"[u]on[a]", b"").replace(b"x", b"").split(b"#")) <= {b"", str(number).encode()}
        assert rollouts.finish[number] == finish[fate]
        assert int(rollouts["turns_N"][number]) == count
        assert int(rollouts["segments_N"][number]) == 1 or fate == "leave"
        earned = float(rollouts["environment_rewards_NT"][number].sum())
        assert earned == (float(number) if finish[fate] == "stop" else 0.0)
        tokens, mask = rollouts.tokens_NT[number], rollouts.mask_NT[number]
        assert torch_equal(rollouts["sampler_logprobs_NT"][number], -tokens / 100 * mask)
    assert sum(policy.calls) / len(policy.calls) > 4, "turns of several sessions are sampled together"
    assert not engine._endpoints, "the endpoint is closed when no session is left"


def torch_equal(found: Any, expected: Any) -> bool:
    return bool((found - expected).abs().max() < 1e-5)
