"""A game: guess the number, with three tries. The agent asks the policy over HTTP, with nothing but the standard library.

    rlhf-run grpo --environment harness --environment.agent examples/agents/guess.py:play …

The policy reads what was guessed so far and writes a digit. It is told "higher" or "lower".
"""

from __future__ import annotations

import json
import random
import urllib.request

TRIES = 3


def ask(base_url: str, api_key: str, text: str) -> str:
    """Return what the policy writes after `text`; at most two tokens."""
    body = json.dumps({"prompt": text, "max_tokens": 2}).encode()
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{base_url}/completions", body, headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def play(base_url: str, api_key: str, seed: int) -> dict[str, object]:
    """Play one game; the completions of a prompt guess the same number."""
    number = random.Random(seed).randrange(10)
    text, rewards = "Guess a digit: ", []
    for _ in range(TRIES):
        written = ask(base_url, api_key, text)
        guess = int(written[0]) if written[:1].isdecimal() and written.isascii() else None
        if guess == number:
            return {"reward": 1.0, "turn_rewards": rewards, "score": 1.0, "metrics": {"tries": len(rewards) + 1}}
        rewards.append(0.0 if guess is not None else -0.1)
        hint = "no digit" if guess is None else "higher" if guess < number else "lower"
        text += f"{written}\n{hint}: "
    return {"turn_rewards": rewards, "score": 0.0, "metrics": {"tries": TRIES}}
