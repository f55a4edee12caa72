"""Sums with a verifier and retries. The agent asks the policy over HTTP, with nothing but the standard library.

    rlhf-run grpo --environment harness --environment.agent examples/agents/sums.py:play …

The policy reads a sum such as "1+2=" and writes a digit. The verifier computes the sum; after a wrong answer the policy reads
"no" and the sum again.
"""

from __future__ import annotations

import json
import random
import urllib.request

TRIES = 3
DISCOUNT = 0.5
"""Factor on the reward for each further try."""


def ask(base_url: str, api_key: str, text: str) -> str:
    """Return the token that the policy writes after `text`."""
    body = json.dumps({"prompt": text, "max_tokens": 1}).encode()
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{base_url}/completions", body, headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def verify(first: int, second: int, answer: str) -> bool:
    """Return True if the answer is the sum."""
    return answer == str(first + second)


def play(base_url: str, api_key: str, seed: int) -> dict[str, object]:
    """Play one sum; the completions of a prompt get the same one."""
    draw = random.Random(seed)
    first, second = draw.randrange(3), draw.randrange(3)
    question = f"{first}+{second}="
    text, rewards = question, []
    for number in range(TRIES):
        answer = ask(base_url, api_key, text)
        if verify(first, second, answer):
            metrics = {"first": float(number == 0), "right": 1.0}
            return {"reward": DISCOUNT**number, "turn_rewards": rewards, "score": 1.0, "metrics": metrics}
        rewards.append(0.0 if answer.isascii() and answer.isdecimal() else -0.1)
        text += f"{answer}\nno\n{question}"
    return {"turn_rewards": rewards, "score": 0.0, "metrics": {"first": 0.0, "right": 0.0}}
