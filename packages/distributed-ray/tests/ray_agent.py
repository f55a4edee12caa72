"""An agent that drives its episodes: it asks for more while a turn begins with an even token."""

from __future__ import annotations

import json
import urllib.request


def play(base_url: str, api_key: str, prompt: str) -> dict[str, list[float]]:
    """Return a reward of 1 for each turn that begins with an even token; the first other turn ends the episode."""
    ids, rewards = list(prompt.encode()), list[float]()
    while len(rewards) < 4 and sum(rewards) == len(rewards):
        body = json.dumps({"prompt": ids, "max_tokens": 3, "return_token_ids": True}).encode()
        headers = {"Authorization": f"Bearer {api_key}"}
        request = urllib.request.Request(f"{base_url}/completions", body, headers)
        turn = json.load(urllib.request.urlopen(request, timeout=300))["choices"][0]["token_ids"]
        rewards.append(float(turn[0] % 2 == 0))
        ids += [*turn, *b" more"]
    return {"turn_rewards": rewards}
